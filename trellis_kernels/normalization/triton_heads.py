# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Kernels over attention heads ``[N, P, H, D]``: a program has a tile of HEADS whole heads of one part in registers."""

import triton
import triton.language as tl

LEAST_NORM = tl.constexpr(1e-12)  # a head shorter than this is divided by this instead


@triton.jit(do_not_specialize=["rows"])
def heads_forward(
    x, gamma, second_gamma, out, rows, row_stride, part_stride, head_stride, factor,
    H: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Part ``program_id(1)``, normalised if it is one of the first NORMED, else as it is."""
    part = tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    row = unit // H
    head = (unit % H)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (column < D)
    source = x + row[:, None] * row_stride + part * part_stride + head * head_stride + column
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if part < NORMED:
        own = gamma
        if part == 1:
            own = second_gamma
        norm = tl.sqrt(tl.sum(value * value, 1))
        scale = factor / tl.maximum(norm, LEAST_NORM)
        value = value * scale[:, None] * tl.load(own + head * D + column, mask=mask, other=0.0).to(tl.float32)
    target = ((row * tl.num_programs(1) + part)[:, None] * H + head) * D + column
    tl.store(out + target, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "out_parts"])
def heads_backward(
    out_gradient, x, gamma, second_gamma, x_gradient, sums, rows, out_parts, row_stride, part_stride, head_stride,
    factor, H: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Slice ``program_id(0)`` of the rows of part ``program_id(1)``; HEADS >= H.

    Into ``sums [NORMED, slices, H, D]`` goes this program's part of the gradients of the gammas.
    """
    part = tl.program_id(1)
    each = tl.cdiv(rows, tl.num_programs(0))
    first = tl.program_id(0) * each
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (head < H) & (column < D)
    place = head * D + column
    own = gamma
    if part == 1:
        own = second_gamma
    own_gamma = tl.zeros([HEADS, WIDTH], tl.float32)
    if part < NORMED:
        own_gamma = tl.load(own + place, mask=mask, other=0.0).to(tl.float32)
    gamma_sum = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in range(first, tl.minimum(first + each, rows)):
        row = tl.cast(start, tl.int64)
        result = tl.zeros([HEADS, WIDTH], tl.float32)
        if part < out_parts:
            source = (row * out_parts + part) * (H * D) + place
            result = tl.load(out_gradient + source, mask=mask, other=0.0).to(tl.float32)
        if part < NORMED:
            from_x = x + row * row_stride + part * part_stride + head * head_stride + column
            value = tl.load(from_x, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(value * value, 1)[:, None]
            norm = tl.sqrt(squares)
            scale = factor / tl.maximum(norm, LEAST_NORM)
            gamma_sum += result * value * scale
            along = result * own_gamma
            inner = tl.sum(along * value, 1)[:, None]
            projection = tl.where(norm > LEAST_NORM, inner / tl.where(norm > LEAST_NORM, squares, 1.0), 0.0)
            result = scale * (along - value * projection)
        target = (row * tl.num_programs(1) + part) * (H * D) + place
        tl.store(x_gradient + target, result.to(x_gradient.dtype.element_ty), mask=mask)
    if part < NORMED:
        slot = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (H * D)
        tl.store(sums + slot + place, gamma_sum, mask=mask)
