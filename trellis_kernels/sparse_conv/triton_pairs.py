"""The weight gradients: one GEMM per tap over the pairs of rows it connects, both sides gathered."""

from __future__ import annotations

import triton
import triton.language as tl

from trellis_kernels.sparse_conv.triton_gather import octant


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
    BLOCK_K: tl.constexpr,  # of pairs
):
    tiles = tl.cdiv(in_channels, BLOCK_N)
    o = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    column = octant(tap >> 3) + octant(tap & 7) if CHILDREN else tap
    lists += column * list_stride
    count = tl.load(lists + rows)
    blocks = tl.cdiv(count, BLOCK_K)
    begin = (blocks.to(tl.int64) * split // SPLITS).to(tl.int32)
    end = (blocks.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(begin, end):
        pair = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = pair < count
        row = tl.load(lists + pair, mask=inside, other=0).to(tl.int64)
        source = tl.load(neighbors + row * columns + column, mask=inside, other=0).to(tl.int64)
        if CHILDREN:
            row = row * 8 + (tap >> 3)
        g = tl.load(
            gradient + row[:, None] * out_channels + o[None, :],
            mask=inside[:, None] & (o < out_channels)[None, :],
            other=0.0,
        )
        f = tl.load(
            feats + source[:, None] * in_channels + i[None, :],
            mask=inside[:, None] & (i < in_channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(g), f, acc, input_precision=PRECISION)
    to = out + split * out_split_stride + tap * out_tap_stride
    tl.store(
        to + o[:, None].to(tl.int64) * out_row_stride + i[None, :],
        acc,
        mask=(o < out_channels)[:, None] & (i < in_channels)[None, :],
    )


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
    size = out_channels.to(tl.int64) * in_channels
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        if CHILDREN:
            for child in tl.static_range(8):
                parent = ((tap // 9 > child // 4) * 4) + ((tap // 3 % 3 > child // 2 % 2) * 2) + (tap % 3 > child % 2)
                matrix = (split * 64 + child * 8 + parent).to(tl.int64)
                total += tl.load(partial + matrix * size + at, mask=inside, other=0.0)
        else:
            matrix = split * columns.to(tl.int64) + tap
            total += tl.load(partial + matrix * size + at, mask=inside, other=0.0)
    to = out + (at // in_channels * columns + tap) * in_channels + at % in_channels
    tl.store(to, total, mask=inside)
