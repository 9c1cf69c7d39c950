"""The weight gradients: one GEMM per tap over the pairs of rows it connects, both sides gathered."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl

from trellis_kernels.sparse_conv.triton_gather import octant


@triton.jit
def _listed(lists, block, count, BLOCK_K: tl.constexpr):
    """Rows of a block of pairs, -1 behind the last."""
    pair = block * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.load(lists + pair, mask=pair < count, other=-1)


@triton.jit
def _partner(neighbors, row, rows, columns, column):
    source = tl.load(neighbors + row * columns + column, mask=row >= 0, other=-1)
    return tl.where(source < rows, source, -1).to(tl.int64)


@triton.jit
def pair_gemm(
    feats,  # [rows, in_channels]
    neighbors,  # [rows, columns]
    lists,  # [columns, list_stride]: rows that have a tap; at [column, rows] how many they are
    gradient,  # [rows or 8 rows, out_channels]
    out,  # [out_channels, columns, in_channels], or with several splits or with children [splits, taps, ...] float32
    rows,
    columns,
    in_channels,
    out_channels,
    list_stride,
    out_split_stride,
    out_tap_stride,
    out_row_stride,
    CHILDREN: tl.constexpr,  # tap = child * 8 + parent; else tap = column
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of out_channels
    BLOCK_N: tl.constexpr,  # of in_channels
    BLOCK_T: tl.constexpr,  # of in_channels, beside those; 0 for none
    BLOCK_K: tl.constexpr,  # of pairs
):
    width: tl.constexpr = BLOCK_N + BLOCK_T
    tiles = tl.cdiv(in_channels, width)
    o = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = (tl.program_id(0) % tiles) * width + tl.arange(0, BLOCK_N)
    tap = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    column = octant(tap >> 3) + octant(tap & 7) if CHILDREN else tap
    lists += column * list_stride
    count = tl.load(lists + rows)
    blocks = tl.cdiv(count, BLOCK_K)
    begin = (blocks * split // SPLITS).to(tl.int32)
    end = (blocks * (split + 1) // SPLITS).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_T:
        j = (tl.program_id(0) % tiles) * width + BLOCK_N + tl.arange(0, BLOCK_T)
        tail = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    # Rows are looked up two steps ahead and their neighbors one, so that gathering waits for neither.
    row = _listed(lists, begin, count, BLOCK_K).to(tl.int64)
    source = _partner(neighbors, row, rows, columns, column)
    ahead = _listed(lists, begin + 1, count, BLOCK_K)
    for block in range(begin, end):
        to_gather = row * 8 + (tap >> 3) if CHILDREN else row
        g = tl.load(
            gradient + to_gather[None, :] * out_channels + o[:, None],
            mask=(row >= 0)[None, :] & (o < out_channels)[:, None],
            other=0.0,
        )
        f = tl.load(
            feats + source[:, None] * in_channels + i[None, :],
            mask=(source >= 0)[:, None] & (i < in_channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(g, f, acc, input_precision=PRECISION)
        if BLOCK_T:
            h = tl.load(
                feats + source[:, None] * in_channels + j[None, :],
                mask=(source >= 0)[:, None] & (j < in_channels)[None, :],
                other=0.0,
            )
            tail = tl.dot(g, h, tail, input_precision=PRECISION)
        row = ahead.to(tl.int64)
        source = _partner(neighbors, row, rows, columns, column)
        ahead = _listed(lists, block + 2, count, BLOCK_K)
    to = out + split * out_split_stride + tap * out_tap_stride + o[:, None].to(tl.int64) * out_row_stride
    tl.store(to + i[None, :], acc, mask=(o < out_channels)[:, None] & (i < in_channels)[None, :])
    if BLOCK_T:
        tl.store(to + j[None, :], tail, mask=(o < out_channels)[:, None] & (j < in_channels)[None, :])


@triton.jit
def add_pair_splits(
    partial,  # [SPLITS, taps, out_channels, in_channels] float32
    out,  # [out_channels, columns, in_channels]
    columns,
    in_channels,
    out_channels,
    CHILDREN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum in a fixed order: for each split, and with children for each child, which reads one parent through a tap."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1)
    size = tl.cast(out_channels, tl.int64) * in_channels
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        if CHILDREN:
            for child in tl.static_range(8):
                parent = ((tap // 9 > child // 4) * 4) + ((tap // 3 % 3 > child // 2 % 2) * 2) + (tap % 3 > child % 2)
                matrix = (split * 64 + child * 8 + parent).to(tl.int64)
                total += tl.load(partial + matrix * size + at, mask=inside, other=0.0)
        else:
            matrix = split * tl.cast(columns, tl.int64) + tap
            total += tl.load(partial + matrix * size + at, mask=inside, other=0.0)
    to = out + (at // in_channels * columns + tap) * in_channels + at % in_channels
    tl.store(to, total, mask=inside)
