"""What must hold for triangle meshes."""

from __future__ import annotations

import torch
from torch import Tensor


def euler_characteristic(faces: Tensor) -> int:
    """V - E + F of a mesh that must be closed: each directed edge occurs once, and its reverse too."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    count = int(faces.max()) + 1
    keys = (edges[:, 0] * count + edges[:, 1]).sort().values
    reverse = (edges[:, 1] * count + edges[:, 0]).sort().values
    assert torch.equal(keys, reverse), "the surface has a border"
    assert (keys.diff() > 0).all(), "two faces run along an edge in the same direction"
    return len(faces.unique()) - len(edges) // 2 + len(faces)


def signed_volume(vertices: Tensor, faces: Tensor) -> float:
    """Volume enclosed by a closed mesh, positive if its faces are counterclockwise seen from outside."""
    a, b, c = vertices[faces].double().unbind(1)
    return float((a * b.cross(c, dim=1)).sum() / 6)


def canonical(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The same mesh with vertices sorted by position, faces starting at their least vertex and sorted."""
    order = torch.arange(len(vertices))
    for axis in (2, 1, 0):
        order = order[vertices[order, axis].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    faces = rank[faces]
    start = faces.argmin(1, keepdim=True)
    faces = faces.gather(1, (start + torch.arange(3)) % 3)
    keys = (faces[:, 0] * len(order) + faces[:, 1]) * len(order) + faces[:, 2]
    return vertices[order], faces[keys.argsort()]
