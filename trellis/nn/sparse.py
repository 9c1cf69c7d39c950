"""`SparseTensor`: features on voxels. The voxels are shared and immutable; only the features change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import trellis_kernels
from trellis.nn.segments import Segments

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class VoxelGrid:
    """The occupied voxels of a batch of B grids, and whatever has been derived from them.

    Args:
        coords: ``[N, 4]`` int32 batch, x, y, z, the last three in ``[0, resolution)``; batch is non-decreasing.
        segments: how many voxels each of the B grids has.
        resolution: voxels along each side; None where it is not known.
        repeats: the grid this one holds several times, and how often (see `repeated`): its maps are used again.
    """

    coords: Tensor
    segments: Segments
    resolution: int | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    repeats: tuple[VoxelGrid, int] | None = field(default=None, repr=False)

    def derive(self, build: Callable[..., T], *args: Hashable) -> T:
        """``build(self, *args)``, computed once per grid: neighbor maps, window orders, coarser grids.

        What it builds may outlive an inference, so it is built outside inference mode: such tensors can be saved for
        backward later.
        """
        key = (build, *args)
        with self._lock:
            if key not in self._derived:
                with torch.inference_mode(False), torch.no_grad():
                    self._derived[key] = build(self, *args)
            return self._derived[key]

    def release(self) -> None:
        """Forget what was derived; it is rebuilt when next asked for."""
        with self._lock:
            self._derived.clear()

    def to(self, device: torch.device | str) -> VoxelGrid:
        """The same voxels on another device; what was derived is not taken along."""
        own, wanted = self.coords.device, torch.device(device)
        if own.type == wanted.type and wanted.index in (None, own.index):
            return self
        return VoxelGrid(self.coords.to(device), self.segments.to(device), self.resolution)

    def require_resolution(self) -> int:
        if self.resolution is None:
            raise ValueError(
                "this operation needs the grid's resolution, which is unknown; "
                "build the SparseTensor with from_coords(..., resolution=...)"
            )
        return self.resolution


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """``feats [N, C]`` on the N voxels of `grid`. Build with `from_coords`."""

    grid: VoxelGrid
    feats: Tensor

    @classmethod
    def from_coords(
        cls, coords: Tensor, feats: Tensor, resolution: int | None = None, batch_size: int | None = None
    ) -> SparseTensor:
        """Features on the voxels at `coords`, in the order given.

        Args:
            coords: ``[N, 4]`` integer batch, x, y, z; batch non-decreasing, coordinates not negative.
            feats: ``[N, C]`` float.
            resolution: voxels along each side; None if it is not known, then operators that need it say so.
            batch_size: B; by default the largest batch index + 1, so a trailing empty sample needs it.

        Raises:
            ValueError: shapes do not fit, batch decreases or is not below `batch_size`, or a coordinate is outside
                ``[0, resolution)``.
        """
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point():
            raise ValueError(f"coords must be [N, 4] integer (batch, x, y, z); got {list(coords.shape)} {coords.dtype}")
        if feats.ndim != 2 or feats.shape[0] != coords.shape[0]:
            raise ValueError(f"feats must be [N, C] with N={coords.shape[0]}; got {list(feats.shape)}")
        batch = coords[:, 0]
        if coords.numel() and int(coords.min()) < 0:
            raise ValueError(f"coords must not be negative; the least is {int(coords.min())}")
        if bool((batch[1:] < batch[:-1]).any()):
            raise ValueError("coords must have a non-decreasing batch index (column 0): sort the voxels by sample")
        if resolution is not None and coords.numel() and int(coords[:, 1:].max()) >= resolution:
            raise ValueError(f"coords must be below resolution={resolution}; the largest is {int(coords[:, 1:].max())}")
        count = int(batch[-1]) + 1 if coords.numel() else 0
        if batch_size is not None and count > batch_size:
            raise ValueError(f"coords must have batch indices below batch_size={batch_size}; got {count - 1}")
        segments = Segments.from_index(batch, count if batch_size is None else batch_size)
        return cls(VoxelGrid(coords.int().contiguous(), segments, resolution), feats)

    @property
    def coords(self) -> Tensor:
        """``[N, 4]`` int32 batch, x, y, z: row n is the voxel of ``feats[n]``."""
        return self.grid.coords

    @property
    def segments(self) -> Segments:
        return self.grid.segments

    def with_feats(self, feats: Tensor) -> SparseTensor:
        if feats.shape[0] != self.coords.shape[0]:
            raise ValueError(f"feats must have one row per voxel, {self.coords.shape[0]}; got {list(feats.shape)}")
        return replace(self, feats=feats)

    def to(self, device: torch.device | str) -> SparseTensor:
        return SparseTensor(self.grid.to(device), self.feats.to(device))

    def __add__(self, other: SparseTensor) -> SparseTensor:
        if other.grid is not self.grid:
            raise ValueError("sparse tensors can be added only on the same VoxelGrid object")
        return self.with_feats(self.feats + other.feats)

    def __len__(self) -> int:
        """How many samples the batch has."""
        return len(self.segments)

    def sample(self, index: int) -> SparseTensor:
        """One sample of the batch, as a batch of one; on the same grid if there is no other."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a batch of {len(self)}")
        if len(self) == 1:
            return self
        rows = self.segments.slice(index % len(self))
        coords = torch.cat([torch.zeros_like(self.coords[rows, :1]), self.coords[rows, 1:]], dim=1)
        segments = Segments.uniform(1, coords.shape[0], coords.device)
        return SparseTensor(VoxelGrid(coords, segments, self.grid.resolution), self.feats[rows])


