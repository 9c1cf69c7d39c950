# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Window numbers of voxels. How large the grid of windows is stays on the GPU: nothing waits for it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def coordinate_range(coords, limits, rows, BLOCK: tl.constexpr):
    """limits[0:4] = the largest coordinate per axis, limits[4] = the smallest of all; both at least from 0 on."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lowest = tl.zeros([BLOCK], tl.int32)
    for axis in tl.static_range(4):
        coordinate = tl.load(coords + row * 4 + axis, mask=row < rows, other=0)
        tl.atomic_max(limits + axis, tl.max(coordinate, 0))
        lowest = tl.minimum(lowest, coordinate)
    tl.atomic_min(limits + 4, tl.min(lowest, 0))


@triton.jit(do_not_specialize=["rows", "window_size", "shift"])
def window_numbers(coords, limits, numbers, rows, window_size, shift, BLOCK: tl.constexpr):
    """Number of each voxel's window in the grid of windows: batch first, then x, y, z."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    number = tl.load(coords + row * 4, mask=inside, other=0).to(tl.int64)
    for axis in tl.static_range(1, 4):
        coordinate = tl.load(coords + row * 4 + axis, mask=inside, other=0).to(tl.int64)
        windows = (tl.load(limits + axis).to(tl.int64) + shift) // window_size + 1
        number = number * windows + (coordinate + shift) // window_size
    tl.store(numbers + row, number, mask=inside)
