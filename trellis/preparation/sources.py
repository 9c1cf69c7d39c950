"""Where objects come from: a folder of mesh files, or the furniture of Sweet Home 3D."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from trellis.atomic import atomic_path, disk_is_full
from trellis.preparation.metadata import note_failure
from trellis.preparation.scene import Variant
from trellis.representations.mesh_reading import SUFFIXES

SWEETHOME3D = "sweethome3d"
INSTALLED = Path("/usr/share/sweethome3d/furniture")
_LARGEST_CATALOG = 1 << 31  # unpacked bytes
# What a file that is damaged, encrypted or not of its format makes zipfile, pathlib and our parsers raise.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
logger = logging.getLogger(__name__)
_HELD_OUT = 10  # one name in so many

Row = dict[str, Any]


def find_objects(source: str, root: Path) -> list[Row]:
    """The objects of a source as lines of metadata.csv; those of Sweet Home 3D are unpacked to `root`/raw.

    What cannot be read is left out and noted in failures/find.jsonl.

    Args:
        source: a folder, or ``sweethome3d`` (installed), or a folder or .deb that has its .sh3f files.
        root: the prepared folder.

    Raises:
        ValueError: there is nothing to prepare.
        OSError: the disk is full.
        FileNotFoundError: there is no such source.
    """
    if source == SWEETHOME3D:
        if not INSTALLED.is_dir():
            raise FileNotFoundError(
                f"sweethome3d is not installed in {INSTALLED}: `apt install sweethome3d-furniture`, or"
                " `apt download sweethome3d-furniture` and give the .deb as the source"
            )
        folder = INSTALLED
    else:
        folder = Path(source)
    if folder.suffix == ".deb" and folder.is_file():
        folder = _unpacked_package(folder, root / "raw")
    if not folder.is_dir():
        raise FileNotFoundError(f"source must be a folder, a .deb or {SWEETHOME3D!r}; got {source}")
    catalogs = sorted(folder.rglob("*.sh3f"))
    left_out: list[str] = []
    rows: list[Row] = []
    for file in catalogs:
        try:
            rows += _catalog(file, root, left_out)
        except _DAMAGED as error:
            _note(left_out, file, error)
    if not catalogs:
        rows += _folder(folder, root, left_out)
    for reason in left_out:
        note_failure(root, "find", "", reason)
        logger.warning("left out: %s", reason)
    distinct = {row["sha256"]: row for row in reversed(rows)}  # the first of equal ones
    if not distinct:
        why = f"; left out: {left_out[0]}" if left_out else ""
        raise ValueError(f"source must have {', '.join(SUFFIXES)} or .sh3f files; {source} has none{why}")
    return sorted(distinct.values(), key=lambda row: row["sha256"])


def _note(left_out: list[str], what: object, error: BaseException) -> None:
    if disk_is_full(error):
        raise error
    left_out.append(f"{what}: {type(error).__name__}: {error}")


def with_variants(rows: list[Row], count: int, seed: int) -> list[Row]:
    """The rows, each of the training split followed by `count` random variants of it."""
    counts = [count if row["split"] == "train" else 0 for row in rows]
    numbered = [(row, index) for row, n in zip(rows, counts, strict=True) for index in range(n + 1)]
    return [_variant(row, index, seed) if index else row for row, index in numbered]


def furniture(row: Mapping[str, Any]) -> bool:
    """The usual choice of an inspected catalog: 200 to 60,000 faces, colored, neither door nor stairs."""
    colored = str(row.get("textured")) == "True" or int(row.get("materials") or 0) >= 2
    return 200 <= int(row.get("faces") or 0) <= 60_000 and colored and str(row.get("door", "")) != "True"


def _variant(row: Row, index: int, seed: int) -> Row:
    digest = hashlib.sha256(f"{row['sha256']} variant {index} seed {seed}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:12], 16))
    arguments = json.dumps(vars(Variant.random(generator)))
    return row | {"sha256": digest, "base": row["sha256"], "variant": index, "variant_args": arguments}


def split_of(name: str) -> str:
    """``test`` for a tenth of the names, by their hash, ``train`` for the others: equal names stay together."""
    plain = re.sub(r"[^a-z]+", " ", name.lower()).strip()
    return "test" if int(hashlib.sha256(plain.encode()).hexdigest()[:8], 16) % _HELD_OUT == 0 else "train"


def _row(path: Path, root: Path, name: str, **more: Any) -> Row:
    try:
        local = path.resolve().relative_to(root.resolve())
    except ValueError:
        local = path.resolve()
    digest = _digest(path, str(more.get("rotation", "")))
    blank = {"category": "", "tags": "", "creator": "", "license": "", "rotation": "", "variant": 0, "variant_args": ""}
    row = {"sha256": digest, "name": name, **blank, "base": digest, "split": split_of(name), "local_path": str(local)}
    return row | more


def _digest(path: Path, rotation: str) -> str:
    """SHA-256 of a mesh file, of the materials and pictures it names, and of how it is turned."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if path.suffix.lower() == ".obj":
        for library in _named(path, rb"^\s*mtllib\s+(.+?)\s*$"):
            digest.update(library.read_bytes())
            for picture in _named(library, rb"^\s*map_\w+\s+(?:.*\s)?(\S+)\s*$"):
                digest.update(picture.read_bytes())
    if path.suffix.lower() == ".gltf":
        for buffer in _named(path, rb'"uri"\s*:\s*"((?!data:)[^"]+)"'):
            digest.update(buffer.read_bytes())
    digest.update(rotation.encode())
    return digest.hexdigest()


