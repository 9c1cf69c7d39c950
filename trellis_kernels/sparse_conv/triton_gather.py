"""The implicit GEMM of both convolutions and of their input gradients.

A program makes one tile of output rows times output channels. Its reduction runs over (tap, block of input channels);
the rows of the input are gathered inside that loop, and taps that no row of the tile has are not visited.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl

# How taps and rows relate. PLAIN: tap = column of the neighbor map. TO_CHILDREN: a program makes one of the 8 children
# of its rows, whose 8 taps are parents. FROM_CHILDREN: 64 taps, the (child, parent) pairs of the former turned round.
PLAIN = tl.constexpr(0)
TO_CHILDREN = tl.constexpr(1)
FROM_CHILDREN = tl.constexpr(2)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def octant(code):
    """Column of a 3x3x3 map with the digits of a 3-bit number: x is worth 9, y 3, z 1."""
    return (code >> 2) * 9 + ((code >> 1) & 1) * 3 + (code & 1)


@triton.jit
def _column(tap, child, KIND: tl.constexpr):
    """Where the neighbor map has the source of a tap."""
    if KIND == PLAIN:
        return tap
    if KIND == TO_CHILDREN:
        return octant(child) + octant(tap)
    return 26 - octant(tap >> 3) - octant(tap & 7)


@triton.jit
def _lowest(mask):
    """Number of the lowest set bit, the exponent of that power of two as a float; negative if there is none."""
    return (((mask & -mask).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _row(plan, position, inside, plan_stride, order, MASKED: tl.constexpr, CACHE: tl.constexpr):
    """Which row comes at a position."""
    if MASKED:
        return tl.load(plan + 2 * order * plan_stride + position, mask=inside, other=0, cache_modifier=CACHE)
    return position


@triton.jit
def _source(neighbors, row, inside, rows, columns, tap, child, KIND: tl.constexpr):
    """Rows of the input that a tap reads, -1 for none; a row out of range counts as none."""
    column = tl.minimum(tl.maximum(_column(tap, child, KIND), 0), columns - 1)  # behind the last tap: anything
    source = tl.load(neighbors + row.to(tl.int64) * columns + column, mask=inside, other=-1)
    source = tl.where(source < rows, source, -1).to(tl.int64)
    if KIND == FROM_CHILDREN:
        source = tl.where(source < 0, -1, source * 8 + (tap >> 3))
    return source


@triton.jit
def gather_gemm(
    feats,  # [rows or 8 rows, in_channels]
    neighbors,  # [rows, columns]
    plan,  # [2 orders, plan_stride]: order and tap masks, for each order
    weight,
    bias,
    out,  # [rows or 8 rows, out_channels], or with several splits [splits, ...] float32
    rows,
    columns,
    in_channels,
    out_channels,
    plan_stride,
    weight_tap_stride,
    weight_in_stride,
    weight_out_stride,
    KIND: tl.constexpr,
    MIRRORED: tl.constexpr,  # tap k takes the weight of tap columns - 1 - k
    MASKED: tl.constexpr,  # there is a plan; without one all taps are visited
    FIRST_ORDER: tl.constexpr,
    PARTS: tl.constexpr,  # groups of taps with an order of rows each
    SPLITS: tl.constexpr,  # pieces of the reduction of each part
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # width of a second, narrower tile beside the first; 0 for none
    BLOCK_K: tl.constexpr,
):
    width: tl.constexpr = BLOCK_N + BLOCK_T
    tiles = tl.cdiv(out_channels, width)
    first_row = (tl.program_id(0) // tiles) * BLOCK_M
    first_column = (tl.program_id(0) % tiles) * width
    child = tl.program_id(1)
    split = tl.program_id(2)
    order = FIRST_ORDER + split // SPLITS

    position = first_row + tl.arange(0, BLOCK_M)
    inside = position < rows
    steps = tl.cdiv(in_channels, BLOCK_K)
    row = _row(plan, position, inside, plan_stride, order, MASKED, "")
    if MASKED:
        masks = tl.load(plan + (2 * order + 1) * plan_stride + position, mask=inside, other=0)
        mask = tl.reduce(masks, 0, _either).to(tl.int64)
        if KIND != PLAIN:
            taps = tl.arange(0, 8 if KIND == TO_CHILDREN else 64)
            mask = tl.sum(((mask >> _column(taps, child, KIND)) & 1) << taps)
        total = tl.sum((mask >> tl.arange(0, 64)) & 1).to(tl.int32) * steps
    else:
        mask = tl.full((), 0, tl.int64)
        total = columns * steps
    begin = (total.to(tl.int64) * (split % SPLITS) // SPLITS).to(tl.int32)
    end = (total.to(tl.int64) * (split % SPLITS + 1) // SPLITS).to(tl.int32)
    if MASKED:
        for _ in range(begin // steps):
            mask &= mask - 1

    # Offsets inside a tile fit 32 bits; those of tiles are added to the pointer, in 64.
    weight += first_column.to(tl.int64) * weight_out_stride
    channel = tl.arange(0, BLOCK_K)
    column = first_column + tl.arange(0, BLOCK_N)
    inner = channel[:, None] * weight_in_stride + tl.arange(0, BLOCK_N)[None, :] * weight_out_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_T:
        tail_column = first_column + BLOCK_N + tl.arange(0, BLOCK_T)
        tail_inner = (
            channel[:, None] * weight_in_stride + (BLOCK_N + tl.arange(0, BLOCK_T))[None, :] * weight_out_stride
        )
        tail = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    step = begin % steps
    tap = _lowest(mask) if MASKED else begin // steps
    source = _source(neighbors, row, inside, rows, columns, tap, child, KIND)
    for _ in range(begin, end):
        k = step * BLOCK_K + channel
        a = tl.load(
            feats + source[:, None] * in_channels + k[None, :],
            mask=(source >= 0)[:, None] & (k < in_channels)[None, :],
            other=0.0,
        )
        matrix = columns - 1 - tap if MIRRORED else tap
        if KIND == TO_CHILDREN:
            matrix = child * 8 + tap
        block = weight + matrix.to(tl.int64) * weight_tap_stride + (step * BLOCK_K).to(tl.int64) * weight_in_stride
        b = tl.load(
            block + inner,
            mask=(k < in_channels)[:, None] & (column < out_channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if BLOCK_T:
            c = tl.load(
                block + tail_inner,
                mask=(k < in_channels)[:, None] & (tail_column < out_channels)[None, :],
                other=0.0,
            )
            tail = tl.dot(a, c, tail, input_precision=PRECISION)
        # The rows of the next step are looked up one step ahead, so that gathering does not wait for them.
        step += 1
        last = step == steps
        step = tl.where(last, 0, step)
        if MASKED:
            mask = tl.where(last, mask & (mask - 1), mask)
            tap = _lowest(mask)
        else:
            tap = tl.where(last, tap + 1, tap)
        source = _source(neighbors, row, inside, rows, columns, tap, child, KIND)

    # Read again, past L1, rather than kept in registers all the while.
    target = (_row(plan, position, inside, plan_stride, order, MASKED, ".cg")).to(tl.int64)
    if KIND == TO_CHILDREN:
        target = target * 8 + child
    count = tl.cast(rows, tl.int64) * (8 if KIND == TO_CHILDREN else 1)
    to = out + (split * count + target)[:, None] * out_channels
    _store(to, acc, bias, column, inside, out_channels, HAS_BIAS)
    if BLOCK_T:
        _store(to, tail, bias, tail_column, inside, out_channels, HAS_BIAS)


@triton.jit
def _store(to, acc, bias, column, inside, out_channels, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < out_channels, other=0.0).to(tl.float32)[None, :]
    tl.store(to + column[None, :], acc, mask=inside[:, None] & (column < out_channels)[None, :])


@triton.jit
def add_splits(
    partial,  # [SPLITS, size] float32
    bias,
    out,  # [size]
    size,
    out_channels,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the splits in their order, and round once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * tl.cast(size, tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % out_channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=inside)


@triton.jit
def collapse_weight(
    weight,  # [Co, 27, Ci]
    out,  # [8 children, 8 parents, Co, Ci]
    weight_out_stride,
    weight_tap_stride,
    weight_in_stride,
    out_channels,
    in_channels,
    BLOCK: tl.constexpr,
):
    """Sum the taps through which a child reads the same parent; it has 8 parents, at offsets child + parent - 1."""
    child = tl.program_id(0) // 8
    parent = tl.program_id(0) % 8
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.cast(out_channels, tl.int64) * in_channels
    weight += at // in_channels * weight_out_stride + at % in_channels * weight_in_stride
    total = tl.zeros((BLOCK,), tl.float32)
    # Along an axis, tap k leads to the nearer parent 0 for k <= child digit and to parent 1 for k above it.
    x, y, z = child >> 2, (child >> 1) & 1, child & 1
    for kx in range((parent >> 2) * (1 + x), 1 + x + (parent >> 2) * (2 - x)):
        for ky in range(((parent >> 1) & 1) * (1 + y), 1 + y + ((parent >> 1) & 1) * (2 - y)):
            for kz in range((parent & 1) * (1 + z), 1 + z + (parent & 1) * (2 - z)):
                tap = (kx * 3 + ky) * 3 + kz
                total += tl.load(weight + tap * weight_tap_stride, mask=inside, other=0.0).to(tl.float32)
    to = out + tl.program_id(0).to(tl.int64) * out_channels * in_channels
    tl.store(to + at, total, mask=inside)
