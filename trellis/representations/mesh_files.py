"""Meshes as files: GLB and OBJ with y up as their readers expect, PLY and STL with z up as ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis.atomic import atomic_path
from trellis.representations.gltf import save_glb

if TYPE_CHECKING:
    from trellis.representations.mesh import Mesh

_ROWS = 1 << 16  # lines of text made at a time
_LARGEST_STL = 2**32 - 1


@dataclass(frozen=True)
class _Arrays:
    """A mesh as float64 arrays on the host, checked; colors in [0, 1] or None."""

    positions: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    colors: np.ndarray | None

    def y_up(self) -> _Arrays:
        """In the world (x, z, -y): our upward z is their upward y, our front (-y) their front (z)."""
        return _Arrays(_turned(self.positions), self.faces, _turned(self.normals), self.colors)


def save_mesh(mesh: Mesh, path: str | Path) -> None:
    """Write a mesh, whole or not at all; the suffix says how (`Mesh.save`)."""
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"path must end in {', '.join(_WRITERS)}; got {path.name!r}")
    if not len(mesh.faces):
        raise ValueError(f"mesh must have faces to be saved as {path.name}; got an empty mesh")
    mesh.check_indices()
    for name, values in (("vertices", mesh.vertices), ("colors", mesh.colors)):
        if values is not None and not values.float().isfinite().all():
            raise ValueError(f"{name} must be finite float32 numbers to be saved as {path.name}; some are not")
    precise = mesh.detach().to("cpu", torch.float64)
    arrays = _Arrays(
        positions=precise.vertices.numpy(),
        faces=precise.faces.numpy(),
        normals=precise.vertex_normals().numpy(),
        colors=None if precise.colors is None else precise.colors.clamp(0, 1).numpy(),
    )
    writer(path, arrays)


def _turned(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows[:, 0], rows[:, 2], -rows[:, 1]], axis=1)


def _save_glb(path: Path, mesh: _Arrays) -> None:
    turned = mesh.y_up()
    save_glb(path, turned.positions, turned.faces, turned.normals, turned.colors)


def _save_obj(path: Path, mesh: _Arrays) -> None:
    """Text, y up; colors follow the position on its line, the usual extension, in sRGB."""
    turned = mesh.y_up()
    columns = [turned.positions] if turned.colors is None else [turned.positions, turned.colors]
    numbers = np.repeat(turned.faces + 1, 2, axis=1)
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii", newline="\n") as file:
        file.write("# trellis, y up\n")
        for template, rows in (
            ("v" + " %.9g" * (3 * len(columns)) + "\n", np.concatenate(columns, axis=1)),
            ("vn %.6g %.6g %.6g\n", turned.normals),
            ("f %d//%d %d//%d %d//%d\n", numbers),
        ):
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS]
                file.write((template * len(part)) % tuple(part.ravel().tolist()))


def _save_ply(path: Path, mesh: _Arrays) -> None:
    """Binary little endian, z up; colors are sRGB bytes."""
    if len(mesh.positions) > 2**31:
        raise ValueError(f"mesh must have at most 2^31 vertices to be saved as {path.name}; got {len(mesh.positions)}")
    fields = [("position", "<f4", 3), ("normal", "<f4", 3)]
    names = ["float x", "float y", "float z", "float nx", "float ny", "float nz"]
    if mesh.colors is not None:
        fields.append(("color", "u1", 3))
        names += ["uchar red", "uchar green", "uchar blue"]
    vertices = np.empty(len(mesh.positions), dtype=fields)
    vertices["position"], vertices["normal"] = mesh.positions, mesh.normals
    if mesh.colors is not None:
        vertices["color"] = np.rint(mesh.colors * 255)
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces
    header = ["ply", "format binary_little_endian 1.0", "comment trellis, z up"]
    header += [f"element vertex {len(vertices)}", *(f"property {name}" for name in names)]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(header).encode("ascii"))
        file.write(vertices.tobytes())
        file.write(faces.tobytes())


def _save_stl(path: Path, mesh: _Arrays) -> None:
    """Binary, z up; the format has no colors, and repeats the corners of every face."""
    if len(mesh.faces) > _LARGEST_STL:
        raise ValueError(f"mesh must have at most 2^32 - 1 faces to be saved as {path.name}; got {len(mesh.faces)}")
    corners = mesh.positions[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    faces = np.zeros(len(corners), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    faces["normal"] = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    faces["corners"] = corners
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(b"trellis, binary STL, z up".ljust(80))
        file.write(np.uint32(len(faces)).astype("<u4").tobytes())
        file.write(faces.tobytes())


_WRITERS: dict[str, Callable[[Path, _Arrays], None]] = {
    ".glb": _save_glb,
    ".obj": _save_obj,
    ".ply": _save_ply,
    ".stl": _save_stl,
}
