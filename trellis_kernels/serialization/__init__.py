"""Space-filling curves: orders of voxels in which those close in memory are close in space."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.serialization import reference
from trellis_kernels.shapes import expect

__all__ = ["hilbert_codes", "hilbert_order", "morton_codes", "morton_order"]

_KERNELS = {"cpu": "trellis_kernels.serialization.cpu", "cuda": "trellis_kernels.serialization.cuda"}


def morton_codes(coords: Tensor, transposed: bool = False, bits: int = 16) -> Tensor:
    """Number voxels along the Z-order curve of their sample.

        code = batch * 8**bits + (bits of x, y, z interleaved; of each triple x is the highest, z the lowest)

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z); batch in [0, 32767], x, y, z in [0, 2**bits).
        transposed: exchange the roles of x and y, that is, take the curve of (batch, y, x, z).
        bits: of each coordinate, 1 to 16. Does not change the order, only the distance between samples.

    Returns:
        ``[N]`` int64, not negative; distinct for distinct voxels. The batch is above the curve, so that sorting by code
        keeps samples apart.

    Raises:
        ValueError: for a coordinate or `bits` out of range, or if the shape is not the one above.
        TypeError: if coords is not int32.

    Source:
        Morton 1966; bit order and meaning of `transposed` as in Wu et al. 2024, "Point Transformer V3", sec. 4.1.
    """
    return _codes(_morton_codes, coords, transposed, bits)


def hilbert_codes(coords: Tensor, transposed: bool = False, bits: int = 16) -> Tensor:
    """Number voxels along the Hilbert curve of their sample: consecutive codes are voxels that share a face.

        code = batch * 8**bits + position on the curve through the grid of (2**bits)**3 voxels

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z); batch in [0, 32767], x, y, z in [0, 2**bits).
        transposed: exchange the roles of x and y, that is, take the curve of (batch, y, x, z).
        bits: of each coordinate, 1 to 16. On a small grid the curves of b and b + 3 bits agree; in between, the axes
            take turns.

    Returns:
        ``[N]`` int64, not negative; distinct for distinct voxels. The batch is above the curve, so that sorting by code
        keeps samples apart.

    Raises:
        ValueError: for a coordinate or `bits` out of range, or if the shape is not the one above.
        TypeError: if coords is not int32.

    Source:
        Skilling 2004, "Programming the Hilbert curve" (AIP Conf. Proc. 707), with x as axis 0.
    """
    return _codes(_hilbert_codes, coords, transposed, bits)


def morton_order(coords: Tensor, transposed: bool = False, bits: int = 16) -> Tensor:
    """The permutation that sorts voxels by sample and, in each, along the Z-order curve.

    Args:
        coords: ``[N, 4]`` int32, see `morton_codes`.
        transposed: exchange the roles of x and y.
        bits: of each coordinate.

    Returns:
        ``[N]`` int64: ``coords[order]`` is sorted; equal voxels keep their order.

    Raises:
        ValueError, TypeError: as `morton_codes`.
    """
    return _codes(_morton_order, coords, transposed, bits)


def hilbert_order(coords: Tensor, transposed: bool = False, bits: int = 16) -> Tensor:
    """The permutation that sorts voxels by sample and, in each, along the Hilbert curve.

    Args:
        coords: ``[N, 4]`` int32, see `hilbert_codes`.
        transposed: exchange the roles of x and y.
        bits: of each coordinate.

    Returns:
        ``[N]`` int64: ``coords[order]`` is sorted; equal voxels keep their order.

    Raises:
        ValueError, TypeError: as `hilbert_codes`.
    """
    return _codes(_hilbert_order, coords, transposed, bits)


def _codes(operator: Operator, coords: Tensor, transposed: bool, bits: int) -> Tensor:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in [1, 16]; got {bits}")
    expect(coords=(coords, "N 4", torch.int32))
    return operator(coords, transposed, bits)


_morton_codes = Operator(
    "morton_codes(Tensor coords, bool transposed, int bits) -> Tensor", reference.morton_codes, _KERNELS
)
_hilbert_codes = Operator(
    "hilbert_codes(Tensor coords, bool transposed, int bits) -> Tensor", reference.hilbert_codes, _KERNELS
)
_morton_order = Operator(
    "morton_order(Tensor coords, bool transposed, int bits) -> Tensor", reference.morton_order, _KERNELS
)
_hilbert_order = Operator(
    "hilbert_order(Tensor coords, bool transposed, int bits) -> Tensor", reference.hilbert_order, _KERNELS
)


def _fake(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return coords.new_empty(coords.shape[0], dtype=torch.int64)


for _operator in (_morton_codes, _hilbert_codes, _morton_order, _hilbert_order):
    _operator.fake(_fake)
