"""GPU launches. The kernels are in triton_rows.py and triton_heads.py.

Nothing here waits for the GPU, so `offsets` are not checked: whatever they hold, no kernel reads or writes outside its
tensors. Sums over the rows of a segment are done in slices whose number depends on the device, the number of
segments and of rows alone, then over the slices: the same result every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.normalization.triton_heads import heads_backward, heads_forward
from trellis_kernels.normalization.triton_rows import gate_backward, norm_backward, rows_forward

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 32_768
_TILE = 1024  # elements of a tile at least, where the rows are narrower
_PER_THREAD = 16  # elements of a tile per thread at most, up to 32 warps


class Tile(NamedTuple):
    """Rows (or heads) and columns of a tile, powers of two, and warps of a program."""

    rows: int
    width: int
    warps: int


def tile_of(width: int, rows: int | None = None) -> Tile:
    """For rows of `width` elements; `rows` if their number is given by the problem."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns) if rows is None else triton.next_power_of_2(rows)
    return Tile(rows, columns, min(max(rows * columns // (32 * _PER_THREAD), 4), 32))


def layer_norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, offsets: Tensor | None, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, out, mean, rstd = _rows_forward(x, None, None, gain, shift, offsets, eps, unit)
    return out, mean, rstd


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _rows_forward(x, update, gate, gain, shift, offsets, eps, unit)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None) -> Tensor:
    total, *_ = _rows_forward(x, update, gate, None, None, offsets, 0.0, 0.0, normed=False)
    return total


def _rows_forward(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    unit: float,
    normed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _expect_supported(x=x, update=update, gate=gate, weight_or_scale=gain, bias_or_shift=shift)
    x = x.contiguous()
    rows, channels = x.shape
    total = x if update is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape) if normed else total
    mean, rstd = (x.new_empty(rows if normed else 0, dtype=torch.float32) for _ in range(2))
    segments = 1 if offsets is None else offsets.shape[0] - 1
    tile = tile_of(channels)
    if x.numel():
        own = [x if values is None else _row_readable(values) for values in (gate, gain, shift)]
        with cuda_device.guard(x):
            rows_forward[(triton.cdiv(rows, tile.rows),)](
                x, x if update is None else update.contiguous(), *own, _offsets(offsets, x), total, out, mean, rstd,
                rows, segments, segments.bit_length(), *(_row_stride(values) for values in own), eps, unit,
                C=channels, ROWS=tile.rows, WIDTH=tile.width, SEGMENTED=segments > 1,
                UPDATED=update is not None, GATED=gate is not None, NORMED=normed, AFFINE=gain is not None,
                num_warps=tile.warps,
            )  # fmt: skip
    return total, out, mean, rstd


def layer_norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    gain: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_supported(x=x, weight_or_scale=gain)
    x, gradient = x.contiguous(), x.new_empty(x.shape)
    rows, channels = x.shape
    own = 0 if gain is None else gain.shape[0]
    tile = tile_of(channels)
    grid = _slices(x, own, tile.rows)
    sums = x.new_zeros(own, grid[0], 2, channels, dtype=torch.float32) if own else None
    if x.numel():
        values = x if gain is None else _row_readable(gain)
        with cuda_device.guard(x):
            norm_backward[grid](
                out_gradient.contiguous(), x, values, _offsets(offsets, x), mean.contiguous(), rstd.contiguous(),
                gradient, mean if sums is None else sums, rows, _row_stride(values), unit,
                C=channels, ROWS=tile.rows, WIDTH=tile.width, SEGMENTED=own > 1, AFFINE=gain is not None,
                num_warps=tile.warps,
            )  # fmt: skip
    if sums is None or gain is None:
        return gradient, x.new_empty(0, channels), x.new_empty(0, channels)
    gain_gradient, shift_gradient = sums.sum(1).to(gain.dtype).unbind(1)
    return gradient, gain_gradient.contiguous(), shift_gradient.contiguous()


def gated_residual_backward(
    out_gradient: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    _expect_supported(update=update, gate=gate)
    update, gradient = update.contiguous(), update.new_empty(update.shape)
    rows, channels = update.shape
    tile = tile_of(channels)
    grid = _slices(update, gate.shape[0], tile.rows)
    sums = update.new_zeros(gate.shape[0], grid[0], channels, dtype=torch.float32)
    if update.numel():
        values = _row_readable(gate)
        with cuda_device.guard(update):
            gate_backward[grid](
                out_gradient.contiguous(), update, values, _offsets(offsets, update), gradient, sums,
                rows, _row_stride(values),
                C=channels, ROWS=tile.rows, WIDTH=tile.width, SEGMENTED=gate.shape[0] > 1, num_warps=tile.warps,
            )  # fmt: skip
    return gradient, sums.sum(1).to(gate.dtype)


def head_rms_norm(x: Tensor, gamma: Tensor, second_gamma: Tensor | None, parts: int) -> Tensor:
    _expect_supported(x=x, gamma=gamma)
    rows, _, heads, width = x.shape
    out = x.new_empty(rows, parts, heads, width)
    if out.numel():
        x, tile = _heads_readable(x), tile_of(width)
        gammas = _gammas(gamma, second_gamma)
        with cuda_device.guard(x):
            heads_forward[(triton.cdiv(rows * heads, tile.rows), parts)](
                x, *gammas, out, rows, *x.stride()[:3], width**0.5,
                H=heads, D=width, NORMED=1 if second_gamma is None else 2, HEADS=tile.rows, WIDTH=tile.width,
                num_warps=tile.warps,
            )  # fmt: skip
    return out


def head_rms_norm_backward(
    out_gradient: Tensor, x: Tensor, gamma: Tensor, second_gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_supported(x=x, gamma=gamma)
    rows, parts, heads, width = x.shape
    normed = 1 if second_gamma is None else 2
    gradient, tile = x.new_empty(x.shape), tile_of(width, heads)
    slices, _ = _slices(x, parts, 1)
    sums = x.new_zeros(normed, slices, heads, width, dtype=torch.float32)
    if x.numel():
        x, gammas = _heads_readable(x), _gammas(gamma, second_gamma)
        with cuda_device.guard(x):
            heads_backward[(slices, parts)](
                out_gradient.contiguous(), x, *gammas, gradient, sums, rows, out_gradient.shape[1],
                *x.stride()[:3], width**0.5,
                H=heads, D=width, NORMED=normed, HEADS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
            )  # fmt: skip
    gradients = sums.sum(1).to(gamma.dtype)
    second = gradients.new_empty(0, heads, width) if second_gamma is None else gradients[1].clone()
    return gradient, gradients[0].clone(), second


def _slices(x: Tensor, segments: int, rows_at_once: int) -> tuple[int, int]:
    """Programs per segment, four on each multiprocessor in all but none for less than four tiles; and segments."""
    count = max(segments, 1)
    wanted = 4 * cuda_device.properties(x).multiprocessors // count
    return max(1, min(wanted, triton.cdiv(x.shape[0], 4 * rows_at_once))), count


def _offsets(offsets: Tensor | None, like: Tensor) -> Tensor:
    return like if offsets is None else offsets.contiguous()  # without segments nothing reads it


def _row_readable(values: Tensor) -> Tensor:
    """Rows may lie apart, as the parts of one modulation do; the elements of a row may not."""
    return values if values.stride(1) == 1 else values.contiguous()


def _row_stride(values: Tensor) -> int:
    return values.stride(0) if values.shape[0] > 1 else 0


def _heads_readable(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _gammas(gamma: Tensor, second_gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    first = gamma.contiguous()
    return first, first if second_gamma is None else second_gamma.contiguous()


def _expect_supported(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be {', '.join(map(str, DTYPES))} on a GPU; got {tensor.dtype}")
    first = next(iter(tensors.values()))
    if first.ndim == 2 and first.shape[1] > MAX_CHANNELS:
        raise ValueError(f"x must have at most {MAX_CHANNELS} channels on a GPU; got {first.shape[1]}")
