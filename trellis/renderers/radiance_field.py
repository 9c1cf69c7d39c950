"""Pictures of radiance fields, and of occupied voxels."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background, Canvas, VolumeImages
from trellis.representations.radiance_field import AABB, RadianceField
from trellis_kernels import render_radiance_field as march
from trellis_kernels import render_voxels as show_voxels
from trellis_kernels.shapes import FLOATS, expect

Box = tuple[float, float, float, float, float, float]


def render_radiance_field(
    field: RadianceField,
    cameras: Cameras,
    resolution: int = 512,
    background: Background = 0.0,
    ssaa: int = 4,
    generator: torch.Generator | None = None,
    jitter: torch.Generator | Tensor | None = None,
    used_rank: int | None = None,
) -> VolumeImages:
    """Render a radiance field for each camera.

    Differentiable in the factors, the density and the colors of the field and in the background. The ray through a
    pixel takes equal steps of half a sample of a trivector; near and far of the cameras do not matter.

    Args:
        field: N voxels; they decide device and dtype.
        cameras: V cameras.
        resolution: pixels per side of the result.
        background: see `Background`.
        ssaa: samples per side of a pixel.
        generator: for ``background="random"``.
        jitter: where in its step the ray of each sample begins: a generator to draw it from, as the official renderer
            always does, or ``[V, S, S]`` in [0, 1] with S = resolution * ssaa; None: at the start.
        used_rank: use only so many trivectors; None: all.

    Returns:
        Colors ``[V, 3, H, W]``, alphas, depths and median depths ``[V, H, W]``.

    Raises:
        ValueError: if an argument is out of range or a shape does not fit.
    """
    if isinstance(jitter, Tensor):
        side = resolution * ssaa
        expect(field=(field.trivec, "N R 3 D"), jitter=(jitter, f"{len(cameras)} {side} {side}", field.trivec.dtype))
    canvas = Canvas.create(cameras, field.trivec, resolution, ssaa, background, 3, generator)

    def draw(some: Canvas, rows: slice) -> tuple[Tensor, ...]:
        starts = None
        if isinstance(jitter, torch.Generator):
            size = (len(some.cameras), some.samples, some.samples)
            starts = torch.rand(size, generator=jitter, device=jitter.device).to(field.trivec)
        elif jitter is not None:
            starts = jitter[rows]
        return march(
            field.positions,
            field.trivec,
            field.density,
            field.features_dc.squeeze(2),
            field.depth,
            field.aabb,
            some.cameras.extrinsics,
            some.cameras.intrinsics,
            some.samples,
            some.samples,
            some.background,
            starts,
            used_rank,
        )

    return VolumeImages(*canvas.draw(draw))


def render_voxels(
    occupied: Tensor,
    cameras: Cameras,
    resolution: int = 512,
    background: Background = 0.0,
    ssaa: int = 4,
    colors: Tensor | None = None,
    grid: int | None = None,
    aabb: Box = AABB,
    generator: torch.Generator | None = None,
) -> VolumeImages:
    """Render voxels as solid cubes: occupancy as it is.

    Args:
        occupied: ``[R, R, R]`` bool, indexed x, y, z; or ``[N, 3]`` int32 coordinates in a grid of side `grid`.
        cameras: V cameras; their device and dtype are used.
        resolution: pixels per side of the result.
        background: see `Background`.
        ssaa: samples per side of a pixel.
        colors: ``[N, 3]`` float, sRGB, in the order of the coordinates (of an occupancy grid: of its ``nonzero()``);
            None: the center of a voxel in the unit cube, x as red, y as green, z as blue.
        grid: R, a power of two up to 1024; needed with coordinates, given by the shape of an occupancy grid.
        aabb: origin and size of the grid in world units.
        generator: for ``background="random"``.

    Returns:
        Colors ``[V, 3, H, W]``, alphas, depths and median depths ``[V, H, W]``.

    Raises:
        ValueError: if an argument is out of range or a shape does not fit.
        TypeError: if a dtype does not fit.
    """
    if occupied.ndim == 3:
        expect(occupied=(occupied, "R R R", torch.bool))
        grid, coords = occupied.shape[0], occupied.nonzero().int()
    else:
        expect(occupied=(occupied, "N 3", torch.int32))
        coords = occupied
    if grid is None or not 1 <= grid <= 1024 or grid & (grid - 1):
        raise ValueError(f"grid must be a power of two in [1, 1024]; got {grid}")
    if coords.numel() and not 0 <= int(coords.min()) <= int(coords.max()) < grid:
        raise ValueError(f"occupied must be in [0, {grid}); got {int(coords.min())} to {int(coords.max())}")
    positions = (coords.to(cameras.extrinsics) + 0.5) / grid
    canvas = Canvas.create(cameras, positions, resolution, ssaa, background, 3, generator)
    if colors is not None:
        expect(positions=(positions, "N 3"), colors=(colors, "N 3", FLOATS))
    painted = positions if colors is None else colors.to(positions)
    depth = grid.bit_length() - 1

    def draw(some: Canvas, rows: slice) -> tuple[Tensor, ...]:
        camera = some.cameras
        size = (some.samples, some.samples)
        return show_voxels(
            positions, painted, depth, aabb, camera.extrinsics, camera.intrinsics, *size, some.background
        )

    return VolumeImages(*canvas.draw(draw))