def _named(path: Path, pattern: bytes) -> Iterator[Path]:
    """The files below the folder of `path` that its lines name."""
    folder = path.parent.resolve()
    for match in re.finditer(pattern, path.read_bytes(), re.MULTILINE):
        try:
            named = (folder / match[1].decode("utf-8", "replace")).resolve()
            if named.is_relative_to(folder) and named.is_file():
                yield named
        except (OSError, ValueError):  # too long a name, or one with a zero byte
            continue


def _folder(folder: Path, root: Path, left_out: list[str]) -> Iterator[Row]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = re.sub(r"[_\-]+", " ", path.stem)
            try:
                row = _row(path, root, name, captions=json.dumps([name]), source=str(folder))
            except _DAMAGED as error:
                _note(left_out, path, error)
            else:
                yield row


def _catalog(file: Path, root: Path, left_out: list[str]) -> Iterator[Row]:
    """The objects of an .sh3f file: a zip of OBJ files and a catalog."""
    target = root / "raw" / file.stem
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, file)
        text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
        if not (target / "unpacked").exists():
            _unpack(archive, members, file, target, left_out)
    general, objects = _properties(text)
    for entry in objects:
        try:
            row = _catalog_row(entry, general, file, target, root)
        except _DAMAGED as error:
            _note(left_out, f"{file.name} {entry.get('name')}", error)
        else:
            if row is not None:
                yield row


def _catalog_row(
    entry: Mapping[str, str], general: Mapping[str, str], file: Path, target: Path, root: Path
) -> Row | None:
    """An entry of a catalog, or None if its model is not in it."""
    path = target / entry.get("model", "").lstrip("/")
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    if not path.resolve().is_relative_to(target.resolve()):
        return None
    numbers = [float(value) for value in entry.get("modelRotation", "").split()]
    rotation = json.dumps([numbers[i : i + 3] for i in (0, 3, 6)]) if len(numbers) == 9 else ""
    return _row(
        path,
        root,
        entry.get("name", path.stem),
        category=entry.get("category", ""),
        tags=entry.get("tags", ""),
        creator=entry.get("creator", ""),
        license=entry.get("license", general.get("license", "")),
        rotation=rotation,
        source=file.name,
        captions=json.dumps(_captions(entry)),
        door=entry.get("doorOrWindow", "false") == "true" or "staircaseCutOutShape" in entry,
    )


def _members(archive: zipfile.ZipFile, file: Path) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Where each file of an archive goes, looked at before one is written."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    if sum(member.file_size for member in members) > _LARGEST_CATALOG:
        raise ValueError(f"{file} must unpack to at most {_LARGEST_CATALOG} bytes")
    places = {}
    for member in members:
        place = PurePosixPath(member.filename.lstrip("/"))
        if ".." in place.parts or not place.parts:
            raise ValueError(f"{file} must have names inside its folder; got {member.filename!r}")
        places[place] = member
    return places


def _unpack(
    archive: zipfile.ZipFile,
    members: Mapping[PurePosixPath, zipfile.ZipInfo],
    file: Path,
    target: Path,
    left_out: list[str],
) -> None:
    for place, member in members.items():
        try:
            with archive.open(member) as packed, atomic_path(target / place) as path, path.open("wb") as written:
                shutil.copyfileobj(packed, written)
        except _DAMAGED as error:
            _note(left_out, f"{file.name} {place}", error)
    (target / "unpacked").touch()


def _unpacked_package(package: Path, raw: Path) -> Path:
    """The .sh3f files of a Debian package."""
    target = raw / package.stem
    if not (target / "unpacked").exists():
        if shutil.which("dpkg-deb") is None:
            raise ValueError(f"dpkg-deb is needed to unpack {package}; or unpack it yourself and give the folder")
        target.mkdir(parents=True, exist_ok=True)
        command = ["dpkg-deb", "-x", str(package), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{package} must be a Debian package: {done.stderr.strip()}")
        (target / "unpacked").touch()
    return target


def _properties(text: str) -> tuple[dict[str, str], list[Mapping[str, str]]]:
    """General entries and those of each numbered object of a Java properties file."""
    general: dict[str, str] = {}
    numbered: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\w+)(?:#(\d+))?\s*=\s*(.*?)\s*$", line)
        if match and not line.lstrip().startswith(("#", "!")):
            value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), match[3])
            (general if match[2] is None else numbered.setdefault(int(match[2]), {}))[match[1]] = value
    return general, [numbered[key] for key in sorted(numbered)]


def _captions(entry: Mapping[str, str]) -> list[str]:
    """What one may call an object: its name, with an article, with its tags, with its category."""
    name = entry.get("name", "object").lower()
    own = {"blend swap", "scopia", "reallusion", "kator legaz", "katorlegaz"}
    tags = [tag.strip().lower() for tag in entry.get("tags", "").split(",")]
    tags = [tag for tag in tags if tag and tag not in own]
    article = "an" if name[:1] in "aeiou" else "a"
    captions = [name, f"{article} {name}", f"a 3D model of {article} {name}"]
    captions += [f"{name}, {', '.join(tags)}"] if tags else []
    captions += [f"{article} {name} for the {entry['category'].lower()}"] if entry.get("category") else []
    return captions + [f"{article} {name}, {tag}" for tag in tags[:3]]
