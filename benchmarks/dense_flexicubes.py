"""FlexiCubes as the official code runs it, on a dense grid in plain torch: what `extract_mesh` is measured against.

Written from the description in trellis_kernels/mesh_extraction; evaluation form only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.mesh_extraction.tables import corner_offsets, tables


def dense_extract(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, faces and attributes."""
    with coords.device:
        return _extract(coords, feats, resolution)


def _extract(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    side = resolution + 1

    def key(cells: Tensor, side: int) -> Tensor:
        return (cells.long() * torch.tensor([side * side, side, 1])).sum(-1)  # no integer matmul on a GPU

    # Sparse to dense: values of grid points averaged over the cubes that share them, weights of all cells.
    corner_strides = key(corner_offsets(), side)
    corner_keys = key(coords, side)[:, None] + corner_strides
    deform, color = feats[:, 8:32].unflatten(1, (8, 3)), feats[:, 53:].unflatten(1, (8, 6))
    by_corner = torch.cat([feats[:, :8, None] - 1 / resolution, deform, color], 2)
    keys, inverse = corner_keys.flatten().unique(return_inverse=True)
    mean = torch.zeros(len(keys), 10).index_add_(0, inverse, by_corner.flatten(0, 1))
    mean /= torch.bincount(inverse)[:, None]
    values = torch.zeros(side**3, 10)
    values[:, 0] = 1
    values[keys] = mean
    weights = torch.zeros(resolution**3, 21)
    weights[key(coords, resolution)] = feats[:, 32:53]
    axis = torch.arange(side)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), 3).view(-1, 3)
    positions = grid / resolution - 0.5 + (1 - 1e-8) / (2 * resolution) * values[:, 1:4].tanh()
    sdf, colors = values[:, 0], values[:, 4:].sigmoid()
    cells = key(grid[(grid < resolution).all(1)], side)[:, None] + corner_strides

    # Crossed cells and their cases.
    table = tables(coords.device)
    inside = (sdf < 0)[cells]
    crossed = inside.any(1) & ~inside.all(1)
    cells, inside, weights = cells[crossed], inside[crossed], weights[crossed]
    cases = (inside.long() << torch.arange(8)).sum(1)
    where = grid[cells[:, 0]]
    flags = torch.zeros(resolution, resolution, resolution, dtype=torch.int64)
    flags[tuple(where.T)] = table.ambiguous[cases, 0]
    neighbor = where + table.ambiguous[cases, 1:]
    within = ((neighbor >= 0) & (neighbor < resolution)).all(1)
    turn = flags[tuple(where.T)] * flags[tuple(neighbor.clamp(0, resolution - 1).T)] * within
    cases = torch.where(turn > 0, 255 - cases, cases)
    flexible = weights[:, :20].tanh() * 0.99 + 1
    gamma = weights[:, 20].sigmoid() * 0.99 + 0.005

    # Crossed edges and dual vertices.
    ends = cells[:, table.edges]  # [S, 12, 2]
    _, edge, count = ends.flatten(0, 1).unique(dim=0, return_inverse=True, return_counts=True)
    counts = table.counts[cases]
    cell = torch.arange(len(cells)).repeat_interleave(counts)
    rank = torch.arange(len(cell)) - (counts.cumsum(0) - counts)[cell]
    groups = table.groups[cases[cell], rank]
    vertex, slot = (groups >= 0).nonzero().T
    local = groups[vertex, slot]
    pair = ends[cell[vertex], local]
    alpha = flexible[cell[vertex, None], 12 + table.edges[local]]
    scaled = (sdf[pair] * alpha).flip(1) * torch.tensor([1, -1])
    payload = torch.cat([positions, colors], 1)[pair]
    crossing = (scaled[..., None] * payload).sum(1) / scaled.sum(1, keepdim=True)
    beta = flexible[cell[vertex], local][:, None]
    total = torch.zeros(len(cell), 1).index_add_(0, vertex, beta)
    dual = torch.zeros(len(cell), 9).index_add_(0, vertex, beta * crossing) / total
    vertex_of_edge = torch.zeros(len(cells), 12, dtype=torch.int64)
    vertex_of_edge[cell[vertex], local] = vertex

    # The quads of crossed edges with four cells, facing outward, cut along one diagonal.
    of_edge = (count[edge] == 4) & (inside[:, table.edges[:, 0]] != inside[:, table.edges[:, 1]]).flatten()
    chosen = edge[of_edge].sort(stable=True).indices
    quads = vertex_of_edge.flatten()[of_edge][chosen].view(-1, 4)
    first = sdf[ends.flatten(0, 1)[of_edge][chosen].view(-1, 4, 2)[:, 0, 0]]
    quads = torch.where(first[:, None] > 0, quads[:, [0, 1, 3, 2]], quads[:, [2, 3, 1, 0]])
    corner = gamma[cell[quads]]
    cut = (corner[:, 0] * corner[:, 2] > corner[:, 1] * corner[:, 3])[:, None]
    faces = torch.where(cut, quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]]).view(-1, 3)
    return dual[:, :3], faces, dual[:, 3:]
