"""What rendering a Strivec field means, in plain PyTorch: every ray against every leaf.

Geometry (rays, cells, places of samples) is float64 whatever the dtype of the field, here and in the kernels, so that
they take the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

C0 = 0.28209479177387814  # the spherical harmonic of degree 0
NEAREST = 0.2  # leaves whose centers are nearer, in camera depth, are not drawn
LARGEST = 1e9  # a factor beyond it is taken for garbage; products of six of them and a sum still fit float32
MAX_ALPHA = 0.999
STOP = 1e-3  # a ray ends when less than this of it is left
LINEAR = 10.0  # softplus is the identity from here on
_PAIRS = 1 << 21  # of ray and leaf at once


def render_radiance_field(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    dtype, shape = trivec.dtype, (len(extrinsics), height, width)
    factors = [_computed(x) for x in (trivec, density, features)]
    parts = []
    for samples in _samples(positions, trivec, density, features, extrinsics, intrinsics, jitter, depth, aabb, shape):
        value = _shade(samples, *factors)
        blend = _blend(samples, value.alphas)
        weights = blend.weights
        colors = samples.summed(weights[:, None] * value.colors)
        colors = colors + blend.left[:, None] * _computed(background)[samples.view]
        depths = samples.summed(weights * samples.depths.to(weights))
        medians = _first(samples, blend.after < 0.5).to(weights)
        parts.append((colors, depths, blend.left, medians, _crossings(samples, blend.live)))
    if not parts:
        empty = factors[0].new_empty(shape)
        return empty[..., None].expand(*shape, 3).clone().to(dtype), *[empty.to(dtype) for _ in range(3)], empty.int()
    colors, depths, left, medians, crossings = (torch.cat(column) for column in zip(*parts, strict=True))
    images = (depths.view(shape).to(dtype), left.view(shape).to(dtype), medians.view(shape).to(dtype))
    return colors.view(*shape, 3).to(dtype), *images, crossings.view(shape)


def render_radiance_field_gradient(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    crossings: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (len(extrinsics), height, width)
    factors = [_computed(x) for x in (trivec, density, features)]
    results = [torch.zeros_like(x) for x in (*factors, _computed(background))]
    by_color = _computed(colors_gradient).reshape(-1, 3)
    by_depth, by_left = (_computed(x).reshape(-1) for x in (depths_gradient, transmittances_gradient))
    for samples in _samples(positions, trivec, density, features, extrinsics, intrinsics, jitter, depth, aabb, shape):
        rays = slice(samples.begin, samples.begin + samples.rays)
        value = _shade(samples, *factors)
        blend = _blend(samples, value.alphas)
        seen = by_color[rays][samples.ray]
        worth = (seen * value.colors).sum(-1) + by_depth[rays][samples.ray] * samples.depths.to(seen)
        behind = (by_color[rays] * _computed(background)[samples.view]).sum(-1) + by_left[rays]
        # What all later samples and the background add to the loss: it shrinks as this sample grows.
        earned = samples.padded(blend.weights * worth)
        later = earned.sum(1, keepdim=True) - earned.cumsum(1) + (blend.left * behind)[:, None]
        later = later[samples.ray, samples.slot]
        by_sigma = samples.step * (blend.after * worth - later)
        by_sigma = torch.where((value.alphas < MAX_ALPHA) & blend.live, by_sigma, 0)
        by_sum = by_sigma * torch.where(value.sums >= LINEAR, 1, value.sums.sigmoid())
        by_tone = C0 * blend.weights[:, None] * seen * value.colors * (1 - value.colors)
        by_product = by_sum[:, None] * factors[1][samples.leaf]
        by_product = by_product + (by_tone[:, None] * factors[2][samples.leaf]).sum(-1)
        for axis in range(3):
            others = value.lerped[:, :, (axis + 1) % 3] * value.lerped[:, :, (axis + 2) % 3] * by_product
            lower, weight = samples.lower[:, axis], samples.weights[:, axis, None].to(others)
            slots = results[0][:, :, axis].transpose(1, 2)  # [N, D, R], a view
            slots.index_put_((samples.leaf, lower), others * (1 - weight), accumulate=True)
            slots.index_put_((samples.leaf, lower + 1), others * weight, accumulate=True)
        results[1].index_add_(0, samples.leaf, by_sum[:, None] * value.products)
        results[2].index_add_(0, samples.leaf, by_tone[:, None] * value.products[..., None])
        results[3].index_add_(0, samples.view, blend.left[:, None] * by_color[rays])
    inputs = (trivec, density, features, background)
    trivec, density, features, background = (x.to(like.dtype) for x, like in zip(results, inputs, strict=True))
    return trivec, density, features, background


def trace_voxels(
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """The first leaf that each ray passes through, -1 for none, and the depth at which the ray enters it."""
    shape = (len(extrinsics), height, width)
    ids = torch.full((len(extrinsics) * height * width,), -1, dtype=torch.int32, device=positions.device)
    depths = positions.new_zeros(ids.shape, dtype=torch.float64)
    cells, kept = _cells(positions, depth)
    for view, begin, rays, leaves in _batches(cells, kept, extrinsics, intrinsics, None, depth, aabb, shape):
        del view
        near, far = _passage(rays, cells[leaves], depth, aabb)
        near = torch.where(far > near, near, torch.inf)
        if not len(leaves):
            continue
        nearest, index = near.min(1)
        hit = nearest.isfinite()
        part = slice(begin, begin + len(nearest))
        ids[part] = torch.where(hit, leaves[index], -1).int()
        depths[part] = torch.where(hit, nearest * rays.cosines, 0)
    return ids.view(shape), depths.view(shape)


class _Rays(NamedTuple):
    origin: Tensor  # [3]
    directions: Tensor  # [P, 3], of length 1
    cosines: Tensor  # [P]: camera depth per length
    jitter: Tensor  # [P]


class _Samples(NamedTuple):
    """Where P rays are sampled: S samples, in order along each ray."""

    begin: int  # number of the first ray
    rays: int  # P
    longest: int  # most samples on one ray
    step: float
    view: Tensor  # [P]
    ray: Tensor  # [S], from 0
    slot: Tensor  # [S]: which one along the ray
    within: Tensor  # [S]: which one in its leaf
    leaf: Tensor  # [S]: row of the field
    distances: Tensor  # [S]
    depths: Tensor  # [S]: of the camera
    lower: Tensor  # [S, 3]: the first of the two entries that are interpolated
    weights: Tensor  # [S, 3]: of the second; beyond [0, 1] near the faces of the leaf

    def padded(self, values: Tensor) -> Tensor:
        """``[P, longest]``, zero where a ray has no more samples."""
        return values.new_zeros(self.rays, self.longest).index_put((self.ray, self.slot), values)

    def summed(self, values: Tensor) -> Tensor:
        """Over the samples of each ray."""
        return values.new_zeros(self.rays, *values.shape[1:]).index_add(0, self.ray, values)


class _Values(NamedTuple):
    lerped: Tensor  # [S, R, 3]
    products: Tensor  # [S, R]: over the axes
    sums: Tensor  # [S]: density before softplus
    alphas: Tensor  # [S]
    colors: Tensor  # [S, 3]


class _Blend(NamedTuple):
    live: Tensor  # [S]: the ray has not ended before
    weights: Tensor  # [S]
    after: Tensor  # [S]: transmittance behind the sample
    left: Tensor  # [P]: transmittance behind all


def _shade(samples: _Samples, trivec: Tensor, density: Tensor, features: Tensor) -> _Values:
    rows = trivec[samples.leaf]
    lower = samples.lower[:, None, :, None].expand(-1, rows.shape[1], -1, 1)
    weights = samples.weights[:, None].to(rows)
    ends = [rows.gather(3, lower + end).squeeze(3) for end in range(2)]
    lerped = ends[0] + weights * (ends[1] - ends[0])
    products = lerped.prod(2) if rows.requires_grad else lerped[..., 0] * lerped[..., 1] * lerped[..., 2]
    sums = (density[samples.leaf] * products).sum(1)
    sigma = torch.where(sums >= LINEAR, sums, torch.log1p(sums.clamp_max(LINEAR).exp()))
    alphas = (-torch.expm1(-sigma * samples.step)).clamp_max(MAX_ALPHA)
    colors = (C0 * (features[samples.leaf] * products[..., None]).sum(1)).sigmoid()
    return _Values(lerped, products, sums, alphas, colors)


def _blend(samples: _Samples, alphas: Tensor) -> _Blend:
    place = samples.ray, samples.slot
    with torch.no_grad():
        before = _products_before(samples.padded(alphas))[:, :-1]
        live = before[place] >= STOP
    alphas = torch.where(live, alphas, 0)
    passed = _products_before(samples.padded(alphas))
    return _Blend(live, passed[place] * alphas, passed[samples.ray, samples.slot + 1], passed[:, -1])


def _products_before(alphas: Tensor) -> Tensor:
    return torch.cat([alphas.new_ones(len(alphas), 1), (1 - alphas).cumprod(1)], 1)


def _first(samples: _Samples, reached: Tensor) -> Tensor:
    """Camera depth of the first sample of each ray for which `reached` is true, 0 where there is none."""
    depths = torch.where(reached, samples.depths, torch.inf)
    nearest = depths.new_full((samples.rays,), torch.inf).scatter_reduce(0, samples.ray, depths, "amin")
    return torch.where(nearest.isfinite(), nearest, 0)


def _crossings(samples: _Samples, live: Tensor) -> Tensor:
    """How many runs of at most 32 samples, each of one leaf, a ray takes."""
    fresh = live & (samples.within % 32 == 0)
    return torch.zeros_like(samples.view).index_add(0, samples.ray, fresh.long()).int()


def _samples(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    jitter: Tensor | None,
    depth: int,
    aabb: list[float],
    shape: tuple[int, int, int],
) -> Iterator[_Samples]:
    entries = trivec.shape[3]
    step = 0.5 / entries * (aabb[3] / 2**depth)
    usable = [(x.detach().double().abs() <= LARGEST).flatten(1).all(1) for x in (trivec, density, features)]
    cells, kept = _cells(positions, depth, usable[0] & usable[1] & usable[2])
    for view, begin, rays, leaves in _batches(cells, kept, extrinsics, intrinsics, jitter, depth, aabb, shape):
        near, far = _passage(rays, cells[leaves], depth, aabb)
        first, last = ((t / step - rays.jitter[:, None]).ceil() for t in (near, far))
        ray, column = (last > first).nonzero(as_tuple=True)
        order = torch.argsort(near[ray, column], stable=True)
        order = order[torch.argsort(ray[order], stable=True)]
        ray, column = ray[order], column[order]
        counts = (last - first)[ray, column].long()
        ray, column = ray.repeat_interleave(counts), column.repeat_interleave(counts)
        place = torch.arange(len(ray), device=ray.device)
        within = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
        per_ray = torch.bincount(ray, minlength=len(near))
        slot = place - (per_ray.cumsum(0) - per_ray)[ray]
        distances = (first[ray, column] + within + rays.jitter[ray]) * step
        origin, directions = _in_cells(rays, depth, aabb)
        local = origin + distances[:, None] * directions[ray] - cells[leaves][column]
        scaled = local * entries - 0.5
        lower = scaled.trunc().clamp(0, entries - 2)
        longest = int(per_ray.max()) if len(per_ray) else 0
        yield _Samples(
            begin=begin,
            rays=len(near),
            longest=longest,
            step=step,
            view=torch.full((len(near),), view, device=ray.device),
            ray=ray,
            slot=slot,
            within=within,
            leaf=leaves[column],
            distances=distances,
            depths=distances * rays.cosines[ray],
            lower=lower.long(),
            weights=scaled - lower,
        )


def _cells(positions: Tensor, depth: int, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[N, 3]`` cell of each leaf, and whether it is drawn: inside the box, usable, and the first in its cell."""
    extent = 2**depth
    places = (positions.detach().double() * extent).floor()
    inside = ((places >= 0) & (places < extent)).all(1)
    if usable is not None:
        inside = inside & usable
    cells = torch.where(inside[:, None], places, 0).long()
    rows = torch.arange(len(cells), device=cells.device)
    keys = torch.where(inside, (cells[:, 0] * extent + cells[:, 1]) * extent + cells[:, 2], -1 - rows)
    unique, inverse = torch.unique(keys, return_inverse=True)
    first = rows.new_full(unique.shape, len(rows)).scatter_reduce(0, inverse, rows, "amin")
    return cells, inside & (first[inverse] == rows)


