# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Kernels over rows ``[N, C]``: a program has a tile of ROWS whole rows in registers, WIDTH >= C columns wide.

What a segment has of its own is read from its row of ``[1 or B, C]`` (stride 0 for 1) and is found in the L1 cache by
all but the first row of a segment that a multiprocessor sees.
"""

import triton
import triton.language as tl


@triton.jit
def segment_of(row, offsets, segments, search_steps, SEGMENTED: tl.constexpr):
    """The last segment that begins at or before each row; below `segments` whatever `offsets` holds."""
    low = tl.zeros_like(row)
    if SEGMENTED:
        high = low + segments
        for _ in range(search_steps):
            middle = (low + high) // 2
            found = tl.load(offsets + middle) <= row
            low = tl.where(found, middle, low)
            high = tl.where(found, high, middle)
    return low.to(tl.int64)


@triton.jit(do_not_specialize=["rows", "segments", "search_steps"])
def rows_forward(
    x, update, gate, gain, shift, offsets, total_out, out, mean_out, rstd_out,
    rows, segments, search_steps, gate_stride, gain_stride, shift_stride, eps, unit,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SEGMENTED: tl.constexpr,
    UPDATED: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """total = x + gate * update; out = normalised(total) * (unit + gain) + shift, as far as they are asked for."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = row < rows
    mask = inside[:, None] & (column < C)
    at = row.to(tl.int64)[:, None] * C + column
    segment = segment_of(tl.where(inside, row, 0), offsets, segments, search_steps, SEGMENTED)[:, None]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if UPDATED:
        added = tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            added *= tl.load(gate + segment * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        rounded = (value + added).to(total_out.dtype.element_ty)
        tl.store(total_out + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if NORMED:
        mean = tl.sum(value, 1) / C
        centered = tl.where(mask, value - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / C + eps)
        result = centered * rstd[:, None]
        if AFFINE:
            own_gain = tl.load(gain + segment * gain_stride + column, mask=mask, other=0.0).to(tl.float32)
            own_shift = tl.load(shift + segment * shift_stride + column, mask=mask, other=0.0).to(tl.float32)
            result = result * (unit + own_gain) + own_shift
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
        tl.store(mean_out + row, mean, mask=inside)
        tl.store(rstd_out + row, rstd, mask=inside)


@triton.jit
def slice_of(offsets, rows, SEGMENTED: tl.constexpr, ROWS: tl.constexpr):
    """Rows of this program: slice ``program_id(0)`` of the segment ``program_id(1)``, in whole tiles."""
    begin = 0
    end = rows
    if SEGMENTED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + tl.program_id(1)), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(offsets + tl.program_id(1) + 1), begin), rows)
    tiles = tl.cdiv(end - begin, ROWS)
    each = tl.cdiv(tiles, tl.num_programs(0)) * ROWS
    first = begin + tl.program_id(0) * each
    return first, tl.minimum(first + each, end)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    out_gradient, x, gain, offsets, mean_in, rstd_in, x_gradient, sums, rows, gain_stride, unit,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SEGMENTED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """The gradient of x; into ``sums [B, slices, 2, C]`` this program's part of those of gain and shift."""
    first, end = slice_of(offsets, rows, SEGMENTED, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    own_gain = tl.zeros([1, WIDTH], tl.float32)
    if AFFINE:
        own = gain + tl.program_id(1).to(tl.int64) * gain_stride + column
        own_gain = unit + tl.load(own, mask=column < C, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    shift_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        mask = inside[:, None] & (column < C)
        at = row.to(tl.int64)[:, None] * C + column
        upstream = tl.load(out_gradient + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_in + row, mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_in + row, mask=inside, other=0.0)[:, None]
        normalised = tl.where(mask, (value - mean) * rstd, 0.0)
        along = upstream
        if AFFINE:
            along = upstream * own_gain
            gain_sum += upstream * normalised
            shift_sum += upstream
        plain = (tl.sum(along, 1) / C)[:, None]
        projected = (tl.sum(along * normalised, 1) / C)[:, None]
        gradient = rstd * (along - plain - normalised * projected)
        tl.store(x_gradient + at, gradient.to(x_gradient.dtype.element_ty), mask=mask)
    if AFFINE:
        place = sums + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C
        columns = tl.arange(0, WIDTH)
        tl.store(place + columns, tl.sum(gain_sum, 0), mask=columns < C)
        tl.store(place + C + columns, tl.sum(shift_sum, 0), mask=columns < C)


@triton.jit(do_not_specialize=["rows"])
def gate_backward(
    out_gradient, update, gate, offsets, update_gradient, sums, rows, gate_stride,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """The gradient of the update; into ``sums [B, slices, C]`` this program's part of that of the gate."""
    first, end = slice_of(offsets, rows, SEGMENTED, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    own = gate + tl.program_id(1).to(tl.int64) * gate_stride + column
    own_gate = tl.load(own, mask=column < C, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < C)
        at = row.to(tl.int64)[:, None] * C + column
        upstream = tl.load(out_gradient + at, mask=mask, other=0.0).to(tl.float32)
        gate_sum += upstream * tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(update_gradient + at, (upstream * own_gate).to(update_gradient.dtype.element_ty), mask=mask)
    columns = tl.arange(0, WIDTH)
    place = sums + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C
    tl.store(place + columns, tl.sum(gate_sum, 0), mask=columns < C)
