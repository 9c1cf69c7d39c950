"""CPU launch. The driver is csrc/cpu/gaussians.cpp, its inner loops are csrc/cpu/gaussians.inl.h."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened

LIST_ENTRIES = 1 << 24  # at once in the lists of Gaussians per tile: 64 MiB


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    width: int,
    height: int,
    kernel_size: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, shape = means.dtype, (extrinsics.shape[0], height, width)
    images = means.new_empty(*shape, colors.shape[1], dtype=compute_dtype(dtype))
    depths, transmittances = images.new_empty(shape), images.new_empty(shape)
    last = means.new_empty(shape, dtype=torch.int32)
    _cpu.rasterize_gaussians(
        _wide(means),
        _wide(quats),
        _wide(scales),
        _wide(opacities),
        _wide(colors),
        _wide(extrinsics),
        _wide(intrinsics),
        _wide(background),
        images,
        depths,
        transmittances,
        last,
        kernel_size,
        LIST_ENTRIES,
        torch.get_num_threads(),
    )
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide
