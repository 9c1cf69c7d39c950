"""An object of which exact pictures can be made: a dented stone with two horns in a ring, textured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import render_mesh
from trellis.representations.mesh import Mesh
from trellis.representations.texture import Texture

BACKGROUND = (0.5, 0.5, 0.5)
_TAU = 2 * math.pi
_STONE = 0.7  # share of the texture's height, above the part of the ring
Surface = Callable[[Tensor, Tensor], Tensor]


class Scene(NamedTuple):
    """A textured mesh in [-0.5, 0.5]^3."""

    mesh: Mesh
    texture: Texture


def textured_object(texels: int = 256, columns: int = 128) -> Scene:
    """Stone and ring in one mesh with one texture; no symmetry in shape or color.

    Args:
        texels: side of the texture.
        columns: of vertices around each part; 3.6 columns^2 triangles.
    """
    parts = [
        _sheet(_stone, columns // 2, columns, (0.0, _STONE)),
        _sheet(_ring, columns // 4, columns, (_STONE, 1.0)),
    ]
    vertices, faces, uv, corners = [], [], [], []
    for part in parts:
        faces.append(part[1] + sum(map(len, vertices)))
        corners.append(part[3] + sum(map(len, uv)))
        vertices.append(part[0])
        uv.append(part[2])
    mesh = Mesh(torch.cat(vertices), torch.cat(faces))
    return Scene(mesh, Texture(_colors(texels), torch.cat(uv), torch.cat(corners), wrap="clamp"))


def stone(columns: int = 128) -> Mesh:
    """The stone alone: a shape that a sphere can be pulled to."""
    vertices, faces, *_ = _sheet(_stone, columns // 2, columns, (0.0, 1.0))
    return Mesh(vertices, faces)


def sphere(columns: int, radius: float = 0.3) -> Mesh:
    """Triangles of about the same size: an octahedron whose faces are divided into columns^2 / 16 each."""
    steps = columns // 4
    i, j = (index.flatten() for index in torch.meshgrid(*[torch.arange(steps + 1)] * 2, indexing="ij"))
    points = torch.stack([i, j, steps - i - j], 1)[i + j <= steps].float() / steps
    row = torch.full((steps + 2, steps + 2), -1)
    row[:-1, :-1][(i + j <= steps).view(steps + 1, -1)] = torch.arange(len(points))
    upper = torch.stack([row[:-1, :-1], row[1:, :-1], row[:-1, 1:]], -1).view(-1, 3)
    lower = torch.stack([row[1:, :-1], row[1:, 1:], row[:-1, 1:]], -1).view(-1, 3)
    faces = torch.cat([triangles[(triangles >= 0).all(1)] for triangles in (upper, lower)])
    everywhere, all_faces = [], []
    for octant in torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 3):
        all_faces.append((faces if octant.prod() > 0 else faces.flip(1)) + sum(map(len, everywhere)))
        everywhere.append(points * octant)
    vertices, merged = _merge(torch.cat(everywhere), torch.cat(all_faces))
    return Mesh(radius * torch.nn.functional.normalize(vertices, dim=1), merged)


def training_cameras(count: int = 24) -> Cameras:
    """Spread evenly all around the object."""
    return Cameras.sphere_hammersley(count)


def held_out_cameras(count: int = 8) -> Cameras:
    """Spread evenly, and none where a training camera is."""
    return Cameras.sphere_hammersley(count, offset=(0.37, 0.21))


@torch.no_grad()
def pictures(scene: Scene, cameras: Cameras, resolution: int, ssaa: int = 4) -> tuple[Tensor, Tensor]:
    """``[V, 3, H, W]`` colors in front of `BACKGROUND` and ``[V, H, W]`` masks."""
    images = render_mesh(scene.mesh, cameras, resolution, BACKGROUND, ssaa, scene.texture, returns=("colors", "mask"))
    assert images.colors is not None
    assert images.mask is not None
    return images.colors, images.mask


def _stone(u: Tensor, v: Tensor) -> Tensor:
    """A sphere with waves, a dent and two horns of different length."""
    phi, theta = _TAU * u, math.pi * v
    direction = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    radius = 0.3 + 0.02 * (3 * phi + 2 * theta).sin() * theta.sin() ** 3 + 0.02 * (4 * theta).cos()
    for axis, width, height in (
        ((0.3, 0.5, 0.81), 0.03, 0.16),
        ((-0.55, -0.2, 0.81), 0.02, 0.1),
        ((0.9, -0.4, 0.1), 0.15, -0.1),
    ):
        axis = torch.nn.functional.normalize(direction.new_tensor(axis), dim=0)
        radius = radius + height * ((direction @ axis - 1) / width).exp()
    return radius[..., None] * direction


def _ring(u: Tensor, v: Tensor) -> Tensor:
    """A torus around the stone, tilted, thicker on one side."""
    theta, phi = _TAU * u, -_TAU * v
    thickness = 0.035 + 0.015 * theta.sin()
    around = 0.435 + thickness * phi.cos()
    flat = torch.stack([around * theta.cos(), around * theta.sin(), thickness * phi.sin()], -1)
    tilt = math.radians(25)
    rotation = flat.new_tensor([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    return flat @ rotation.T


def _sheet(surface: Surface, rows: int, columns: int, band: tuple[float, float]) -> tuple[Tensor, ...]:
    """Vertices, faces, uv and faces of uv of a closed surface over the unit square, textured by a band of rows."""
    v, u = torch.meshgrid(
        torch.linspace(0, 1, rows + 1, dtype=torch.float64),
        torch.linspace(0, 1, columns + 1, dtype=torch.float64),
        indexing="ij",
    )
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    a = row * (columns + 1) + column
    b, c, d = a + 1, a + columns + 1, a + columns + 2
    corners = torch.stack([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)], 2).view(-1, 3)
    points = surface(u, v).view(-1, 3)
    vertices, faces = _merge(points, corners)
    whole = (faces != faces.roll(1, 1)).all(1)  # at the poles of a sphere every second triangle has no area
    uv = torch.stack([u, band[0] + v * (band[1] - band[0])], -1).view(-1, 2)
    return vertices.float(), faces[whole], uv.float(), corners[whole]


def _merge(points: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The same surface with one vertex where several had the same position."""
    _, inverse = (points * 1e6).round().unique(dim=0, return_inverse=True)
    vertices = points.new_empty(int(inverse.max()) + 1, 3).index_copy(0, inverse, points)
    return vertices, inverse[faces]


def _colors(texels: int) -> Tensor:
    """``[H, W, 3]``: smooth color, stripes, dots and a checkerboard; without a seam from the right to the left."""
    axis = (torch.arange(texels) + 0.5) / texels
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    base = torch.stack(
        [0.55 + 0.3 * (_TAU * (u + v)).sin(), 0.5 + 0.3 * (_TAU * (2 * u - v) + 1).sin(), 0.45 + 0.3 * (9 * v).cos()],
        -1,
    )
    stripes = torch.sigmoid(20 * (_TAU * (6 * u + 3 * v)).sin())[..., None] * ((v > 0.2) & (v < 0.4))[..., None]
    distance = ((u * 10) % 1 - 0.5) ** 2 + ((v * 10) % 1 - 0.5) ** 2
    dots = (torch.sigmoid((0.08 - distance) * 80) * ((v > 0.45) & (v < 0.65)))[..., None]
    checks = (((u * 8).floor() + (v * 20).floor()) % 2 * (v > _STONE))[..., None]
    colors = base * (1 - 0.75 * stripes) * (1 - 0.5 * checks) + dots * (torch.tensor([0.95, 0.9, 0.2]) - base)
    return colors.clamp(0, 1)
