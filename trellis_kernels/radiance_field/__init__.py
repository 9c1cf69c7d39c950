"""Strivec radiance fields: voxels that hold low-rank factors of density and color, drawn by marching along rays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.radiance_field import reference
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["RadianceFieldImages", "render_radiance_field", "render_voxels"]

MAX_EXTENT = 16384  # pixels per side
MAX_DEPTH = 10
MAX_ENTRIES = 1024
_KERNELS = {"cpu": "trellis_kernels.radiance_field.cpu", "cuda": "trellis_kernels.radiance_field.cuda"}


class RadianceFieldImages(NamedTuple):
    """Images of V cameras; dtype that of the field."""

    colors: Tensor
    """``[V, H, W, 3]`` in front of the background."""
    alphas: Tensor
    """``[V, H, W]`` in [0, 1]: share of each pixel that is not background."""
    depths: Tensor
    """``[V, H, W]``: expected camera depth ``sum_k w_k z_k``, world units, 0 where nothing is; not divided by alpha."""
    median_depths: Tensor
    """``[V, H, W]``: camera depth at which less than half of the ray is left, 0 where there is none; no gradient."""


def render_radiance_field(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    depth: int,
    aabb: Sequence[float],
    extrinsics: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    background: Tensor,
    jitter: Tensor | None = None,
    used_rank: int | None = None,
) -> RadianceFieldImages:
    """March along the ray of each pixel through the leaves of a Strivec field, front to back, for several cameras.

        f_r = prod_axis lerp(trivec[r, axis])
        sigma = softplus(sum_r density_r f_r),  c = sigmoid(C0 sum_r features_r f_r)
        alpha_k = min(1 - exp(-sigma_k step), 0.999),  w_k = alpha_k prod_{j<k} (1 - alpha_j)
        color = sum_k w_k c_k + (1 - sum_k w_k) background

    Samples lie at distances ``(k + jitter) step`` from the camera, k whole and not negative, ``step = 0.5 / D`` of a
    leaf's size along x, the same for all leaves. A sample on the face between two leaves belongs to the farther one.
    Within a leaf D values per axis lie at the centers of D intervals; beyond the first and the last the line through
    the nearest two is continued. A ray ends once less than 0.001 of it is left. Leaves whose centers have a camera
    depth of 0.2 or less are not drawn, so a camera may be inside the object; near and far planes do not clip.

    Each leaf fills the cell of the regular ``2^depth`` grid that its position lies in, wherever in the cell. Of leaves
    in one cell the first is drawn. Left out, and given zero gradient, are the others, leaves outside the unit cube, and
    leaves with a factor that is not finite or above 1e9 in magnitude. A camera that is not finite sees the background.

    Differentiable once in `trivec`, `density`, `features` and `background`, through colors, alphas and depths; a
    clamped alpha and the end of a ray are constants. Geometry is computed in float64 and the rest in the dtype of the
    field, half precision in float32, rounded once. The result and the gradients do not depend on the number of threads.

    Args:
        positions: ``[N, 3]`` float. Leaf centers in the unit cube of `aabb`, in [0, 1). (Corners ``coords / 2^depth``
            mean the same leaves as centers ``(coords + 0.5) / 2^depth``.)
        trivec: ``[N, R, 3, D]`` float. Factors along x, y and z; D from 2 to 1024. Its dtype is that of every other
            argument but `positions`.
        density: ``[N, R]``. Raw.
        features: ``[N, R, 3]``. Raw, of red, green and blue.
        depth: level of the grid, 0 to 10.
        aabb: origin and size, in world units, of the box that the unit cube is mapped to; sizes positive.
        extrinsics: ``[V, 4, 4]`` world to camera, rigid; x right, y down, z forward.
        intrinsics: ``[V, 3, 3]`` normalised by the image size: focal lengths and principal point of a picture whose
            sides have length 1, origin in its top left corner. Skew is ignored.
        width: pixels, 1 to 16384.
        height: pixels, 1 to 16384.
        background: ``[3]`` or ``[V, 3]``.
        jitter: ``[V, H, W]`` in [0, 1]: shift of the samples of each pixel, in steps; None for 0. Clamped, NaN is 0.
        used_rank: number of leading factors that are used, 1 to R; None for all.

    Returns:
        Images, see `RadianceFieldImages`.

    Raises:
        ValueError: if a shape, size or range is not the one above, or an argument without a gradient requires one.
        TypeError: if a dtype is not.

    Source:
        Gao et al. 2023, "Strivec: Sparse Tri-Vector Radiance Fields", sec. 3-4; sampling as the renderer of the
        official code (golden values ``render_trivec_oracle``), which ignores the principal point: here it is where
        `intrinsics` says.
    """
    dtype = trivec.dtype
    expect(
        trivec=(trivec, "N R 3 D", FLOATS),
        positions=(positions, "N 3", FLOATS),
        density=(density, "N R", dtype),
        features=(features, "N R 3", dtype),
        extrinsics=(extrinsics, "V 4 4", dtype),
        intrinsics=(intrinsics, "V 3 3", dtype),
        background=(background, "V 3" if background.ndim == 2 else "3", dtype),
    )
    views, rank = extrinsics.shape[0], trivec.shape[1]
    if not 2 <= trivec.shape[3] <= MAX_ENTRIES:
        raise ValueError(f"trivec must be [N, R, 3, D] with D in 2..{MAX_ENTRIES}; got {list(trivec.shape)}")
    if jitter is not None:
        expect(trivec=(trivec, "N R 3 D"), jitter=(jitter, f"{views} {height} {width}", dtype))
    if used_rank is not None and not 1 <= used_rank <= rank:
        raise ValueError(f"used_rank must be in 1..{rank}; got {used_rank}")
    box = _checked(depth, aabb, width, height)
    _refuse_gradient(positions=positions, extrinsics=extrinsics, intrinsics=intrinsics, jitter=jitter)
    if background.ndim == 1:
        background = background.expand(views, -1)
    if used_rank is not None:
        trivec, density, features = (x[:, :used_rank] for x in (trivec, density, features))
    field = (positions, trivec, density, features)
    colors, depths, left, medians, _ = _render(
        *field, extrinsics, intrinsics, background, jitter, depth, box, width, height
    )
    return RadianceFieldImages(colors, 1 - left, depths, medians)


def render_voxels(
    positions: Tensor,
    colors: Tensor,
    depth: int,
    aabb: Sequence[float],
    extrinsics: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    background: Tensor,
) -> RadianceFieldImages:
    """Draw solid voxels: each pixel shows the first one that its ray enters.

    Cells, left-out leaves and cameras are those of `render_radiance_field`. Differentiable in `colors` and
    `background`.

    Args:
        positions: ``[N, 3]`` float in [0, 1): centers, or ``coords / 2^depth``.
        colors: ``[N, 3]`` float, clamped to [0, 1]. Its dtype is that of the arguments below.
        depth: level of the grid, 0 to 10.
        aabb: origin and size of the box in world units.
        extrinsics: ``[V, 4, 4]``.
        intrinsics: ``[V, 3, 3]``.
        width: pixels, 1 to 16384.
        height: pixels, 1 to 16384.
        background: ``[3]`` or ``[V, 3]``, not clamped.

    Returns:
        Images: alphas are 0 or 1, both depths that of the point where the ray enters the voxel.

    Raises:
        ValueError, TypeError: as `render_radiance_field`.
    """
    dtype = colors.dtype
    expect(
        colors=(colors, "N 3", FLOATS),
        positions=(positions, "N 3", FLOATS),
        extrinsics=(extrinsics, "V 4 4", dtype),
        intrinsics=(intrinsics, "V 3 3", dtype),
        background=(background, "V 3" if background.ndim == 2 else "3", dtype),
    )
    box = _checked(depth, aabb, width, height)
    _refuse_gradient(positions=positions, extrinsics=extrinsics, intrinsics=intrinsics)
    views = extrinsics.shape[0]
    behind = background.expand(views, -1) if background.ndim == 1 else background
    ids, depths = _trace(positions, extrinsics, intrinsics, depth, box, width, height)
    # One table of voxels and backgrounds, so that a pixel is one look-up.
    table = torch.cat([colors.clamp(0, 1), behind])
    rows = torch.arange(views, device=ids.device)[:, None, None] + len(colors)
    hit = ids >= 0
    images = table.index_select(0, torch.where(hit, ids, rows).flatten()).view(views, height, width, 3)
    depths = depths.to(dtype)
    return RadianceFieldImages(images, hit.to(dtype), depths, depths.clone())


def _checked(depth: int, aabb: Sequence[float], width: int, height: int) -> list[float]:
    if not 0 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth must be in 0..{MAX_DEPTH}; got {depth}")
    if not (1 <= width <= MAX_EXTENT and 1 <= height <= MAX_EXTENT):
        raise ValueError(f"width and height must be in 1..{MAX_EXTENT}; got {width} and {height}")
    box = [float(value) for value in aabb]
    if len(box) != 6 or not all(map(math.isfinite, box)) or min(box[3:]) <= 0:
        raise ValueError(f"aabb must be an origin and three positive sizes, all finite; got {tuple(box)}")
    return box


def _refuse_gradient(**tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient: rendering a radiance field has none for it")


_render = Operator(
    "render_radiance_field(Tensor positions, Tensor trivec, Tensor density, Tensor features, Tensor extrinsics, "
    "Tensor intrinsics, Tensor background, Tensor? jitter, int depth, float[] aabb, int width, int height) "
    "-> (Tensor colors, Tensor depths, Tensor transmittances, Tensor medians, Tensor crossings)",
    reference.render_radiance_field,
    _KERNELS,
)
# `crossings`: how many runs of at most 32 samples, each of one leaf, a ray takes: what a backward has to note.
_gradient = Operator(
    "render_radiance_field_gradient(Tensor colors_gradient, Tensor depths_gradient, Tensor transmittances_gradient, "
    "Tensor positions, Tensor trivec, Tensor density, Tensor features, Tensor extrinsics, Tensor intrinsics, "
    "Tensor background, Tensor? jitter, Tensor crossings, int depth, float[] aabb, int width, int height) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.render_radiance_field_gradient,
    _KERNELS,
)
_trace = Operator(
    "trace_voxels(Tensor positions, Tensor extrinsics, Tensor intrinsics, int depth, float[] aabb, int width, "
    "int height) -> (Tensor ids, Tensor depths)",
    reference.trace_voxels,
    _KERNELS,
)


@_render.fake
def _(positions: Tensor, trivec: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = (rest[2].shape[0], rest[9], rest[8])
    images = [trivec.new_empty(*shape, 3), *(trivec.new_empty(shape) for _ in range(3))]
    return *images, trivec.new_empty(shape, dtype=torch.int32)


@_gradient.fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[i].new_empty(args[i].shape) for i in (4, 5, 6, 9))


@_trace.fake
def _(
    positions: Tensor, extrinsics: Tensor, intrinsics: Tensor, depth: int, aabb: list[float], width: int, height: int
) -> tuple[Tensor, Tensor]:
    shape = (extrinsics.shape[0], height, width)
    return positions.new_empty(shape, dtype=torch.int32), positions.new_empty(shape, dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*inputs[:8], output[4])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    by_field_and_background = _gradient(*gradients[:3], *ctx.saved_tensors, *ctx.numbers)
    trivec, density, features, background = by_field_and_background
    return None, trivec, density, features, None, None, background, *[None] * 5


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of render_radiance_field is not implemented")


_render.autograd(_differentiate, _setup)
_gradient.autograd(_refuse, _setup_nothing)
