"""CUDA launches. Kernels: csrc/cuda/texture*.cu and silhouettes.cu; sorts are torch's. No launch waits for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.mesh_raster import reference_silhouettes
from trellis_kernels.mesh_raster.reference_texture import mip_texels


def interpolate_derivatives(attributes: Tensor, faces: Tensor, ids: Tensor, derivatives: Tensor) -> Tensor:
    out = attributes.new_empty(*ids.shape, 2 * attributes.shape[2])
    _launch("interpolate_derivatives", attributes, faces, ids, derivatives, out)
    return out


def sample_texture(
    texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> tuple[Tensor, Tensor]:
    mips = _room_for_mips(texture, derivatives)
    out = texture.new_empty(*uv.shape[:3], texture.shape[3])
    _launch("sample_texture", texture, uv, _or_nothing(derivatives, uv), out, mips, options=(wrap, filter))
    return out, mips


def sample_texture_uv_gradient(
    out_gradient: Tensor, texture: Tensor, mips: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> Tensor:
    out = uv.new_empty(uv.shape)
    where = uv, _or_nothing(derivatives, uv)
    _launch("sample_texture_uv_gradient", out_gradient, texture, mips, *where, out, options=(wrap, filter))
    return out


def sample_texture_gradient(
    out_gradient: Tensor, texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> Tensor:
    images, height, width, channels = texture.shape
    pixels, levels = uv.numel() // 2, derivatives is not None
    out, mips = texture.new_empty(texture.shape), _room_for_mips(texture, derivatives)
    native = cuda_device.native(texture)
    with cuda_device.guard(texture):
        out_gradient, uv, how = out_gradient.contiguous(), uv.contiguous(), (wrap, filter)
        places = images * native.texture_places(height, width, levels)
        keys = uv.new_empty(pixels, 2 if levels and height * width > 1 else 1, dtype=torch.int32)
        level_of_pixel = uv.new_empty(pixels)
        listed = _or_nothing(derivatives, uv), out, keys, level_of_pixel
        _launch("texture_keys", out_gradient, uv, *listed, options=how)
        ordered, order = torch.sort(keys.flatten(), stable=True)
        runs = keys.new_zeros(places, 2)
        partials = uv.new_empty(len(order) // native.texture_chunk, 4, channels)
        found = out_gradient, uv, level_of_pixel
        _launch("texture_runs", *found, out, ordered, order, levels, runs, partials, options=how)
        _launch("sum_texture", *found, order, runs, partials, levels, out, mips, options=how)
    return out


def face_neighbors(faces: Tensor) -> Tensor:
    with cuda_device.guard(faces):
        return reference_silhouettes.face_neighbors(faces)


def antialias(
    images: Tensor, ids: Tensor, depths: Tensor, positions: Tensor, faces: Tensor, neighbors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out, shares = images.new_empty(images.shape), images.new_empty(*ids.shape, 2)
    edges = ids.new_empty(*ids.shape, 2)
    _launch("antialias", images, ids, depths, positions, faces, neighbors, out, shares, edges)
    return out, shares, edges


def antialias_gradient(
    out_gradient: Tensor, images: Tensor, positions: Tensor, faces: Tensor, shares: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor]:
    by_images, by_positions = images.new_empty(images.shape), positions.new_empty(positions.shape)
    _launch("antialias_images_gradient", out_gradient, shares, by_images)
    with cuda_device.guard(images):
        views, vertices, _ = positions.shape
        sums = images.new_empty(views, faces.numel(), 3, dtype=torch.float64)
        _launch("antialias_edges_gradient", out_gradient, images, positions, faces, shares, edges, sums)
        ordered, corners = torch.sort(faces.flatten(), stable=True)
        rows = torch.arange(vertices + 1, dtype=faces.dtype, device=faces.device)
        starts = torch.searchsorted(ordered, rows, out_int32=True)
        _launch("antialias_positions_gradient", sums, positions, faces, corners, starts, by_positions)
    return by_images, by_positions


def _room_for_mips(texture: Tensor, derivatives: Tensor | None) -> Tensor:
    images, height, width, channels = texture.shape
    return texture.new_empty(images, 0 if derivatives is None else mip_texels(height, width), channels)


def _or_nothing(derivatives: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, 0, 0, 0) if derivatives is None else derivatives


def _launch(name: str, *arguments: Tensor | bool, options: tuple[str, ...] = ()) -> None:
    # Outputs are contiguous already, so they pass unchanged.
    given = [argument.contiguous() if isinstance(argument, Tensor) else argument for argument in arguments]
    tensor = given[0]
    assert isinstance(tensor, Tensor)
    native = cuda_device.native(tensor)
    with cuda_device.guard(tensor):
        getattr(native, name)(*given, *options, cuda_device.stream(tensor))
