"""Features of voxels without a network: moments of the surface that depth pictures show in each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trellis.renderers.camera import Cameras

CHANNELS = 17
OPAQUE = 0.5  # least opacity of a pixel that counts
NUDGES = (0.0, 0.25, -0.25, 0.5)  # voxels along the line of sight to look for an active one, nearest first
ENOUGH = 100.0  # pixels that make a voxel well seen
_ROWS, _COLUMNS = (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)  # xx, yy, zz, xy, xz, yz


def visible_surface(
    indices: Tensor, resolution: int, images: Iterable[Tensor], depths: Tensor, cameras: Cameras
) -> Tensor:
    """Color, place, shape and direction of what V depth pictures see of the surface in each voxel.

    Every pixel is a point of the surface; a voxel's features are moments of its points, each of about unit size:

        0:3    mean color: brightness m = (r + g + b) / 3 as 4 m - 2, then 8 (r - g) and 8 (b - (r + g) / 2): hues
               differ less than brightness does, and would be learned late
        3:6    mean place in the voxel, 4 q, q from -1/2 to 1/2
        6:12   second central moments of q: 8 of xx, yy, zz, then of xy, xz, yz
        12:15  mean direction to the camera
        15     standard deviation of the brightness, times 4
        16     log(1 + points) / log(1 + 100)

    A voxel that no picture shows has zeros.

    Args:
        indices: ``[N, 3]`` int32 of voxels, each once.
        resolution: R, voxels per side of the unit cube around 0.
        images: V of ``[4, H, W]`` float: sRGB, not premultiplied, and opacity, in [0, 1].
        depths: ``[V, H, W]`` float distance along the camera's axis, 0 where nothing is.
        cameras: V cameras.

    Returns:
        ``[N, 17]`` float32.

    Raises:
        ValueError: a picture has another size than its depths, or there are not V of them.
    """
    table = torch.full((resolution,) * 3, -1, dtype=torch.int64)
    x, y, z = indices.long().unbind(1)
    table[x, y, z] = torch.arange(len(indices))
    sums, count = torch.zeros(len(indices), CHANNELS), 0
    for image in images:
        if count == len(depths) or image.shape != (4, *depths.shape[1:]):
            wanted = f"{len(depths)} of [4, {depths.shape[1]}, {depths.shape[2]}]"
            raise ValueError(f"images must be {wanted} like depths; number {count} is {list(image.shape)}")
        points, toward, colors = _points(image, depths[count], cameras[count])
        voxels, places = _located(points, toward, table)
        kept = voxels >= 0
        places, colors = places[kept], colors[kept]
        moments = places[:, _ROWS] * places[:, _COLUMNS]
        brightness = colors.mean(1, keepdim=True)
        ones = torch.ones_like(brightness)
        values = torch.cat([colors, places, moments, toward[kept], brightness.square(), ones], 1)
        sums.index_add_(0, voxels[kept], values)
        count += 1
    if count != len(depths):
        raise ValueError(f"images must be {len(depths)} like depths; got {count}")
    number = sums[:, 16:]
    color, place, moments, toward, square = (sums[:, :16] / number.clamp(min=1)).split([3, 3, 6, 3, 1], 1)
    moments = moments - place[:, _ROWS] * place[:, _COLUMNS]
    spread = (square - color.mean(1, keepdim=True).square()).clamp(min=0).sqrt()
    amount = torch.log1p(number) / math.log1p(ENOUGH)
    red, green, blue = color.split(1, 1)
    hues = [8 * (red - green), 8 * (blue - (red + green) / 2)]
    features = torch.cat(
        [4 * color.mean(1, keepdim=True) - 2, *hues, 4 * place, 8 * moments, toward, 4 * spread, amount], 1
    )
    return features * (number > 0)


def _points(image: Tensor, depth: Tensor, camera: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """``[P, 3]`` each: the points that the opaque pixels show, their directions to the camera, and their colors."""
    row, column = torch.nonzero((depth > 0) & (image[3] >= OPAQUE), as_tuple=True)
    height, width = depth.shape
    pixels = torch.stack([(column + 0.5) / width, (row + 0.5) / height, torch.ones(len(row))], 1)
    rays = pixels @ torch.linalg.inv(camera.intrinsics[0]).T  # of length 1 along the camera's axis
    rotation, center = camera.extrinsics[0, :3, :3], camera.centers[0]
    rays = rays @ rotation
    points = center + rays * depth[row, column, None].float()
    return points, -F.normalize(rays, dim=1), image[:3, row, column].T


def _located(points: Tensor, toward: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """``[P]`` number of the voxel that each point lies in, or -1; ``[P, 3]`` where in it.

    A surface between two voxels may belong to either, and depths are rounded: so a point in no active voxel is moved a
    little along its line of sight.
    """
    resolution = len(table)
    voxels = torch.full((len(points),), -1)
    places = torch.zeros_like(points)
    for nudge in NUDGES:
        left = torch.nonzero(voxels < 0)[:, 0]
        scaled = (points[left] + 0.5) * resolution
        cells = (scaled + nudge * toward[left]).floor()
        cells = cells.clamp(0, resolution - 1)
        x, y, z = cells.long().unbind(1)
        voxels[left] = table[x, y, z]
        places[left] = (scaled - cells - 0.5).clamp(-0.5, 0.5)
    return voxels, places
