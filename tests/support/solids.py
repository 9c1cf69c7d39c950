"""Small meshes of which everything is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trellis.representations.mesh import Mesh


def box(
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0), center: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Mesh:
    """Eight vertices and twelve faces that look outward, with the colors of the RGB cube."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # index 4 x + 2 y + z
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = torch.tensor([[q[0], q[i], q[i + 1]] for q in quads for i in (1, 2)])
    vertices = (corners - 0.5) * torch.tensor(sizes) + torch.tensor(center)
    return Mesh(vertices, faces, colors=corners, normals=corners)


def torus(around: int = 24, across: int = 12, major: float = 0.3, minor: float = 0.1) -> Mesh:
    """A closed surface of genus 1 about the z axis, inscribed in the torus, faces outward."""
    i, j = torch.meshgrid(torch.arange(around), torch.arange(across), indexing="ij")

    def index(a: Tensor, b: Tensor) -> Tensor:
        return (a % around) * across + b % across

    corners = index(i, j), index(i + 1, j), index(i + 1, j + 1), index(i, j + 1)
    faces = torch.cat([torch.stack([corners[0], corners[k], corners[k + 1]], -1).reshape(-1, 3) for k in (1, 2)])
    u, v = i * (2 * math.pi / around), j * (2 * math.pi / across)
    radius = major + minor * v.cos()
    vertices = torch.stack([radius * u.cos(), radius * u.sin(), minor * v.sin()], -1).reshape(-1, 3)
    return Mesh(vertices, faces, colors=(vertices + 0.5).clamp(0, 1))


def joined(*meshes: Mesh) -> Mesh:
    """Several meshes as one, without colors."""
    offsets = torch.tensor([0, *(len(mesh.vertices) for mesh in meshes)]).cumsum(0)
    faces = torch.cat([mesh.faces + offset for mesh, offset in zip(meshes, offsets[:-1], strict=True)])
    return Mesh(torch.cat([mesh.vertices for mesh in meshes]), faces)
