"""Voxel sets of the sizes that released models meet."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.support.scenes import sphere_voxels


@cache
def object_voxels() -> Tensor:
    """``[19192, 4]`` int32 on the host: two thin shells at 64^3, as many voxels as a usual object has.

    They have 5,632 parents at 32^3, which are the tokens of the latent flow, and 332 windows of 8^3 shifted by 4 with
    57.8 voxels each, 89 at most.
    """
    shells = [sphere_voxels(64, radius=radius, thickness=0.55) for radius in (0.47, 0.34)]
    return torch.cat(shells).unique(dim=0)  # in the order of an occupancy grid


def flexgemm_shell(resolution: int, device: torch.device | str = "cpu") -> Tensor:
    """``[N, 4]`` int32: FlexGEMM's benchmark set, ``R / 2 - 1.25 <= |x| <= R / 2``."""
    axis = torch.arange(resolution, dtype=torch.float32, device=device) - (resolution - 1) / 2
    slices = []
    for start in range(0, resolution, 64):  # 1024^3 at once would take gigabytes
        square = axis[start : start + 64, None, None] ** 2 + axis[:, None] ** 2 + axis**2
        within = (square >= (resolution / 2 - 1.25) ** 2) & (square <= (resolution / 2) ** 2)
        slices.append(within.nonzero() + torch.tensor([start, 0, 0], device=device))
    return torch.nn.functional.pad(torch.cat(slices).int(), (1, 0))
