"""A triangle mesh with colors and a normal map at its vertices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis_kernels.shapes import FLOATS, expect


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

    def to(self, device: torch.device | str) -> Mesh:
        """The same mesh on another device."""
        moved = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Mesh(**{name: None if value is None else value.to(device) for name, value in moved.items()})

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

    def check_indices(self) -> None:
        """Raise ValueError if a face names a vertex that is not there."""
        count = len(self.vertices)
        if self.faces.numel() and not 0 <= int(self.faces.min()) <= int(self.faces.max()) < count:
            raise ValueError(f"faces must be in [0, {count}); got {int(self.faces.min())} to {int(self.faces.max())}")
