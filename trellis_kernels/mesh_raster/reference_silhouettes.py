"""What antialiasing means, in plain PyTorch: all pairs of pixels that show different triangles, one walk each."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.mesh_raster.reference import check_faces, pixel_centers

MAX_STEPS = 16  # triangles a walk goes through
_XYW = [0, 1, 3]


def face_neighbors(faces: Tensor) -> Tensor:
    if not len(faces):
        return torch.empty_like(faces)
    # Edge i is the one opposite corner i.
    ends = torch.stack([faces.roll(-1, 1), faces.roll(-2, 1)], -1).long().view(-1, 2)
    low, high = ends.min(1).values, ends.max(1).values
    keys, order = ((low << 32) | high).sort(stable=True)
    same = torch.nn.functional.pad(keys[1:] == keys[:-1], (2, 2))  # [i + 1]: whether i is like i - 1
    before, after = same[1:-2], same[2:-1]
    alone_with_next = after & ~before & ~same[3:]
    alone_with_last = before & ~after & ~same[:-3]
    others = torch.where(alone_with_next, order.roll(-1), order.roll(1)) // 3
    found = torch.where(alone_with_next | alone_with_last, others, -1).int()
    return torch.empty_like(found).index_copy(0, order, found).view(-1, 3)


def antialias(
    images: Tensor, ids: Tensor, depths: Tensor, positions: Tensor, faces: Tensor, neighbors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(faces, neighbors, ids, positions)
    edges = torch.full_like(ids, -1)[..., None].repeat(1, 1, 1, 2)
    shares = torch.zeros_like(edges, dtype=images.dtype)
    out = images.clone()
    for axis in (0, 1):
        first, second = _neighboring(ids, axis)
        pair = (first != second).nonzero()  # view, row, column of the first pixel
        if not len(pair):
            continue
        at = pair.unbind(1)
        there = (pair + pair.new_tensor([0, axis, 1 - axis])).unbind(1)
        from_second = (ids[at] < 0) | ((ids[there] >= 0) & (depths[there] < depths[at]))
        centers = _centers(ids, pair), _centers(ids, torch.stack(there, 1))
        start, end = (
            torch.where(from_second[:, None], centers[1], centers[0]),
            torch.where(from_second[:, None], centers[0], centers[1]),
        )
        triangle = torch.where(from_second, ids[there], ids[at]).long()
        edge, part, normal = _walk(at[0], triangle, start, end, positions, faces, neighbors)
        level, upright = normal[:, 1].abs() * ids.shape[2], normal[:, 0].abs() * ids.shape[1]
        found = (edge >= 0) & ((upright >= level) if axis == 0 else (upright < level))
        part = torch.where(from_second, 1 - part, part)  # of the way from the first pixel
        shares[(*at, torch.full_like(at[0], axis))] = torch.where(found, 0.5 - part, 0).to(images.dtype)
        edges[(*at, torch.full_like(at[0], axis))] = torch.where(found, edge, -1).int()
    for axis in (0, 1):
        first, second = _neighboring(images, axis)
        share = _neighboring(shares[..., axis], axis)[0][..., None]
        taken = share.abs() * (second - first)
        to_first, to_second = _neighboring(out, axis)
        to_first += torch.where(share > 0, taken, 0)
        to_second -= torch.where(share < 0, taken, 0)
    return out, shares, edges


def antialias_gradient(
    out_gradient: Tensor, images: Tensor, positions: Tensor, faces: Tensor, shares: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor]:
    by_images = out_gradient.clone()
    by_positions = torch.zeros_like(positions, dtype=torch.float64)
    size = edges.new_tensor([edges.shape[2], edges.shape[1]]).double()
    for axis in (0, 1):
        first, second = _neighboring(images, axis)
        share = _neighboring(shares[..., axis], axis)[0]
        into_first, into_second = _neighboring(out_gradient, axis)
        taker = torch.where((share > 0)[..., None], into_first, into_second)
        given = share.abs()[..., None] * taker  # moves from the taker to the other
        to_first, to_second = _neighboring(by_images, axis)
        sign = torch.where(share > 0, 1, -1)[..., None]
        to_first -= sign * given
        to_second += sign * given
        pair = (_neighboring(edges[..., axis], axis)[0] >= 0).nonzero()
        if not len(pair):
            continue
        at = pair.unbind(1)
        by_share = (taker * (second - first))[at].sum(-1).double()
        edge = edges[(*at, torch.full_like(at[0], axis))].long()
        triangle = faces[edge // 3].long()
        j = triangle.gather(1, ((edge + 1) % 3)[:, None])[:, 0]
        k = triangle.gather(1, ((edge + 2) % 3)[:, None])[:, 0]
        p, q = (positions[at[0], row][:, _XYW].double() for row in (j, k))
        normal = torch.linalg.cross(p, q)
        crossing = _centers(edges[..., 0], pair)
        other = normal[:, 1 - axis] * crossing[:, 1 - axis] + normal[:, 2]
        crossing[:, axis] = -other / normal[:, axis]
        # share = 0.5 - part, part = (crossing - first) * size / 2, and the crossing moves by -(normal's move . it) / n
        by_normal = (by_share * 0.5 * size[axis] / normal[:, axis])[:, None] * crossing
        for row, gradient in ((j, torch.linalg.cross(q, by_normal)), (k, torch.linalg.cross(by_normal, p))):
            flat = (at[0] * positions.shape[1] + row)[:, None] * 4 + row.new_tensor(_XYW)
            by_positions.view(-1).index_add_(0, flat.flatten(), gradient.flatten())
    return by_images, by_positions.to(positions.dtype)


def _neighboring(pixels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Views of ``[B, H, W, ...]``: all pixels that have a next one along x (0) or y (1), and the next ones."""
    dim = 2 - axis
    return pixels.narrow(dim, 0, pixels.shape[dim] - 1), pixels.narrow(dim, 1, pixels.shape[dim] - 1)


