"""Which tiles the GPU kernels use: pure functions of shapes, dtype and device properties."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trellis_kernels.cuda_device import Properties


class Tiles(NamedTuple):
    """A tile of one of the GEMMs.

    Args:
        m: rows.
        n: columns.
        tail: columns of a second tile beside the first, 0 for none. Tiles have powers of two, channels need not.
        k: depth of one step of the reduction.
        warps: per program.
        stages: of the software pipeline.
        slots: programs the device runs at a time.
    """

    m: int
    n: int
    tail: int
    k: int
    warps: int
    stages: int
    slots: int


def gather_tiles(dtype: torch.dtype, exact: bool, columns: int, depth: int, device: Properties) -> Tiles:
    """Tiles of gather_gemm: of rows x `columns` output channels, reducing over `depth` input channels per tap."""
    if dtype == torch.float32:
        if exact:
            return _tiles(64, _power(columns, 64), 0, 16, 4, 4, device)
        n = _power(columns, 128 if _wide(device) else 64)
        return _tiles(128, n, 0, _power(depth, 32), 8 if n == 128 else 4, 4, device)
    n, tail = _columns(columns, device)
    narrow = tail and not _wide(device)  # fewer registers are left there
    m = 64 if narrow and n == 128 else 128
    k = _power(depth, 32 if narrow or (depth % 64 and depth < 128) else 64)
    warps = 8 if n + tail > 128 or (n == 128 and device.capability[0] != 9) else 4
    return _tiles(m, n, tail, k, warps, 2, device)


def pair_tiles(dtype: torch.dtype, exact: bool, rows: int, columns: int, device: Properties) -> Tiles:
    """Tiles of pair_gemm: of `rows` output channels x `columns` input channels, reducing over pairs."""
    if dtype == torch.float32:
        return _tiles(64, _power(columns, 64), 0, 32, 4, 4, device)
    n, tail = _columns(columns, device, joined=True)
    m = 64 if rows <= 64 or (-(-rows // 64) % 2 and rows < 512) else 128
    k = 64 if _wide(device) or n < 128 else 32
    warps = 8 if m * (n + tail) > 128 * 128 or (tail == 64 and not _wide(device)) else 4
    return _tiles(m, n, tail, k, warps, 2, device)


def parts_pay(rows: int, depth: int) -> bool:
    """Whether an order of rows for each plane of taps saves more time than adding up three float32 results takes.

    Adding takes about 192 / `depth` of the time of the products wanted; one order for all taps wastes half of them at
    15,000 rows on a surface, a third at 64,000, less above.
    """
    return depth >= 512 and rows <= 80 * depth


def gather_splits(programs: int, steps: int, slots: int) -> int:
    """Into how many pieces to cut reductions of about `steps` steps, where `programs` tiles leave slots idle."""
    return max(1, min(slots // max(programs, 1), steps // 8, 16))


def pair_splits(programs: int, rows: int, slots: int) -> int:
    """Likewise for pair_gemm, whose taps differ in length: more pieces than slots, none of them short."""
    return max(1, min(-(-2 * slots // max(programs, 1)), rows // 2048, 16))


def _columns(columns: int, device: Properties, joined: bool = False) -> tuple[int, int]:
    """A tile, and one beside it, that waste little: the released models have 96 and 192 channels."""
    for n, tail in ((16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 64)):
        if columns <= n + tail:
            return n, tail
    if not _wide(device) or -(-columns // 128) % 2:
        return 128, 0
    # In two halves on Blackwell, whose accumulators come out of tensor memory into registers at the end.
    return (128, 128) if device.capability[0] == 10 and not joined else (256, 0)


def _wide(device: Properties) -> bool:
    """Whether tensor cores read both operands from shared memory: Hopper, and Blackwell of data centers."""
    return device.capability[0] in (9, 10)


def _tiles(m: int, n: int, tail: int, k: int, warps: int, size: int, device: Properties) -> Tiles:
    """Complete a tile: as many stages as shared memory holds, for two programs of 4 warps or one of 8."""
    together = 2 if warps == 4 else 1
    stages = (device.shared_memory // together - 2048) // ((m + n + tail) * k * size)
    stages = max(2, min(4, stages)) if _wide(device) else max(2, min(3, stages)) + 1
    return Tiles(m, n, tail, k, warps, stages, together * device.multiprocessors)


def _power(size: int, most: int) -> int:
    """The least power of two that holds `size`, from 16 to `most`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))
