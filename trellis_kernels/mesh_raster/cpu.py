"""CPU launch. The kernels are csrc/cpu/mesh_raster*."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.mesh_raster.reference_silhouettes import antialias, antialias_gradient, face_neighbors
from trellis_kernels.mesh_raster.reference_texture import (
    interpolate_derivatives,
    sample_texture,
    sample_texture_gradient,
    sample_texture_uv_gradient,
)

# Not kernels yet: the definitions themselves.
__all__ = [
    "antialias",
    "antialias_gradient",
    "face_neighbors",
    "interpolate_derivatives",
    "sample_texture",
    "sample_texture_gradient",
    "sample_texture_uv_gradient",
]


def rasterize_mesh(
    positions: Tensor,
    faces: Tensor,
    width: int,
    height: int,
    behind_faces: Tensor | None,
    behind_depths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (positions.shape[0], height, width)
    if behind_faces is None or behind_depths is None:
        behind_faces, behind_depths = faces.new_empty(0, 0, 0), positions.new_empty(0, 0, 0)
    ids, depths = faces.new_empty(shape), positions.new_empty(shape)
    barycentrics, derivatives = positions.new_empty(*shape, 2), positions.new_empty(*shape, 4)
    pictures = ids, barycentrics, depths, derivatives
    _launch(_cpu.rasterize_mesh, positions, faces, behind_faces, behind_depths, *pictures)
    return barycentrics, depths, derivatives, ids


def rasterize_mesh_gradient(positions: Tensor, *inputs: Tensor) -> Tensor:
    out = positions.new_empty(positions.shape)
    _launch(_cpu.rasterize_mesh_gradient, positions, *inputs, out)
    return out


def interpolate(attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor) -> Tensor:
    out = attributes.new_empty(*ids.shape, attributes.shape[2])
    _launch(_cpu.interpolate, attributes, faces, ids, barycentrics, out)
    return out


def interpolate_gradient(
    out_gradient: Tensor, attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor
) -> tuple[Tensor, Tensor]:
    gradients = attributes.new_empty(attributes.shape), barycentrics.new_empty(barycentrics.shape)
    _launch(_cpu.interpolate_gradient, out_gradient, attributes, faces, ids, barycentrics, *gradients)
    return gradients


def _launch(kernel: Callable[..., None], *tensors: Tensor) -> None:
    # Outputs come last; they are contiguous already, so they pass unchanged.
    kernel(*(tensor.contiguous() for tensor in tensors), torch.get_num_threads())
