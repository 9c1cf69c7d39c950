"""CPU launch. The kernels are csrc/cpu/mesh_raster*."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.mesh_raster.reference_texture import mip_texels


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


def interpolate_derivatives(attributes: Tensor, faces: Tensor, ids: Tensor, derivatives: Tensor) -> Tensor:
    out = attributes.new_empty(*ids.shape, 2 * attributes.shape[2])
    _launch(_cpu.interpolate_derivatives, attributes, faces, ids, derivatives, out)
    return out


def sample_texture(
    texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> tuple[Tensor, Tensor]:
    images, height, width, channels = texture.shape
    mips = texture.new_empty(images, 0 if derivatives is None else mip_texels(height, width), channels)
    out = texture.new_empty(*uv.shape[:3], channels)
    where = uv, _or_nothing(derivatives, uv)
    _launch(_cpu.sample_texture, texture, *where, out, mips, options=(wrap, filter))
    return out, mips


def sample_texture_gradient(
    out_gradient: Tensor, texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> Tensor:
    out = texture.new_empty(texture.shape)
    where = uv, _or_nothing(derivatives, uv)
    _launch(_cpu.sample_texture_gradient, out_gradient, *where, out, options=(wrap, filter))
    return out


def sample_texture_uv_gradient(
    out_gradient: Tensor, texture: Tensor, mips: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> Tensor:
    out = uv.new_empty(uv.shape)
    inputs = out_gradient, texture, mips, uv, _or_nothing(derivatives, uv)
    _launch(_cpu.sample_texture_uv_gradient, *inputs, out, options=(wrap, filter))
    return out


def face_neighbors(faces: Tensor) -> Tensor:
    out = faces.new_empty(faces.shape)
    _launch(_cpu.face_neighbors, faces, out)
    return out


def antialias(
    images: Tensor, ids: Tensor, depths: Tensor, positions: Tensor, faces: Tensor, neighbors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out, shares = images.new_empty(images.shape), images.new_empty(*ids.shape, 2)
    edges = ids.new_empty(*ids.shape, 2)
    _launch(_cpu.antialias, images, ids, depths, positions, faces, neighbors, out, shares, edges)
    return out, shares, edges


def antialias_gradient(out_gradient: Tensor, images: Tensor, positions: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    gradients = images.new_empty(images.shape), positions.new_empty(positions.shape)
    _launch(_cpu.antialias_gradient, out_gradient, images, positions, *inputs, *gradients)
    return gradients


def _or_nothing(derivatives: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, 0, 0, 0) if derivatives is None else derivatives


def _launch(kernel: Callable[..., None], *tensors: Tensor, options: tuple[str, ...] = ()) -> None:
    # Outputs come last; they are contiguous already, so they pass unchanged.
    kernel(*(tensor.contiguous() for tensor in tensors), *options, torch.get_num_threads())
