"""What the voxel maps mean, in plain PyTorch: packed keys, sorted and searched."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 65535  # four coordinates of 16 bits make a 64-bit key


def neighbor_map(coords: Tensor, kernel_size: int) -> Tensor:
    _check_range(coords, LIMIT)
    sorted_keys, rows = _keys(coords).sort(stable=True)
    _check_distinct(coords, sorted_keys, rows)
    if len(coords) == 0:
        return coords.new_empty(0, kernel_size**3)
    steps = torch.arange(kernel_size, dtype=torch.int32, device=coords.device) - kernel_size // 2
    columns = []
    for step in torch.cartesian_prod(steps, steps, steps):
        sought = coords.clone()
        sought[:, 1:] += step
        keys = _keys(sought)
        place = torch.searchsorted(sorted_keys, keys).clamp_max(len(coords) - 1)
        found = (sorted_keys[place] == keys) & ((sought >= 0) & (sought <= LIMIT)).all(1)
        columns.append(torch.where(found, rows[place], -1).int())
    return torch.stack(columns, 1)


def coarsen(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    _check_range(coords, LIMIT)
    coarse = torch.cat([coords[:, :1], coords[:, 1:] // min(factor, LIMIT + 1)], 1)
    unique, inverse = coarse.unique(dim=0, return_inverse=True) if len(coords) else (coarse, coarse[:, 0].clone())
    return unique, inverse.int()


def subdivide_coords(coords: Tensor) -> Tensor:
    _check_range(coords, LIMIT // 2)
    bit = torch.arange(2, dtype=torch.int32, device=coords.device)
    child = torch.nn.functional.pad(torch.cartesian_prod(bit, bit, bit), (1, 0))
    scale = coords.new_tensor([1, 2, 2, 2])
    return (coords[:, None] * scale + child).reshape(-1, 4)


def subdivided_neighbor_map(neighbors: Tensor) -> Tensor:
    n = len(neighbors)
    if 8 * n >= 2**31:
        raise ValueError(f"neighbors must have fewer than 2**28 rows; got {n}")
    bad = (neighbors < -1) | (neighbors >= n)
    if bad.any():
        raise ValueError(f"neighbors must be in [-1, {n}); got {int(neighbors[bad][0])}")
    device = neighbors.device
    parity, tap = torch.arange(2, device=device)[:, None], torch.arange(3, device=device)
    place = parity + tap - 1  # in child widths from the first child of the voxel: -1 .. 2
    coarse_tap = _per_axis(place.div(2, rounding_mode="floor") + 1, 3)
    child = _per_axis(place % 2, 2)
    parents = neighbors[:, coarse_tap]
    return torch.where(parents < 0, -1, 8 * parents + child.int()).reshape(-1, 27)


def _per_axis(table: Tensor, base: int) -> Tensor:
    """``[2, 3]``, a function of one axis' parity and tap -> ``[8, 27]``, its three digits in `base` as one number."""
    x, y, z = table.view(2, 1, 1, 3, 1, 1), table.view(1, 2, 1, 1, 3, 1), table.view(1, 1, 2, 1, 1, 3)
    return ((x * base + y) * base + z).reshape(8, 27)


def _keys(coords: Tensor) -> Tensor:
    """``[N]`` int64, in the lexicographic order of the rows (the batch is shifted to be signed, like the key)."""
    batch, x, y, z = coords.long().unbind(1)
    return ((batch - 2**15) << 48) + (x << 32) + (y << 16) + z


def _check_range(coords: Tensor, limit: int) -> None:
    bound = coords.new_tensor([LIMIT, limit, limit, limit])
    bad = ((coords < 0) | (coords > bound)).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"coords must be in [0, {limit}]; got {coords[row].tolist()} in row {row}")


def _check_distinct(coords: Tensor, sorted_keys: Tensor, rows: Tensor) -> None:
    repeated = (sorted_keys[1:] == sorted_keys[:-1]).nonzero()[:, 0]
    if len(repeated):
        second = int(rows[repeated + 1].min())
        first = int((coords == coords[second]).all(1).nonzero()[0])
        raise ValueError(
            f"coords must hold each voxel once; got {coords[second].tolist()} in rows {first} and {second}"
        )
