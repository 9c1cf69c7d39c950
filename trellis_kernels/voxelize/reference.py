"""What voxelization means, in plain PyTorch: thirteen separating axes between a triangle and a box."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 1e-9  # voxels


def voxelize_mesh(vertices: Tensor, faces: Tensor, resolution: int) -> Tensor:
    if len(faces) and (int(faces.min()) < 0 or int(faces.max()) >= len(vertices)):
        raise ValueError(f"faces must be rows of vertices, in [0, {len(vertices)})")
    corners = (vertices.double()[faces.long()] + 0.5) * resolution
    occupied = torch.zeros((resolution,) * 3, dtype=torch.bool, device=vertices.device)
    for triangle in corners[corners.isfinite().all(-1).all(-1)]:
        low = (triangle.amin(0) - 1 - SLACK).ceil().clamp(0, resolution).long()
        high = (triangle.amax(0) + SLACK).floor().clamp(-1, resolution - 1).long() + 1
        if (high > low).all():
            axes = [torch.arange(int(a), int(b), device=vertices.device) for a, b in zip(low, high, strict=True)]
            cells = torch.cartesian_prod(*axes).view(-1, 3)
            x, y, z = cells[_touch(triangle, cells)].unbind(-1)
            occupied[x, y, z] = True
    return occupied.nonzero().int()


def _touch(triangle: Tensor, cells: Tensor) -> Tensor:
    """Which unit boxes, given by their lowest corners ``[N, 3]``, share a point with the triangle ``[3, 3]``."""
    edges = triangle.roll(-1, 0) - triangle
    units = torch.eye(3, dtype=triangle.dtype, device=triangle.device)
    crosses = torch.linalg.cross(edges[:, None].expand(3, 3, 3), units.expand(3, 3, 3)).view(9, 3)
    axes = torch.cat([units, torch.linalg.cross(edges[0], edges[1])[None], crosses])
    projected = triangle @ axes.T  # [3, 13]
    box = cells.to(triangle) @ axes.T  # [N, 13]
    slack = SLACK * axes.abs().sum(-1)
    low, high = box + axes.clamp(max=0).sum(-1), box + axes.clamp(min=0).sum(-1)
    return ((projected.amin(0) <= high + slack) & (projected.amax(0) >= low - slack)).all(-1)
