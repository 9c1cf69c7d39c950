"""GPU launches. The kernels are in triton_forward.py, triton_backward.py and triton_partition.py.

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
from trellis_kernels.attention import flash
from trellis_kernels.attention.triton_backward import key_gradients, query_gradient, window_gradients
from trellis_kernels.attention.triton_forward import attention_forward
from trellis_kernels.attention.triton_partition import coordinate_range, window_numbers

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 128
_VOXELS = 256  # per program of the partition


class Tiles(NamedTuple):
    """How a kernel is launched: rows of queries and of keys per tile, warps per program, stages of its loop."""

    queries: int
    keys: int
    warps: int
    stages: int


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    _expect_supported(query)
    if flash.is_faster(query.dtype, query.shape[2], cuda_device.properties(query).capability):
        return flash.varlen_attention(query, key, value, query_offsets, key_offsets)
    return _forward(query, key, value, None, query_offsets, key_offsets)


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    _expect_supported(qkv)
    query, key, value = qkv.unbind(1)
    return _forward(query, key, value, order.contiguous(), offsets, offsets)


def varlen_attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_supported(query)
    upstream, query, key, value = (_readable(x) for x in (out_gradient, query, key, value))
    out, logsumexp = out.contiguous(), logsumexp.contiguous()
    offsets = query_offsets.contiguous(), key_offsets.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    inner = torch.empty_like(logsumexp)
    rows, keys, width = query.shape[0], key.shape[0], query.shape[2]
    capability = cuda_device.properties(query).capability
    strides = (stride for x in (upstream, query, key, value) for stride in x.stride()[:2])
    arguments = (width**-0.5, *strides)
    constants = {"SPLIT": query.dtype != torch.float32, **_parts(query)}
    with cuda_device.guard(query):
        if dq.numel():
            tiles = query_tiles(query.dtype, width, capability)
            grid, *place = _places(query, query_offsets, tiles.queries)
            query_gradient[(grid,)](
                upstream, query, key, value, out, logsumexp, *offsets, dq, inner, rows, keys, *place, *arguments,
                **constants, **_options(tiles),
            )  # fmt: skip
        if dk.numel():
            tiles = key_tiles(query.dtype, width, capability)
            grid, *place = _places(key, key_offsets, tiles.keys)
            key_gradients[(grid,)](
                upstream, query, key, value, logsumexp, inner, *offsets, dk, dv, rows, keys, *place, *arguments,
                **constants, **_options(tiles),
            )  # fmt: skip
    return dq, dk, dv


def windowed_attention_backward(
    out_gradient: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
    _expect_supported(qkv)
    upstream, qkv = _readable(out_gradient), _readable(qkv)
    rows, _, heads, width = qkv.shape
    gradient = qkv.new_empty(rows, 3, heads, width)
    if gradient.numel() == 0:
        return gradient
    tiles = window_tiles(qkv.dtype, width, cuda_device.properties(qkv).capability)
    grid, *place = _places(qkv[:, 0], offsets, tiles.queries)
    with cuda_device.guard(qkv):
        window_gradients[(grid,)](
            upstream, qkv, out.contiguous(), logsumexp.contiguous(), order.contiguous(), offsets.contiguous(), gradient,
            rows, *place, width**-0.5, *upstream.stride()[:2], *qkv.stride()[:3],
            **_parts(qkv), BLOCK=tiles.queries, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return gradient


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


# The configurations: functions of shape, dtype and device and of nothing else, so that a result never changes. What
# bounds them is registers: `pytest -m aot` prints those of each. float32 products are exact and do not run on tensor
# cores: small tiles. Without wgmma (9.x) or tcgen05 (10.x) the operands of products are in registers too.


def forward_tiles(dtype: torch.dtype, width: int, capability: tuple[int, int], *, gathered: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(64, 32, 8, 1)
    if gathered:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 128 if capability[0] == 10 else 64, 8, 3)


def query_tiles(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> Tiles:
    if dtype == torch.float32:
        return Tiles(32, 32 if width <= 64 else 16, 8, 1)
    return Tiles(128, 64 if capability[0] in (9, 10) else 32, 8, 2)


def key_tiles(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> Tiles:
    if dtype == torch.float32:
        return Tiles(16, 64, 8, 1) if width <= 64 else Tiles(16, 16, 4, 1)
    return Tiles(64 if capability[0] in (9, 10) else 32, 128, 8, 2)


def window_tiles(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> Tiles:
    """Of the gradients: queries and keys are the same rows."""
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= 64 else Tiles(16, 16, 4, 1)
    return Tiles(64, 64, 4 if width <= 64 else 8, 1) if capability[0] in (9, 10) else Tiles(32, 32, 4, 1)


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
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    out, logsumexp = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    query, key, value = (_readable(x) for x in (query, key, value))
    gathered, width = order is not None, query.shape[2]
    tiles = forward_tiles(query.dtype, width, cuda_device.properties(query).capability, gathered=gathered)
    grid, *place = _places(query, query_offsets, tiles.queries)
    with cuda_device.guard(query):
        attention_forward[(grid,)](
            query, key, value, query_offsets if order is None else order,
            query_offsets.contiguous(), key_offsets.contiguous(), out, logsumexp,
            query.shape[0], key.shape[0], *place, width**-0.5,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            GATHERED=gathered, SPLIT=not gathered and query.dtype != torch.float32, **_parts(query), **_options(tiles),
        )  # fmt: skip
    return out, logsumexp


def _places(tensor: Tensor, offsets: Tensor, block: int) -> tuple[int, int, int, int, int]:
    """Programs, and what one needs to find its place among them: sequences, search steps, slots, heads."""
    sequences, heads = offsets.shape[0] - 1, tensor.shape[1]
    slots = tensor.shape[0] // block + sequences
    return slots * heads, sequences, (sequences - 1).bit_length(), slots, heads


def _parts(tensor: Tensor) -> dict[str, Any]:
    width = tensor.shape[-1]
    part, tail = head_parts(width)
    return {"D": width, "HEAD": part, "TAIL": tail, "WIDEN": triton.knobs.runtime.interpret}


def _options(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself wherever its columns are next to each other: rows and heads may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _expect_supported(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"attention on a GPU must be {', '.join(map(str, DTYPES))}; got {tensor.dtype}")
    if tensor.shape[-1] > MAX_WIDTH:
        raise ValueError(f"the head width D must be at most {MAX_WIDTH} on a GPU; got {tensor.shape[-1]}")
