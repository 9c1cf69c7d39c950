"""From voxel coordinates to integer maps: who is next to whom, and which voxels coincide.

A voxel is a row (batch, x, y, z) of int32, each in [0, 65535]. On a GPU lists have fewer than 2**30 rows, and a wrong
value among the rows is what a wrong index is to torch: a device-side assertion, raised by the next synchronization.
Only `coarsen` and `unique_coords` wait for the GPU, once, for the size of their result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.shapes import expect
from trellis_kernels.voxel_hash import reference

__all__ = ["coarsen", "neighbor_map", "subdivide_coords", "subdivided_neighbor_map", "unique_coords"]

_KERNELS = {"cpu": "trellis_kernels.voxel_hash.cpu", "cuda": "trellis_kernels.voxel_hash.cuda"}


def neighbor_map(coords: Tensor, kernel_size: int = 3) -> Tensor:
    """Find the occupied voxels in the cube around each voxel.

        neighbors[n, k] = m  where  coords[m] == coords[n] + (0, dx, dy, dz)

    Tap ``k = ((dx + r) * kernel_size + dy + r) * kernel_size + dz + r`` with ``r = kernel_size // 2``: x slowest, z
    fastest, the order of a weight stored as (kx, ky, kz). Voxels of different samples are never neighbors.

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z), each in [0, 65535]; rows distinct, in any order. Fastest where
            voxels close in space are close in memory.
        kernel_size: width of the cube in voxels, odd.

    Returns:
        ``[N, K]`` int32, ``K = kernel_size ** 3``: row of each neighbor, -1 where the voxel is empty. The middle tap is
        the voxel itself, and ``neighbors[neighbors[n, k], K - 1 - k] == n``.

    Raises:
        ValueError: for a coordinate out of range, for a voxel that occurs twice (its first two rows are named), for an
            even kernel size, or if the shape is not the one above.
        TypeError: if coords is not int32.

    Source:
        The tap order is that of the official submanifold convolutions (spconv, weight ``(out, kx, ky, kz, in)``).
        Kernel: blocks of 4^3 voxels behind a hash table, as in Museth 2013, "VDB: High-Resolution Sparse Volumes".
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    expect(coords=(coords, "N 4", torch.int32))
    return _neighbor_map(coords, kernel_size)


def unique_coords(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Sort voxels and merge the equal ones.

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z), each in [0, 65535], in any order.

    Returns:
        unique: ``[M, 4]`` int32, the distinct rows in lexicographic order (batch, x, y, z).
        inverse: ``[N]`` int32, ``unique[inverse] == coords``.

    Raises:
        ValueError, TypeError: if a coordinate, shape or dtype is not the one above.
    """
    return coarsen(coords, 1)


def coarsen(coords: Tensor, factor: int = 2) -> tuple[Tensor, Tensor]:
    """Find the occupied voxels of a grid `factor` times coarser, and to which of them each voxel belongs.

        coarse[inverse[n]] == (batch, x // factor, y // factor, z // factor)  of  coords[n]

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z), each in [0, 65535], in any order.
        factor: positive.

    Returns:
        coarse: ``[M, 4]`` int32, distinct, in lexicographic order (batch, x, y, z).
        inverse: ``[N]`` int32.

    Raises:
        ValueError: for a coordinate out of range, a factor below 1, or if the shape is not the one above.
        TypeError: if coords is not int32.

    Source:
        TRELLIS, ``SparseDownsample``: the coarse voxels and their order.
    """
    if factor < 1:
        raise ValueError(f"factor must be positive; got {factor}")
    expect(coords=(coords, "N 4", torch.int32))
    return _coarsen(coords, factor)


def subdivide_coords(coords: Tensor) -> Tensor:
    """Replace each voxel by its 8 children on a grid twice as fine.

        out[8 n + 4 dx + 2 dy + dz] = (batch, 2 x + dx, 2 y + dy, 2 z + dz)  of  coords[n]

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z); batch in [0, 65535], x, y, z in [0, 32767].

    Returns:
        ``[8 N, 4]`` int32; the children of a voxel are contiguous, z fastest.

    Raises:
        ValueError, TypeError: if a coordinate, shape or dtype is not the one above.

    Source:
        TRELLIS, ``SparseSubdivide``.
    """
    expect(coords=(coords, "N 4", torch.int32))
    return _subdivide_coords(coords)


def subdivided_neighbor_map(neighbors: Tensor) -> Tensor:
    """Derive the neighbor map of the children from that of their parents, without any search.

    Equals ``neighbor_map(subdivide_coords(coords))`` for ``neighbors = neighbor_map(coords)``: all 8 children of a
    voxel exist, so a child's neighbor exists if the coarse voxel around it does.

    Args:
        neighbors: ``[N, 27]`` int32 from `neighbor_map` with kernel size 3; rows in [0, N), -1 where empty.

    Returns:
        ``[8 N, 27]`` int32, children in the order of `subdivide_coords`.

    Raises:
        ValueError: if a row is out of range, if ``8 N`` exceeds int32, or if the shape is not the one above.
        TypeError: if neighbors is not int32.
    """
    expect(neighbors=(neighbors, "N 27", torch.int32))
    return _subdivided_neighbor_map(neighbors)


_neighbor_map = Operator("neighbor_map(Tensor coords, int kernel_size) -> Tensor", reference.neighbor_map, _KERNELS)
_coarsen = Operator("coarsen(Tensor coords, int factor) -> (Tensor, Tensor)", reference.coarsen, _KERNELS)
_subdivide_coords = Operator("subdivide_coords(Tensor coords) -> Tensor", reference.subdivide_coords, _KERNELS)
_subdivided_neighbor_map = Operator(
    "subdivided_neighbor_map(Tensor neighbors) -> Tensor", reference.subdivided_neighbor_map, _KERNELS
)


@_neighbor_map.fake
def _(coords: Tensor, kernel_size: int) -> Tensor:
    return coords.new_empty(coords.shape[0], kernel_size**3)


@_coarsen.fake
def _(coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    coarse = torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty(coarse, 4), coords.new_empty(coords.shape[0])


@_subdivide_coords.fake
def _(coords: Tensor) -> Tensor:
    return coords.new_empty(8 * coords.shape[0], 4)


@_subdivided_neighbor_map.fake
def _(neighbors: Tensor) -> Tensor:
    return neighbors.new_empty(8 * neighbors.shape[0], 27)
