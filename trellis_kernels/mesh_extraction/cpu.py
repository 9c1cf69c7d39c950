"""CPU launch. The kernels are csrc/cpu/mesh_topology.cpp, mesh_values.cpp and mesh_gradient.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import widened


def surface_topology(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, ...]:
    sdf = feats[:, :8] if feats.element_size() < 4 else feats  # of half-precision feats widen what is read
    topology = _cpu.SurfaceTopology(coords.contiguous(), resolution, torch.get_num_threads())
    points, point_cubes = coords.new_empty(topology.points, 3), coords.new_empty(topology.points, 8)
    topology.fill_points(_wide(sdf), points, point_cubes)
    cells, cell_points = coords.new_empty(topology.cells, 3), coords.new_empty(topology.cells, 8)
    cell_cubes, cases = coords.new_empty(topology.cells), coords.new_empty(topology.cells)
    vertex_cells, quads = coords.new_empty(topology.vertices), coords.new_empty(topology.quads, 4)
    topology.fill_cells(cells, cell_cubes, cell_points, cases, vertex_cells, quads)
    return points, point_cubes, cells, cell_cubes, cell_points, cases, vertex_cells, quads


def split_quads(quads: Tensor, gammas: Tensor) -> Tensor:
    faces = quads.new_empty(len(quads), 2, 3, dtype=torch.int64)
    _cpu.split_quads(quads.contiguous(), _wide(gammas), faces, torch.get_num_threads())
    return faces.flatten(0, 1)


def surface_values(feats: Tensor, *topology: Any) -> tuple[Tensor, ...]:
    wide = _wide(feats)
    *maps, vertex_cells, resolution, training = topology
    vertices, grid = len(vertex_cells), len(maps[0]) if training else 0
    shapes = ((vertices, 3), (vertices, (feats.shape[1] - 53) // 8), (vertices,), (3,), (grid, 3), (grid,))
    results = [wide.new_empty(shape) for shape in shapes]
    inputs = [tensor.contiguous() for tensor in maps]
    arguments: list[Any] = [wide, *inputs, resolution, training, *results, torch.get_num_threads()]
    _cpu.surface_values(*arguments)
    return tuple(result.to(feats.dtype) for result in results)


def surface_values_gradient(feats: Tensor, *topology_and_gradients: Any) -> Tensor:
    wide = _wide(feats)
    *maps, _vertex_cells, resolution, training = topology_and_gradients[:-6]
    gradients = [_wide(gradient) for gradient in topology_and_gradients[-6:]]
    feats_gradient = torch.empty_like(wide)
    inputs = [tensor.contiguous() for tensor in maps]
    arguments: list[Any] = [wide, *inputs, resolution, training, *gradients, feats_gradient, torch.get_num_threads()]
    _cpu.surface_values_gradient(*arguments)
    return feats_gradient.to(feats.dtype)


def _wide(tensor: Tensor) -> Tensor:
    (wide,) = widened(tensor)
    assert wide is not None
    return wide
