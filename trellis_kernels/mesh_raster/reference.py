"""What rasterization means, in plain PyTorch: every pixel against every triangle."""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS = 1 << 22  # of pixels and triangles at a time


def rasterize_mesh(
    positions: Tensor,
    faces: Tensor,
    width: int,
    height: int,
    behind_faces: Tensor | None,
    behind_depths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_faces(faces, positions.shape[1])
    views, pixels = positions.shape[0], height * width
    centers = pixel_centers(width, height, positions.device)
    ids = faces.new_full((views, pixels), -1)
    depths = positions.new_ones(views, pixels)
    for view in range(views):
        plane = edge_planes(positions[view].double(), faces)
        for first in range(0, pixels if len(faces) else 0, max(1, _PAIRS // max(1, len(faces)))):
            some = slice(first, first + max(1, _PAIRS // max(1, len(faces))))
            covered, depth = _covered(plane, centers[some], positions.dtype)
            if behind_faces is not None and behind_depths is not None:
                row = torch.arange(len(faces), device=faces.device)
                last, at = behind_depths[view].view(-1, 1)[some], behind_faces[view].view(-1, 1)[some]
                covered &= (row != at) & ((depth > last) | ((depth == last) & (row > at) & (at >= 0)))
            depth = torch.where(covered, depth, torch.inf)
            nearest, row = depth.min(1)  # the first of equal ones
            hit = nearest < torch.inf
            ids[view, some] = torch.where(hit, row, -1).int()
            depths[view, some] = torch.where(hit, nearest, 1.0).to(positions.dtype)
    ids = ids.view(views, height, width)
    barycentrics, derivatives = _barycentrics(positions, faces, ids)
    return barycentrics, depths.view(views, height, width), derivatives, ids


def rasterize_mesh_gradient(
    positions: Tensor, faces: Tensor, ids: Tensor, barycentrics_gradient: Tensor, depths_gradient: Tensor
) -> Tensor:
    corners, triangles = corner_rows(positions.double(), faces, ids)
    p, z = corners[..., _XYW], corners[..., 2]
    centers = pixel_centers(ids.shape[2], ids.shape[1], ids.device).view(1, *ids.shape[1:], 3)
    normals = torch.linalg.cross(p.roll(-1, -2), p.roll(-2, -2))
    edges = (normals * centers[..., None, :]).sum(-1)
    hit = ids >= 0
    sums = torch.where(hit, edges.sum(-1), 1.0)[..., None]
    determinant = torch.where(hit, (p[..., 0, :] * normals[..., 0, :]).sum(-1), 1.0)[..., None]
    weights = torch.nn.functional.pad(barycentrics_gradient.double(), (0, 1))
    depths = depths_gradient.double()[..., None] / determinant
    # u, v = edges / sum of edges, and depth = sum of edges z / determinant
    by_edge = (weights - (weights * edges).sum(-1, keepdim=True) / sums) / sums + depths * z
    by_determinant = -depths * (edges * z).sum(-1, keepdim=True) / determinant
    by_normal = by_edge[..., None] * centers[..., None, :]
    by_xyw = by_determinant[..., None] * normals
    by_xyw += torch.linalg.cross(p.roll(-1, -2), by_normal.roll(-2, -2))  # as the first factor of a cross product
    by_xyw += torch.linalg.cross(by_normal.roll(-1, -2), p.roll(-2, -2))  # as the second
    by_corner = torch.stack([by_xyw[..., 0], by_xyw[..., 1], depths * edges, by_xyw[..., 2]], -1)
    return _added_to_vertices(by_corner * hit[..., None, None], triangles, positions.shape).to(positions.dtype)


def interpolate(attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor) -> Tensor:
    corners, weights = _corners(attributes, faces, ids, barycentrics)
    return (corners * weights[..., None]).sum(3)


def interpolate_gradient(
    out_gradient: Tensor, attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor
) -> tuple[Tensor, Tensor]:
    corners, weights = _corners(attributes, faces, ids, barycentrics)
    by_weight = (out_gradient[..., None, :] * corners).sum(-1) * (ids >= 0)[..., None]
    _, triangles = corner_rows(attributes, faces, ids)
    by_corner = (weights[..., None] * out_gradient[..., None, :]).double()
    by_attribute = _added_to_vertices(by_corner, triangles, (ids.shape[0], *attributes.shape[1:]))
    if attributes.shape[0] == 1:
        by_attribute = by_attribute.sum(0, keepdim=True)
    return by_attribute.to(attributes.dtype), by_weight[..., :2] - by_weight[..., 2:]


def pixel_centers(width: int, height: int, device: torch.device) -> Tensor:
    """``[H * W, 3]`` float64: x / w and y / w of the pixel centers, and 1."""
    x, y = (
        (torch.arange(extent, dtype=torch.float64, device=device) + 0.5) * (2 / extent) - 1
        for extent in (width, height)
    )
    return torch.stack(
        [x.expand(height, -1), y[:, None].expand(-1, width), torch.ones_like(x.expand(height, -1))], -1
    ).view(-1, 3)


def edge_planes(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[F, 3, 3]`` normals n of the planes through the camera and each edge, ``[F]`` determinants, ``[F, 3]`` z.

    A triangle covers a direction d where n_i d > 0 for all three; then n_i d are the barycentrics, not normalised. The
    plane of an edge is computed from the lower vertex row to the higher: the triangles that share it see it alike.
    """
    corners = vertices[faces.long()]
    planes = []
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        ascending = (faces[:, j] < faces[:, k])[:, None]
        a, b = (
            torch.where(ascending, corners[:, j, _XYW], corners[:, k, _XYW]),
            torch.where(ascending, corners[:, k, _XYW], corners[:, j, _XYW]),
        )
        plane = torch.linalg.cross(a, b)
        planes.append(torch.where(ascending, plane, -plane))
    normals = torch.stack(planes, 1)
    determinants = (corners[:, 0, _XYW] * normals[:, 0]).sum(1)
    flip = torch.where(determinants < 0, -1.0, 1.0)
    return normals * flip[:, None, None], determinants * flip, corners[:, :, 2]


_XYW = [0, 1, 3]


def _covered(planes: tuple[Tensor, Tensor, Tensor], centers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[P, F]``: which triangles cover which pixels, and their depths there, rounded."""
    normals, determinants, z = planes
    edges = torch.einsum("pc,fic->pfi", centers, normals)
    x, y = normals[..., 0], normals[..., 1]
    takes_zero = (x > 0) | ((x == 0) & (y > 0))  # left edges, and top ones
    valid = (determinants > 0) & determinants.isfinite() & normals.isfinite().all(2).all(1)
    inside = ((edges > 0) | ((edges == 0) & takes_zero)).all(2) & valid
    depth = ((edges * z).sum(2) / determinants).to(dtype)
    return inside & (depth >= -1) & (depth <= 1), depth


def _barycentrics(positions: Tensor, faces: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the first two corners, and their derivatives by a step of one pixel."""
    height, width = ids.shape[1:]
    p = corner_rows(positions.double(), faces, ids)[0][..., _XYW]
    normals = torch.linalg.cross(p.roll(-1, -2), p.roll(-2, -2))
    edges = (normals * pixel_centers(width, height, ids.device).view(1, height, width, 1, 3)).sum(-1)
    hit = (ids >= 0)[..., None]
    sums = torch.where(hit, edges.sum(-1, keepdim=True), 1.0)
    weights = edges / sums
    slopes = normals[..., :2] * normals.new_tensor([2 / width, 2 / height])
    steps = (slopes - weights[..., None] * slopes.sum(-2, keepdim=True)) / sums[..., None]
    return (
        torch.where(hit, weights[..., :2].clamp(0, 1), 0).to(positions.dtype),
        torch.where(hit, steps[..., :2, :].flatten(-2), 0).to(positions.dtype),
    )


def _corners(attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, H, W, 3, C]`` attributes of the triangle of each pixel and ``[B, H, W, 3]`` weights, zero where none."""
    check_faces(faces, attributes.shape[1])
    if ids.numel() and int(ids.max()) >= len(faces):
        raise ValueError(f"rasterization.faces must be below F={len(faces)}; got {int(ids.max())}")
    u, v = barycentrics.unbind(-1)
    weights = torch.where((ids >= 0)[..., None], torch.stack([u, v, 1 - u - v], -1), 0)
    return corner_rows(attributes, faces, ids)[0], weights


def corner_rows(rows: Tensor, faces: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, H, W, 3, C]`` rows of the triangle of each pixel, and ``[B, H, W, 3]`` which; any where there is none."""
    if not len(faces):
        return rows.new_zeros(*ids.shape, 3, rows.shape[2]), ids.new_zeros(*ids.shape, 3).long()
    triangles = faces[ids.clamp_min(0).long()].long()
    batch = torch.arange(ids.shape[0], device=ids.device).view(-1, 1, 1, 1) % rows.shape[0]
    return rows[batch, triangles], triangles


def _added_to_vertices(by_corner: Tensor, triangles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``[B, V, C]`` sums of ``[B, H, W, 3, C]`` over the pixels of each vertex."""
    views, vertices, columns = shape
    sums = by_corner.new_zeros(views * vertices, columns)
    if not vertices:
        return sums.view(shape)
    first = vertices * torch.arange(views, device=triangles.device).view(-1, 1, 1, 1)
    return sums.index_add(0, (triangles + first).flatten(), by_corner.reshape(-1, columns)).view(shape)


def check_faces(faces: Tensor, vertices: int) -> None:
    bad = ((faces < 0) | (faces >= vertices)).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"faces must be in [0, {vertices}); got {faces[row].tolist()} in row {row}")
