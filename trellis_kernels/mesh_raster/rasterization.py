"""What `rasterize_mesh` gives and everything else here reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rasterization(NamedTuple):
    """What B cameras see of a mesh, per pixel; row 0 is the one where clip-space y / w is lowest."""

    faces: Tensor
    """``[B, H, W]`` int32: row of the triangle in front, -1 where there is none."""
    barycentrics: Tensor
    """``[B, H, W, 2]``: perspective-correct weights of the triangle's first two vertices; the third has the rest."""
    depths: Tensor
    """``[B, H, W]``: z / w in [-1, 1], 1 where there is nothing."""
    derivatives: Tensor
    """``[B, H, W, 4]``: of the two barycentrics by a step of one pixel: du/dx, du/dy, dv/dx, dv/dy. No gradient."""
