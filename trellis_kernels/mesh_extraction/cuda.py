"""CUDA launch. The kernels are csrc/cuda/mesh_*.cu."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.precision import widened

_WORDS_WITHOUT_ASKING = 1 << 22  # up to 150 MB; beyond, one more number is read back to need no more than that


class _Bits(NamedTuple):
    """A set of grid coordinates, one bit each (csrc/cuda/sparse_bits.cuh)."""

    segments: Tensor
    ends: Tensor
    words: Tensor
    ranks: Tensor
    places: Tensor


def surface_topology(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, ...]:
    coords, cubes = coords.contiguous(), len(coords)
    sdf = _wide(feats[:, :8] if feats.element_size() < 4 else feats)  # of half-precision feats widen what is read
    native, stream = cuda_device.native(coords), cuda_device.stream(coords)
    with cuda_device.guard(coords):
        # Columns, then words: each is counted, the counts summed, and what they say filled in.
        columns = [_columns(coords, side) for side in (resolution, resolution + 1, resolution)]
        columns[0][0].zero_()
        native.mesh_voxel_columns(coords, resolution, *columns[0], stream)
        voxels = _with_words(columns[0], cubes, resolution)
        voxels.words.zero_()
        native.mesh_point_columns(coords, resolution, voxels, *columns[1], *columns[2], stream)
        voxels.ranks.cumsum_(0)
        points, surface = (_with_words(pair, cubes, resolution) for pair in columns[1:])
        cube_of_voxel, inside = coords.new_empty(cubes), torch.empty_like(points.words)
        sums = coords.new_empty(3, len(surface.words))
        native.mesh_surface_cells(
            coords, sdf, resolution, voxels, cube_of_voxel, points, inside, surface, sums, stream
        )  # fmt: skip
        points.ranks.cumsum_(0)
        for row in sums:  # torch scans one row with many blocks, but a matrix with one block per row
            row.cumsum_(0)
        found = [0] * 5
        if cubes:  # the one time the host waits: the sizes of the outputs
            found = torch.cat([voxels.ranks[-1:], points.ranks[-1:], sums[:, -1]]).tolist()
        if found[0] < cubes:
            _explain(coords, resolution)
        shapes = ((found[1], 3), (found[1], 8), (found[2], 3), (found[2],), (found[2], 8), (found[2],), (found[3],))
        outputs = tuple(coords.new_empty(shape) for shape in (*shapes, (found[4], 4)))
        starts = coords.new_empty(found[2], 3)
        native.mesh_fill_topology(
            resolution, voxels, cube_of_voxel, points, inside, surface, sums, starts, outputs, stream
        )  # fmt: skip
    return outputs


def split_quads(quads: Tensor, gammas: Tensor) -> Tensor:
    faces = quads.new_empty(len(quads), 2, 3, dtype=torch.int64)
    native, stream = cuda_device.native(quads), cuda_device.stream(quads)
    with cuda_device.guard(quads):
        native.split_quads(quads.contiguous(), _wide(gammas), faces, stream)
    return faces.flatten(0, 1)


def surface_values(feats: Tensor, *topology: Any) -> tuple[Tensor, ...]:
    wide = _wide(feats)
    *maps, resolution, training = topology
    inputs = tuple(tensor.contiguous() for tensor in maps)
    points, cells, vertices = len(maps[0]), len(maps[2]), len(maps[6])
    grid = points if training else 0
    shapes = ((vertices, 3), (vertices, (feats.shape[1] - 53) // 8), (vertices,), (3,), (grid, 3), (grid,))
    results = tuple(wide.new_empty(shape) for shape in shapes)
    if not training:
        results[3].zero_()
    blocks = max(-(-cells // 16), -(-max(points, len(feats)) // 64)) if training else 0
    partial = wide.new_empty(3, blocks, dtype=torch.float64)
    native, stream = cuda_device.native(feats), cuda_device.stream(feats)
    with cuda_device.guard(feats):
        room = _room(wide, points, cells, training)
        native.surface_values(wide, inputs, resolution, training, room, partial, results, stream)
    return tuple(result.to(feats.dtype) for result in results)


def surface_values_gradient(feats: Tensor, *topology_and_gradients: Any) -> Tensor:
    wide = _wide(feats)
    *maps, resolution, training = topology_and_gradients[:-6]
    gradients = tuple(_wide(gradient) for gradient in topology_and_gradients[-6:])
    inputs = tuple(tensor.contiguous() for tensor in maps)
    cubes, points, cells, vertices = len(feats), len(maps[0]), len(maps[2]), len(maps[6])
    feats_gradient = torch.empty_like(wide)
    native, stream = cuda_device.native(feats), cuda_device.stream(feats)
    with cuda_device.guard(feats):
        room = _room(wide, points, cells, training)
        maps_back = tuple(maps[0].new_full(shape, -1) for shape in ((cubes, 8), (cubes,), (points, 8)))
        values = room[2].shape
        shapes = (values, values, (cells, 21), (cells, 8), (cells * training, 24), (vertices, 8))
        more = (*maps_back, *(wide.new_empty(shape) for shape in (*shapes, (vertices * training, 3))))
        native.surface_values_gradient(
            wide, inputs, resolution, training, room, more, gradients, feats_gradient, stream
        )  # fmt: skip
    return feats_gradient.to(feats.dtype)


def _room(feats: Tensor, points: int, cells: int, training: bool) -> tuple[Tensor, ...]:
    """To work in: SurfaceRoom of csrc/cuda/mesh_extraction.h."""
    return (
        feats.new_empty(cells, dtype=torch.int32),
        feats.new_zeros(0 if training else points, dtype=torch.uint8),
        feats.new_empty(points, 4 + (feats.shape[1] - 53) // 8),
        feats.new_zeros(1, dtype=torch.int64),
    )


def _columns(coords: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Segments and ends of the columns of a grid."""
    return coords.new_empty(side**2, dtype=torch.int64), coords.new_empty(side**2)


def _with_words(columns: tuple[Tensor, Tensor], cubes: int, resolution: int) -> _Bits:
    """Sums up the counts of words, and makes room for as many words."""
    segments, ends = columns
    ends.cumsum_(0)
    # Around a cube there are at most 9 columns of cells, in each at most three words.
    room = min(len(segments) * (resolution // 64 + 1), 27 * cubes)
    if room > _WORDS_WITHOUT_ASKING:
        room = int(ends[-1])
    words = segments.new_empty(room)
    return _Bits(segments, ends, words, ends.new_empty(room), ends.new_empty(room))


def _explain(coords: Tensor, resolution: int) -> None:
    """Why there are fewer voxels than cubes."""
    low, high = int(coords.min()), int(coords.max())
    if low < 0 or high >= resolution:
        raise ValueError(f"coords must be in [0, {resolution}); got {low} to {high}")
    raise ValueError("coords must be distinct; got the same cube twice")


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide
