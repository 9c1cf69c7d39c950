"""What sampling a texture means, in plain PyTorch: every pixel against every level of the mip chain."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.mesh_raster.reference import check_faces, corner_rows


def mip_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths from the texture itself to one texel."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    return sizes


def mip_texels(height: int, width: int) -> int:
    """Of all levels but the texture itself."""
    return sum(h * w for h, w in mip_sizes(height, width)[1:])


def interpolate_derivatives(attributes: Tensor, faces: Tensor, ids: Tensor, derivatives: Tensor) -> Tensor:
    check_faces(faces, attributes.shape[1])
    if ids.numel() and int(ids.max()) >= len(faces):
        raise ValueError(f"rasterization.faces must be below F={len(faces)}; got {int(ids.max())}")
    corners, _ = corner_rows(attributes, faces, ids)
    by_weight = corners[..., :2, :] - corners[..., 2:, :]  # of u and v; the third weight is 1 - u - v
    steps = torch.einsum("bhwkc,bhwkd->bhwcd", by_weight, derivatives.unflatten(-1, (2, 2))).flatten(-2)
    return torch.where((ids >= 0)[..., None], steps, 0)


def sample_texture(
    texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> tuple[Tensor, Tensor]:
    levels = _levels(texture) if derivatives is not None else [texture]
    shares = _shares(texture.shape, uv, derivatives, filter)
    out = texture.new_zeros(*uv.shape[:3], texture.shape[3])
    for level, share in zip(levels, shares, strict=True):
        for texels, weight, _ in _taps(level.shape, uv, wrap, filter):
            out = out + (share * weight)[..., None] * level.flatten(0, 2)[texels]
    mips = [level.flatten(1, 2) for level in levels[1:]]
    return out, torch.cat(mips, 1) if mips else texture.new_empty(texture.shape[0], 0, texture.shape[3])


def sample_texture_gradient(
    out_gradient: Tensor, texture: Tensor, uv: Tensor, derivatives: Tensor | None, wrap: str, filter: str
) -> Tensor:
    sizes = mip_sizes(*texture.shape[1:3]) if derivatives is not None else [tuple(texture.shape[1:3])]
    shares = _shares(texture.shape, uv, derivatives, filter)
    count, channels = texture.shape[0], texture.shape[3]
    below: Tensor | None = None
    for (height, width), share in reversed(list(zip(sizes, shares, strict=True))):
        gradient = texture.new_zeros(count * height * width, channels, dtype=torch.float64)
        for texels, weight, _ in _taps((count, height, width), uv, wrap, filter):
            by_texel = (share * weight).double()[..., None] * out_gradient.double()
            used = (share * weight) != 0
            gradient = gradient.index_add(0, texels[used], by_texel[used])
        gradient = gradient.view(count, height, width, channels)
        if below is not None:
            rows, columns = (_means(n, gradient) for n in (height, width))
            gradient = gradient + torch.einsum("ij,kl,tikc->tjlc", rows, columns, below)
        below = gradient
    assert below is not None
    return below.to(texture.dtype)


def sample_texture_uv_gradient(
    out_gradient: Tensor,
    texture: Tensor,
    mips: Tensor,
    uv: Tensor,
    derivatives: Tensor | None,
    wrap: str,
    filter: str,
) -> Tensor:
    sizes = mip_sizes(*texture.shape[1:3]) if derivatives is not None else [tuple(texture.shape[1:3])]
    starts = mips.split([h * w for h, w in sizes[1:]], 1)
    rows = [texture.flatten(0, 2), *(level.flatten(0, 1) for level in starts)]
    gradient = torch.zeros_like(uv)
    for level, (height, width), share in zip(rows, sizes, _shares(texture.shape, uv, derivatives, filter), strict=True):
        for texels, _, slopes in _taps((texture.shape[0], height, width), uv, wrap, filter):
            by_weight = share * (level[texels] * out_gradient).sum(-1)
            gradient = gradient + torch.where((share != 0)[..., None], by_weight[..., None] * slopes, 0)
    return gradient


def _levels(texture: Tensor) -> list[Tensor]:
    levels = [texture]
    for height, width in mip_sizes(*texture.shape[1:3])[:-1]:
        rows, columns = (_means(n, texture) for n in (height, width))
        levels.append(torch.einsum("ij,kl,tjlc->tikc", rows, columns, levels[-1]))
    return levels


def _means(size: int, like: Tensor) -> Tensor:
    """``[size // 2, size]``: what each texel of the next level takes of each of this one, by the length they share."""
    half = max(1, size // 2)
    edges = torch.arange(half + 1, dtype=torch.float64, device=like.device)[:, None] * (size / half)
    texel = torch.arange(size, dtype=torch.float64, device=like.device)
    shared = torch.minimum(edges[1:], texel + 1) - torch.maximum(edges[:-1], texel)
    return (shared.clamp_min(0) * (half / size)).to(like.dtype)


def _shares(shape: torch.Size, uv: Tensor, derivatives: Tensor | None, filter: str) -> list[Tensor]:
    """``[B, h, w]`` how much of each level a pixel takes, none where its uv is not finite."""
    finite = uv.isfinite().all(-1)
    if derivatives is None:
        return [finite.to(uv.dtype)]
    _, height, width, _ = shape
    last = len(mip_sizes(height, width)) - 1
    size = derivatives.new_tensor([[width], [height]])
    x, y = (derivatives.unflatten(-1, (2, 2)) * size).unbind(-1)  # steps in texels
    xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    squared = 0.5 * (xx + yy + ((xx - yy) ** 2 + 4 * xy * xy).sqrt())  # the larger singular value
    level = torch.where(squared > 1, 0.5 * squared.log2(), 0.0).clamp_max(last)
    level = torch.where(squared < torch.inf, level, float(last))
    if filter == "nearest":
        level = (level + 0.5).floor().clamp_max(last)
    return [(1 - (level - i).abs()).clamp_min(0) * finite for i in range(last + 1)]


def _taps(shape: tuple[int, ...], uv: Tensor, wrap: str, filter: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Texels a pixel takes of a level: ``[B, h, w]`` rows of all texels, weights, and ``[B, h, w, 2]`` their slopes."""
    count, height, width = shape[:3]
    image = torch.arange(uv.shape[0], device=uv.device).view(-1, 1, 1) % count
    uv = torch.where(uv.isfinite().all(-1, keepdim=True), uv, 0)
    folded = {"repeat": lambda: uv - uv.floor(), "clamp": lambda: uv.clamp(0, 1), "zero": lambda: uv.clamp(-1, 2)}
    uv = folded[wrap]()
    if filter == "nearest":
        j, i = (uv * uv.new_tensor([width, height])).floor().long().unbind(-1)
        texels, inside = _wrapped(i, j, height, width, wrap)
        return [(image * (height * width) + texels, inside.to(uv.dtype), torch.zeros_like(uv))]
    at = uv * uv.new_tensor([width, height]) - 0.5
    first = at.floor()
    x, y = (at - first).unbind(-1)
    j, i = first.long().unbind(-1)
    taps = []
    for down in (0, 1):
        for right in (0, 1):
            texels, inside = _wrapped(i + down, j + right, height, width, wrap)
            across, along = (x if right else 1 - x), (y if down else 1 - y)
            slopes = torch.stack([(2 * right - 1) * along * width, (2 * down - 1) * across * height], -1)
            taps.append((image * (height * width) + texels, across * along * inside, slopes * inside[..., None]))
    return taps


def _wrapped(i: Tensor, j: Tensor, height: int, width: int, wrap: str) -> tuple[Tensor, Tensor]:
    if wrap == "repeat":
        return (i % height) * width + j % width, torch.ones_like(i, dtype=torch.bool)
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width) if wrap == "zero" else torch.ones_like(i).bool()
    return i.clamp(0, height - 1) * width + j.clamp(0, width - 1), inside
