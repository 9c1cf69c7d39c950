"""CPU launch. The kernels are csrc/cpu/voxel_hash.cpp and voxel_hash_resample.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import _cpu


def neighbor_map(coords: Tensor, kernel_size: int) -> Tensor:
    neighbors = coords.new_empty(coords.shape[0], kernel_size**3)
    _cpu.neighbor_map(coords.contiguous(), kernel_size, neighbors, torch.get_num_threads())
    return neighbors


def coarsen(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    room = coords.new_empty(coords.shape)  # for as many coarse voxels as there can be; what is not used stays untouched
    inverse = coords.new_empty(coords.shape[0])
    count = _cpu.coarsen(coords.contiguous(), factor, room, inverse, torch.get_num_threads())
    return room[:count].clone(), inverse


def subdivide_coords(coords: Tensor) -> Tensor:
    children = coords.new_empty(8 * coords.shape[0], 4)
    _cpu.subdivide_coords(coords.contiguous(), children, torch.get_num_threads())
    return children


def subdivided_neighbor_map(neighbors: Tensor) -> Tensor:
    children = neighbors.new_empty(8 * neighbors.shape[0], 27)
    _cpu.subdivided_neighbor_map(neighbors.contiguous(), children, torch.get_num_threads())
    return children
