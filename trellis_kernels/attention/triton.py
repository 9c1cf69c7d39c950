"""GPU launches. The kernels are in triton_forward.py and triton_backward.py; windows are sorted with torch.

Nothing here waits for the GPU, except `window_partition` once, for the number of windows: so `order` and `offsets` are
not checked. An index out of range is never followed; what the rows concerned then hold is not defined.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.attention.triton_forward import attention_forward
from trellis_kernels.attention.triton_partition import coordinate_range, window_numbers

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 128
_VOXELS = 256  # per program of the partition


class Tiles(NamedTuple):
    """How a kernel is launched: rows of queries and of keys per tile, warps per program, stages of the key loop."""

    queries: int
    keys: int
    warps: int
    stages: int


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    rows, heads, width = query.shape
    out, logsumexp = query.new_empty(rows, heads, width), query.new_empty(rows, heads, dtype=torch.float32)
    tiles = forward_tiles(query.dtype, width, cuda_device.properties(query).capability, gathered=False)
    _forward(query, key, value, query_offsets, query_offsets, key_offsets, out, logsumexp, tiles, gathered=False)
    return out, logsumexp


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    out, logsumexp = qkv.new_empty(rows, heads, width), qkv.new_empty(rows, heads, dtype=torch.float32)
    tiles = forward_tiles(qkv.dtype, width, cuda_device.properties(qkv).capability, gathered=True)
    query, key, value = qkv.unbind(1)
    _forward(query, key, value, order, offsets, offsets, out, logsumexp, tiles, gathered=True)
    return out, logsumexp


def window_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    rows = coords.shape[0]
    if rows == 0:
        return coords.new_empty(0), coords.new_zeros(1)
    shift %= window_size  # more only skips windows that nothing is in
    coords, limits = coords.contiguous(), coords.new_zeros(5)
    numbers = coords.new_empty(rows, dtype=torch.int64)
    grid = (triton.cdiv(rows, _VOXELS),)
    with cuda_device.guard(coords):
        coordinate_range[grid](coords, limits, rows, BLOCK=_VOXELS)
        window_numbers[grid](coords, limits, numbers, rows, window_size, shift, BLOCK=_VOXELS)
    numbers, order = numbers.sort(stable=True)
    rank = (numbers[1:] != numbers[:-1]).cumsum(0)  # of the window of each row but the first, which has 0
    last = rank[-1:] if rows > 1 else numbers.new_zeros(1)
    *highest, lowest, windows = torch.cat([limits, last.int()]).tolist()  # the one time that the host waits
    _expect_coords(highest, lowest, window_size, shift)
    first = torch.searchsorted(rank, torch.arange(1, windows + 2, device=coords.device), out_int32=True) + 1
    return order.int(), torch.cat([first.new_zeros(1), first])


def _expect_coords(highest: list[int], lowest: int, window_size: int, shift: int) -> None:
    if lowest < 0:
        raise ValueError(f"coords must not be negative; got {lowest}")
    batches, *sizes = highest
    if (batches + 1) * math.prod((size + shift) // window_size + 1 for size in sizes) >= 2**62:
        raise ValueError("coords must span fewer than 2^62 windows")


def forward_tiles(dtype: torch.dtype, width: int, capability: tuple[int, int], *, gathered: bool) -> Tiles:
    """The forward's configuration: a function of shape, dtype and device, so that results never change."""
    if dtype == torch.float32:
        return Tiles(64, 32, 8, 1)  # exact products do not run on tensor cores
    if gathered:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 128 if capability[0] == 10 else 64, 8, 3)


def head_parts(width: int) -> tuple[int, int]:
    """The powers of two that a head of this width is split into; the second may be 0. Tensor cores need 16."""
    if width <= 16:
        return 16, 0
    whole = 1 << (width.bit_length() - 1)
    if whole == width:
        return width, 0
    tail = max(16, 1 << (width - whole - 1).bit_length())
    return (whole, tail) if tail < whole else (2 * whole, 0)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, query_offsets: Tensor, key_offsets: Tensor,
    out: Tensor, logsumexp: Tensor, tiles: Tiles, *, gathered: bool,
) -> None:  # fmt: skip
    _expect_supported(query)
    if out.numel() == 0:
        return
    query, key, value = (_readable(x) for x in (query, key, value))
    grid, problem = _grid(query, query_offsets, tiles.queries)
    with cuda_device.guard(query):
        attention_forward[grid](
            query, key, value, order.contiguous(), query_offsets.contiguous(), key_offsets.contiguous(), out, logsumexp,
            query.shape[0], key.shape[0], *problem, query.shape[2] ** -0.5,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            GATHERED=gathered, SPLIT=not gathered and query.dtype != torch.float32, **_head(query.shape[2]),
            BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _grid(tensor: Tensor, offsets: Tensor, block: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The grid, and what a program needs to find its place in it: sequences, search steps, slots, heads."""
    sequences, heads = offsets.shape[0] - 1, tensor.shape[1]
    slots = tensor.shape[0] // block + sequences
    return (slots * heads,), (sequences, (sequences - 1).bit_length(), slots, heads)


def _head(width: int) -> dict[str, Any]:
    part, tail = head_parts(width)
    return {"D": width, "HEAD": part, "TAIL": tail, "WIDEN": triton.knobs.runtime.interpret}


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself wherever its columns are next to each other: rows and heads may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _expect_supported(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"attention on a GPU must be {', '.join(map(str, DTYPES))}; got {tensor.dtype}")
    if tensor.shape[-1] > MAX_WIDTH:
        raise ValueError(f"the head width D must be at most {MAX_WIDTH} on a GPU; got {tensor.shape[-1]}")
