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
        tail: columns of a second tile beside the first, 0 for none.
        k: depth of one step of the reduction.
        warps: per program.
        stages: of the software pipeline.
    """

    m: int
    n: int
    tail: int
    k: int
    warps: int
    stages: int


def gather_tiles(dtype: torch.dtype, exact: bool, columns: int, depth: int, device: Properties) -> Tiles:
    """Tile of rows x `columns` output channels, reducing over `depth` input channels per tap."""
    if dtype == torch.float32:
        k = 16 if exact or depth <= 16 else 32
        if exact:
            return Tiles(64, _power(columns, 64), 0, k, 4, 3)
        return Tiles(128, _power(columns, 128), 0, k, 8, 4)
    n, tail = _columns(columns)
    k = _power(depth, 32 if depth % 64 and depth < 128 else 64)
    return Tiles(128, n, tail, k, 8 if n >= 128 else 4, 4)


def pair_tiles(dtype: torch.dtype, exact: bool, rows: int, columns: int, device: Properties) -> Tiles:
    """Tile of `rows` output channels x `columns` input channels, reducing over pairs."""
    if dtype == torch.float32:
        return Tiles(_power(rows, 64), _power(columns, 64), 0, 32, 4, 3)
    m, n = _power(rows, 128), _power(columns, 128)
    return Tiles(m, n, 0, 64, 8 if m * n >= 128 * 128 else 4, 4)


def splits(programs: int, steps: int, device: Properties) -> int:
    """Into how many pieces to cut reductions of `steps` steps when `programs` tiles leave the device idle."""
    wanted = -(-2 * device.multiprocessors // max(programs, 1))
    return max(1, min(wanted, steps // 8, 16))


def _columns(columns: int) -> tuple[int, int]:
    """A tile, and one beside it, that waste little: the released models have 96 and 192 channels."""
    for n, tail in ((16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 64)):
        if columns <= n + tail:
            return n, tail
    return (256, 0) if columns % 256 == 0 or columns > 512 else (128, 0)


def _power(size: int, most: int) -> int:
    """The least power of two that holds `size`, from 16 to `most`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))
