# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Where points are seen: their order along a curve, their pixels, the window of pixels that each tile of them sees.

`pixels` ``[V, N]`` int32 is the row, plus one, times 2^16, and the column, plus one, of the upper left of the four
pixels around a point, which may be one beyond the border; -1: it takes no part. `places` ``[2, V, N]`` float32 is how
far to the right and down of it the point lies. `windows` ``[4, V, T]`` int32 is the first row and column and the height
and width of what a tile sees of a picture. Points are in the order of `order`.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["points"])
def morton_keys(positions, low, scale_in, keys, points, BITS: tl.constexpr, BLOCK: tl.constexpr):
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = point < points
    scale = tl.load(scale_in)
    key = tl.zeros([BLOCK], tl.int32)
    for axis in tl.static_range(3):
        at = positions + point.to(tl.int64) * 3 + axis
        cell = (tl.load(at, mask=inside, other=0.0) - tl.load(low + axis)) * scale
        cell = tl.where(cell > 0, cell, 0)  # and where it is NaN
        cell = tl.where(cell < (1 << BITS) - 1, cell, (1 << BITS) - 1).to(tl.int32)
        cell = (cell | cell << 16) & 0x030000FF
        cell = (cell | cell << 8) & 0x0300F00F
        cell = (cell | cell << 4) & 0x030C30C3
        cell = (cell | cell << 2) & 0x09249249
        key |= cell << (2 - axis)
    tl.store(keys + point, key, mask=inside)


@triton.jit
def camera_row(inner, outer, row, column):
    """Element ``[row, column]`` of intrinsics @ extrinsics[:3]."""
    total = tl.load(inner + 3 * row).to(tl.float64) * tl.load(outer + column).to(tl.float64)
    total += tl.load(inner + 3 * row + 1).to(tl.float64) * tl.load(outer + 4 + column).to(tl.float64)
    return total + tl.load(inner + 3 * row + 2).to(tl.float64) * tl.load(outer + 8 + column).to(tl.float64)


@triton.jit
def along(inner, outer, row, x, y, z):
    seen = camera_row(inner, outer, row, 0) * x + camera_row(inner, outer, row, 1) * y
    return seen + camera_row(inner, outer, row, 2) * z + camera_row(inner, outer, row, 3)


@triton.jit(do_not_specialize=["tolerance", "views", "points", "tiles", "height", "width", "rows", "columns"])
def see_points(
    positions, order, extrinsics, intrinsics, depths, pixels, places, windows, counts, tolerance,
    views, points, tiles, height, width, rows, columns,
    POINTS: tl.constexpr, VIEWS: tl.constexpr, DEPTHS: tl.constexpr, ONLY_SEEN: tl.constexpr,
):  # fmt: skip
    """Tile ``program_id(0)`` in VIEWS views. Geometry is in float64: borders are where they are on the CPU."""
    tile = tl.program_id(0)
    place = tile * POINTS + tl.arange(0, POINTS)
    inside = place < points
    point = tl.load(order + place, mask=inside, other=0)
    at = positions + point * 3
    x = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    y = tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
    z = tl.load(at + 2, mask=inside, other=0.0).to(tl.float64)
    found = tl.zeros([POINTS], tl.int32)
    first = tl.program_id(1) * VIEWS
    for view in range(first, tl.minimum(first + VIEWS, views)):
        one = tl.zeros([1], tl.int64) + view
        own = tl.sum(one, 0)  # as int64: V N may be more than an int32 holds
        inner, outer = intrinsics + own * 9, extrinsics + own * 16
        depth = along(inner, outer, 2, x, y, z)
        front = inside & (depth > 0)
        divisor = tl.where(front, depth, 1.0)
        u = tl.where(front, along(inner, outer, 0, x, y, z) / divisor, -1e9)
        v = tl.where(front, along(inner, outer, 1, x, y, z) / divisor, -1e9)
        seen = front & (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
        if DEPTHS:
            i = tl.minimum(tl.where(seen, v * rows, 0.0).to(tl.int32), rows - 1)
            j = tl.minimum(tl.where(seen, u * columns, 0.0).to(tl.int32), columns - 1)
            surface = tl.load(depths + (own * rows + i) * columns + j, mask=seen, other=0.0).to(tl.float64)
            seen = seen & ((surface <= 0) | (depth <= surface + tolerance))
        found += seen.to(tl.int32)
        column, row = u * width - 0.5, v * height - 0.5
        near = (column > -1) & (column < width) & (row > -1) & (row < height)
        if ONLY_SEEN:
            near = near & seen
        column, row = tl.where(near, column, 0.0), tl.where(near, row, 0.0)
        left, top = tl.floor(column), tl.floor(row)
        right, down = (column - left).to(tl.float32), (row - top).to(tl.float32)
        i, j = top.to(tl.int32), left.to(tl.int32)
        target = own * points + place
        tl.store(pixels + target, tl.where(near, (i + 1) << 16 | (j + 1), -1), mask=inside)
        tl.store(places + target, right, mask=inside)
        tl.store(places + (views + own) * points + place, down, mask=inside)
        top_row = tl.maximum(tl.min(tl.where(near, i, height), 0), 0)
        left_column = tl.maximum(tl.min(tl.where(near, j, width), 0), 0)
        end_row = tl.minimum(tl.max(tl.where(near, i, -2), 0) + 2, height)
        end_column = tl.minimum(tl.max(tl.where(near, j, -2), 0) + 2, width)
        window, plane = windows + own * tiles + tile, (own * 0 + views) * tiles
        tl.store(window, top_row)
        tl.store(window + plane, left_column)
        tl.store(window + 2 * plane, tl.maximum(end_row - top_row, 0))
        tl.store(window + 3 * plane, tl.maximum(end_column - left_column, 0))
    if ONLY_SEEN:
        tl.atomic_add(counts + point, found, mask=inside)  # of whole numbers: in any order the same


@triton.jit
def weights_of(pixels, places, view_points, at, inside, row, column):
    """Bilinear weights ``[pixels, points]`` of pixels of given row and column: so few points are held by a thread."""
    pixel = tl.load(pixels + at, mask=inside, other=-1)[None, :]
    right = tl.load(places + at, mask=inside, other=0.0)[None, :]
    down = tl.load(places + view_points + at, mask=inside, other=0.0)[None, :]
    i = row[:, None] - (pixel >> 16) + 1
    j = column[:, None] - (pixel & 0xFFFF) + 1
    vertical = tl.where(i == 0, 1.0 - down, tl.where(i == 1, down, 0.0))
    horizontal = tl.where(j == 0, 1.0 - right, tl.where(j == 1, right, 0.0))
    return tl.where(pixel >= 0, vertical * horizontal, 0.0)
