"""`stated_size`: how large a mesh file says it is, before a parser spends minutes and gigabytes on it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = 1 << 20
_HEADER = 1 << 16  # bytes in which the header of a PLY file ends
_TRIANGLES = 4  # glTF's mode


class Size(NamedTuple):
    """At least so many; 0 where a file does not say, or is damaged: its parser will tell."""

    faces: int
    vertices: int


def stated_size(path: Path) -> Size:
    """Count the faces and vertices of a GLB, glTF, OBJ, PLY or STL file, reading it at most once, in blocks."""
    counters = {".obj": _obj, ".ply": _ply, ".stl": _stl, ".glb": _glb, ".gltf": _gltf}
    try:
        return counters[path.suffix.lower()](path)
    except (struct.error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return Size(0, 0)  # not of its format: the parser says in which way


def _obj(path: Path) -> Size:
    return Size(_lines(path, b"f "), _lines(path, b"v "))


def _lines(path: Path, start: bytes) -> int:
    """How many lines start so."""
    needle = b"\n" + start
    count, rest = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            block = rest + block
            count += block.count(needle)
            rest = block[-len(needle) + 1 :]
    return count


def _ply(path: Path) -> Size:
    with path.open("rb") as file:
        header = file.read(_HEADER).partition(b"end_header")[0]
    counts = {name: int(number) for name, number in re.findall(rb"^element\s+(\w+)\s+(\d+)", header, re.MULTILINE)}
    return Size(counts.get(b"face", 0), counts.get(b"vertex", 0))


def _stl(path: Path) -> Size:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(84)
    binary = len(header) == 84 and struct.unpack("<I", header[80:])[0] * 50 + 84 == size
    faces = max(0, size - 84) // 50 if binary or not header.startswith(b"solid") else _words(path, b"endfacet")
    return Size(faces, 3 * faces)


def _words(path: Path, word: bytes) -> int:
    count, rest = 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            block = rest + block
            count += block.count(word)
            rest = block[-len(word) + 1 :]
    return count


def _glb(path: Path) -> Size:
    with path.open("rb") as file:
        magic, _, _, length, kind = struct.unpack("<4sIII4s", file.read(20))
        if magic != b"glTF" or kind != b"JSON":
            return Size(0, 0)
        return _described(json.loads(file.read(min(length, path.stat().st_size))))


def _gltf(path: Path) -> Size:
    return _described(json.loads(path.read_bytes()))


def _described(gltf: Mapping[str, Any]) -> Size:
    """Of every node's mesh: one that is placed twice counts twice, as trimesh reads it."""
    sizes = [_mesh(gltf, mesh) for mesh in gltf["meshes"]]
    placed = [node["mesh"] for node in gltf.get("nodes", []) if "mesh" in node]
    return Size(sum(sizes[i].faces for i in placed), sum(sizes[i].vertices for i in placed))


def _mesh(gltf: Mapping[str, Any], mesh: Mapping[str, Any]) -> Size:
    faces = vertices = 0
    for primitive in mesh["primitives"]:
        points = int(gltf["accessors"][primitive["attributes"]["POSITION"]]["count"])
        corners = int(gltf["accessors"][primitive["indices"]]["count"]) if "indices" in primitive else points
        vertices += points
        faces += corners // 3 if primitive.get("mode", _TRIANGLES) == _TRIANGLES else max(0, corners - 2)
    return Size(faces, vertices)
