"""Pooling and upsampling: whole rows, read through an index."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_rows(
    feats,  # [rows, channels]
    order,  # [rows] int64: rows sorted by the coarse voxel they belong to, stably
    starts,  # [count + 1] int64: where in `order` those of each coarse voxel begin
    out,  # [count, channels]
    channels,
    MEAN: tl.constexpr,
    MORE: tl.constexpr,  # rows counted besides those there are
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One coarse voxel: the sum of its rows in their order, so that results are the same every time."""
    coarse = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    begin = tl.load(starts + coarse)
    end = tl.load(starts + coarse + 1)
    total = tl.zeros((BLOCK,), ACCUMULATOR)
    for i in range(begin, end):
        row = tl.load(order + i)
        total += tl.load(feats + row * channels + channel, mask=inside, other=0.0).to(ACCUMULATOR)
    if MEAN:
        total = total / tl.maximum(end - begin + MORE, 1).to(ACCUMULATOR)
    tl.store(out + coarse * channels + channel, total, mask=inside)


@triton.jit
def gather_rows(
    feats,  # [sources, channels]
    inverse,  # [rows] int32
    out,  # [rows, channels]
    rows,
    sources,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    source = tl.load(inverse + row, mask=row < rows, other=-1).to(tl.int64)
    present = (source >= 0) & (source < sources)
    values = tl.load(feats + source[:, None] * channels + channel[None, :], mask=inside & present[:, None], other=0.0)
    tl.store(out + row[:, None] * channels + channel[None, :], values, mask=inside)
