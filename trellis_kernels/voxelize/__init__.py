"""Voxelization: the cells of a grid that a triangle mesh touches."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.shapes import expect
from trellis_kernels.voxelize import reference

__all__ = ["voxelize_mesh"]

MAX_RESOLUTION = 1024


def voxelize_mesh(vertices: Tensor, faces: Tensor, resolution: int = 64) -> Tensor:
    """The voxels of the unit cube around the origin that a surface passes through.

    Voxel (x, y, z) is the closed box from ``(x, y, z) / resolution - 0.5`` to one voxel further; it belongs to the
    result if it shares a point with a triangle, a touching corner included (comparisons are in float64, in the
    triangle's favor by 1e-9 voxels). Meshes need not be closed. Parts outside the cube are cut off; degenerate
    triangles count as the segment or point they are; triangles with a vertex that is not finite are left out. Not
    differentiable.

    Args:
        vertices: ``[V, 3]`` float32 or float64.
        faces: ``[F, 3]`` int32 rows of `vertices`.
        resolution: voxels per axis, 1 to 1024.

    Returns:
        ``[N, 3]`` int32, distinct, in lexicographic order (x, y, z).

    Raises:
        ValueError: if a shape or `resolution` does not fit or a face has a vertex outside ``[0, V)``.
        TypeError: if a dtype does not fit.

    Source:
        The separating axis test: Schwarz & Seidel 2010, "Fast parallel surface and solid voxelization on GPUs", sec. 3.
    """
    expect(vertices=(vertices, "V 3", (torch.float32, torch.float64)), faces=(faces, "F 3", torch.int32))
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"resolution must be in [1, {MAX_RESOLUTION}]; got {resolution}")
    return _voxelize(vertices.detach(), faces, resolution)


_voxelize = Operator(
    "voxelize_mesh(Tensor vertices, Tensor faces, int resolution) -> Tensor",
    reference.voxelize_mesh,
    {"cpu": "trellis_kernels.voxelize.cpu"},
)


@_voxelize.fake
def _(vertices: Tensor, faces: Tensor, resolution: int) -> Tensor:
    return faces.new_empty(torch.library.get_ctx().new_dynamic_size(), 3)
