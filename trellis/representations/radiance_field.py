"""A Strivec radiance field: voxels that hold low-rank factors of density and color."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trellis_kernels.shapes import FLOATS, expect

AABB = (-0.5, -0.5, -0.5, 1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class RadianceField:
    """N voxels of one size with R trivectors of length 3 x D each.

    At a point of a voxel, ``f_r`` is the product over the three axes of the linearly interpolated ``trivec[r, axis]``;
    density is ``softplus(sum_r density_r f_r)`` per world unit, color is ``sigmoid(C0 sum_r features_dc_r f_r)``, sRGB.

    Args:
        positions: ``[N, 3]`` float. Voxel centers in the unit cube of `aabb`.
        depth: octree level: a voxel's side is ``2^-depth`` of the box, so ``2^depth`` is the resolution rounded down
            to a power of two; 0 to 10.
        trivec: ``[N, R, 3, D]``. Factors along x, y and z.
        density: ``[N, R]``. Raw.
        features_dc: ``[N, R, 1, 3]``. Spherical harmonics of degree 0, per color channel; raw.
        resolution: voxels per axis of the grid that `positions` lie on.
        aabb: origin and size, in world units, of the box that the unit cube is mapped to.

    Raises:
        ValueError, TypeError: if a shape, dtype or range is not the one above.
    """

    positions: Tensor
    depth: int
    trivec: Tensor
    density: Tensor
    features_dc: Tensor
    resolution: int
    aabb: tuple[float, float, float, float, float, float] = AABB

    def __post_init__(self) -> None:
        expect(
            positions=(self.positions, "N 3", FLOATS),
            trivec=(self.trivec, "N R 3 D", FLOATS),
            density=(self.density, "N R", FLOATS),
            features_dc=(self.features_dc, "N R 1 3", FLOATS),
        )
        if not 1 <= self.resolution <= 2**10:
            raise ValueError(f"resolution must be in [1, 1024]; got {self.resolution}")
        if self.depth != self.resolution.bit_length() - 1:
            raise ValueError(f"depth must be floor(log2({self.resolution})); got {self.depth}")
        if len(self.aabb) != 6 or not all(size > 0 for size in self.aabb[3:]):
            raise ValueError(f"aabb must be an origin and three positive sizes; got {self.aabb}")

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, *args: Any, **kwargs: Any) -> RadianceField:
        """The same field on another device or in another dtype; arguments of `torch.Tensor.to`."""
        tensors = {name: getattr(self, name).to(*args, **kwargs) for name in TENSORS}
        return RadianceField(**tensors, depth=self.depth, resolution=self.resolution, aabb=self.aabb)


TENSORS = ("positions", "trivec", "density", "features_dc")
