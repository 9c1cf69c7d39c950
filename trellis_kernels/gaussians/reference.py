"""What Gaussian rasterisation means, in plain PyTorch: per camera a projection, a sort, then tiles of pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16  # pixels per side
NEAREST = 0.2  # camera depth
SMALLEST_ALPHA = 1 / 255
LARGEST_ALPHA = 0.99
SMALLEST_TRANSMITTANCE = 1e-4
_CHUNK = 1 << 14  # Gaussians of a tile blended at once

_HALF = (torch.float16, torch.bfloat16)


class Projected(NamedTuple):
    """The Gaussians of one camera that are drawn, nearest first."""

    indices: Tensor  # [n] int64, into the inputs
    centers: Tensor  # [n, 2] pixels
    conics: Tensor  # [n, 3] xx, xy, yy of the inverse covariance
    opacities: Tensor  # [n]
    depths: Tensor  # [n]
    radii: Tensor  # [n] pixels, whole numbers
    tiles: Tensor  # [n, 4] int64: first tile in x and y, and one past the last


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    width: int,
    height: int,
    kernel_size: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = means.dtype
    if dtype in _HALF:
        floats = (means, quats, scales, opacities, colors, extrinsics, intrinsics, background)
        means, quats, scales, opacities, colors, extrinsics, intrinsics, background = (x.float() for x in floats)
    shape = (len(extrinsics), height, width)
    images, depths = means.new_zeros(*shape, colors.shape[1]), means.new_zeros(shape)
    transmittances, last = means.new_ones(shape), means.new_full(shape, -1, dtype=torch.int32)
    for view in range(len(extrinsics)):
        splats = project(
            means, quats, scales, opacities, extrinsics[view], intrinsics[view], width, height, kernel_size
        )
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                tile = (view, slice(top, top + TILE), slice(left, left + TILE))
                blended = _blend(splats, colors, left, top, images[tile].shape[1], images[tile].shape[0])
                images[tile], depths[tile], transmittances[tile], last[tile] = blended
        images[view] += transmittances[view, :, :, None] * background[view]
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    extrinsic: Tensor,
    intrinsic: Tensor,
    width: int,
    height: int,
    kernel_size: float,
) -> Projected:
    rotation, translation = extrinsic[:3, :3], extrinsic[:3, 3]
    fx, fy, cx, cy = intrinsic[0, 0], intrinsic[1, 1], intrinsic[0, 2], intrinsic[1, 2]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    in_front = z > NEAREST

    # clip space, with the guard against a division by zero that the official code has
    ndc_x, ndc_y = ((2 * fx * x + (2 * cx - 1) * z) / (z + 1e-7), (2 * fy * y + (2 * cy - 1) * z) / (z + 1e-7))
    centers = torch.stack([((ndc_x + 1) * width - 1) / 2, ((ndc_y + 1) * height - 1) / 2], -1)

    # covariance in pixels: the projection linearised at the mean, which is first moved near the field of view
    limit_x, limit_y = 1.3 * 0.5 / fx, 1.3 * 0.5 / fy
    tx, ty = (x / z).clamp(-limit_x, limit_x), (y / z).clamp(-limit_y, limit_y)
    zero = torch.zeros_like(z)
    row_x = torch.stack([fx * width / z, zero, -fx * width * tx / z], -1)
    row_y = torch.stack([zero, fy * height / z, -fy * height * ty / z], -1)
    half_axes = torch.stack([row_x, row_y], -2) @ rotation @ (_rotations(quats) * scales[:, None, :])
    a, b, c = (
        half_axes[:, 0].square().sum(-1),
        (half_axes[:, 0] * half_axes[:, 1]).sum(-1),
        half_axes[:, 1].square().sum(-1),
    )

    # mip filter: the Gaussian is widened by the pixel and keeps its integral
    det_sharp = (a * c - b * b).clamp_min(1e-6)
    det_wide = ((a + kernel_size) * (c + kernel_size) - b * b).clamp_min(1e-6)
    fading = (det_sharp / (det_wide + 1e-6) + 1e-6).sqrt()
    fading = fading.masked_fill((det_sharp <= 1e-6) | (det_wide <= 1e-6), 0)
    a, c = a + kernel_size, c + kernel_size
    det = a * c - b * b

    middle = 0.5 * (a + c)
    radii = (3 * (middle + (middle * middle - det).clamp_min(0.1).sqrt()).sqrt()).ceil()
    grid = torch.tensor([-(-width // TILE), -(-height // TILE)], device=means.device)
    first = _whole((centers - radii[:, None]) / TILE).minimum(grid).clamp_min(0)
    past = _whole((centers + radii[:, None] + (TILE - 1)) / TILE).minimum(grid).clamp_min(0)

    drawn = (in_front & (det > 0) & (past > first).all(-1)).nonzero().squeeze(-1)
    index = drawn[z[drawn].sort(stable=True).indices]
    conics = torch.stack([c, -b, a], -1) / det[:, None]
    return Projected(
        index,
        centers[index],
        conics[index],
        (opacities * fading)[index],
        z[index],
        radii[index],
        torch.cat([first, past], -1)[index],
    )


def _blend(
    splats: Projected, colors: Tensor, left: int, top: int, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colors, depths, transmittances and last contributors of the pixels of one tile."""
    tile_x, tile_y = left // TILE, top // TILE
    x0, y0, x1, y1 = splats.tiles.unbind(-1)
    here = ((x0 <= tile_x) & (tile_x < x1) & (y0 <= tile_y) & (tile_y < y1)).nonzero().squeeze(-1)
    device = colors.device
    rows, columns = torch.arange(top, top + height, device=device), torch.arange(left, left + width, device=device)
    pixel_y, pixel_x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([pixel_x, pixel_y], -1).view(-1, 1, 2)

    image, depth = colors.new_zeros(len(pixels), colors.shape[1]), colors.new_zeros(len(pixels))
    transmittance, last = colors.new_ones(len(pixels)), colors.new_full((len(pixels),), -1, dtype=torch.int64)
    going = colors.new_ones(len(pixels), dtype=torch.bool)
    for chunk in here.split(_CHUNK) if len(here) else ():
        dx, dy = (splats.centers[chunk] - pixels).unbind(-1)  # [pixels, splats of the chunk]
        xx, xy, yy = splats.conics[chunk].unbind(-1)
        power = -0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy
        alpha = (splats.opacities[chunk] * power.exp()).clamp_max(LARGEST_ALPHA)
        alpha = alpha.masked_fill((power > 0) | ~(alpha >= SMALLEST_ALPHA), 0)
        after = transmittance[:, None] * (1 - alpha).cumprod(-1)
        # The splat that would bring the transmittance below the limit is left out, with all that follow.
        kept = going[:, None] & (after >= SMALLEST_TRANSMITTANCE)
        before = torch.cat([transmittance[:, None], after[:, :-1]], -1)
        weight = before * alpha * kept
        index = splats.indices[chunk]
        image = image + weight @ colors[index]
        depth = depth + weight @ splats.depths[chunk]
        last = torch.where((weight > 0).any(-1), index[_position(weight > 0).clamp_min(0)], last)
        transmittance = after.masked_fill(~kept, 2).amin(-1).minimum(transmittance)
        going = going & kept[:, -1]
    shape = (height, width)
    return image.view(*shape, -1), depth.view(shape), transmittance.view(shape), last.view(shape).int()


def _position(contributes: Tensor) -> Tensor:
    """Position of the last True in each row, -1 if there is none."""
    positions = torch.arange(1, contributes.shape[-1] + 1, device=contributes.device)
    return (contributes * positions).amax(-1) - 1


def _rotations(quats: Tensor) -> Tensor:
    w, x, y, z = quats.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _whole(values: Tensor) -> Tensor:
    """Truncation to int64; what is not finite or far outside any image becomes a bound."""
    return values.nan_to_num(0.0).clamp(-(2**20), 2**20).trunc().long()
