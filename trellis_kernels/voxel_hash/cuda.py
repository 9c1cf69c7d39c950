"""CUDA launch. The kernels are csrc/cuda/voxel_hash.cu and voxel_hash_resample.cu; sorting and sums are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import cuda_device


def neighbor_map(coords: Tensor, kernel_size: int) -> Tensor:
    coords, count = cuda_device.aligned(coords), coords.shape[0]
    slots = coords.new_zeros(_capacity(count), 2, dtype=torch.int64)
    slot_of, rows, counter = coords.new_empty(count), coords.new_empty(count), coords.new_zeros(1)
    neighbors = coords.new_empty(count, kernel_size**3)
    native = cuda_device.native(coords)
    with cuda_device.guard(coords):
        native.neighbor_map(coords, kernel_size, slots, slot_of, rows, counter, neighbors, cuda_device.stream(coords))
    return neighbors


def coarsen(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    coords, count = cuda_device.aligned(coords), coords.shape[0]
    slots = coords.new_zeros(_capacity(count), 2, dtype=torch.int64)
    slot_of, used = coords.new_empty(count), coords.new_empty(count)
    keys, counts = coords.new_empty(count, dtype=torch.int64), coords.new_zeros(2)
    native = cuda_device.native(coords)
    with cuda_device.guard(coords):
        stream = cuda_device.stream(coords)
        native.gather_runs(coords, factor, slots, slot_of, keys, used, counts, stream)
        runs, voxels = counts.tolist()  # the one wait: sizes of what follows
        order = keys[:runs].argsort()
        sizes = coords.new_empty(runs)
        native.run_sizes(slots, used, order, sizes, stream)
        ends = sizes.cumsum(0, dtype=torch.int32)
        coarse, inverse = coords.new_empty(voxels, 4), coords.new_empty(count)
        native.write_coarse(coords, factor, slots, slot_of, used, order, ends, coarse, inverse, stream)
    return coarse, inverse


def subdivide_coords(coords: Tensor) -> Tensor:
    coords = cuda_device.aligned(coords)
    children = coords.new_empty(8 * coords.shape[0], 4)
    native = cuda_device.native(coords)
    with cuda_device.guard(coords):
        native.subdivide_coords(coords, children, cuda_device.stream(coords))
    return children


def subdivided_neighbor_map(neighbors: Tensor) -> Tensor:
    children = neighbors.new_empty(8 * neighbors.shape[0], 27)
    native = cuda_device.native(neighbors)
    with cuda_device.guard(neighbors):
        native.subdivided_neighbor_map(neighbors.contiguous(), children, cuda_device.stream(neighbors))
    return children


def _capacity(voxels: int) -> int:
    """Slots of the hash table: at most half are taken, even if no two voxels share one."""
    if voxels >= 2**30:
        raise ValueError(f"coords must have fewer than 2**30 rows on a GPU; got {voxels}")
    return max(2 * voxels, 1)
