"""CUDA launches. Kernels: csrc/cuda/gaussians_project.cu and gaussians.cu, for gradients gaussians_gradient.cu and
gaussians_project_gradient.cu; sorts and sums are torch's.

Gaussians are sorted by depth once per camera; their (camera, tile) pairs are listed in that order and sorted by tile,
stably, so that each tile's list is nearest first and ties go by index. How many pairs there are depends on the data:
one number is read back per group of cameras, the only wait for the GPU (more only where the lists would not fit
LIST_ENTRIES and are taken in several parts, nearest first). A buffer of a guessed capacity would need no wait, but a
picture with more pairs than guessed would be wrong, or the answer read back all the same.

The gradient needs the lists again. If one group of cameras and one part hold them all, the forward keeps them (`state`)
and the gradient does not wait; else it makes them again, the farthest part first. Sums are taken in an order that only
the inputs determine, so that gradients are the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trellis_kernels import cuda_device
from trellis_kernels.precision import widened

TILE = 16
SPLATS = 1 << 23  # Gaussians times cameras at once: about 700 MiB
LIST_ENTRIES = 1 << 26  # pairs of Gaussian and tile at once, about 40 bytes each while they are sorted
_CAMERAS = 1024  # at once: tiles of all fit 31 bits at any size of picture
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAMERA = 16  # gradients per camera: three rows of its pose, two focal lengths, principal point
_NOTHING = (0, 0, 0, 0)


class _Scene(NamedTuple):
    """What is drawn, in float32."""

    gaussians: tuple[Tensor, Tensor, Tensor, Tensor]  # means, quats, scales, opacities
    colors: Tensor  # [1 or V, G, C]
    extrinsics: Tensor
    intrinsics: Tensor
    background: Tensor
    width: int
    height: int
    kernel_size: float

    @property
    def across(self) -> int:
        return -(-self.width // TILE)

    @property
    def tiles(self) -> int:
        return self.across * -(-self.height // TILE)

    def colors_of(self, cameras: slice) -> Tensor:
        return self.colors if len(self.colors) == 1 else self.colors[cameras]


class _Group(NamedTuple):
    """Cameras drawn at once, and all Gaussians as each of them sees them; see csrc/cuda/gaussians.h."""

    cameras: slice
    splats: Tensor
    places: Tensor
    counts: Tensor
    order: Tensor
    ends: Tensor


class _Lists(NamedTuple):
    """Pairs of Gaussian and tile; see csrc/cuda/gaussians.h."""

    slots: Tensor
    permutation: Tensor
    starts: Tensor


class _State(NamedTuple):
    """What a gradient needs of a group of cameras."""

    splats: Tensor  # [V * G, 8] float32
    firsts: Tensor  # [V * G] int64
    permutation: Tensor  # [entries] int64
    slots: Tensor  # [entries] int32
    counts: Tensor  # [V, G] int32
    starts: Tensor  # [V * tiles + 1] int32


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
    native = _native(means)
    shape = (views, height, width)
    images = means.new_empty(*shape, colors.shape[-1], dtype=torch.float32)
    depths, transmittances, medians = (images.new_empty(shape) for _ in range(3))
    last = images.new_empty(shape, dtype=torch.int32)
    state = means.new_empty(0, dtype=torch.uint8)
    with cuda_device.guard(means):
        stream = cuda_device.stream(means)
        inputs = (means, quats, scales, opacities, colors, extrinsics, intrinsics, background)
        scene = _scene(inputs, width, height, kernel_size)
        for group in _groups(native, scene, stream):
            outputs = [x[group.cameras] for x in (images, depths, transmittances, last, medians)]
            shades, behind = scene.colors_of(group.cameras), scene.background[group.cameras]
            parts = _parts(group.ends)
            kept = None
            if keep and len(parts) == 1 and len(group.counts) == views:
                state = means.new_empty(_bytes(group.counts, scene.tiles, parts[0][2]), dtype=torch.uint8)
                kept = _kept(state, group.counts.shape, scene.tiles)
                kept.splats.copy_(group.splats)
                kept.counts.copy_(group.counts)
                native.first_entries(group.order, group.ends, kept.firsts, stream)
            for number, part in enumerate(parts):
                lists = _lists(native, scene, group, part, kept, stream)
                resume, finish = number > 0, number == len(parts) - 1
                native.blend_tiles(group.splats, shades, *lists, behind, resume, finish, *outputs, stream)
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last, medians.to(dtype), state


def rasterize_gaussians_backward(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    last: Tensor,
    state: Tensor,
    kernel_size: float,
) -> tuple[Tensor, ...]:
    dtype, views, count = means.dtype, extrinsics.shape[0], len(means)
    native = _native(means)
    height, width = last.shape[1:]
    with cuda_device.guard(means):
        stream = cuda_device.stream(means)
        inputs = (means, quats, scales, opacities, colors, extrinsics, intrinsics, background)
        scene = _scene(inputs, width, height, kernel_size)
        pixels = [_wide(x) for x in (colors_gradient, depths_gradient, transmittances_gradient, out_transmittances)]
        last, state = last.contiguous(), state.contiguous()
        of_gaussians = [torch.empty_like(x) if views else torch.zeros_like(x) for x in scene.gaussians]
        of_colors = pixels[0].new_zeros(views, count, colors.shape[-1])
        of_cameras = pixels[0].new_zeros(views, _CAMERA)
        groups: Iterator[tuple[slice, _State, _Group | None]]
        if state.numel():
            groups = iter([(slice(0, views), _kept(state, torch.Size((views, count)), scene.tiles), None)])
        else:
            groups = _again(native, scene, stream)
        for cameras, seen, group in groups:
            moments = torch.empty_like(seen.splats)  # written, and read, where a Gaussian is drawn
            chosen = [x[cameras] for x in (*pixels, last)]
            _blend_gradient(native, scene, cameras, seen, group, chosen, moments, of_colors[cameras], stream)
            sums = moments.new_empty(-(-count // 32), len(seen.counts), _CAMERA)
            native.project_gaussians_gradient(
                *scene.gaussians,
                scene.extrinsics[cameras],
                scene.intrinsics[cameras],
                width,
                height,
                kernel_size,
                seen.counts,
                seen.splats,
                moments,
                cameras.start > 0,
                *of_gaussians,
                sums,
                stream,
            )
            of_cameras[cameras] = sums.sum(0)
        of_background = (pixels[3][..., None] * pixels[0]).sum((1, 2))
        of_extrinsics = pad(of_cameras[:, :12].view(-1, 3, 4), (0, 0, 0, 1))
        fx, fy, cx, cy = of_cameras[:, 12:].unbind(1)
        zero = torch.zeros_like(fx)
        of_intrinsics = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, zero], 1).view(-1, 3, 3)
        of_colors = of_colors if colors.ndim == 3 else of_colors.sum(0)
    gradients = (*of_gaussians, of_colors, of_extrinsics, of_intrinsics, of_background)
    return tuple(gradient.to(dtype) for gradient in gradients)


def _blend_gradient(
    native: Any,
    scene: _Scene,
    cameras: slice,
    seen: _State,
    group: _Group | None,
    pixels: list[Tensor],
    moments: Tensor,
    of_colors: Tensor,
    stream: int,
) -> None:
    """Gradients of colors, and the moments from which those of the projection follow, by a group of cameras."""
    colors, last = scene.colors_of(cameras), pixels[-1]
    channels = colors.shape[-1]
    at_once, values = (3, 10) if channels <= 3 else (7, 14)  # as csrc/cuda/gaussians_gradient.cu has it
    passes = range(0, max(channels, 1), at_once)
    parts = [(0, 0, len(seen.slots))] if group is None else _parts(group.ends)
    between = (2, *last.shape) if len(parts) > 1 else _NOTHING
    running = [moments.new_empty(between) for _ in passes]
    base = sum(entries for _, _, entries in parts)
    for number, part in enumerate(reversed(parts)):
        base -= part[2]
        lists = _lists(native, scene, group, part, None, stream) if group else _Lists(*seen[3:1:-1], seen.starts)
        records, behind = moments.new_empty(part[2], values), scene.background[cameras]
        for first, state in zip(passes, running, strict=True):
            given = last.new_zeros(part[2], dtype=torch.uint8)
            images = (behind, *pixels, number > 0, state)
            native.blend_tiles_gradient(
                seen.splats, colors, *lists, seen.firsts, base, *images, first, records, given, stream
            )
            native.sum_entries(records, given, seen.firsts, seen.counts, base, first, moments, of_colors, stream)


def _native(means: Tensor) -> Any:
    if means.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"means must be one of {names} on a CUDA device; got {means.dtype}")
    return cuda_device.native(means)


def _scene(inputs: tuple[Tensor, ...], width: int, height: int, kernel_size: float) -> _Scene:
    means, quats, scales, opacities, colors, extrinsics, intrinsics, background = map(_wide, inputs)
    gaussians = (means, cuda_device.aligned(quats), scales, opacities)
    shades = colors if colors.ndim == 3 else colors[None]
    return _Scene(gaussians, shades, extrinsics, intrinsics, background, width, height, kernel_size)


def _groups(native: Any, scene: _Scene, stream: int) -> Iterator[_Group]:
    """The cameras, as many at a time as fit SPLATS, with all Gaussians projected and sorted by depth."""
    views, count = len(scene.extrinsics), len(scene.gaussians[0])
    step = min(max(SPLATS // max(count, 1), 1), _CAMERAS)
    for first in range(0, views, step):
        cameras = slice(first, min(first + step, views))
        shape = (cameras.stop - first, count)
        depths = scene.extrinsics.new_empty(shape)
        splats, places = depths.new_empty(depths.numel(), 8), depths.new_empty(depths.numel(), 4, dtype=torch.int32)
        counts = depths.new_empty(shape, dtype=torch.int32)
        chosen = (scene.extrinsics[cameras], scene.intrinsics[cameras], scene.width, scene.height, scene.kernel_size)
        native.project_gaussians(*scene.gaussians, *chosen, splats, places, counts, depths, stream)
        order = torch.sort(depths, stable=True)[1]
        ends = counts.gather(1, order).flatten().cumsum(0, dtype=torch.int64)
        yield _Group(cameras, splats, places, counts, order, ends)


def _again(native: Any, scene: _Scene, stream: int) -> Iterator[tuple[slice, _State, _Group | None]]:
    """For a gradient, the groups of cameras without their lists."""
    for group in _groups(native, scene, stream):
        firsts = torch.empty_like(group.ends)
        native.first_entries(group.order, group.ends, firsts, stream)
        none = group.counts.new_empty(0)
        yield group.cameras, _State(group.splats, firsts, none.long(), none, group.counts, none), group


def _bytes(counts: Tensor, tiles: int, entries: int) -> int:
    return 44 * counts.numel() + 12 * entries + 4 * (len(counts) * tiles + 1)


def _kept(state: Tensor, shape: torch.Size, tiles: int) -> _State:
    """The parts of a state for [V, G] slots."""
    slots, lists = shape.numel(), shape[0] * tiles + 1
    entries = (state.numel() - 44 * slots - 4 * lists) // 12
    sizes = (32 * slots, 8 * slots, 8 * entries, 4 * entries, 4 * slots, 4 * lists)
    splats, firsts, permutation, of_entries, counts, starts = state.split(sizes)
    return _State(
        splats.view(torch.float32).view(slots, 8),
        firsts.view(torch.int64),
        permutation.view(torch.int64),
        of_entries.view(torch.int32),
        counts.view(torch.int32).view(shape),
        starts.view(torch.int32),
    )


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


def _lists(
    native: Any, scene: _Scene, group: _Group, part: tuple[int, int, int], kept: _State | None, stream: int
) -> _Lists:
    """The pairs of a part of the Gaussians, in the order of depth, and where each tile's are among them."""
    begin, end, entries = part
    count = len(group.counts) * scene.tiles
    tiles = group.counts.new_empty(entries)
    slots, permutation, starts = (
        (kept.slots, kept.permutation, kept.starts)
        if kept
        else (torch.empty_like(tiles), tiles.new_empty(entries, dtype=torch.int64), tiles.new_empty(count + 1))
    )
    native.list_tiles(
        group.places, group.order, group.ends, begin, end, scene.across, scene.tiles, tiles, slots, stream
    )
    if count < 1 << 15:  # half the digits for the sort
        tiles = tiles.short()
    keys = torch.sort(tiles, stable=True, out=(torch.empty_like(tiles), permutation))[0]
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    torch.searchsorted(keys, bounds, out_int32=True, out=starts)
    return _Lists(slots, permutation, starts)


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
