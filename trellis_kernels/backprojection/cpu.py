"""CPU launch. The kernels are csrc/cpu/backprojection*."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.backprojection.order import morton_order
from trellis_kernels.precision import compute_dtype, widened

_VIEWS_AT_ONCE = 8  # of half precision: how much of it exists as float32 at the same time
_CHANNELS_AT_ONCE = 128  # of the gradient: the points of a few rows of pixels stay in the second-level cache


def backproject(
    features: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(features.dtype)
    shape = len(positions), features.shape[3]
    out = features.new_full(shape, float("-inf") if maximum else 0.0, dtype=dtype)
    counts = positions.new_zeros(shape[0], dtype=torch.int32)
    winners = positions.new_full(shape if maximum else (0, 0), -1, dtype=torch.int32)
    cameras, order = _cameras(positions, extrinsics, intrinsics), morton_order(positions)
    for views in _portions(len(features), features.dtype):
        (pictures,) = widened(features[views])
        _cpu.backproject(
            pictures, cameras[0], order, cameras[1][views], cameras[2][views], *_depths(depths, cameras[0], views),
            tolerance, views.start, out, counts, winners, torch.get_num_threads(),
        )  # fmt: skip
    if maximum:
        out[counts == 0] = 0
    else:
        out /= counts.clamp(min=1)[:, None]
    return out.to(features.dtype), counts, winners


def backproject_gradient(
    out_gradient: Tensor,
    counts: Tensor,
    winners: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
    height: int,
    width: int,
) -> Tensor:
    order = morton_order(positions)
    gradient = _blocks(out_gradient, order, compute_dtype(out_gradient.dtype))
    if not maximum:
        gradient /= counts[order].clamp(min=1)[:, None]
    winning = _blocks(winners, order, torch.int32) if maximum else winners.new_empty(0, 0, 0)
    shape = (len(extrinsics), height, width, out_gradient.shape[1])
    out = out_gradient.new_empty(shape)
    cameras = _cameras(positions[order], extrinsics, intrinsics)
    for views in _portions(len(extrinsics), out_gradient.dtype):
        whole = out.dtype == gradient.dtype
        portion = out[views] if whole else gradient.new_empty(views.stop - views.start, *shape[1:])
        _cpu.backproject_gradient(
            gradient, winning, cameras[0], cameras[1][views], cameras[2][views], *_depths(depths, cameras[0], views),
            tolerance, views.start, portion, torch.get_num_threads(),
        )  # fmt: skip
        if not whole:
            out[views] = portion
    return out


def _blocks(rows: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, C]`` as ``[B, N, D]``, ordered: a few kilobytes apart, what few channels of neighbors share no cache."""
    channels = rows.shape[1]
    size = min(_CHANNELS_AT_ONCE, max(channels, 1))
    blocks = rows.new_empty(-(-channels // size), len(rows), size, dtype=dtype)
    for block, part in zip(blocks, rows.split(size, dim=1), strict=False):
        block[:, : part.shape[1]] = part.index_select(0, order)
        block[:, part.shape[1] :] = 0
    return blocks


def _portions(views: int, dtype: torch.dtype) -> Iterator[slice]:
    step = max(views, 1) if compute_dtype(dtype) == dtype else _VIEWS_AT_ONCE
    return (slice(first, min(first + step, views)) for first in range(0, views, step))


def _cameras(*tensors: Tensor) -> list[Tensor]:
    """In float64: the side of a border on which a point falls must not depend on the dtype of the arithmetic."""
    return [tensor.double().contiguous() for tensor in tensors]


def _depths(depths: Tensor | None, positions: Tensor, views: slice) -> tuple[Tensor, bool]:
    if depths is None:
        return positions.new_empty(0, 0, 0), False
    return depths[views].to(positions).contiguous(), True
