"""Antialiasing of silhouettes, and through it the gradient of a picture in where its silhouettes are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.mesh_raster import reference_silhouettes as reference
from trellis_kernels.mesh_raster.rasterization import Rasterization
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import expect

_KERNELS = {"cpu": "trellis_kernels.mesh_raster.cpu", "cuda": "trellis_kernels.mesh_raster.cuda"}


def face_neighbors(faces: Tensor) -> Tensor:
    """The triangle on the other side of each edge.

    Args:
        faces: ``[F, 3]`` int32 rows of vertices, not negative.

    Returns:
        ``[F, 3]`` int32: for the edge opposite each corner the row of the other triangle that has it, -1 where there
        is none or more than one. Orientation does not matter.

    Raises:
        ValueError: if the shape does not fit.
        TypeError: if the dtype does not fit.
    """
    expect(faces=(faces, "F 3", torch.int32))
    return _face_neighbors(faces)


def antialias(
    images: Tensor, rasterization: Rasterization, positions: Tensor, faces: Tensor, neighbors: Tensor | None = None
) -> Tensor:
    """Blend the two pixels on either side of a silhouette by where it passes between their centers.

    For neighboring pixels, side by side or one above the other, that show different triangles: from the center of the
    nearer one, walk towards the other across the mesh (through at most 16 triangles) to the first edge that is a
    silhouette: one that no other triangle or more than two share, or whose two triangles lie on the same side of it in
    the picture. If it is crossed after a part t of the way, the nearer pixel takes ``0.5 - t`` of the other's color if
    that is positive, and else the other ``t - 0.5`` of the nearer one's. Pixels side by side look at edges that are
    rather upright, pixels one above the other at edges that are rather level. What a pixel takes from its four
    neighbors adds up. The mean over a row of an upright edge, or over a column of a level one, is thus its exact
    coverage; an edge along a row or column is exact in every pixel.

    Differentiable once in `images` and in `positions` (x, y and w), through the crossings: the gradient of the
    silhouette, which `interpolate` does not have. Gradients are summed in a fixed order.

    Args:
        images: ``[B, H, W, C]`` of the dtype of `positions`: what to antialias, for example shaded colors or a mask.
        rasterization: B pictures, whose `faces` and `depths` are read.
        positions: ``[B, V, 4]`` as given to `rasterize_mesh`.
        faces: ``[F, 3]`` likewise. Where vertices are doubled along a seam of a texture, the seam is taken for a
            silhouette; give the faces of the positions, not those of uv.
        neighbors: ``face_neighbors(faces)``, if at hand; computed if not.

    Returns:
        ``[B, H, W, C]``.

    Raises:
        ValueError: if a shape does not fit or an index is out of range; on a GPU the latter is a device-side assertion.
        TypeError: if a dtype does not fit.

    Source:
        Laine et al. 2020, "Modular Primitives for High-Performance Differentiable Rendering", section 3.6; the walk
        is ours: without it silhouettes of triangles smaller than a pixel are lost.
    """
    expect(
        positions=(positions, "B V 4", (torch.float32, torch.float64)),
        images=(images, "B H W C", positions.dtype),
        ids=(rasterization.faces, "B H W", torch.int32),
        depths=(rasterization.depths, "B H W", positions.dtype),
        faces=(faces, "F 3", torch.int32),
        **({} if neighbors is None else {"neighbors": (neighbors, "F 3", torch.int32)}),
    )
    across = _face_neighbors(faces) if neighbors is None else neighbors
    return _antialias(images, rasterization.faces, rasterization.depths.detach(), positions, faces, across)[0]


_face_neighbors = Operator("face_neighbors(Tensor faces) -> Tensor", reference.face_neighbors, _KERNELS)
_antialias = Operator(
    "antialias(Tensor images, Tensor ids, Tensor depths, Tensor positions, Tensor faces, Tensor neighbors)"
    " -> (Tensor, Tensor, Tensor)",
    reference.antialias,
    _KERNELS,
)
_antialias_gradient = Operator(
    "antialias_gradient(Tensor out_gradient, Tensor images, Tensor positions, Tensor faces, Tensor shares,"
    " Tensor edges) -> (Tensor, Tensor)",
    reference.antialias_gradient,
    _KERNELS,
)


@_face_neighbors.fake
def _(faces: Tensor) -> Tensor:
    return faces.new_empty(faces.shape)


@_antialias.fake
def _(
    images: Tensor, ids: Tensor, depths: Tensor, positions: Tensor, faces: Tensor, neighbors: Tensor
) -> tuple[Tensor, ...]:
    return (
        images.new_empty(images.shape),
        images.new_empty(*ids.shape, 2),  # what the first pixel takes of the second (right, below), or minus
        ids.new_empty(*ids.shape, 2),  # the edge between them, 3 face + corner, or -1
    )


@_antialias_gradient.fake
def _(out_gradient: Tensor, images: Tensor, positions: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return images.new_empty(images.shape), positions.new_empty(positions.shape)


def _setup_antialias(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    images, _, _, positions, faces, _ = inputs
    _, shares, edges = output
    ctx.mark_non_differentiable(shares, edges)
    ctx.save_for_backward(images, positions, faces, shares, edges)


def _differentiate_antialias(ctx: Any, gradient: Tensor, *nothing: None) -> tuple[Tensor | None, ...]:
    by_images, by_positions = _antialias_gradient(gradient, *ctx.saved_tensors)
    return by_images, None, None, by_positions, None, None


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of antialias is not implemented")


_antialias.autograd(_differentiate_antialias, _setup_antialias)
_antialias_gradient.autograd(_refuse, _setup_nothing)
