"""Gaussians and cameras shared by tests and benchmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.scenes import sphere_voxels


class Scene(NamedTuple):
    """The tensor arguments of `rasterize_gaussians` before the size of the image, and the background."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    background: Tensor

    def arguments(self, width: int, height: int, kernel_size: float = 0.1) -> tuple[object, ...]:
        return (*self[:7], width, height, self.background, kernel_size)

    def to(self, dtype: torch.dtype) -> Scene:
        return Scene(*(tensor.to(dtype) for tensor in self))


def orbit_cameras(views: int, radius: float = 2.0, fov: float = math.radians(40)) -> tuple[Tensor, Tensor]:
    """Extrinsics ``[V, 4, 4]`` and normalised intrinsics ``[V, 3, 3]`` of cameras around the origin, z up."""
    yaw = torch.arange(views) * (2 * math.pi / max(views, 1)) + 0.4
    eye = radius * torch.stack([yaw.sin() * 0.9, yaw.cos() * 0.9, torch.full_like(yaw, math.sqrt(1 - 0.81))], -1)
    forward = normalize(-eye, dim=-1)
    right = normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0, 1]).expand_as(forward)), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    extrinsics = torch.eye(4).repeat(views, 1, 1)
    extrinsics[:, :3, :3] = rotation
    extrinsics[:, :3, 3] = -(rotation @ eye[:, :, None]).squeeze(-1)
    focal = 0.5 / math.tan(fov / 2)
    intrinsics = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]).repeat(views, 1, 1)
    return extrinsics, intrinsics


def random_scene(count: int, views: int = 1, channels: int = 3, size: float = 0.03, seed: int = 0) -> Scene:
    """Gaussians of all shapes about `size` wide, in the unit cube around the origin."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(count, 3, generator=generator) - 0.5
    quats = normalize(torch.randn(count, 4, generator=generator), dim=-1)
    scales = size * (0.7 * torch.randn(count, 3, generator=generator)).exp()
    opacities = torch.rand(count, generator=generator)
    colors = torch.rand(count, channels, generator=generator)
    background = torch.rand(views, channels, generator=generator)
    return Scene(means, quats, scales, opacities, colors, *orbit_cameras(views), background)


def decoded_scene(count: int, views: int = 1, seed: int = 0) -> Scene:
    """As the decoder makes them: 32 per voxel of a sphere on a 64^3 grid, scales of 0.004 to 0.01."""
    generator = torch.Generator().manual_seed(seed)
    voxels = sphere_voxels(64)[:, 1:]
    voxels = voxels[torch.randperm(len(voxels), generator=generator)[: -(-count // 32)].sort().values]
    offsets = 1.5 * (torch.rand(len(voxels), 32, 3, generator=generator) - 0.5)
    means = ((voxels[:, None] + 0.5 + offsets) / 64 - 0.5).view(-1, 3)[:count]
    quats = normalize(torch.randn(count, 4, generator=generator), dim=-1)
    scales = 0.004 + 0.006 * torch.rand(count, 3, generator=generator)
    opacities = torch.rand(count, generator=generator)
    colors = (means + 0.5).clamp(0, 1)
    return Scene(means, quats, scales, opacities, colors, *orbit_cameras(views), torch.zeros(views, 3))
