"""What the GEMMs know of a neighbor map beforehand: an order of rows, the taps each row has, the pairs of each tap."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_keys(
    neighbors,  # [rows, taps]
    keys,  # [orders, rows]
    rows,
    taps,
    locality,  # rows of one block of 2^locality rows stay together
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """Sort keys: the place of a row's tap mask in Gray-code order, for all taps and for each part of them."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.arange(0, BLOCK_TAPS)
    source = tl.load(
        neighbors + row[:, None].to(tl.int64) * taps + tap[None, :],
        mask=(row < rows)[:, None] & (tap < taps)[None, :],
        other=-1,
    )
    present = ((source >= 0) & (source < rows)).to(tl.int32)
    mask = tl.sum(present << tap[None, :], 1)
    tl.store(keys + row, _place(mask) | (row >> locality) << taps, mask=row < rows)
    if PARTS > 1:
        size = taps // PARTS
        for part in tl.static_range(PARTS):
            key = _place((mask >> part * size) & ((1 << size) - 1))
            tl.store(keys + (part + 1) * tl.cast(rows, tl.int64) + row, key, mask=row < rows)


@triton.jit
def _place(mask):
    """Where a word comes in Gray-code order."""
    mask ^= mask >> 1
    mask ^= mask >> 2
    mask ^= mask >> 4
    mask ^= mask >> 8
    return mask ^ (mask >> 16)


@triton.jit
def write_orders(
    keys,  # [orders, rows], sorted
    order,  # [orders, rows] int64
    plan,  # [2 orders + ..., plan_stride]
    rows,
    taps,
    plan_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + which * rows + at, mask=at < rows, other=0)
    row = tl.load(order + which * rows + at, mask=at < rows, other=0).to(tl.int32)
    size = taps // PARTS
    bits = tl.where(which == 0, taps, size)
    key &= (1 << bits) - 1
    mask = (key ^ (key >> 1)) << tl.where(which == 0, 0, (which - 1) * size).to(tl.int32)
    tl.store(plan + 2 * which * plan_stride + at, row, mask=at < rows)
    tl.store(plan + (2 * which + 1) * plan_stride + at, mask, mask=at < rows)


@triton.jit
def count_pairs(
    neighbors,  # [rows, taps]
    counts,  # [taps, blocks]
    rows,
    taps,
    BLOCK: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    present = _present(neighbors, row, tap, rows, taps)
    tl.store(counts + tap * tl.num_programs(0) + tl.program_id(0), tl.sum(present, 0), mask=tap < taps)


@triton.jit
def list_pairs(
    neighbors,  # [rows, taps]
    ends,  # [taps, blocks]: pairs of a tap in this block and those before it
    lists,  # [taps, rows + 1]
    rows,
    taps,
    BLOCK: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """Write, for every tap, the rows that have it, in ascending order; their number goes behind the last column."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    present = _present(neighbors, row, tap, rows, taps)
    end = tl.load(ends + tap * blocks + block, mask=tap < taps, other=0)
    place = (end - tl.sum(present, 0))[None, :] + tl.cumsum(present, 0) - 1
    to = lists + tap[None, :].to(tl.int64) * (rows + 1)
    tl.store(to + place, tl.broadcast_to(row[:, None], place.shape), mask=present > 0)
    if block == blocks - 1:
        tl.store(lists + tap.to(tl.int64) * (rows + 1) + rows, end, mask=tap < taps)


@triton.jit
def _present(neighbors, row, tap, rows, taps):
    source = tl.load(
        neighbors + row[:, None].to(tl.int64) * taps + tap[None, :],
        mask=(row < rows)[:, None] & (tap < taps)[None, :],
        other=-1,
    )
    return ((source >= 0) & (source < rows)).to(tl.int32)
