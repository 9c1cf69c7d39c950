"""A textured mesh beside rays cast one per pixel: coverage, depth and color."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from tests.support.solids import torus
from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import render_mesh
from trellis.representations.texture import Texture

AROUND, ACROSS, SIZE = 24, 12, 96
Hits = tuple[Tensor, Tensor, Tensor]


def textured_torus() -> tuple[trimesh.Trimesh, Texture, Tensor]:
    """A closed mesh whose texture has seams, and the corners of each triangle in the texture."""
    mesh = torus(AROUND, ACROSS)
    i, j = torch.meshgrid(torch.arange(AROUND + 1), torch.arange(ACROSS + 1), indexing="ij")
    uv = torch.stack([i / AROUND, j / ACROSS], -1).view(-1, 2)
    # Each triangle's corners in that grid: those of the torus, one step further where they have wrapped round.
    a, b = mesh.faces // ACROSS, mesh.faces % ACROSS
    a = torch.where((a.amax(1, keepdim=True) == AROUND - 1) & (a == 0), AROUND, a)
    b = torch.where((b.amax(1, keepdim=True) == ACROSS - 1) & (b == 0), ACROSS, b)
    corners = a * (ACROSS + 1) + b
    image = torch.rand(6, 9, 3, generator=torch.Generator().manual_seed(1))
    texture = Texture(image, uv, corners)
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False), texture, uv[corners].double()


def brute_force(mesh: trimesh.Trimesh, eye: Tensor, rays: Tensor) -> Hits:
    """Nearest triangle (-1: none), and two barycentrics; every ray against every triangle, in float64."""
    a, b, c = torch.tensor(np.asarray(mesh.triangles)).unbind(1)
    e, f = b - a, c - a
    p = torch.linalg.cross(rays[:, None], f[None].expand(len(rays), -1, -1))
    determinant = (p * e).sum(-1)
    s = eye - a
    u = (p * s).sum(-1) / determinant
    q = torch.linalg.cross(s, e)
    v = (rays[:, None] * q).sum(-1) / determinant
    t = (q * f).sum(-1) / determinant
    t[(u < 0) | (v < 0) | (u + v > 1) | (t <= 0)] = torch.inf
    nearest = t.argmin(1)
    rows = torch.arange(len(rays))
    hit = t[rows, nearest].isfinite()
    return torch.where(hit, nearest, -1), u[rows, nearest], v[rows, nearest]


def embree(mesh: trimesh.Trimesh, eye: Tensor, rays: Tensor) -> Hits:
    pytest.importorskip("embreex")
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    origins = eye.expand_as(rays).numpy()
    faces = torch.tensor(RayMeshIntersector(mesh).intersects_first(origins, rays.numpy()), dtype=torch.int64)
    a, b, c = torch.tensor(np.asarray(mesh.triangles))[faces.clamp_min(0)].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    point = eye + rays * ((normal * (a - eye)).sum(-1) / (normal * rays).sum(-1))[:, None]
    weights = [
        (torch.linalg.cross(x - point, y - point) * normal).sum(-1) / normal.square().sum(-1)
        for x, y in ((c, a), (a, b))
    ]
    return faces, weights[0], weights[1]


@pytest.mark.parametrize("cast", [brute_force, embree], ids=lambda f: f.__name__)
def test_textured_mesh_agrees_with_rays(cast: Callable[[trimesh.Trimesh, Tensor, Tensor], Hits]) -> None:
    solid, texture, uv = textured_torus()
    mesh = torus(AROUND, ACROSS)
    camera = Cameras.look_at((0.9, 1.0, 0.7))
    steps = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    image = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)
    local = image @ torch.linalg.inv(camera.intrinsics[0].double()).T
    rays = local @ camera.extrinsics[0, :3, :3].double()  # of depth 1
    eye = camera.centers[0].double()
    faces, u, v = cast(solid, eye, rays)
    hit = faces >= 0

    drawn = render_mesh(mesh, camera, SIZE, ssaa=1, texture=texture)
    assert drawn.mask is not None
    assert drawn.depths is not None
    assert drawn.colors is not None
    covered = drawn.mask[0].view(-1) >= 0.5
    assert (covered != hit).sum() <= 2  # centers on a silhouette within rounding
    assert 0.1 < hit.double().mean() < 0.5

    weights = torch.stack([1 - u - v, u, v], -1)[..., None]
    corners = torch.tensor(np.asarray(solid.triangles))[faces.clamp_min(0)]
    depth = (((corners * weights).sum(1) - eye) @ camera.extrinsics[0, 2, :3].double()).where(hit, 0.0)
    # Away from silhouettes, where neighboring pixels are not mixed.
    grid = depth.view(1, 1, SIZE, SIZE)
    spread = -torch.nn.functional.max_pool2d(-grid, 3, 1, 1) - torch.nn.functional.max_pool2d(grid, 3, 1, 1)
    inner = hit & (spread.view(-1).abs() < 0.06)
    assert inner.sum() > 0.5 * hit.sum()
    error = (drawn.depths[0].view(-1).double() - depth)[inner].abs()
    assert error.max() < 1e-5

    at = (uv[faces.clamp_min(0)] * weights).sum(1)
    around = pad(texture.image.double().permute(2, 0, 1)[None], (1, 1, 1, 1), mode="circular")
    size = torch.tensor([9.0, 6.0], dtype=torch.float64)
    expected = grid_sample(around, (2 * (at * size + 1) / (size + 2) - 1)[None, None], align_corners=False)[0, :, 0]
    error = (drawn.colors[0].flatten(1).double() - expected)[:, inner].abs()
    assert error.max() < 1e-3
    assert error.mean() < 1e-5
