"""Sparse 3D operators. Each lives in a folder of its own name; a tensor's device picks its kernel."""

from trellis_kernels.gaussians import rasterize_gaussians, spherical_harmonics
from trellis_kernels.operator import OPERATORS, use_reference
from trellis_kernels.sparse_conv import (
    pointwise_conv,
    sparse_pool,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    submanifold_conv_weight_gradient,
    upsample,
)

__all__ = [
    "OPERATORS",
    "pointwise_conv",
    "rasterize_gaussians",
    "sparse_pool",
    "spherical_harmonics",
    "subdivide",
    "subdivided_conv",
    "submanifold_conv",
    "submanifold_conv_weight_gradient",
    "upsample",
    "use_reference",
]
