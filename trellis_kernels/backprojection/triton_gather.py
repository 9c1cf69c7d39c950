# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Sums of pixels as products of matrices: bilinear weights of a tile of points, times the window of pixels they see.

Neighbors in space are neighbors in a picture, so a tile of points needs few pixels of it; each is read once per tile,
not four times per point, and tensor cores add them up.
"""

import triton
import triton.language as tl

from trellis_kernels.backprojection.triton_views import weights_of


@triton.jit(do_not_specialize=["views", "points", "tiles", "height", "width"])
def gather_points(
    features, order, pixels, places, windows, counts, out, winners,
    views, points, tiles, height, width, channels,
    POINTS: tl.constexpr, TEXELS: tl.constexpr, CHANNELS: tl.constexpr, MAXIMUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of POINTS points. Programs of the same channels run together and share them in the L2 cache."""
    tile = tl.program_id(0)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    wanted = (column < channels)[None, :]
    place = (tile * POINTS + tl.arange(0, POINTS)).to(tl.int64)
    inside = place < points
    view_points = tl.sum(tl.zeros([1], tl.int64) + views, 0) * points
    plane = tl.sum(tl.zeros([1], tl.int64) + views, 0) * tiles
    picture = tl.sum(tl.zeros([1], tl.int64) + height, 0) * width * channels
    total = tl.zeros([POINTS, CHANNELS], tl.float32)
    winner = tl.full([POINTS, CHANNELS], -1, tl.int32) if MAXIMUM else 0
    at, window = place, windows + tile
    for view in range(views):
        top, left = tl.load(window), tl.load(window + plane)
        wide = tl.load(window + 3 * plane)
        count = tl.load(window + 2 * plane) * wide
        sample = tl.zeros([POINTS, CHANNELS], tl.float32) if MAXIMUM else total
        for first in range(0, count, TEXELS):
            texel = first + tl.arange(0, TEXELS)
            i, j = top + texel // wide, left + texel % wide
            there = texel < count
            rows = features + ((i * width + j) * channels)[:, None] + column[None, :]
            values = tl.load(rows, mask=there[:, None] & wanted, other=0.0)
            weights = weights_of(pixels, places, view_points, at, inside, i, j)
            sample = tl.dot(tl.trans(weights.to(values.dtype)), values, sample, input_precision=PRECISION)
        if MAXIMUM:
            seen = tl.load(pixels + at, mask=inside, other=-1) >= 0
            better = seen[:, None] & ((sample > total) | (winner < 0))
            total = tl.where(better, sample, total)
            winner = tl.where(better, view, winner)
        else:
            total = sample
        at += points
        window += tiles
        features += picture
    point = tl.load(order + place, mask=inside, other=0)
    target = point[:, None] * channels + column[None, :]
    mask = inside[:, None] & wanted
    if MAXIMUM:
        tl.store(winners + target, winner, mask=mask)
    else:
        total = total / tl.maximum(tl.load(counts + point, mask=inside, other=1), 1).to(tl.float32)[:, None]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["views", "points", "tiles", "height", "width"])
def gather_pixels(
    out_gradient, order, pixels, places, windows, counts, winners, gradient,
    views, points, tiles, height, width, channels,
    POINTS: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    MAXIMUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of SIDE^2 pixels of a picture: one after the other the tiles of points that see some.

    Programs of the same channels run together: theirs of all points fit the L2 cache.
    """
    across = tl.cdiv(width, SIDE)
    top, left = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    column = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    wanted = (column < channels)[None, :]
    own = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, SIDE * SIDE)
    i, j = top + pixel // SIDE, left + pixel % SIDE
    window = windows + own * tiles
    plane = tl.sum(tl.zeros([1], tl.int64) + views, 0) * tiles
    view_points = tl.sum(tl.zeros([1], tl.int64) + views, 0) * points
    total = tl.zeros([SIDE * SIDE, CHANNELS], tl.float32)
    for group in range(0, tiles, GROUP):
        near = _overlaps(window, plane, group + tl.arange(0, GROUP), tiles, top, left, SIDE)
        if tl.sum(near.to(tl.int32), 0) > 0:
            for tile in range(group, tl.minimum(group + GROUP, tiles)):
                if _overlaps(window, plane, tile, tiles, top, left, SIDE):
                    place = tile * POINTS + tl.arange(0, POINTS)
                    inside = place < points
                    point = tl.load(order + place, mask=inside, other=0)
                    source = point[:, None] * channels + column[None, :]
                    mask = inside[:, None] & wanted
                    values = tl.load(out_gradient + source, mask=mask, other=0.0)
                    weights = weights_of(pixels, places, view_points, own * points + place, inside, i, j)
                    if MAXIMUM:
                        mine = tl.load(winners + source, mask=mask, other=-1) == own
                        values = tl.where(mine, values, 0.0).to(values.dtype)
                    else:
                        seen_by = tl.maximum(tl.load(counts + point, mask=inside, other=1), 1)
                        weights = weights / seen_by.to(tl.float32)[None, :]
                    total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    target = gradient + ((own * height + i) * width + j)[:, None] * channels + column[None, :]
    tl.store(target, total.to(gradient.dtype.element_ty), mask=((i < height) & (j < width))[:, None] & wanted)


@triton.jit
def _overlaps(window, plane, tile, tiles, top, left, SIDE: tl.constexpr):
    """Whether the windows of tiles share pixels with the square that begins at (top, left)."""
    known = tile < tiles
    row = tl.load(window + tile, mask=known, other=0)
    column = tl.load(window + plane + tile, mask=known, other=0)
    tall = tl.load(window + 2 * plane + tile, mask=known, other=0)
    wide = tl.load(window + 3 * plane + tile, mask=known, other=0)
    across = (row < top + SIDE) & (row + tall > top) & (column < left + SIDE) & (column + wide > left)
    return across & (tall > 0) & (wide > 0)
