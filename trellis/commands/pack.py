"""`trellis pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from trellis.commands.console import failed, progress_bars
from trellis.data.packing import unpack_shards, write_shards
from trellis.data.shards import KINDS


@dataclass(frozen=True)
class Request:
    """The options of `trellis pack`, unchecked."""

    source: Path
    output: Path
    objects: int
    include: tuple[str, ...]
    unpack: bool
    verbose: bool


def run(request: Request) -> int:
    """Pack or unpack; 1 after an error, and where a damaged shard was not unpacked to its end."""
    console, errors = Console(), Console(stderr=True)
    where = escape(str(request.output))
    try:
        if request.unpack:
            shards = unpack_shards(request.source, request.output)
            console.print(f"{where} [dim]{len(shards.rows)} objects of {len(shards.files)} shards[/]")
            return 1 if shards.damaged else 0
        with progress_bars(console) as bars:
            bar = bars.add_task("shards", total=None)
            packed = write_shards(
                request.source,
                request.output,
                request.objects,
                request.include or KINDS,
                lambda done, total: bars.update(bar, completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        return failed(errors, str(request.source), error, request.verbose)
    console.print(f"{where} [dim]{packed.objects} objects in {packed.shards} shards, {packed.written} written[/]")
    return 0
