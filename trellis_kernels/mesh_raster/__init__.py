"""Triangle meshes to pictures: which triangle each pixel shows, and vertex attributes carried to the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.mesh_raster import reference
from trellis_kernels.mesh_raster.rasterization import Rasterization
from trellis_kernels.mesh_raster.silhouettes import antialias, face_neighbors
from trellis_kernels.mesh_raster.texture import interpolate_derivatives, sample_texture
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import expect

__all__ = [
    "Rasterization",
    "antialias",
    "face_neighbors",
    "interpolate",
    "interpolate_derivatives",
    "rasterize_mesh",
    "sample_texture",
]

MAX_EXTENT = 16384  # pixels per side
_KERNELS = {"cpu": "trellis_kernels.mesh_raster.cpu", "cuda": "trellis_kernels.mesh_raster.cuda"}


def rasterize_mesh(
    positions: Tensor, faces: Tensor, width: int, height: int, behind: Rasterization | None = None
) -> Rasterization:
    """Find the nearest triangle behind the center of each pixel.

    A pixel center on an edge belongs to exactly one of the two triangles that share it (the top-left rule), so a closed
    mesh shows no gap and no double. Both sides of a triangle are drawn. Triangles that reach behind the camera are cut
    there without being split; degenerate ones, and those with a position that is not finite, are never seen. At equal
    depth the lower row wins. Differentiable once in `positions` through `barycentrics` and `depths`, as if each pixel
    kept its triangle.

    Args:
        positions: ``[B, V, 4]`` float32 or float64. Clip-space x, y, z, w of every vertex for B cameras: a vertex is in
            front of the camera where w > 0 and in the picture where -w <= x, y, z <= w.
        faces: ``[F, 3]`` int32 rows of `positions`, the same for all cameras.
        width: pixels, 1 to 16384.
        height: pixels.
        behind: an earlier result for the same arguments: draw the next layer, what its triangles hide (depth peeling).

    Returns:
        See `Rasterization`; the same for any number of threads, and on a GPU, whose triangles and depths are those of
        the CPU to the last bit.

    Raises:
        ValueError: if a shape or size does not fit or a face has a vertex outside ``[0, V)`` (on a GPU the latter is a
            device-side assert, as in torch's own indexing).
        TypeError: if a dtype does not fit.

    Source:
        Olano & Greer 1997, "Triangle Scan Conversion using 2D Homogeneous Coordinates"; layers: Everitt 2001,
        "Interactive Order-Independent Transparency".
    """
    expect(positions=(positions, "B V 4", (torch.float32, torch.float64)), faces=(faces, "F 3", torch.int32))
    for name, extent in (("width", width), ("height", height)):
        if not 1 <= extent <= MAX_EXTENT:
            raise ValueError(f"{name} must be in [1, {MAX_EXTENT}]; got {extent}")
    layer: tuple[Tensor | None, Tensor | None] = (None, None)
    if behind is not None:
        shape = f"{positions.shape[0]} {height} {width}"
        expect(
            faces=(behind.faces, shape, torch.int32),
            depths=(behind.depths, shape, positions.dtype),
            positions=(positions, "B V 4"),
        )
        layer = behind.faces, behind.depths.detach()
    barycentrics, depths, derivatives, ids = _rasterize(positions, faces, width, height, *layer)
    return Rasterization(ids, barycentrics, depths, derivatives)


def interpolate(attributes: Tensor, faces: Tensor, rasterization: Rasterization) -> Tensor:
    """Carry attributes of the vertices to the pixels.

        out = u attributes[i] + v attributes[j] + (1 - u - v) attributes[k]      (i, j, k the vertices of the triangle)

    Differentiable once in `attributes` and, through the barycentrics, in the positions.

    Args:
        attributes: ``[A, V, C]`` of the dtype of the barycentrics; A is B, or 1 for the same in every picture.
        faces: ``[F, 3]`` int32, as given to `rasterize_mesh`.
        rasterization: B pictures.

    Returns:
        ``[B, H, W, C]``, zero where there is no triangle.

    Raises:
        ValueError: if a shape does not fit or an index is out of range.
        TypeError: if a dtype does not fit.
    """
    ids, barycentrics = rasterization.faces, rasterization.barycentrics
    expect(
        faces=(faces, "F 3", torch.int32),
        attributes=(attributes, "A V C", barycentrics.dtype),
        ids=(ids, "B H W", torch.int32),
        barycentrics=(barycentrics, "B H W 2"),
    )
    if attributes.shape[0] not in (1, ids.shape[0]):
        raise ValueError(f"attributes must be [A, V, C] with A = 1 or {ids.shape[0]}; got {list(attributes.shape)}")
    return _interpolate(attributes, faces, ids, barycentrics)


_rasterize = Operator(
    "rasterize_mesh(Tensor positions, Tensor faces, int width, int height, Tensor? behind_faces, Tensor? behind_depths)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.rasterize_mesh,
    _KERNELS,
)
_rasterize_gradient = Operator(
    "rasterize_mesh_gradient(Tensor positions, Tensor faces, Tensor ids, Tensor barycentrics_gradient,"
    " Tensor depths_gradient) -> Tensor",
    reference.rasterize_mesh_gradient,
    _KERNELS,
)
_interpolate = Operator(
    "interpolate(Tensor attributes, Tensor faces, Tensor ids, Tensor barycentrics) -> Tensor",
    reference.interpolate,
    _KERNELS,
)
_interpolate_gradient = Operator(
    "interpolate_gradient(Tensor out_gradient, Tensor attributes, Tensor faces, Tensor ids, Tensor barycentrics)"
    " -> (Tensor, Tensor)",
    reference.interpolate_gradient,
    _KERNELS,
)


@_rasterize.fake
def _(
    positions: Tensor, faces: Tensor, width: int, height: int, behind_faces: Tensor | None, behind_depths: Tensor | None
) -> tuple[Tensor, ...]:
    shape = (positions.shape[0], height, width)
    return (
        positions.new_empty(*shape, 2),
        positions.new_empty(shape),
        positions.new_empty(*shape, 4),
        faces.new_empty(shape),
    )


@_rasterize_gradient.fake
def _(positions: Tensor, faces: Tensor, ids: Tensor, *gradients: Tensor) -> Tensor:
    return positions.new_empty(positions.shape)


@_interpolate.fake
def _(attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor) -> Tensor:
    return attributes.new_empty(*ids.shape, attributes.shape[2])


@_interpolate_gradient.fake
def _(
    out_gradient: Tensor, attributes: Tensor, faces: Tensor, ids: Tensor, barycentrics: Tensor
) -> tuple[Tensor, Tensor]:
    return attributes.new_empty(attributes.shape), barycentrics.new_empty(barycentrics.shape)


def _setup_rasterize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    positions, faces, *_ = inputs
    _, _, derivatives, ids = output
    ctx.mark_non_differentiable(ids, derivatives)
    ctx.save_for_backward(positions, faces, ids)


def _differentiate_rasterize(
    ctx: Any, barycentrics: Tensor, depths: Tensor, derivatives: None, ids: None
) -> tuple[Tensor | None, ...]:
    return _rasterize_gradient(*ctx.saved_tensors, barycentrics, depths), None, None, None, None, None


def _setup_interpolate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_interpolate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    attributes, barycentrics = _interpolate_gradient(gradient, *ctx.saved_tensors)
    return attributes, None, None, barycentrics


def _setup_nothing(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of mesh rasterization is not implemented")


_rasterize.autograd(_differentiate_rasterize, _setup_rasterize)
_interpolate.autograd(_differentiate_interpolate, _setup_interpolate)
_rasterize_gradient.autograd(_refuse, _setup_nothing)
_interpolate_gradient.autograd(_refuse, _setup_nothing)
