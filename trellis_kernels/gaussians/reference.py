"""What Gaussian rasterisation means, in plain PyTorch: per camera a projection, a sort, then tiles of pixels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = means.dtype
    if dtype in _HALF:
        floats = (means, quats, scales, opacities, colors, extrinsics, intrinsics, background)
        means, quats, scales, opacities, colors, extrinsics, intrinsics, background = (x.float() for x in floats)
    shape = (len(extrinsics), height, width)
    views = []
    for view in range(len(extrinsics)):
        splats = project(
            means, quats, scales, opacities, extrinsics[view], intrinsics[view], width, height, kernel_size
        )
        shades = colors[view] if colors.ndim == 3 else colors
        rows = []
        for top in range(0, height, TILE):
            size = min(TILE, height - top)
            tiles = [_blend(splats, shades, left, top, min(TILE, width - left), size) for left in range(0, width, TILE)]
            rows.append([torch.cat(parts, 1) for parts in zip(*tiles, strict=True)])
        image, depth, transmittance, last, median = (torch.cat(parts, 0) for parts in zip(*rows, strict=True))
        views.append((image + transmittance[:, :, None] * background[view], depth, transmittance, last, median))
    if not views:
        empty = means.new_empty(shape)
        image = means.new_empty(*shape, colors.shape[-1])
        outputs = [image, empty, empty.clone(), empty.int(), empty.clone()]
    else:
        outputs = [torch.stack(parts) for parts in zip(*views, strict=True)]
    images, depths, transmittances, last, medians = outputs
    state = torch.empty(0, dtype=torch.uint8, device=means.device)
    return images.to(dtype), depths.to(dtype), transmittances.to(dtype), last, medians.to(dtype), state


def rasterize_gaussians_backward(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    last: Tensor,
    state: Tensor,
    kernel_size: float,
) -> tuple[Tensor, ...]:
    """The derivative of the reference by torch's autograd."""
    height, width = out_depths.shape[1:]
    inputs = [means, quats, scales, opacities, colors, extrinsics, intrinsics, background]

    def differentiate() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = rasterize_gaussians(*leaves, width, height, kernel_size)[:3]  # type: ignore[call-arg, arg-type]
        gradients = (colors_gradient, depths_gradient, transmittances_gradient)
        used = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        roots, seeds = [output for output, _ in used], [gradient for _, gradient in used]
        return list(torch.autograd.grad(roots, leaves, seeds, allow_unused=True, materialize_grads=True))

    # Within an operator autograd is switched off, for its thread.
    with ThreadPoolExecutor(1) as pool:
        gradients = pool.submit(differentiate).result()
    return tuple(gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients)


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
    """What is drawn by one camera. Differentiable: what is left out never enters the part that is differentiated."""
    with torch.no_grad():
        depths, _, conics, _, radii, tiles, drawn = _project(
            means, quats, scales, opacities, extrinsic, intrinsic, width, height, kernel_size
        )
        drawn &= conics.isfinite().all(-1) & opacities.isfinite() & (scales > 0).all(-1)
        drawn &= quats.square().sum(-1).isfinite()
        drawn = drawn.nonzero().squeeze(-1)
        index = drawn[depths[drawn].sort(stable=True).indices]
    depths, centers, conics, faded, _, _, _ = _project(
        means[index],
        quats[index],
        scales[index],
        opacities[index],
        extrinsic,
        intrinsic,
        width,
        height,
        kernel_size,
    )
    return Projected(index, centers, conics, faded, depths, radii[index], tiles[index])


def _project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    extrinsic: Tensor,
    intrinsic: Tensor,
    width: int,
    height: int,
    kernel_size: float,
) -> tuple[Tensor, ...]:
    """Depths, centers, conics, opacities, radii, tiles of all Gaussians, and whether each is drawn."""
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

    drawn = in_front & (det > 0) & (past > first).all(-1)
    conics = torch.stack([c, -b, a], -1) / det[:, None]
    return z, centers, conics, opacities * fading, radii, torch.cat([first, past], -1), drawn


def _blend(
    splats: Projected, colors: Tensor, left: int, top: int, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Colors, depths, transmittances, last contributors and median depths of the pixels of one tile."""
    tile_x, tile_y = left // TILE, top // TILE
    x0, y0, x1, y1 = splats.tiles.unbind(-1)
    here = ((x0 <= tile_x) & (tile_x < x1) & (y0 <= tile_y) & (tile_y < y1)).nonzero().squeeze(-1)
    device = colors.device
    rows, columns = torch.arange(top, top + height, device=device), torch.arange(left, left + width, device=device)
    pixel_y, pixel_x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([pixel_x, pixel_y], -1).view(-1, 1, 2)

    image, depth = colors.new_zeros(len(pixels), colors.shape[1]), colors.new_zeros(len(pixels))
    median = colors.new_zeros(len(pixels))
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
        with torch.no_grad():
            halving = kept & (before >= 0.5) & (after < 0.5)
            median = median + halving.to(weight) @ splats.depths[chunk]
        transmittance = torch.cat([transmittance[:, None], after], -1).gather(1, kept.sum(-1, keepdim=True)).squeeze(1)
        going = going & kept[:, -1]
    shape = (height, width)
    last, median = last.view(shape).int(), median.view(shape).detach()
    return image.view(*shape, colors.shape[1]), depth.view(shape), transmittance.view(shape), last, median


def _position(contributes: Tensor) -> Tensor:
    """Position of the last True in each row, -1 if there is none."""
    positions = torch.arange(1, contributes.shape[-1] + 1, device=contributes.device)
    return (contributes * positions).amax(-1) - 1


def _rotations(quats: Tensor) -> Tensor:
    w, x, y, z = (quats / quats.square().sum(-1, keepdim=True).sqrt()).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _whole(values: Tensor) -> Tensor:
    """Truncation to int64; what is not finite or far outside any image becomes a bound."""
    return values.nan_to_num(0.0).clamp(-(2**20), 2**20).trunc().long()
