"""Voxel sets shared by tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def random_voxels(resolution: int, occupancy: float, batch: int = 1, seed: int = 0) -> Tensor:
    """``[N, 4]`` int32 (batch, x, y, z): each voxel of `batch` grids is occupied with probability `occupancy`."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand((batch, *(resolution,) * 3), generator=generator, device="cpu")
    return (chance < occupancy).nonzero().int().to(torch.get_default_device())


def sphere_voxels(resolution: int, batch: int = 1, radius: float = 0.4, thickness: float = 1.0) -> Tensor:
    """``[N, 4]`` int32: voxels within `thickness` of a sphere of `radius` grid widths, like an object's surface."""
    axis = torch.arange(resolution) - (resolution - 1) / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - radius * resolution
    return (distance.abs() < thickness).expand(batch, -1, -1, -1).nonzero().int()


def shuffled_within_samples(coords: Tensor, seed: int = 0) -> Tensor:
    """The same voxels, in random order inside each sample."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(coords), generator=generator, device="cpu").to(coords.device)
    return coords[order][coords[order, 0].argsort(stable=True)]
