"""FlexiCubes on sparse cubes in plain PyTorch: the topology (integers), the values on it, and their gradient.

Nothing here is dense: grid points and cells are looked up in sorted lists of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trellis_kernels.mesh_extraction.tables import corner_offsets, tables
from trellis_kernels.precision import compute_dtype


def surface_topology(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, ...]:
    if len(coords) and not 0 <= int(coords.min()) <= int(coords.max()) < resolution:
        raise ValueError(f"coords must be in [0, {resolution}); got {int(coords.min())} to {int(coords.max())}")
    # Grid points: the corners of all cubes, and for each of the eight cells around a point its cube (or -1).
    offsets = corner_offsets(coords.device)
    corners = coords.long()[:, None] + offsets  # [N, 8, 3]
    side = resolution + 1
    point_keys, point_of_corner = _keys(corners, side).unique(return_inverse=True)
    point_cubes = torch.full((len(point_keys), 8), -1, dtype=torch.int64, device=coords.device)
    cube = torch.arange(len(coords), device=coords.device)
    point_cubes[point_of_corner, torch.arange(8, device=coords.device)] = cube[:, None].expand(-1, 8)
    if int((point_cubes >= 0).sum()) != 8 * len(coords):
        raise ValueError("coords must be distinct; got the same cube twice")

    # Cells crossed by the surface. Where no cube touches a point it is outside. Every such cell has a point inside.
    sdf = _mean(feats[:, :8, None].to(compute_dtype(feats.dtype)) - 1 / resolution, point_cubes)[:, 0]
    inside_points = _unpack(point_keys[sdf < 0], side)
    around = inside_points[:, None] - offsets
    around = around[((around >= 0) & (around < resolution)).all(-1)]
    cells = _unpack(_keys(around, resolution).unique(), resolution)
    cell_points = _find(_keys(cells[:, None] + offsets, side), point_keys)
    inside = _row_or(sdf, cell_points, 1.0) < 0
    crossed = ~inside.all(1)
    cells, cell_points, inside = cells[crossed], cell_points[crossed], inside[crossed]
    cell_keys = _keys(cells, resolution)
    cube_keys, order = _keys(coords.long(), resolution).sort()
    cell_cubes = _row_or(order, _find(cell_keys, cube_keys), -1)

    # A cell and the neighbor across its ambiguous face, if that is ambiguous too, both take the opposite case.
    table = tables(coords.device)
    cases = (inside.long() << torch.arange(8, device=coords.device)).sum(1)
    flag, direction = table.ambiguous[cases, 0], table.ambiguous[cases, 1:]
    neighbor = cells + direction
    within = ((neighbor >= 0) & (neighbor < resolution)).all(1)
    neighbor_flag = _row_or(flag, _find(_keys(neighbor, resolution), cell_keys), 0) * within
    cases = torch.where((flag * neighbor_flag).bool(), 255 - cases, cases)

    # Dual vertices cell by cell; a quad joins those of the four cells around each crossed edge inside the grid.
    counts = table.counts[cases]
    first_vertex = counts.cumsum(0) - counts
    vertex_cells = torch.arange(len(cells), device=coords.device).repeat_interleave(counts)
    quads = _quads(cells, cell_keys, inside, first_vertex[:, None] + table.vertex_of_edge[cases], resolution)
    results = (_unpack(point_keys, side), point_cubes, cells, cell_cubes, cell_points, cases)
    return *(t.int() for t in results), vertex_cells.int(), quads.int()


def _quads(cells: Tensor, cell_keys: Tensor, inside: Tensor, vertex_of_edge: Tensor, resolution: int) -> Tensor:
    """``[Q, 4]``: seen from outside, counterclockwise. Ordered by the cell the edge starts in, then by axis."""
    quads, order = [], []
    for axis, (edges, first, last) in enumerate(_EDGES_AROUND):
        # The edge from corner 0 along `axis` is shared by the cells behind it in the two other directions.
        u, v = (other for other in range(3) if other != axis)
        back = torch.zeros(4, 3, dtype=torch.int64, device=cells.device)
        back[[0, 1], u] = 1
        back[[0, 2], v] = 1
        crossed = (inside[:, first] != inside[:, last]) & (cells[:, u] > 0) & (cells[:, v] > 0)
        rows = crossed.nonzero()[:, 0]
        around = _find(_keys(cells[rows, None] - back, resolution), cell_keys)
        quad = vertex_of_edge[around, torch.tensor(edges, device=cells.device)]
        starts_inside = inside[rows, first, None]
        quads.append(torch.where(starts_inside, quad[:, [2, 3, 1, 0]], quad[:, [0, 1, 3, 2]]))
        order.append(rows * 3 + axis)
    return torch.cat(quads)[torch.cat(order).argsort()]


def split_quads(quads: Tensor, gammas: Tensor) -> Tensor:
    gamma = gammas.to(compute_dtype(gammas.dtype))[quads]
    along_02 = gamma[:, :1] * gamma[:, 2:3] > gamma[:, 1:2] * gamma[:, 3:]
    return torch.where(along_02, quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]]).long().view(-1, 3)


# By axis: which edge of the cells at (-1, -1), (-1, 0), (0, -1), (0, 0) it is; its corners in cell (0, 0), in the
# direction of the edge table (y edges run downwards).
_EDGES_AROUND = (([6, 4, 2, 0], 0, 1), ([10, 9, 11, 8], 2, 0), ([5, 1, 7, 3], 0, 4))


class _Field(NamedTuple):
    """The attributes of the grid points, each with a default row at the end for points that no cube touches."""

    corners: Tensor  # [G, 8, D] raw: sdf, deformation, colors of the cubes around a point
    mean: Tensor  # [G, D] and a default row
    sdf: Tensor  # [G + 1]
    shift: Tensor  # [G + 1, 3] tanh of the deformation
    color: Tensor  # [G + 1, C]


class _Dual(NamedTuple):
    """Everything per dual vertex and edge of its group, padded to 7 edges."""

    edges: Tensor  # [V, 7] -1 where none
    ends: Tensor  # [V, 7, 2] corner of the cell
    points: Tensor  # [V, 7, 2] row of the field
    sdf: Tensor  # [V, 7, 2]
    payload: Tensor  # [V, 7, 2, 3 + C] position, color
    alpha: Tensor  # [V, 7, 2]
    beta: Tensor  # [V, 7] 0 where no edge
    crossing: Tensor  # [V, 7, 3 + C] the weighted zero crossings
    vertex: Tensor  # [V, 3 + C]
    offset: Tensor  # [V, 7, 3] from the vertex to the plain zero crossings
    distance: Tensor  # [V, 7] 0 where no edge


def surface_values(
    feats: Tensor,
    points: Tensor,
    point_cubes: Tensor,
    cells: Tensor,
    cell_cubes: Tensor,
    cell_points: Tensor,
    cases: Tensor,
    vertex_cells: Tensor,
    resolution: int,
    training: bool,
) -> tuple[Tensor, ...]:
    dtype, wide = feats.dtype, feats.to(compute_dtype(feats.dtype))
    field = _field(wide, point_cubes, resolution)
    weights = _cell_weights(wide, cell_cubes)
    dual = _dual(field, weights, cells, cell_points, cases, vertex_cells, resolution)
    gamma = weights[:, 20].sigmoid()[vertex_cells] * 0.99 + 0.005
    results = [dual.vertex[:, :3], dual.vertex[:, 3:], gamma]
    grid = [wide.new_zeros(3), wide.new_empty(0, 3), wide.new_empty(0)]
    if training:
        present = dual.edges >= 0
        mean_distance = dual.distance.sum(1, keepdim=True) / present.sum(1, keepdim=True)
        deviation = ((dual.distance - mean_distance).abs() * present).sum() / present.sum().clamp_min(1)
        apart = (field.corners - field.mean[:-1, None]) * (point_cubes >= 0)[..., None]
        consistency = apart.square().sum() / max(8 * len(feats) * apart.shape[2], 1)
        magnitude = wide[:, 32:52].abs().sum() / max(20 * len(feats), 1)
        terms = torch.stack([deviation, consistency, magnitude])
        grid = [terms, _positions(points, field.shift[:-1], resolution), field.sdf[:-1].clone()]
    return tuple(result.to(dtype).contiguous() for result in results + grid)


def surface_values_gradient(
    feats: Tensor,
    points: Tensor,
    point_cubes: Tensor,
    cells: Tensor,
    cell_cubes: Tensor,
    cell_points: Tensor,
    cases: Tensor,
    vertex_cells: Tensor,
    resolution: int,
    training: bool,
    vertices_gradient: Tensor,
    attributes_gradient: Tensor,
    gammas_gradient: Tensor,
    terms_gradient: Tensor,
    positions_gradient: Tensor,
    sdf_gradient: Tensor,
) -> Tensor:
    dtype, wide = feats.dtype, feats.to(compute_dtype(feats.dtype))
    field = _field(wide, point_cubes, resolution)
    weights = _cell_weights(wide, cell_cubes)
    dual = _dual(field, weights, cells, cell_points, cases, vertex_cells, resolution)
    present = dual.edges >= 0
    deviation_gradient, consistency_gradient, magnitude_gradient = terms_gradient.to(wide.dtype)

    # Deviation: each distance moves its own term and, through the mean distance, those of the whole group.
    vertex_gradient = torch.cat([vertices_gradient, attributes_gradient], 1).to(wide.dtype)
    offset_gradient = torch.zeros_like(dual.offset)
    if training:
        count = present.sum(1, keepdim=True)
        sign = (dual.distance - dual.distance.sum(1, keepdim=True) / count).sign() * present
        distance_gradient = (sign - sign.sum(1, keepdim=True) / count) * deviation_gradient / present.sum().clamp_min(1)
        distance_gradient = distance_gradient * present
        unit = dual.offset / dual.distance[..., None].clamp_min(torch.finfo(wide.dtype).tiny)
        offset_gradient = distance_gradient[..., None] * unit
        vertex_gradient[:, :3] -= offset_gradient.sum(1)

    # vertex = sum beta crossing / sum beta;  crossing = (w0 p0 + w1 p1) / (w0 + w1), w = (s1 a1, -s0 a0)
    total = dual.beta.sum(1, keepdim=True)
    crossing_gradient = vertex_gradient[:, None] * (dual.beta / total)[..., None]
    beta_gradient = (vertex_gradient[:, None] * (dual.crossing - dual.vertex[:, None])).sum(-1) / total * present
    alpha_gradient, end_sdf_gradient, payload_gradient = _crossing_gradient(dual, dual.alpha, crossing_gradient)
    plain = dual._replace(crossing=torch.cat([dual.offset + dual.vertex[:, None, :3], dual.crossing[..., 3:]], -1))
    _, plain_sdf_gradient, plain_payload_gradient = _crossing_gradient(
        plain, torch.ones_like(dual.alpha), torch.nn.functional.pad(offset_gradient, (0, field.color.shape[1]))
    )
    end_sdf_gradient = end_sdf_gradient + plain_sdf_gradient
    payload_gradient = payload_gradient + plain_payload_gradient

    # Sum what the vertices want of each grid point and of each cell's weights.
    point = dual.points[present].flatten()
    sums = wide.new_zeros(len(field.sdf), 1 + payload_gradient.shape[-1])
    sums.index_add_(0, point, torch.cat([end_sdf_gradient[..., None], payload_gradient], -1)[present].flatten(0, 1))
    cell_gradient = wide.new_zeros(len(cells), 21)
    cell = vertex_cells.long()[:, None].expand_as(dual.edges)
    cell_gradient.index_put_((cell[present], dual.edges[present]), beta_gradient[present], accumulate=True)
    cell_of_end = cell[..., None].expand_as(dual.ends)
    alpha_at = (cell_of_end[present], 12 + dual.ends[present])
    cell_gradient.index_put_(alpha_at, alpha_gradient[present], accumulate=True)
    cell_gradient[:, :20] *= 0.99 * (1 - weights[:, :20].tanh().square())
    gamma = weights[:, 20].sigmoid()
    gamma_gradient = wide.new_zeros(len(cells)).index_add(0, vertex_cells, gammas_gradient.to(wide.dtype))
    cell_gradient[:, 20] = gamma_gradient * 0.99 * gamma * (1 - gamma)

    # Through tanh and sigmoid to the means, and from those to the corners of the cubes.
    sums = sums[:-1]
    if training:
        sums[:, 0] += sdf_gradient
        sums[:, 1:4] += positions_gradient
    shift, color = field.shift[:-1], field.color[:-1]
    sums[:, 1:4] *= (1 - shift.square()) * _reach(resolution)
    sums[:, 4:] *= color * (1 - color)
    real = (point_cubes >= 0)[..., None]
    corners = (sums / real.sum(1)).unsqueeze(1).expand_as(field.corners)
    if training:
        scale = 2 * consistency_gradient / max(8 * len(feats) * sums.shape[1], 1)
        corners = corners + scale * (field.corners - field.mean[:-1, None])
    result = torch.zeros_like(wide)
    by_corner = wide.new_zeros(len(feats), 8, sums.shape[1])
    by_corner[point_cubes[real[..., 0]].long(), real[..., 0].nonzero()[:, 1]] = corners[real[..., 0]]
    result[:, :8] = by_corner[..., 0]
    result[:, 8:32] = by_corner[..., 1:4].flatten(1)
    result[:, 53:] = by_corner[..., 4:].flatten(1)
    owned = cell_cubes >= 0
    result[cell_cubes[owned].long(), 32:53] = cell_gradient[owned]
    if training:
        result[:, 32:52] += wide[:, 32:52].sign() * (magnitude_gradient / max(20 * len(feats), 1))
    return result.to(dtype)


def _crossing_gradient(dual: _Dual, alpha: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the crossings with respect to alpha, sdf ``[V, 7, 2]`` and payload ``[V, 7, 2, 3 + C]`` at the two ends."""
    weight, total = _crossing_weights(dual.sdf, alpha)
    gradient = torch.where((dual.edges >= 0)[..., None], gradient / total, 0)[:, :, None]
    weight_gradient = (gradient * (dual.payload - dual.crossing[:, :, None])).sum(-1)
    product_gradient = weight_gradient.flip(-1) * weight_gradient.new_tensor([-1, 1])
    return product_gradient * dual.sdf, product_gradient * alpha, gradient * weight[..., None]


