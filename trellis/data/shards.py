"""Prepared objects in tar files, as WebDataset has them: many objects in few files, each readable by itself.

The files of an object lie one after the other and are called ``<sha256>.<kind>...``:

    <sha>.json                  its line of metadata.csv
    <sha>.voxels.ply            voxels/<sha>.ply
    <sha>.renders.000.png       renders/<sha>/000.png; so too renders_cond
    <sha>.features.<model>.npz  features/<model>/<sha>.npz; so too latents, ss_latents, conditions

The tar files are not compressed, so an object is read by its place in the file: training draws the same samples in the
same order as from the folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trellis.preparation.metadata import Row

logger = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # of an object
FOLDERS = ("renders", "renders_cond")  # <kind>/<sha>/<file>
MODELS = ("features", "latents", "ss_latents", "conditions")  # <kind>/<model>/<sha>.npz
KINDS = ("voxels", *FOLDERS, *MODELS)
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.+@-]{0,200}")  # a file or a model: no path, not hidden
_LARGEST_LINE = 1 << 24  # bytes of a line of metadata


class Span(NamedTuple):
    """Where a file lies."""

    shard: int
    start: int
    size: int


@dataclass(frozen=True)
class Shards:
    """The whole objects of a folder of shards.

    Args:
        folder: where they are.
        files: the shards.
        rows: each object's line of metadata.
        spans: each file of theirs, by its path in a prepared folder.
        damaged: shards that could not be read to their end, and why.
    """

    folder: Path
    files: list[Path]
    rows: dict[str, Row] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)

    def read(self, path: str) -> bytes:
        """A file by its path in a prepared folder.

        Raises:
            FileNotFoundError: there is none.
            OSError: the shard became shorter.
        """
        if path not in self.spans:
            raise FileNotFoundError(f"{self.folder} has no {path}")
        shard, start, size = self.spans[path]
        with self.files[shard].open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"{self.files[shard]} ends inside of {path}")
        return content


class ShardPlace:
    """A file or folder inside of shards, to be read as a path is.

    Args:
        shards: all of them.
        path: in the prepared folder that they hold.
    """

    def __init__(self, shards: Shards, path: str = "") -> None:
        self.shards, self.path = shards, path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        return self.shards.read(self.path)

    def __truediv__(self, name: str, /) -> ShardPlace:
        return ShardPlace(self.shards, f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return f"{self.shards.folder}[{self.path}]"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardPlace) and (self.shards.folder, self.path) == (other.shards.folder, other.path)

    def __hash__(self) -> int:
        return hash((self.shards.folder, self.path))


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob("*.tar"))


def open_shards(folder: Path) -> Shards:
    """Find the objects in the shards of a folder.

    Of a damaged shard the objects before the damage count; it is reported, and so is an object without its line of
    metadata. Of an object that comes twice the first counts.
    """
    shards = Shards(folder, shard_files(folder))
    for number, file in enumerate(shards.files):
        try:
            for sha, row, spans in read_shard(file, number):
                if row is None:
                    logger.warning(
                        "object %s of %s is left out: it has no line of metadata that can be read", sha, file
                    )
                elif sha in shards.rows:
                    logger.warning("object %s of %s is left out: it comes a second time", sha, file)
                else:
                    shards.rows[sha] = row
                    shards.spans.update(spans)
        except (ValueError, OSError) as error:
            logger.warning("%s is damaged, only what comes before is used: %s", file, error)
            shards.damaged[file] = str(error)
    return shards


def read_shard(file: Path, number: int = 0) -> Iterator[tuple[str, Row | None, dict[str, Span]]]:
    """The whole objects of one shard: id, line of metadata (None: missing or damaged), and where its files lie.

    Raises:
        ValueError: it is damaged; what was given before is whole.
    """
    sha, row, spans = "", None, dict[str, Span]()
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                mine, _, rest = member.name.partition(".")
                if mine != sha:
                    if sha:
                        yield sha, row, spans
                    sha, row, spans = mine, None, {}
                if not member.isreg() or member.sparse is not None or not ID.fullmatch(sha):
                    raise ValueError(f"{member.name!r} is no file of an object")
                if rest == "json":
                    stream.seek(member.offset_data)
                    row = _row(stream.read(min(member.size, _LARGEST_LINE)), sha)
                elif (path := inner_path(member.name)) is not None:
                    spans[path] = Span(number, member.offset_data, member.size)
            # tarfile takes a damaged header for the end; a real end is a block of zeros.
            stream.seek(tar.offset)
            block = stream.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or any(block):
                raise ValueError(f"no end of the archive at byte {tar.offset} of {os.fstat(stream.fileno()).st_size}")
    except Exception as error:  # tarfile raises many types on damaged files
        raise ValueError(f"{type(error).__name__} {error}") from error
    if sha:
        yield sha, row, spans


def member_name(path: str) -> str:
    """What a file of a prepared folder is called in a shard: ``voxels/<sha>.ply`` is ``<sha>.voxels.ply``.

    Raises:
        ValueError: it is no file of an object, or its name does not go into a shard.
    """
    parts = path.split("/")
    name = ""
    if len(parts) == 3 and parts[0] in FOLDERS:
        name = f"{parts[1]}.{parts[0]}.{parts[2]}"
    elif len(parts) == 3 and parts[0] in MODELS and parts[2].endswith(".npz"):
        name = f"{parts[2][:-4]}.{parts[0]}.{parts[1]}.npz"
    elif len(parts) == 2 and parts[0] == "voxels" and parts[1].endswith(".ply"):
        name = f"{parts[1][:-4]}.voxels.ply"
    if not name or inner_path(name) != path:
        raise ValueError(f"{path!r} cannot be called so in a shard")
    return name


def inner_path(name: str) -> str | None:
    """The inverse of `member_name`; None for what has no place in a prepared folder."""
    sha, _, rest = name.partition(".")
    kind, _, rest = rest.partition(".")
    if not ID.fullmatch(sha) or not _PART.fullmatch(rest):
        return None
    if kind in FOLDERS:
        return f"{kind}/{sha}/{rest}"
    if kind in MODELS and rest.endswith(".npz") and len(rest) > 4:
        return f"{kind}/{rest[:-4]}/{sha}.npz"
    return f"voxels/{sha}.ply" if (kind, rest) == ("voxels", "ply") else None


def _row(content: bytes, sha: str) -> Row | None:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return {str(key): str(value) for key, value in row.items()} | {"sha256": sha} if isinstance(row, dict) else None
