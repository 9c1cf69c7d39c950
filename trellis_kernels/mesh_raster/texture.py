"""Textures: the picture's coordinates in a texture, how fast they change, and what the texture shows there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.mesh_raster import reference_texture as reference
from trellis_kernels.mesh_raster.rasterization import Rasterization
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import expect

MAX_EXTENT = 16384  # texels per side
WRAPS, FILTERS = ("repeat", "clamp", "zero"), ("linear", "nearest")
_KERNELS = {"cpu": "trellis_kernels.mesh_raster.cpu", "cuda": "trellis_kernels.mesh_raster.cuda"}


def interpolate_derivatives(attributes: Tensor, faces: Tensor, rasterization: Rasterization) -> Tensor:
    """How much interpolated attributes change by a step of one pixel: of uv, what `sample_texture` chooses levels by.

    No gradient: the choice of a level has none either.

    Args:
        attributes: ``[A, V, C]`` of the dtype of the barycentrics; A is B, or 1 for the same in every picture.
        faces: ``[F, 3]`` int32, as given to `interpolate`.
        rasterization: B pictures.

    Returns:
        ``[B, H, W, 2 C]``: d0/dx, d0/dy, d1/dx, d1/dy, ... with x to the right and y down the rows; zero where there is
        no triangle. For uv that is du/dx, du/dy, dv/dx, dv/dy.

    Raises:
        ValueError: if a shape does not fit or an index is out of range; on a GPU the latter is a device-side assertion.
        TypeError: if a dtype does not fit.
    """
    ids, derivatives = rasterization.faces, rasterization.derivatives
    expect(
        faces=(faces, "F 3", torch.int32),
        attributes=(attributes, "A V C", derivatives.dtype),
        ids=(ids, "B H W", torch.int32),
        derivatives=(derivatives, "B H W 4"),
    )
    if attributes.shape[0] not in (1, ids.shape[0]):
        raise ValueError(f"attributes must be [A, V, C] with A = 1 or {ids.shape[0]}; got {list(attributes.shape)}")
    return _interpolate_derivatives(attributes.detach(), faces, ids, derivatives)


def sample_texture(
    texture: Tensor, uv: Tensor, derivatives: Tensor | None = None, wrap: str = "repeat", filter: str = "linear"
) -> Tensor:
    """Look a texture up at the coordinates of each pixel.

    uv = (0, 0) is the top left corner of the texture, the outer corner of texel [0, 0], and (1, 1) the bottom right
    one: u runs along columns, v down rows, as in glTF. Texel [i, j] has its center at ((j + 0.5) / W, (i + 0.5) / H).

    With `derivatives` the texture is smoothed to the size of a pixel's footprint: level l of the mip chain is half as
    wide and high as level l - 1 (rounded down, at least 1), each texel the mean of the area it covers there, also
    where that is a fraction of texels; the last level is one texel, the mean of all. The level of a pixel is log2 of
    the longest axis, in texels, of what one pixel covers in the texture, between 0 and the last; "linear" blends the
    two levels around it, "nearest" takes the nearer. Derivatives that are not finite choose the last level.

    Differentiable once in `texture`, through the mip chain, and with "linear" in `uv`, as if the level stayed: the
    derivatives get no gradient. Gradients are summed in a fixed order. A pixel whose uv is not finite is zero and
    gives no gradient.

    Args:
        texture: ``[T, H, W, C]`` float32 or float64, H and W in 1 to 16384 and of any ratio; T is B, or 1 for the same
            in every picture.
        uv: ``[B, h, w, 2]`` of the dtype of `texture`.
        derivatives: ``[B, h, w, 4]`` du/dx, du/dy, dv/dx, dv/dy by a step of one pixel, from `interpolate_derivatives`;
            None: only the texture itself, no smoothing.
        wrap: beyond [0, 1] the texture is "repeat"-ed, goes on with its border ("clamp"), or is "zero".
        filter: between texel centers "linear", or the "nearest" texel.

    Returns:
        ``[B, h, w, C]``.

    Raises:
        ValueError: if a shape, `wrap` or `filter` does not fit.
        TypeError: if a dtype does not fit.

    Source:
        Williams 1983, "Pyramidal Parametrics"; levels of any size: Guthe & Heckbert 2005, "Non-Power-of-Two Mipmap
        Creation".
    """
    expect(
        texture=(texture, "T H W C", (torch.float32, torch.float64)),
        uv=(uv, "B h w 2", texture.dtype),
        **({} if derivatives is None else {"derivatives": (derivatives, "B h w 4", texture.dtype)}),
    )
    if derivatives is not None and derivatives.shape[:3] != uv.shape[:3]:
        raise ValueError(f"derivatives must be {[*uv.shape[:3], 4]}; got {list(derivatives.shape)}")
    if texture.shape[0] not in (1, uv.shape[0]):
        raise ValueError(f"texture must be [T, H, W, C] with T = 1 or {uv.shape[0]}; got {list(texture.shape)}")
    if not all(1 <= extent <= MAX_EXTENT for extent in texture.shape[1:3]):
        raise ValueError(f"texture must be 1 to {MAX_EXTENT} texels high and wide; got {list(texture.shape)}")
    for name, value, known in (("wrap", wrap, WRAPS), ("filter", filter, FILTERS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}")
    return _sample(texture, uv, None if derivatives is None else derivatives.detach(), wrap, filter)[0]


_interpolate_derivatives = Operator(
    "interpolate_derivatives(Tensor attributes, Tensor faces, Tensor ids, Tensor derivatives) -> Tensor",
    reference.interpolate_derivatives,
    _KERNELS,
)
_sample = Operator(
    "sample_texture(Tensor texture, Tensor uv, Tensor? derivatives, str wrap, str filter) -> (Tensor, Tensor)",
    reference.sample_texture,
    _KERNELS,
)
_sample_gradient = Operator(
    "sample_texture_gradient(Tensor out_gradient, Tensor texture, Tensor uv, Tensor? derivatives, str wrap, str filter)"
    " -> Tensor",
    reference.sample_texture_gradient,
    _KERNELS,
)
_sample_uv_gradient = Operator(
    "sample_texture_uv_gradient(Tensor out_gradient, Tensor texture, Tensor mips, Tensor uv, Tensor? derivatives,"
    " str wrap, str filter) -> Tensor",
    reference.sample_texture_uv_gradient,
    _KERNELS,
)


@_interpolate_derivatives.fake
def _(attributes: Tensor, faces: Tensor, ids: Tensor, derivatives: Tensor) -> Tensor:
    return attributes.new_empty(*ids.shape, 2 * attributes.shape[2])


@_sample.fake
def _(texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str) -> tuple[Tensor, Tensor]:
    images, _, _, channels = texture.shape
    mips = reference.mip_texels(*texture.shape[1:3]) if derivatives is not None else 0
    return texture.new_empty(*uv.shape[:3], channels), texture.new_empty(images, mips, channels)


@_sample_gradient.fake
def _(out_gradient: Tensor, texture: Tensor, uv: Tensor, *rest: Any) -> Tensor:
    return texture.new_empty(texture.shape)


@_sample_uv_gradient.fake
def _(out_gradient: Tensor, texture: Tensor, mips: Tensor, uv: Tensor, *rest: Any) -> Tensor:
    return uv.new_empty(uv.shape)


def _setup_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    texture, uv, derivatives, ctx.wrap, ctx.filter = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(texture, output[1], uv, derivatives)


def _differentiate_sample(ctx: Any, gradient: Tensor, mips: None) -> tuple[Tensor | None, ...]:
    texture, mip_levels, *where = ctx.saved_tensors
    how = ctx.wrap, ctx.filter
    return (
        _sample_gradient(gradient, texture, *where, *how) if ctx.needs_input_grad[0] else None,
        _sample_uv_gradient(gradient, texture, mip_levels, *where, *how) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_gradient(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    return None, None, None, None


def _refuse(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of sample_texture is not implemented")


_interpolate_derivatives.autograd(_no_gradient, _setup_nothing)
_sample.autograd(_differentiate_sample, _setup_sample)
_sample_gradient.autograd(_refuse, _setup_nothing)
_sample_uv_gradient.autograd(_refuse, _setup_nothing)