def _crossing_weights(sdf: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    weight = (sdf * alpha).flip(-1) * sdf.new_tensor([1, -1])
    return weight, weight.sum(-1, keepdim=True)


def _dual(
    field: _Field,
    weights: Tensor,
    cells: Tensor,
    cell_points: Tensor,
    cases: Tensor,
    vertex_cells: Tensor,
    resolution: int,
) -> _Dual:
    table = tables(cells.device)
    counts = table.counts[cases]
    rank = torch.arange(len(vertex_cells), device=cells.device) - (counts.cumsum(0) - counts)[vertex_cells]
    edges = table.groups[cases[vertex_cells], rank]  # [V, 7]
    present = edges >= 0
    ends = table.edges[edges]  # [V, 7, 2]
    points = cell_points[vertex_cells[:, None, None], ends].long()
    points = torch.where(points < 0, len(field.sdf) - 1, points)
    grid = cells[vertex_cells][:, None, None] + corner_offsets(cells.device)[ends]
    payload = torch.cat([_positions(grid, field.shift[points], resolution), field.color[points]], -1)
    sdf = field.sdf[points]
    sdf = torch.where(present[..., None], sdf, sdf.new_tensor([-1, 1]))  # any crossing: no division by zero
    flexible = weights[:, :20].tanh() * 0.99 + 1
    beta = flexible[vertex_cells[:, None], edges] * present
    alpha = flexible[vertex_cells[:, None, None], 12 + ends]
    weight, total = _crossing_weights(sdf, alpha)
    crossing = (weight[..., None] * payload).sum(2) / total
    vertex = (beta[..., None] * crossing).sum(1) / beta.sum(1, keepdim=True)
    weight, total = _crossing_weights(sdf, torch.ones_like(alpha))
    offset = (weight[..., None] * payload[..., :3]).sum(2) / total - vertex[:, None, :3]
    distance = offset.norm(dim=-1) * present
    return _Dual(edges, ends, points, sdf, payload, alpha, beta, crossing, vertex, offset, distance)


def _field(feats: Tensor, point_cubes: Tensor, resolution: int) -> _Field:
    by_corner = [feats[:, :8, None] - 1 / resolution, feats[:, 8:32].unflatten(1, (8, 3))]
    by_corner.append(feats[:, 53:].unflatten(1, (8, (feats.shape[1] - 53) // 8)))
    values = torch.cat(by_corner, 2)
    mean = _mean(values, point_cubes)
    default = mean.new_zeros(1, mean.shape[1])
    default[0, 0] = 1
    mean = torch.cat([mean, default])
    corners = _row_or(values.flatten(0, 1), _corner_rows(point_cubes), 0)
    return _Field(corners, mean, mean[:, 0], mean[:, 1:4].tanh(), mean[:, 4:].sigmoid())


def _mean(values: Tensor, point_cubes: Tensor) -> Tensor:
    """``[G, D]``: mean over the cubes around each grid point of what they say ``[N, 8, D]`` about it."""
    gathered = _row_or(values.flatten(0, 1), _corner_rows(point_cubes), 0)
    return gathered.sum(1) / (point_cubes >= 0).sum(1, keepdim=True)


def _corner_rows(point_cubes: Tensor) -> Tensor:
    return torch.where(point_cubes < 0, -1, point_cubes.long() * 8 + torch.arange(8, device=point_cubes.device))


def _cell_weights(feats: Tensor, cell_cubes: Tensor) -> Tensor:
    """``[S, 21]``: beta of the 12 edges, alpha of the 8 corners, gamma; raw. 0 in cells without a cube."""
    return _row_or(feats[:, 32:53], cell_cubes.long(), 0)


def _positions(grid: Tensor, shift: Tensor, resolution: int) -> Tensor:
    return grid.to(shift.dtype) / resolution - 0.5 + shift * _reach(resolution)


def _reach(resolution: int) -> float:
    """How far the deformation can move a grid point: just less than half a cell."""
    return (1 - 1e-8) / (2 * resolution)


def _row_or(values: Tensor, index: Tensor, default: float) -> Tensor:
    """``values[index]``, `default` where the index is negative."""
    padded = torch.cat([values, values.new_full((1, *values.shape[1:]), default)])
    return padded[torch.where(index < 0, len(values), index)]


def _keys(coords: Tensor, side: int) -> Tensor:
    """One int64 per coordinate; sorting keys sorts by x, y, z. Coordinates outside [0, side) give a key below 0."""
    keys = (coords[..., 0] * side + coords[..., 1]) * side + coords[..., 2]
    return torch.where(((coords >= 0) & (coords < side)).all(-1), keys, -1)


def _unpack(keys: Tensor, side: int) -> Tensor:
    return torch.stack([keys // side**2, keys // side % side, keys % side], -1)


def _find(keys: Tensor, sorted_keys: Tensor) -> Tensor:
    """Position of each key in the sorted list, -1 where it is not in it."""
    if len(sorted_keys) == 0:
        return torch.full_like(keys, -1)
    position = torch.searchsorted(sorted_keys, keys).clamp_max(len(sorted_keys) - 1)
    return torch.where(sorted_keys[position] == keys, position, -1)
