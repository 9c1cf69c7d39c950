"""Rotations as quaternions ``(w, x, y, z)`` and as matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def quat_to_matrix(quats: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]`` (w, x, y, z) of any length but zero."""
    w, x, y, z = normalize(quats, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quat(matrices: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]`` (w, x, y, z), largest component positive, of rotations ``[..., 3, 3]``.

    Each component is known from the diagonal up to its sign; the products in the off-diagonal terms, divided by the
    largest component, give the others without cancellation (Shepperd 1978).
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in matrices.unbind(-2))
    # row i of the outer product 4 q qT
    ww, xx, yy, zz = 1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22
    wx, wy, wz = m21 - m12, m02 - m20, m10 - m01
    xy, xz, yz = m10 + m01, m02 + m20, m21 + m12
    outer = torch.stack(
        [torch.stack(row, -1) for row in ((ww, wx, wy, wz), (wx, xx, xy, xz), (wy, xy, yy, yz), (wz, xz, yz, zz))], -2
    )
    largest = torch.stack([ww, xx, yy, zz], -1).argmax(-1)
    row = outer.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    return normalize(row, dim=-1)
