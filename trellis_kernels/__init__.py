"""Sparse 3D operators. Each lives in a folder of its own name; a tensor's device picks its kernel."""

from trellis_kernels.attention import varlen_attention, window_partition, windowed_attention
from trellis_kernels.backprojection import backproject
from trellis_kernels.gaussians import rasterize_gaussians, spherical_harmonics
from trellis_kernels.mesh_extraction import ExtractedMesh, ExtractionTerms, extract_mesh
from trellis_kernels.mesh_raster import (
    Rasterization,
    antialias,
    face_neighbors,
    interpolate,
    interpolate_derivatives,
    rasterize_mesh,
    sample_texture,
)
from trellis_kernels.normalization import (
    gated_residual,
    head_rms_norm,
    layer_norm,
    modulated_layer_norm,
    qk_rms_norm,
    residual_layer_norm,
)
from trellis_kernels.operator import OPERATORS, use_reference
from trellis_kernels.radiance_field import RadianceFieldImages, render_radiance_field, render_voxels
from trellis_kernels.serialization import hilbert_codes, hilbert_order, morton_codes, morton_order
from trellis_kernels.sparse_conv import (
    conv_plan,
    pointwise_conv,
    sparse_pool,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    submanifold_conv_weight_gradient,
    upsample,
)
from trellis_kernels.ssim import ssim_map
from trellis_kernels.voxel_hash import (
    coarsen,
    neighbor_map,
    subdivide_coords,
    subdivided_neighbor_map,
    unique_coords,
)
from trellis_kernels.voxelize import voxelize_mesh

__all__ = [
    "OPERATORS",
    "ExtractedMesh",
    "ExtractionTerms",
    "RadianceFieldImages",
    "Rasterization",
    "antialias",
    "backproject",
    "coarsen",
    "conv_plan",
    "extract_mesh",
    "face_neighbors",
    "gated_residual",
    "head_rms_norm",
    "hilbert_codes",
    "hilbert_order",
    "interpolate",
    "interpolate_derivatives",
    "layer_norm",
    "modulated_layer_norm",
    "morton_codes",
    "morton_order",
    "neighbor_map",
    "pointwise_conv",
    "qk_rms_norm",
    "rasterize_gaussians",
    "rasterize_mesh",
    "render_radiance_field",
    "render_voxels",
    "residual_layer_norm",
    "sample_texture",
    "sparse_pool",
    "spherical_harmonics",
    "ssim_map",
    "subdivide",
    "subdivide_coords",
    "subdivided_conv",
    "subdivided_neighbor_map",
    "submanifold_conv",
    "submanifold_conv_weight_gradient",
    "unique_coords",
    "upsample",
    "use_reference",
    "varlen_attention",
    "voxelize_mesh",
    "window_partition",
    "windowed_attention",
]
