"""GPU launches. The kernels are in triton_views.py (where points are seen) and triton_gather.py (sums of pixels).

Points are taken in tiles along a Morton curve. Nothing here waits for the GPU, nothing depends on the order in which
programs run, and nothing of the size [V, N, C] exists: between the kernels are 12 bytes per view and point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.backprojection.order import BITS, grid_of
from trellis_kernels.backprojection.triton_gather import gather_pixels, gather_points
from trellis_kernels.backprojection.triton_views import morton_keys, see_points

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SIDE = 32_000  # rows and columns have 16 bits each
_POINTS = 64  # of a tile: rows of a product; of a surface at 64^3 they see 40 of 37 x 37 pixels on average
_TEXELS = 32  # of a window at once
_SIDE = 8  # of a square of pixels
_GROUP = 16  # tiles that are looked at together, for what sees a square
_VIEWS = 8  # that a program sees points in


class _Sight(NamedTuple):
    """What see_points found. See triton_views.py."""

    order: Tensor
    pixels: Tensor
    places: Tensor
    windows: Tensor
    counts: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Views, points, tiles."""
        return *self.pixels.shape, self.windows.shape[2]


def channels_at_once(dtype: torch.dtype, channels: int, maximum: bool) -> int:
    """Of a program, a power of two: as many as leave room for two or more programs on a multiprocessor."""
    most = 64 if maximum or dtype == torch.float32 else 256
    return min(most, max(16, triton.next_power_of_2(channels)))


def backproject(
    features: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    views, height, width, channels = features.shape
    _expect_supported("features", features, height, width)
    shape = len(positions), channels
    out = features.new_zeros(shape)
    winners = out.new_full(shape if maximum else (0, 0), -1, dtype=torch.int32)
    sight = _see(positions, extrinsics, intrinsics, depths, tolerance, maximum, height, width)
    if views and out.numel():
        block = channels_at_once(features.dtype, channels, maximum)
        with cuda_device.guard(features):
            gather_points[(sight.sizes[2], triton.cdiv(channels, block))](
                cuda_device.aligned(features), *sight, out, winners, *sight.sizes, height, width, channels,
                POINTS=_POINTS, TEXELS=_TEXELS, CHANNELS=block, MAXIMUM=maximum,
                PRECISION=_precision(features), num_warps=8 if block > 128 else 4, num_stages=1,
            )  # fmt: skip
    return out, sight.counts, winners


def backproject_gradient(
    out_gradient: Tensor,
    counts: Tensor,
    winners: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
    height: int,
    width: int,
) -> Tensor:
    channels = out_gradient.shape[1]
    _expect_supported("out_gradient", out_gradient, height, width)
    out = out_gradient.new_zeros(len(extrinsics), height, width, channels)
    if out.numel() and len(positions):
        sight = _see(positions, extrinsics, intrinsics, depths, tolerance, maximum, height, width)
        block = min(
            channels_at_once(out_gradient.dtype, channels, maximum), 32 if out_gradient.dtype == torch.float32 else 128
        )
        squares = triton.cdiv(height, _SIDE) * triton.cdiv(width, _SIDE)
        with cuda_device.guard(out_gradient):
            gather_pixels[(squares, len(extrinsics), triton.cdiv(channels, block))](
                cuda_device.aligned(out_gradient), *sight[:4], counts.contiguous(), winners.contiguous(), out,
                *sight.sizes, height, width, channels,
                POINTS=_POINTS, SIDE=_SIDE, CHANNELS=block, GROUP=_GROUP, MAXIMUM=maximum,
                PRECISION=_precision(out_gradient), num_warps=8, num_stages=1,
            )  # fmt: skip
    return out


def _see(
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
    height: int,
    width: int,
) -> _Sight:
    views, points, tiles = len(extrinsics), len(positions), triton.cdiv(len(positions), _POINTS)
    only_seen = maximum or depths is not None
    counts = positions.new_full((points,), 0 if only_seen else views, dtype=torch.int32)
    pixels = counts.new_empty(views, points)
    places = pixels.new_empty(2, views, points, dtype=torch.float32)
    windows = pixels.new_empty(4, views, tiles)
    if not points or not views:
        return _Sight(counts.new_empty(0, dtype=torch.int64), pixels, places, windows, counts)
    positions = positions.contiguous()
    hiding = depths is not None and depths.shape[1] * depths.shape[2] > 0
    rows, columns = depths.shape[1:] if depths is not None else (0, 0)
    keys = counts.new_empty(points)
    with cuda_device.guard(positions):
        morton_keys[(triton.cdiv(points, 256),)](positions, *grid_of(positions), keys, points, BITS=BITS, BLOCK=256)
        order = keys.argsort(stable=True)
        see_points[(tiles, triton.cdiv(views, _VIEWS))](
            positions, order, extrinsics.contiguous(), intrinsics.contiguous(),
            positions if depths is None else depths.contiguous(), pixels, places, windows, counts, tolerance,
            views, points, tiles, height, width, rows, columns,
            POINTS=_POINTS, VIEWS=_VIEWS, DEPTHS=hiding, ONLY_SEEN=only_seen, num_warps=1,
        )  # fmt: skip
    return _Sight(order, pixels, places, windows, counts)


def _precision(values: Tensor) -> str:
    """float32 is multiplied as three products of its leading and trailing bits, which is as exact as it is."""
    return "tf32x3" if values.dtype == torch.float32 else "ieee"


def _expect_supported(name: str, tensor: Tensor, height: int, width: int) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be {', '.join(map(str, DTYPES))} on a GPU; got {tensor.dtype}")
    if max(height, width) > MAX_SIDE or height * width * tensor.shape[-1] >= 2**31:
        raise ValueError(
            f"a picture of features must have sides of at most {MAX_SIDE} and less than 2^31 values on a GPU; "
            f"got {height} x {width} x {tensor.shape[-1]}"
        )
