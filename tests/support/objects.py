"""One object as a mesh, Gaussians and a radiance field, each made from the same formulas and from no other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import trimesh
from torch import Tensor
from torch.nn.functional import normalize

from trellis.representations.gaussians import GaussianConfig, Gaussians
from trellis.representations.mesh import Mesh
from trellis.representations.radiance_field import RadianceField
from trellis.representations.rotation import matrix_to_quat

_C0 = 0.28209479177387814
# Direction, height and sharpness of the bumps: a long arm to +x, a hat on +z, a nose at -y, a tail at -x +y.
_BUMPS = (
    ((1.0, 0.15, 0.1), 0.20, 14.0),
    ((0.1, 0.0, 1.0), 0.17, 22.0),
    ((0.0, -1.0, -0.1), 0.12, 45.0),
    ((-0.8, 0.6, -0.3), 0.10, 8.0),
)
_STEEPNESS = 4e5  # density per world unit gained per world unit below the surface


class Trio(NamedTuple):
    mesh: Mesh
    gaussians: Gaussians
    radiance_field: RadianceField


def radius(directions: Tensor) -> Tensor:
    """``[...]`` how far the surface is from the origin in directions ``[..., 3]`` of length 1."""
    total = torch.full_like(directions[..., 0], 0.22)
    for axis, height, sharpness in _BUMPS:
        toward = directions @ normalize(directions.new_tensor(axis), dim=0)
        total = total + height * torch.exp(sharpness * (toward - 1))
    return total


def color(points: Tensor) -> Tensor:
    """``[..., 3]`` sRGB: bands of another direction per channel, different on every side."""
    waves = points @ points.new_tensor([[11.0, 3.0, 4.0], [-4.0, 9.0, 6.0], [3.0, -7.0, 12.0]]).T
    return 0.5 + 0.42 * torch.sin(waves + points.new_tensor([0.3, 1.7, 4.0]))


def distance(points: Tensor) -> Tensor:
    """Zero on the surface, negative inside; not the distance itself, but monotonic along each ray from the origin."""
    return points.norm(dim=-1) - radius(normalize(points, dim=-1))


def lumpy_mesh(detail: int = 5) -> Mesh:
    """``20 * 4^detail`` triangles."""
    sphere = trimesh.creation.icosphere(subdivisions=detail)
    directions = normalize(torch.tensor(sphere.vertices), dim=-1)
    vertices = directions * radius(directions)[:, None]
    mesh = Mesh(vertices, torch.tensor(sphere.faces, dtype=torch.int64), color(vertices))
    normals = (mesh.vertex_normals() + 1) / 2
    return Mesh(mesh.vertices, mesh.faces, mesh.colors, normals).to(dtype=torch.float32)


def lumpy_gaussians(detail: int = 5) -> Gaussians:
    """A thin disc at every vertex of the mesh, as wide as its vertices are apart."""
    mesh = lumpy_mesh(detail).to(dtype=torch.float64)
    assert mesh.colors is not None
    z = mesh.vertex_normals()
    x = normalize(torch.linalg.cross(z, z.new_tensor([0.3, 1.0, 0.2]).expand_as(z)), dim=-1)
    rotation = matrix_to_quat(torch.stack([x, torch.linalg.cross(z, x), z], -1))
    a, b, c = (mesh.vertices[corner] for corner in mesh.faces.unbind(1))
    areas = torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2
    around = torch.zeros(len(z), dtype=torch.float64)
    around.index_add_(0, mesh.faces.flatten(), areas.repeat_interleave(3) / 3)
    wide = 0.7 * around.sqrt()
    scales = torch.stack([wide, wide, torch.full_like(wide, 1e-3)], -1)
    config = GaussianConfig(scaling_activation="exp", filter_kernel_size_3d=0.0)
    gaussians = Gaussians(
        mesh.vertices + 0.5,
        ((mesh.colors - 0.5) / _C0)[:, None],
        scales.log() - config.raw_scaling_bias,
        rotation - rotation.new_tensor([1.0, 0, 0, 0]),
        torch.full((len(z), 1), 4.0, dtype=torch.float64) - config.raw_opacity_bias,
        config,
    )
    return gaussians.to(torch.float32)


def lumpy_field(resolution: int = 64, samples: int = 4) -> RadianceField:
    """Voxels along the surface with four trivectors: 1, x, y and z, so that density and color are linear in each."""
    grid = torch.cartesian_prod(*[(torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution] * 3)
    points = (grid - 0.5).requires_grad_()
    signed = distance(points)
    (slopes,) = torch.autograd.grad(signed.sum(), points)
    signed = signed.detach() / slopes.norm(dim=-1)
    near = signed.abs() < 1.6 / resolution
    points, signed, slopes = points.detach()[near], signed[near], normalize(slopes[near], dim=-1)
    logits, tilts = _linear_logits(points)
    # Light is stopped a little below where the density begins, so it begins a little above the surface.
    outer = signed - math.sqrt(1 / _STEEPNESS)
    side = 1 / resolution
    density = -_STEEPNESS * torch.cat([outer[:, None], slopes * side], 1)
    features = torch.stack([logits, *(tilts[..., axis] * side for axis in range(3))], 1) / _C0
    line = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples - 0.5
    trivec = torch.ones(len(points), 4, 3, samples, dtype=torch.float64)
    for axis in range(3):
        trivec[:, 1 + axis, axis] = line
    tensors = (points + 0.5, trivec, density, features[:, :, None])
    positions, trivec, density, features = (tensor.float() for tensor in tensors)
    return RadianceField(positions, resolution.bit_length() - 1, trivec, density, features, resolution)


def _linear_logits(points: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, 3]`` raw colors at the points, and ``[N, 3, 3]`` how each changes along x, y and z."""
    points = points.clone().requires_grad_()
    logits = color(points).logit()
    tilts = [torch.autograd.grad(logits[:, channel].sum(), points, retain_graph=True)[0] for channel in range(3)]
    return logits.detach(), torch.stack(tilts, 1)


def lumpy(detail: int = 5, resolution: int = 64) -> Trio:
    return Trio(lumpy_mesh(detail), lumpy_gaussians(detail + 1), lumpy_field(resolution))