def _centers(ids: Tensor, pixels: Tensor) -> Tensor:
    """``[N, 3]`` x / w, y / w and 1 of the centers of pixels given by view, row and column."""
    centers = pixel_centers(ids.shape[2], ids.shape[1], ids.device)
    return centers[pixels[:, 1] * ids.shape[2] + pixels[:, 2]]


def _walk(
    view: Tensor, triangle: Tensor, start: Tensor, end: Tensor, positions: Tensor, faces: Tensor, neighbors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The first silhouette edge on the way: ``3 face + corner`` or -1, how far it is, and the normal of its plane."""
    found = torch.full_like(triangle, -1)
    part, normal = torch.zeros_like(start[:, 0]), torch.zeros_like(start)
    walking = torch.ones_like(triangle, dtype=torch.bool)
    entered = torch.full_like(triangle, -1)  # the edge we came in by
    for _ in range(MAX_STEPS):
        vertices = faces[triangle].long()
        p = positions[view[:, None], vertices][..., _XYW].double()
        planes = torch.stack([_plane(p, vertices, i) for i in range(3)], 1)
        planes = planes * torch.where((p[:, 0] * planes[:, 0]).sum(1) < 0, -1.0, 1.0)[:, None, None]
        here, there = ((planes * at[:, None]).sum(-1) for at in (start, end))
        leaves = (there < 0) & (torch.arange(3, device=faces.device) != entered[:, None])
        parts = torch.where(here > 0, here / (here - there), 0.0).maximum(part[:, None])
        parts, exit = torch.where(leaves, parts, torch.inf).min(1)  # the first of equal ones
        walking &= parts < torch.inf
        rows = torch.arange(len(exit), device=exit.device)
        plane = planes[rows, exit]
        beyond = neighbors[triangle, exit].long()
        theirs = faces[beyond.clamp_min(0)].long()
        ours = [vertices[rows, (exit + i) % 3] for i in (1, 2)]
        inner = (theirs != ours[0][:, None]) & (theirs != ours[1][:, None])  # the corner that is not on our edge
        entry = inner.int().argmax(1)
        opposite = positions[view, theirs[rows, entry]][:, _XYW].double()
        goes_on = (beyond >= 0) & ((opposite * plane).sum(1) < 0)
        ends = walking & ~goes_on
        found = torch.where(ends, 3 * triangle + exit, found)
        part = torch.where(walking, parts, part)
        normal = torch.where(ends[:, None], plane, normal)
        walking &= goes_on
        triangle = torch.where(walking, beyond, triangle)
        entered = torch.where(walking, entry, entered)
    return found, part, normal


def _plane(p: Tensor, vertices: Tensor, corner: int) -> Tensor:
    """Normal of the plane through the camera and the edge opposite a corner, the same for both of its triangles."""
    j, k = (corner + 1) % 3, (corner + 2) % 3
    plane = torch.linalg.cross(p[:, j], p[:, k])
    return torch.where((vertices[:, j] < vertices[:, k])[:, None], plane, -torch.linalg.cross(p[:, k], p[:, j]))


def _check(faces: Tensor, neighbors: Tensor, ids: Tensor, positions: Tensor) -> None:
    check_faces(faces, positions.shape[1])
    for name, rows in (("rasterization.faces", ids), ("neighbors", neighbors)):
        if rows.numel() and int(rows.max()) >= len(faces):
            raise ValueError(f"{name} must be below F={len(faces)}; got {int(rows.max())}")
