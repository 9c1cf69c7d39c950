"""A triangle mesh with colors and a normal map at its vertices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis.representations.mesh_statistics import mesh_statistics
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["Mesh", "mesh_statistics"]


@dataclass(frozen=True, eq=False)
class Mesh:
    """V vertices and F triangles, counterclockwise seen from outside. Either number may be 0.

    Args:
        vertices: ``[V, 3]`` float. World positions, z up, in [-0.5, 0.5].
        faces: ``[F, 3]`` int64, in [0, V).
        colors: ``[V, 3]`` float, sRGB in [0, 1], or None.
        normals: ``[V, 3]`` float in [0, 1], or None. The normal map that the decoder predicts: ``(n + 1) / 2`` of a
            world normal n. It is shading, not geometry; for that see `vertex_normals`.

    Raises:
        ValueError, TypeError: if a shape or dtype is not the one above. Indices are checked where they are used.
    """

    vertices: Tensor
    faces: Tensor
    colors: Tensor | None = None
    normals: Tensor | None = None

    def __post_init__(self) -> None:
        arguments: dict[str, Any] = {
            "vertices": (self.vertices, "V 3", FLOATS),
            "faces": (self.faces, "F 3", torch.int64),
            "colors": (self.colors, "V 3", FLOATS),
            "normals": (self.normals, "V 3", FLOATS),
        }
        expect(**{name: argument for name, argument in arguments.items() if argument[0] is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Mesh:
        """The same mesh on another device, its real numbers in another dtype; None: as they are."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def detach(self) -> Mesh:
        """The same mesh, without a gradient history."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Mesh:
        present = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        return Mesh(**{name: function(value) for name, value in present.items()})

    def vertex_normals(self) -> Tensor:
        """``[V, 3]`` unit normals of the geometry: the mean over the faces at a vertex, weighted by their areas.

        A vertex whose faces have no area, or cancel, gets (0, 0, 1). Differentiable with respect to `vertices`.

        Raises:
            ValueError: a face names a vertex that is not there.
        """
        self.check_indices()
        vertices = self.vertices.to(torch.promote_types(self.vertices.dtype, torch.float32))
        a, b, c = (vertices[corner] for corner in self.faces.unbind(1))
        doubled_area = (b - a).cross(c - a, dim=1)
        total = torch.zeros_like(vertices).index_add(0, self.faces.flatten(), doubled_area.repeat_interleave(3, 0))
        largest = total.detach().abs().amax(1, keepdim=True)
        up = total.new_tensor([0.0, 0.0, 1.0])
        # Divided first by the largest component: the square of a tiny area would underflow.
        total = torch.where(largest > 0, total / torch.where(largest > 0, largest, 1), up)
        return (total / total.norm(dim=1, keepdim=True)).to(self.vertices.dtype)

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all; its suffix says which.

        ``.glb`` and ``.obj`` have y up, ours (x, y, z) as (x, z, -y), with colors and `vertex_normals`. ``.ply``
        (binary) has z up as ours, with colors and normals. ``.stl`` (binary) has z up, and neither. The predicted
        normal map is in none of them. See docs/conventions.md.

        Raises:
            ValueError: the suffix is another; the mesh has no faces; an index or a number is out of range.
        """
        from trellis.representations.mesh_files import save_mesh

        save_mesh(self, path)

    def check_indices(self) -> None:
        """Raise ValueError if a face names a vertex that is not there."""
        count = len(self.vertices)
        if self.faces.numel() and not 0 <= int(self.faces.min()) <= int(self.faces.max()) < count:
            raise ValueError(f"faces must be in [0, {count}); got {int(self.faces.min())} to {int(self.faces.max())}")