class Coarser(NamedTuple):
    """A coarser grid, and the coarse row each fine voxel falls into (``[N]`` int32)."""

    grid: VoxelGrid
    inverse: Tensor


def neighbors(grid: VoxelGrid, kernel_size: int) -> Tensor:
    """``[N, kernel_size^3]`` int32 rows of the neighbors, -1 where empty. For `VoxelGrid.derive`."""
    if grid.repeats is not None:
        base, copies = grid.repeats
        return _shifted(base.derive(neighbors, kernel_size), copies, len(base.coords))
    return trellis_kernels.neighbor_map(grid.coords, kernel_size)


def conv_plan(grid: VoxelGrid, kernel_size: int, gradients: bool) -> Tensor:
    """What a GPU's convolutions prepare once per neighbor map; empty on a CPU. For `VoxelGrid.derive`."""
    return trellis_kernels.conv_plan(grid.derive(neighbors, kernel_size), gradients)


def coarser(grid: VoxelGrid, factor: int) -> Coarser:
    """The grid at ``1/factor`` of the resolution, voxels in lexicographic order. For `VoxelGrid.derive`."""
    if grid.repeats is not None:
        base, copies = grid.repeats
        coarse = base.derive(coarser, factor)
        return Coarser(coarse.grid.derive(repeated, copies), _shifted(coarse.inverse, copies, len(coarse.grid.coords)))
    coords, inverse = trellis_kernels.coarsen(grid.coords, factor)
    resolution = None if grid.resolution is None else -(-grid.resolution // factor)
    return Coarser(VoxelGrid(coords, Segments.from_index(coords[:, 0], len(grid.segments)), resolution), inverse)


def finer(grid: VoxelGrid) -> VoxelGrid:
    """The grid of all 8 children of each voxel, children together, z fastest. For `VoxelGrid.derive`.

    The children's neighbor map follows from the parents', so it is set down here rather than searched for later.
    """
    resolution = None if grid.resolution is None else 2 * grid.resolution
    segments = Segments.of([8 * length for length in grid.segments.lengths], grid.coords.device)
    fine_neighbors = trellis_kernels.subdivided_neighbor_map(grid.derive(neighbors, 3))
    derived: dict[Hashable, Any] = {(neighbors, 3): fine_neighbors}
    return VoxelGrid(trellis_kernels.subdivide_coords(grid.coords), segments, resolution, derived)


def repeated(grid: VoxelGrid, copies: int) -> VoxelGrid:
    """A batch of `copies` times the samples of `grid`, one copy after the other. For `VoxelGrid.derive`.

    Neither its neighbors nor its coarser grid are searched for: they are those of `grid`, at other rows.
    """
    first = torch.arange(copies, dtype=torch.int32, device=grid.coords.device) * len(grid.segments)
    coords = grid.coords.repeat(copies, 1)
    coords[:, 0] += first.repeat_interleave(len(grid.coords))
    segments = Segments.of(grid.segments.lengths * copies, coords.device)
    return VoxelGrid(coords, segments, grid.resolution, repeats=(grid, copies))


def _shifted(rows: Tensor, copies: int, count: int) -> Tensor:
    """Row numbers below `count`, or -1, for each copy: those of the second start at `count`, and so on."""
    first = torch.arange(copies, dtype=rows.dtype, device=rows.device) * count
    shifted = rows + first.view(-1, *(1,) * rows.ndim)
    return torch.where(rows < 0, -1, shifted).flatten(0, 1)
