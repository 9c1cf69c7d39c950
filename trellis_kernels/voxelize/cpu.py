"""CPU launch. The kernel is csrc/cpu/voxelize.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import _cpu


def voxelize_mesh(vertices: Tensor, faces: Tensor, resolution: int) -> Tensor:
    threads = torch.get_num_threads()
    bits = faces.new_zeros(resolution, resolution, (resolution + 63) // 64, dtype=torch.int64)
    count = _cpu.voxelize_mesh(vertices.double().contiguous(), faces.contiguous(), resolution, bits, threads)
    coords = faces.new_empty(count, 3)
    _cpu.list_voxels(bits, coords)
    return coords
