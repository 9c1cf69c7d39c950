"""What the mesh decoder is compared with on the surface itself: renders, truncated distances, points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, grid_sample

from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import MeshImages, render_mesh
from trellis.representations.mesh import Mesh
from trellis_kernels import ExtractedMesh

NEAR, FAR = 1.0, 3.0
_AT_ONCE = 1 << 24  # distances held at a time


@dataclass(frozen=True)
class Truth:
    """The object as V cameras see it.

    Args:
        mesh: itself.
        mask: ``[V, H, W]`` in [0, 1].
        depths: ``[V, H, W]``.
        normals: ``[V, 3, H, W]``, ``(n + 1) / 2``, turned towards the camera.
    """

    mesh: Mesh
    mask: Tensor
    depths: Tensor
    normals: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, mesh: Mesh, cameras: Cameras, resolution: int, ssaa: int) -> Truth:
        seen = draw(mesh, cameras, resolution, ssaa)
        assert seen.mask is not None
        assert seen.depths is not None
        assert seen.normals is not None
        return cls(mesh, seen.mask, seen.depths, towards(seen.normals, cameras))


def draw(mesh: Mesh, cameras: Cameras, resolution: int, ssaa: int) -> MeshImages:
    """Mask, depths, normals, and colors and normal maps if it has any."""
    return render_mesh(mesh, cameras, resolution, ssaa=ssaa, near=NEAR, far=FAR)


def towards(normals: Tensor, cameras: Cameras) -> Tensor:
    """``(n + 1) / 2`` pictures ``[V, 3, H, W]`` with n turned to the side of the surface that the camera sees."""
    height, width = normals.shape[2:]
    y, x = torch.meshgrid(
        (torch.arange(height, device=normals.device) + 0.5) / height,
        (torch.arange(width, device=normals.device) + 0.5) / width,
        indexing="ij",
    )
    image = torch.stack([x, y, torch.ones_like(x)]).to(normals)
    rays = torch.einsum("vij,jhw->vihw", torch.linalg.inv(cameras.intrinsics), image)
    world = torch.einsum("vij,vihw->vjhw", cameras.extrinsics[:, :3, :3], rays)
    away = ((2 * normals - 1) * world).sum(1, keepdim=True) > 0
    return torch.where(away, 1 - normals, normals)


def truncated_distance_error(extracted: ExtractedMesh, depths: Tensor, cameras: Cameras, resolution: int) -> Tensor:
    """Mean square difference of the grid's distances from those along the line of sight, both truncated at 3 cells.

    Args:
        extracted: in its training form.
        depths: ``[V, H, W]`` of the object.
        cameras: V.
        resolution: cells of the extraction grid per axis.
    """
    assert extracted.terms is not None
    points, distances = extracted.terms.grid_positions, extracted.terms.grid_sdf
    limit = 3 / resolution
    rotation, shift = cameras.extrinsics[:, :3, :3], cameras.extrinsics[:, :3, 3]
    local = torch.einsum("vij,nj->vni", rotation, points) + shift[:, None]
    projected = torch.einsum("vij,vnj->vni", cameras.intrinsics, local)
    places = 2 * projected[..., :2] / projected[..., 2:] - 1
    seen = grid_sample(depths[:, None], places[:, None], padding_mode="border", align_corners=True)[:, 0, 0]
    along = seen - local[..., 2]
    kept = along > -limit
    error = (distances - along.clamp(-limit, limit)).square()
    return torch.where(kept, error, 0.0).sum() / kept.sum().clamp_min(1)


def sample_points(mesh: Mesh, count: int, generator: torch.Generator) -> Tensor:
    """``[count, 3]`` points on the surface, evenly by area; differentiable in the vertices."""
    corners = embedding(mesh.faces, mesh.vertices)
    a, b, c = corners.unbind(1)
    areas = torch.linalg.cross(b - a, c - a).detach().norm(dim=1).double()
    draws = torch.rand((count, 3), generator=generator, device=generator.device).to(corners)
    total = areas.cumsum(0)
    faces = torch.searchsorted(total, draws[:, 0].double() * total[-1]).clamp_max(len(mesh.faces) - 1)
    root = draws[:, 1:2].sqrt()
    u, v = root * (1 - draws[:, 2:]), root * draws[:, 2:]
    chosen = corners[faces]
    return chosen[:, 0] * (1 - u - v) + chosen[:, 1] * u + chosen[:, 2] * v


def chamfer_distance(points: Tensor, targets: Tensor) -> Tensor:
    """``mean_p min_q |p - q| + mean_q min_p |p - q|`` of ``[N, 3]`` and ``[M, 3]``, world units; differentiable."""
    there = (points - targets[_nearest(points, targets)]).norm(dim=1).mean()
    back = (targets - points[_nearest(targets, points)]).norm(dim=1).mean()
    return there + back


@torch.no_grad()
def _nearest(points: Tensor, targets: Tensor) -> Tensor:
    return torch.cat(list(_nearest_parts(points, targets)))


def _nearest_parts(points: Tensor, targets: Tensor) -> Iterator[Tensor]:
    for part in points.split(max(1, math.floor(_AT_ONCE / max(1, len(targets))))):
        yield torch.cdist(part, targets, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
