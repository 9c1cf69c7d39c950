"""A prepared folder into tar shards, and back."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from trellis.atomic import atomic_path
from trellis.data.shards import FOLDERS, KINDS, MODELS, Shards, member_name, open_shards, read_shard, shard_files
from trellis.preparation.metadata import Row, read_metadata, write_metadata


class Packed(NamedTuple):
    """How many objects and shards there are, and how many of these were written and not there before."""

    objects: int
    shards: int
    written: int


def write_shards(
    root: Path,
    out: Path,
    objects_per_shard: int = 256,
    kinds: Collection[str] = KINDS,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the objects of a prepared folder as shards ``shard-000000.tar``, ..., in the order of their ids.

    The same objects give the same bytes. A shard that is there and up to date is not written again; one is written
    whole or not at all.

    Args:
        root: prepared folder.
        out: folder of the shards.
        objects_per_shard: the last has fewer.
        kinds: what goes in, of `trellis.data.shards.KINDS`; objects that have none of it are left out.
        progress: called with the shards done and all shards.

    Raises:
        ValueError: an unknown kind, nothing to write, a name that does not fit, or other shards in `out`.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds must be of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    if objects_per_shard < 1:
        raise ValueError(f"objects_per_shard must be at least 1; got {objects_per_shard}")
    rows = read_metadata(root)
    objects = [(sha, files) for sha in sorted(rows) if (files := _files(root, sha, kinds))]
    if not objects:
        raise ValueError(f"{root} must have objects with {', '.join(kinds)}; it has none")
    groups = [objects[start : start + objects_per_shard] for start in range(0, len(objects), objects_per_shard)]
    names = [f"shard-{number:06d}.tar" for number in range(len(groups))]
    others = [file.name for file in shard_files(out) if file.name not in names]
    if others:
        raise ValueError(f"{out} has other shards, such as {others[0]}: use another folder")
    out.mkdir(parents=True, exist_ok=True)
    if (root / "preparation.json").exists():
        with atomic_path(out / "preparation.json") as temporary:
            shutil.copyfile(root / "preparation.json", temporary)
    written = 0
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        if not _current(out / name, group, rows):
            _write(out / name, group, rows)
            written += 1
        if progress is not None:
            progress(number + 1, len(groups))
    return Packed(len(objects), len(groups), written)


def unpack_shards(folder: Path, root: Path) -> Shards:
    """Write the objects of shards as a prepared folder; files that are there with their size stay.

    Returns:
        What was unpacked; its `damaged` says what was not.

    Raises:
        ValueError: there is no whole object.
    """
    shards = open_shards(folder)
    if not shards.rows:
        raise ValueError(
            f"{folder} must have shards with objects; it has {len(shards.files)} shards and no whole object"
        )
    for path, span in shards.spans.items():
        target = root / path
        if not target.is_file() or target.stat().st_size != span.size:
            with atomic_path(target) as temporary:
                temporary.write_bytes(shards.read(path))
    if (folder / "preparation.json").exists() and not (root / "preparation.json").exists():
        with atomic_path(root / "preparation.json") as temporary:
            shutil.copyfile(folder / "preparation.json", temporary)
    known = read_metadata(root) if (root / "metadata.csv").exists() else {}
    write_metadata(root, (known | shards.rows).values())
    return shards


def _files(root: Path, sha: str, kinds: Collection[str]) -> list[tuple[str, Path]]:
    """The files of an object: what they are called in a shard, and where they are."""
    paths: list[Path] = []
    if "voxels" in kinds:
        paths.append(root / "voxels" / f"{sha}.ply")
    for kind in (kind for kind in FOLDERS if kind in kinds):
        folder = root / kind / sha
        paths += sorted(folder.iterdir()) if folder.is_dir() else []
    for kind in (kind for kind in MODELS if kind in kinds):
        models = sorted((root / kind).iterdir()) if (root / kind).is_dir() else []
        paths += [model / f"{sha}.npz" for model in models]
    # A name that begins with a dot is what an interrupted step left.
    whole = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    return [(member_name(path.relative_to(root).as_posix()), path) for path in whole]


def _current(shard: Path, group: list[tuple[str, list[tuple[str, Path]]]], rows: dict[str, Row]) -> bool:
    """Whether a shard is there with these objects, and files of these sizes."""
    if not shard.exists():
        return False
    wanted = {sha: (_line(rows[sha]), {name: path.stat().st_size for name, path in files}) for sha, files in group}
    try:
        there = {
            sha: (_line(row or {}), {member_name(path): span.size for path, span in spans.items()})
            for sha, row, spans in read_shard(shard)
        }
    except ValueError:
        return False
    return there == wanted


def _write(shard: Path, group: list[tuple[str, list[tuple[str, Path]]]], rows: dict[str, Row]) -> None:
    with atomic_path(shard) as temporary, tarfile.open(temporary, "w") as tar:
        for sha, files in group:
            _add(tar, f"{sha}.json", _line(rows[sha]))
            for name, path in files:
                _add(tar, name, path.read_bytes())


def _line(row: Row) -> bytes:
    return json.dumps({key: str(value) for key, value in row.items()}, ensure_ascii=False, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of time 0 and nobody: the same objects give the same bytes
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
