"""The order in which points are visited: neighbors in space see the same pixels."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 10  # per axis, so that a key is a positive int32


def morton_order(positions: Tensor) -> Tensor:
    """A permutation, ``[N]`` int64, along a Morton curve through the box of `positions` ``[N, 3]`` (NaN: anywhere)."""
    if not positions.numel():
        return positions.new_empty(0, dtype=torch.int64)
    low, scale = grid_of(positions)
    # a NaN that is left (an infinite box) becomes 0
    cells = ((positions - low) * scale).nan_to_num().clamp(0, (1 << BITS) - 1).int()
    for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):
        cells = (cells | cells << shift) & mask
    x, y, z = cells.unbind(1)
    return (x << 2 | y << 1 | z).argsort(stable=True)


def grid_of(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cells of the curve begin, ``[3]``, and how many there are to a unit of length, ``[]``."""
    low, high = positions.nan_to_num().aminmax(dim=0)
    return low, (1 << BITS) / (high - low).amax().clamp(min=1e-30)
