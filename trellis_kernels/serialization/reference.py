"""What the curves mean, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BATCH = 2**15 - 1  # above 3 * 16 bits of position, below the sign


def morton_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    batch, *axes = _axes(coords, transposed, bits)
    return _interleave(batch, axes, bits)


def hilbert_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    batch, *axes = _axes(coords, transposed, bits)
    for level in range(bits - 1, 0, -1):  # undo the turns of the curve, from the coarsest cell down (Skilling 2004)
        bit, below = 1 << level, (1 << level) - 1
        for axis in range(3):
            reflected = (axes[axis] & bit) != 0
            exchanged = torch.where(reflected, 0, (axes[0] ^ axes[axis]) & below)
            axes[0] = torch.where(reflected, axes[0] ^ below, axes[0] ^ exchanged)
            if axis:
                axes[axis] = axes[axis] ^ exchanged
    axes[1] = axes[1] ^ axes[0]  # Gray code: each cell of the octree differs from the one before in one axis
    axes[2] = axes[2] ^ axes[1]
    parity = torch.zeros_like(batch)
    for level in range(bits - 1, 0, -1):
        parity = torch.where((axes[2] & (1 << level)) != 0, parity ^ ((1 << level) - 1), parity)
    return _interleave(batch, [axis ^ parity for axis in axes], bits)


def morton_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return morton_codes(coords, transposed, bits).argsort(stable=True)


def hilbert_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return hilbert_codes(coords, transposed, bits).argsort(stable=True)


def _axes(coords: Tensor, transposed: bool, bits: int) -> list[Tensor]:
    limit = 2**bits - 1
    bad = ((coords < 0) | (coords > coords.new_tensor([MAX_BATCH, limit, limit, limit]))).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"coords must be in [0, {limit}] (batch: [0, {MAX_BATCH}]); got {coords[row].tolist()} in row {row}"
        )
    batch, x, y, z = coords.long().unbind(1)
    return [batch, y, x, z] if transposed else [batch, x, y, z]


def _interleave(batch: Tensor, axes: list[Tensor], bits: int) -> Tensor:
    code = batch
    for level in range(bits - 1, -1, -1):
        for axis in axes:
            code = (code << 1) | ((axis >> level) & 1)
    return code
