"""CUDA launches. Kernels: csrc/cuda/radiance_field*.cu; the grid, the sort and sums over images are torch's.

The forward does not wait for the GPU. The gradient lists the runs of samples that rays take from leaves, sorted by
leaf; how many there are depends on the data, so their numbers per camera are read back, the only wait. A run takes
about 60 bytes while it is sorted; cameras are taken in groups of at most RUNS where one of them has not more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.precision import widened

RUNS = 1 << 24  # at once: about 1 GiB
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PIXELS = 2**31 - 1  # at once


def render_radiance_field(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    _check(trivec)
    native = cuda_device.native(trivec)
    shape = (len(extrinsics), height, width)
    images = [trivec.new_empty(*shape, 3, dtype=torch.float32)]
    images += [trivec.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    crossings = trivec.new_empty(shape, dtype=torch.int32)
    with cuda_device.guard(trivec):
        stream = cuda_device.stream(trivec)
        packed, usable = _packed(native, trivec, density, features, stream)
        field = (packed, *_grid(positions, usable, depth))
        for group in _groups([height * width] * len(extrinsics), _PIXELS):
            cameras = _exact(extrinsics[group]), _exact(intrinsics[group]), aabb, depth, trivec.shape[3]
            pixels = _wide(background[group]), _jitter(trivec, jitter, group)
            outputs = [image[group] for image in images]
            native.march_field(*field, *cameras, *pixels, *outputs, crossings[group], stream)
    return *(image.to(trivec.dtype) for image in images), crossings


def render_radiance_field_gradient(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    crossings: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    _check(trivec)
    native = cuda_device.native(trivec)
    results = [torch.zeros_like(x, dtype=torch.float32) for x in (trivec, density, features, background)]
    results = [x.contiguous() for x in results]
    with cuda_device.guard(trivec):
        stream = cuda_device.stream(trivec)
        packed, usable = _packed(native, trivec, density, features, stream)
        field = (packed, *_grid(positions, usable, depth))
        gradients = [_wide(x) for x in (colors_gradient, depths_gradient, transmittances_gradient)]
        runs_of_views = crossings.flatten(1).sum(1, dtype=torch.int64).tolist() if len(trivec) else []
        for group in _groups(runs_of_views, RUNS, height * width):
            lenses = _exact(extrinsics[group]), _exact(intrinsics[group]), aabb, depth
            shifts = _jitter(trivec, jitter, group)
            pixels = _wide(background[group]), shifts, *(x[group] for x in gradients)
            ends = crossings[group].flatten().cumsum(0, dtype=torch.int64)
            total = sum(runs_of_views[group])
            keys = trivec.new_full((total,), len(trivec), dtype=torch.int32)
            runs = keys.new_empty(total, 4)
            firsts, laters = keys.new_empty(total, dtype=torch.float64), keys.new_empty(total, dtype=torch.float32)
            left = gradients[2].new_empty(gradients[2][group].shape)
            lists = (keys, runs, firsts, laters)
            native.note_field(*field, *lenses, trivec.shape[3], *pixels, ends, *lists, left, stream)
            sorted_keys, order = torch.sort(keys, stable=True)
            bounds = torch.arange(len(trivec) + 1, dtype=torch.int32, device=keys.device)
            starts = torch.searchsorted(sorted_keys, bounds, out_int32=True)
            resume = group.start > 0
            noted = (order, starts, runs, firsts, laters, resume)
            native.sum_field_gradient(packed, *lenses, shifts, *pixels[2:4], *noted, *results[:3], stream)
            results[3][group] = (left[..., None] * pixels[2]).flatten(1, 2).sum(1)
        if not len(trivec):
            results[3] = gradients[0].flatten(1, 2).sum(1)
    return tuple(result.to(trivec.dtype) for result in results)


def trace_voxels(
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    native = cuda_device.native(positions)
    ids = positions.new_empty(len(extrinsics), height, width, dtype=torch.int32)
    depths = positions.new_empty(ids.shape, dtype=torch.float64)
    with cuda_device.guard(positions):
        grid = _grid(positions, None, depth)
        for group in _groups([height * width] * len(extrinsics), _PIXELS):
            cameras = _exact(extrinsics[group]), _exact(intrinsics[group]), aabb, depth
            native.trace_voxels(*grid, *cameras, ids[group], depths[group], cuda_device.stream(positions))
    return ids, depths


def _check(trivec: Tensor) -> None:
    if trivec.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"trivec must be one of {names} on a CUDA device; got {trivec.dtype}")


def _packed(native: Any, trivec: Tensor, density: Tensor, features: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """The factors as kernels read them, and for each leaf whether all of them are numbers."""
    count, rank, _, entries = trivec.shape
    packed = trivec.new_empty(count, (3 * entries + 4) * (-(-max(rank, 1) // 4) * 4), dtype=torch.float32)
    usable = trivec.new_ones(count, dtype=torch.int32)
    native.pack_field(_wide(trivec), _wide(density), _wide(features), packed, usable, stream)
    return packed, usable


def _grid(positions: Tensor, usable: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
    """Which leaf fills each cell, in blocks of 4^3 cells: LeafGridView in csrc/include/field_ray.h."""
    extent, side, count = 2**depth, max(2**depth // 4, 1), len(positions)
    places = (positions.detach().double() * extent).floor()
    inside = ((places >= 0) & (places < extent)).all(1)
    if usable is not None:
        inside = inside & usable.bool()
    cells = torch.where(inside[:, None], places, 0).long()
    blocks = ((cells[:, 0] >> 2) * side + (cells[:, 1] >> 2)) * side + (cells[:, 2] >> 2)
    taken = torch.zeros(side**3 + 1, dtype=torch.int32, device=positions.device)
    taken[torch.where(inside, blocks, side**3)] = 1  # all others fall behind the end
    taken = taken[: side**3]
    numbers = torch.where(taken > 0, taken.cumsum(0, dtype=torch.int32) - 1, -1)
    within = ((cells[:, 0] & 3) << 4) | ((cells[:, 1] & 3) << 2) | (cells[:, 2] & 3)
    most = min(count, side**3)
    slots = torch.where(inside, numbers[blocks].long() * 64 + within, most * 64)
    rows = torch.arange(count, dtype=torch.int32, device=positions.device)
    leaves = rows.new_full((most * 64 + 1,), count).scatter_reduce_(0, slots, rows, "amin")[: most * 64]
    return numbers, torch.where(leaves < count, leaves, -1).view(most, 64)


def _groups(counts: list[int], limit: int, pixels: int = 0) -> list[slice]:
    """Ranges of cameras whose counts do not pass `limit` together, nor their pixels 2^31."""
    groups, begin, total = [], 0, 0
    for view, count in enumerate(counts):
        if view > begin and (total + count > limit or (view + 1 - begin) * pixels > _PIXELS):
            groups.append(slice(begin, view))
            begin, total = view, 0
        total += count
    return [*groups, slice(begin, len(counts))] if counts else []


def _jitter(trivec: Tensor, jitter: Tensor | None, group: slice) -> Tensor:
    return trivec.new_empty(0, 0, 0, dtype=torch.float32) if jitter is None else _wide(jitter[group])


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().contiguous()


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide
