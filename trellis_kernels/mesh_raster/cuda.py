"""CUDA launches. Kernels: csrc/cuda/mesh_raster.cu and mesh_raster_gradient.cu; sorts and sums of all are torch's.

No launch waits for the GPU. Which triangle wins a pixel is found by integer atomics, whose order does not matter;
gradients are summed in a fixed order, pixels sorted by triangle and corners by vertex. So results are always the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.mesh_raster.cuda_texture import (
    antialias,
    antialias_gradient,
    face_neighbors,
    interpolate_derivatives,
    sample_texture,
    sample_texture_gradient,
    sample_texture_uv_gradient,
)

__all__ = [
    "antialias",
    "antialias_gradient",
    "face_neighbors",
    "interpolate",
    "interpolate_derivatives",
    "interpolate_gradient",
    "rasterize_mesh",
    "rasterize_mesh_gradient",
    "sample_texture",
    "sample_texture_gradient",
    "sample_texture_uv_gradient",
]

SMALL_BOX = 256  # kSmallBox of csrc/cuda/mesh_raster.h
CHUNKS, CHUNK = 4, 128  # per block, and items in each: csrc/cuda/ordered_sums.cuh
CHANNELS = 4  # whose gradients are summed at a time
ROWS = 1 << 21  # of triangles times views at once: 200 MB of sums
PIXELS = 1 << 26
_TILES_PER_BLOCK = 4
_INT32_MAX = 2**31 - 1


def rasterize_mesh(
    positions: Tensor,
    faces: Tensor,
    width: int,
    height: int,
    behind_faces: Tensor | None,
    behind_depths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions, faces = cuda_device.aligned(positions), cuda_device.aligned(faces)
    shape = (positions.shape[0], height, width)
    ids, depths = faces.new_empty(shape), positions.new_empty(shape)
    barycentrics, derivatives = positions.new_empty(*shape, 2), positions.new_empty(*shape, 4)
    keys = faces.new_full(shape, -1, dtype=torch.int64)
    layer = (faces.new_empty(0, 0, 0), positions.new_empty(0, 0, 0))
    if behind_faces is not None and behind_depths is not None:
        layer = behind_faces.contiguous(), behind_depths.contiguous()
    rows = shape[0] * len(faces)
    some_large = width * height > SMALL_BOX and rows > 0
    tiles = faces.new_empty(*((shape[0], len(faces)) if some_large else (0, 0)))
    native = cuda_device.native(positions)
    with cuda_device.guard(positions):
        stream = cuda_device.stream(positions)
        mesh = (positions, faces, *layer, keys)
        native.draw_mesh_faces(*mesh, ids, tiles, False, stream)
        if some_large:
            ends = tiles.flatten().cumsum(0)
            most = rows * (-(-width // 32) * -(-height // 32))
            blocks = min(8 * cuda_device.properties(positions).multiprocessors, -(-most // _TILES_PER_BLOCK))
            native.draw_mesh_tiles(*mesh, ids, ends, False, blocks, stream)
        if positions.dtype == torch.float64:  # depth and row do not fit one atomic
            ids.fill_(_INT32_MAX)
            native.draw_mesh_faces(*mesh, ids, tiles, True, stream)
            if some_large:
                native.draw_mesh_tiles(*mesh, ids, ends, True, blocks, stream)
        native.describe_mesh_pixels(positions, faces, keys, ids, barycentrics, depths, derivatives, stream)
    return barycentrics, depths, derivatives, ids


def rasterize_mesh_gradient(
    positions: Tensor, faces: Tensor, ids: Tensor, barycentrics_gradient: Tensor, depths_gradient: Tensor
) -> Tensor:
    inputs = [x.contiguous() for x in (positions, ids, barycentrics_gradient, depths_gradient)]
    faces = faces.contiguous()
    out = torch.zeros_like(inputs[0])
    native = cuda_device.native(positions)
    with cuda_device.guard(positions):
        stream = cuda_device.stream(positions)
        corners = _grouped(faces.flatten(), positions.shape[1])
        for group in _groups(ids, faces):
            points, seen, *gradients = [x[group] for x in inputs]
            pixels = _pixels_by_face(seen, len(faces))
            sums, partials = _sums(out, pixels)
            native.mesh_gradient_of_faces(points, faces, seen, *gradients, *pixels, partials, sums, stream)
            partials = _partials(out, corners.keys, len(points), CHANNELS)
            native.add_corners_to_vertices(sums, pixels.starts, 0, *corners, partials, out[group], stream)
    return out


def interpolate(attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor) -> Tensor:
    out = attributes.new_empty(*ids.shape, attributes.shape[2])
    native = cuda_device.native(attributes)
    with cuda_device.guard(attributes):
        inputs = [x.contiguous() for x in (attributes, faces, ids, barycentrics)]
        native.interpolate(*inputs, out, cuda_device.stream(attributes))
    return out


def interpolate_gradient(
    out_gradient: Tensor, attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor
) -> tuple[Tensor, Tensor]:
    inputs = [x.contiguous() for x in (ids, out_gradient, barycentrics)]
    attributes, faces = attributes.contiguous(), faces.contiguous()
    by_attributes, by_barycentrics = torch.zeros_like(attributes), torch.empty_like(inputs[2])
    views, vertices, channels = attributes.shape
    native = cuda_device.native(attributes)
    with cuda_device.guard(attributes):
        stream = cuda_device.stream(attributes)
        native.interpolate_barycentrics_gradient(inputs[1], attributes, faces, inputs[0], by_barycentrics, stream)
        corners = _grouped(faces.flatten(), vertices)
        for group in _groups(ids, faces):
            seen, gradient, weights = [x[group] for x in inputs]
            pixels = _pixels_by_face(seen, len(faces))
            sums, partials = _sums(by_attributes, pixels)
            to = by_attributes[group] if views > 1 else by_attributes
            vertex_partials = _partials(by_attributes, corners.keys, len(to), CHANNELS)
            for first in range(0, channels, CHANNELS):
                native.interpolate_gradient_of_faces(
                    gradient, faces, vertices, seen, weights, first, *pixels, partials, sums, stream
                )
                native.add_corners_to_vertices(sums, pixels.starts, first, *corners, vertex_partials, to, stream)
    return by_attributes, by_barycentrics


class _Runs(NamedTuple):
    """Items grouped by key: their keys in rising order, which item each is, and where each key begins."""

    keys: Tensor
    order: Tensor
    starts: Tensor


def _grouped(keys: Tensor, count: int) -> _Runs:
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    return _Runs(ordered, order, torch.searchsorted(ordered, bounds, out_int32=True))


def _pixels_by_face(ids: Tensor, count: int) -> _Runs:
    """Pixels of some views by view and triangle."""
    first = count * torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    return _grouped(torch.where(ids >= 0, ids + first.view(-1, 1, 1), -1).flatten(), count * len(ids))


def _groups(ids: Tensor, faces: Tensor) -> Iterator[slice]:
    """Views that are taken at once, so that sums and sorts stay in bounds."""
    views, height, width = ids.shape
    step = max(1, min(ROWS // max(1, len(faces)), PIXELS // (height * width), 32768))
    for first in range(0, views if len(faces) else 0, step):
        yield slice(first, first + step)


def _sums(like: Tensor, pixels: _Runs) -> tuple[Tensor, Tensor]:
    """Room for what the pixels of each triangle add to its three corners, and for the partial sums on the way."""
    sums = like.new_empty(len(pixels.starts) - 1, 3 * CHANNELS, dtype=torch.float64)
    return sums, _partials(like, pixels.keys, 1, 3 * CHANNELS)


def _partials(like: Tensor, keys: Tensor, sources: int, columns: int) -> Tensor:
    chunks = -(-len(keys) // (CHUNKS * CHUNK)) * CHUNKS
    return like.new_empty(sources, chunks, 2 * columns, dtype=torch.float64)
