"""CPU launch. The driver is csrc/cpu/gaussians.cpp, its inner loops are csrc/cpu/gaussians.inl.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.gaussians import reference
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
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, shape = means.dtype, (extrinsics.shape[0], height, width)
    images = means.new_empty(*shape, colors.shape[-1], dtype=compute_dtype(dtype))
    depths, transmittances, medians = (images.new_empty(shape) for _ in range(3))
    last = means.new_empty(shape, dtype=torch.int32)
    _cpu.rasterize_gaussians(
        _wide(means),
        _wide(quats),
        _wide(scales),
        _wide(opacities),
        _wide(colors if colors.ndim == 3 else colors[None]),
        _wide(extrinsics),
        _wide(intrinsics),
        _wide(background),
        images,
        depths,
        transmittances,
        last,
        medians,
        kernel_size,
        LIST_ENTRIES,
        torch.get_num_threads(),
    )
    state = means.new_empty(0, dtype=torch.uint8)
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last, medians.to(dtype), state


def rasterize_gaussians_backward(*inputs: Any) -> tuple[Tensor, ...]:
    return reference.rasterize_gaussians_backward(*inputs)  # until there is a kernel


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    out = directions.new_empty(directions.shape, dtype=compute_dtype(directions.dtype))
    _cpu.spherical_harmonics(_wide(coefficients), _wide(directions), out, torch.get_num_threads())
    return out.to(coefficients.dtype)


def spherical_harmonics_gradient(
    out_gradient: Tensor, coefficients: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = coefficients.dtype
    by_coefficients, by_directions = (
        tensor.new_empty(tensor.shape, dtype=compute_dtype(dtype)) for tensor in (coefficients, directions)
    )
    _cpu.spherical_harmonics_gradient(
        _wide(out_gradient),
        _wide(coefficients),
        _wide(directions),
        by_coefficients,
        by_directions,
        torch.get_num_threads(),
    )
    return by_coefficients.to(dtype), by_directions.to(dtype)
