"""`trellis prepare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trellis.commands.console import failed, progress_bars
from trellis.preparation.attribution import write_attribution
from trellis.preparation.job import Settings, step_function
from trellis.preparation.metadata import done, read_metadata, write_metadata
from trellis.preparation.runner import Summary, prepare
from trellis.preparation.sources import find_objects, furniture, with_variants

FILTERS = {"all": lambda row: True, "furniture": furniture}


@dataclass(frozen=True)
class Request:
    """The options of `trellis prepare`, unchecked."""

    source: str | None
    data: Path
    steps: tuple[str, ...]
    options: dict[str, Any]  # arguments of Settings; the elevation as text
    choose: str
    jobs: int
    rank: int
    world_size: int
    limit: int | None
    ray: str | None
    verbose: bool


def run(request: Request) -> int:
    """Find the objects, then do the steps; 0 unless the run itself failed or no object succeeded."""
    console, errors = Console(), Console(stderr=True)
    try:
        if request.choose not in FILTERS:
            raise ValueError(f"--filter must be one of {', '.join(FILTERS)}; got {request.choose!r}")
        for step in request.steps:
            step_function(step)
        settings = settings_from(request.options)
        if request.source is not None:
            _register(request, settings, console)
        elif not (request.data / "metadata.csv").exists():
            raise ValueError(f"a source is needed: {request.data} has no metadata.csv yet")
        else:
            resumed(request.data, settings).save(request.data)
        summary = _steps(request, console, request.steps)
    except (ValueError, OSError, ImportError) as error:
        return failed(errors, str(request.data), error, request.verbose)
    if summary.failed:
        console.print(f"{summary.failed} failures: {request.data / 'failures'}")
    console.print(f"{summary.objects} objects, {summary.done} steps done")
    return 1 if summary.failed and not summary.done else 0


def settings_from(options: dict[str, Any]) -> Settings:
    """The settings that the options of the command line say.

    Raises:
        ValueError: one is out of range.
    """
    try:
        low, high = (float(part) for part in options["cond_elevation"].split(","))
    except ValueError as error:
        wanted = "--cond-elevation must be two degrees such as -10,40"
        raise ValueError(f"{wanted}; got {options['cond_elevation']!r}") from error
    return Settings(**options | {"cond_elevation": (low, high)})


def resumed(data: Path, settings: Settings) -> Settings:
    """The settings of the folder; only models can be other ones without a source."""
    old = Settings.load(data)
    blank = Settings()
    models = ("feature_model", "image_encoder", "text_encoder", "structure_encoder", "latent_encoder")
    given = {name: getattr(settings, name) for name in models if getattr(settings, name) != getattr(blank, name)}
    return dataclasses.replace(old, **given)


def _register(request: Request, settings: Settings, console: Console) -> None:
    """Write the objects of the source, and their variants, into metadata.csv; lines that are there stay."""
    root = request.data
    root.mkdir(parents=True, exist_ok=True)
    settings.save(root)
    known = read_metadata(root) if (root / "metadata.csv").exists() else {}
    found = find_objects(str(request.source), root)
    write_metadata(root, ({row["sha256"]: row for row in found} | known).values())
    _steps(request, console, ("inspect",), originals=True)
    choose = FILTERS[request.choose]
    rows = {
        sha: row | {"kept": done(row.get("inspected")) and bool(choose(row))}
        for sha, row in read_metadata(root).items()
        if not int(row.get("variant") or 0)
    }
    kept = [row for row in rows.values() if row["kept"]]
    for row in with_variants(kept, settings.variants, settings.seed):
        rows.setdefault(row["sha256"], _unprepared(row))
    write_metadata(root, (rows | _also(known, rows)).values())
    write_attribution(root, kept)
    console.print(f"{len(found)} objects in {request.source}, {len(kept)} kept, {len(rows) - len(found)} variants")


def _unprepared(row: dict[str, object]) -> dict[str, object]:
    """A variant's line: what its original is, not what was already done with that."""
    stays = {"faces", "vertices", "materials", "textured", "kept", "inspected"}
    of_source = {"sha256", "name", "category", "tags", "creator", "license", "rotation", "variant", "variant_args"}
    of_source |= {"base", "split", "local_path", "captions", "source", "door"}
    return {key: value for key, value in row.items() if key in of_source | stays}


def _also(known: dict[str, dict[str, object]], rows: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Lines of variants as earlier runs left them."""
    return {sha: row for sha, row in known.items() if int(str(row.get("variant") or 0)) or sha not in rows}


def _steps(request: Request, console: Console, steps: tuple[str, ...], originals: bool = False) -> Summary:
    with progress_bars(console) as bars:
        bar = bars.add_task(", ".join(steps), total=None)
        return prepare(
            request.data,
            steps,
            jobs=request.jobs,
            rank=request.rank,
            world_size=request.world_size,
            limit=None if originals else request.limit,
            choose=None if originals else lambda row: done(row.get("kept", True)),
            ray=request.ray,
            progress=lambda through, total: bars.update(bar, completed=through, total=total),
        )