def _batches(
    cells: Tensor,
    kept: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    jitter: Tensor | None,
    depth: int,
    aabb: list[float],
    shape: tuple[int, int, int],
) -> Iterator[tuple[int, int, _Rays, Tensor]]:
    """View, number of the first ray, rays, and the leaves that the view draws."""
    views, height, width = shape
    device = cells.device
    low, size = (torch.tensor(x, dtype=torch.float64, device=device) for x in (aabb[:3], aabb[3:]))
    centers = (cells.double() + 0.5) / 2**depth * size + low
    for view in range(views):
        camera = extrinsics[view].detach().double()
        lens = intrinsics[view].detach().double()
        rotation, shift = camera[:3, :3], camera[:3, 3]
        leaves = (kept & (centers @ rotation[2] + shift[2] > NEAREST)).nonzero()[:, 0]
        step = max(1, min(_PAIRS // max(len(leaves), 1), 1 << 14))
        for begin in range(0, height * width, step):
            pixels = torch.arange(begin, min(begin + step, height * width), device=device)
            x = (((pixels % width).double() + 0.5) / width - lens[0, 2]) / lens[0, 0]
            y = (((pixels // width).double() + 0.5) / height - lens[1, 2]) / lens[1, 1]
            toward = torch.stack([x, y, torch.ones_like(x)], 1)
            cosines = 1 / toward.norm(dim=1)
            if jitter is None:
                shifts = torch.zeros_like(x)
            else:
                shifts = jitter[view].detach().flatten()[pixels].double().nan_to_num(0, 1, 0).clamp(0, 1)
            rays = _Rays(-(shift @ rotation), (toward * cosines[:, None]) @ rotation, cosines, shifts)
            yield view, view * height * width + begin, rays, leaves


def _in_cells(rays: _Rays, depth: int, aabb: list[float]) -> tuple[Tensor, Tensor]:
    """Origin and directions in units of cells."""
    low, size = (rays.origin.new_tensor(x) for x in (aabb[:3], aabb[3:]))
    return (rays.origin - low) / (size / 2**depth), rays.directions / (size / 2**depth)


def _passage(rays: _Rays, cells: Tensor, depth: int, aabb: list[float]) -> tuple[Tensor, Tensor]:
    """``[P, L]`` distances at which rays enter and leave cells, from 0 on; they miss where these do not increase."""
    origin, directions = _in_cells(rays, depth, aabb)
    near = directions.new_zeros(len(directions), len(cells))
    far = torch.full_like(near, torch.inf)
    for axis in range(3):
        direction = directions[:, axis, None]
        planes = [((cells[:, axis] + side) - origin[axis]) * (1 / direction) for side in range(2)]
        level = (cells[:, axis] <= origin[axis]) & (origin[axis] < cells[:, axis] + 1)
        never = torch.where(level, torch.inf, -torch.inf)
        near = torch.maximum(near, torch.where(direction == 0, -torch.inf, torch.minimum(*planes)))
        far = torch.minimum(far, torch.where(direction == 0, never, torch.maximum(*planes)))
    return near, far


def _computed(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
