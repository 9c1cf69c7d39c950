"""Neighbor maps and subdivisions by brute force, for tests that must not rely on the kernels that build them."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbors_of(coords: Tensor, kernel: int = 3) -> Tensor:
    """``[N, kernel^3]`` int32: row of each neighbor of the voxels ``[N, 4]`` (batch, x, y, z), -1 where empty."""
    batch, *xyz = coords.long().T
    half = kernel // 2
    extent = int(coords[:, 1:].max()) + 1 if len(coords) else 1
    samples = int(coords[:, 0].max()) + 1 if len(coords) else 1
    index = torch.full((samples, *(extent + 2 * half,) * 3), -1, dtype=torch.int32)
    index[batch, xyz[0] + half, xyz[1] + half, xyz[2] + half] = torch.arange(len(coords), dtype=torch.int32)
    dx, dy, dz = torch.cartesian_prod(*[torch.arange(kernel)] * 3).view(-1, 3).T
    return index[batch[:, None], xyz[0][:, None] + dx, xyz[1][:, None] + dy, xyz[2][:, None] + dz].contiguous()


def children_of(coords: Tensor) -> Tensor:
    """``[8 N, 4]``: the children of each voxel, dz fastest."""
    offsets = torch.cartesian_prod(torch.arange(1), *[torch.arange(2)] * 3).to(coords.dtype)
    return (coords[:, None] * coords.new_tensor([1, 2, 2, 2]) + offsets).flatten(0, 1)
