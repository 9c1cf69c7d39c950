"""CPU launch. The driver is csrc/cpu/gaussians.cpp, its inner loops are csrc/cpu/gaussians.inl.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened

LIST_ENTRIES = 1 << 24  # at once in the lists of Gaussians per tile: 64 MiB
LIST_SUMS = 1 << 27  # numbers a backward may keep for them: 512 MiB
_MOMENTS = 7  # of these per entry, beside one per channel
_CONTIGUOUS = torch.contiguous_format


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
        _wide(_per_view(colors)),
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


def rasterize_gaussians_backward(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    last: Tensor,
    state: Tensor,
    kernel_size: float,
) -> tuple[Tensor, ...]:
    inputs = [means, quats, scales, opacities, colors, extrinsics, intrinsics, background]
    gradients = [torch.zeros_like(x, dtype=compute_dtype(x.dtype), memory_format=_CONTIGUOUS) for x in inputs]
    read = [
        *(colors_gradient, depths_gradient, transmittances_gradient),
        *(means, quats, scales, opacities, _per_view(colors), extrinsics, intrinsics, background),
        *(out_colors, out_depths, out_transmittances),
    ]
    arguments: list[Any] = [_wide(x) for x in read]
    arguments += [*gradients[:4], _per_view(gradients[4]), *gradients[5:]]
    entries = min(LIST_ENTRIES, LIST_SUMS // (_MOMENTS + colors.shape[-1]))
    arguments += [kernel_size, entries, torch.get_num_threads()]
    _cpu.rasterize_gaussians_backward(*arguments)
    return tuple(x.to(means.dtype) for x in gradients)


def _per_view(colors: Tensor) -> Tensor:
    """``[V, G, C]``, V = 1 where all views have the same."""
    return colors if colors.ndim == 3 else colors[None]


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
