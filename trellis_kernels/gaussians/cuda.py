"""CUDA launches. Kernels: csrc/cuda/gaussians_project.cu and gaussians.cu; sorts and sums are torch's.

Gaussians are sorted by depth once per camera; their (camera, tile) pairs are listed in that order and sorted by tile,
stably, so that each tile's list is nearest first and ties go by index. How many pairs there are depends on the data:
one number is read back per group of cameras, the only wait for the GPU (more only where the lists would not fit
LIST_ENTRIES and are taken in several parts, nearest first). A buffer of a guessed capacity would need no wait, but a
picture with more pairs than guessed would be wrong, or the answer read back all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.precision import widened

TILE = 16
SPLATS = 1 << 23  # Gaussians times cameras at once: about 700 MiB
LIST_ENTRIES = 1 << 26  # pairs of Gaussian and tile at once, about 40 bytes each while they are sorted
_CAMERAS = 1024  # at once: tiles of all fit 31 bits at any size of picture
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    width: int,
    height: int,
    kernel_size: float,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, views = means.dtype, extrinsics.shape[0]
    if dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"means must be one of {names} on a CUDA device; got {dtype}")
    native = cuda_device.native(means)
    shape = (views, height, width)
    images = means.new_empty(*shape, colors.shape[-1], dtype=torch.float32)
    depths, transmittances, medians = (images.new_empty(shape) for _ in range(3))
    last = images.new_empty(shape, dtype=torch.int32)
    with cuda_device.guard(means):
        stream = cuda_device.stream(means)
        gaussians = [_wide(x) for x in (means, quats, scales, opacities)]
        cameras = [_wide(x) for x in (extrinsics, intrinsics)]
        shades, behind = _wide(colors if colors.ndim == 3 else colors[None]), _wide(background)
        across, down = -(-width // TILE), -(-height // TILE)
        step = min(max(SPLATS // max(len(means), 1), 1), _CAMERAS)
        for first in range(0, views, step):
            group = slice(first, first + step)
            outputs = (images[group], depths[group], transmittances[group], last[group], medians[group])
            chosen = [x[group] for x in cameras]
            its_shades = shades if colors.ndim == 2 else shades[group]
            splats, places, counts, depth_keys = _project(native, gaussians, chosen, width, height, kernel_size, stream)
            order = torch.sort(depth_keys, stable=True)[1]
            ends = counts.gather(1, order).flatten().cumsum(0, dtype=torch.int64)
            parts = _parts(ends)
            for part, (begin, end, entries) in enumerate(parts):
                tiles = means.new_empty(entries, dtype=torch.int32)
                slots = torch.empty_like(tiles)
                native.list_tiles(places, order, ends, begin, end, across, across * down, tiles, slots, stream)
                starts, permutation = _by_tile(tiles, len(chosen[0]) * across * down)
                resume, finish = part > 0, part == len(parts) - 1
                native.blend_tiles(
                    splats, its_shades, slots, permutation, starts, behind[group], resume, finish, *outputs, stream
                )
    state = means.new_empty(0, dtype=torch.uint8)
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last, medians.to(dtype), state


def _project(
    native: Any,
    gaussians: list[Tensor],
    cameras: list[Tensor],
    width: int,
    height: int,
    kernel_size: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is drawn of each Gaussian by each camera; see csrc/cuda/gaussians.h."""
    shape = (len(cameras[0]), len(gaussians[0]))
    depths = gaussians[0].new_empty(shape)
    splats, places = depths.new_empty(depths.numel(), 8), depths.new_empty(depths.numel(), 4, dtype=torch.int32)
    counts = depths.new_empty(shape, dtype=torch.int32)
    native.project_gaussians(*gaussians, *cameras, width, height, kernel_size, splats, places, counts, depths, stream)
    return splats, places, counts, depths


def _parts(ends: Tensor) -> list[tuple[int, int, int]]:
    """Ranges of ranks whose lists fit LIST_ENTRIES, and how long the lists are: one range, or as many as needed."""
    count = len(ends)
    total = int(ends[-1]) if count else 0
    if total <= LIST_ENTRIES:
        return [(0, count, total)]
    parts, begin, done = [], 0, 0
    while done < total:
        limit = torch.tensor(done + LIST_ENTRIES, device=ends.device)
        end = max(int(torch.searchsorted(ends, limit, right=True)), begin + 1)
        entries = int(ends[end - 1]) - done
        parts.append((begin, end, entries))
        begin, done = end, done + entries
    return parts


def _by_tile(tiles: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the list of each tile begins in the permutation that sorts the pairs by tile, and the permutation."""
    if count < 1 << 15:  # half the digits for the sort
        tiles = tiles.short()
    keys, permutation = torch.sort(tiles, stable=True)
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    return torch.searchsorted(keys, bounds, out_int32=True), permutation


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    return _harmonics("spherical_harmonics", [coefficients, directions], [directions])[0]


def spherical_harmonics_gradient(
    out_gradient: Tensor, coefficients: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    inputs = [out_gradient, coefficients, directions]
    by_coefficients, by_directions = _harmonics("spherical_harmonics_gradient", inputs, inputs[1:])
    return by_coefficients, by_directions


def _harmonics(name: str, inputs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    dtype = inputs[0].dtype
    if dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"coefficients must be one of {names} on a CUDA device; got {dtype}")
    native = cuda_device.native(inputs[0])
    with cuda_device.guard(inputs[0]):
        outs = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in like]
        getattr(native, name)(*map(_wide, inputs), *outs, cuda_device.stream(inputs[0]))
    return [out.to(dtype) for out in outs]
