"""What lies on voxels: occupancy, features, structured latents; and structure latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trellis.data.objects import Object
from trellis.nn.sparse import SparseTensor
from trellis.preparation.arrays import read_arrays, read_voxels


@dataclass(frozen=True)
class Occupancy:
    """``ss [B, 1, R, R, R]`` float32, 1 where a voxel is occupied.

    Args:
        resolution: R of the voxel files.
        crop: side of a random cube around a random occupied voxel, taken instead of the whole grid; the structure VAE
            is convolutional, so it learns the same from pieces, several times as fast.
        augment: random quarter turns about the vertical and mirrors in x.
        cache: keep the voxels in memory, a few bytes each.
    """

    resolution: int = 64
    crop: int | None = None
    augment: bool = False
    cache: bool = False
    columns: tuple[str, ...] = ("voxelized",)
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    arguments: ClassVar[tuple[str, ...]] = ("resolution", "crop", "augment", "cache")

    def __post_init__(self) -> None:
        if self.crop is not None and not 1 <= self.crop <= self.resolution:
            raise ValueError(f"crop must be in [1, {self.resolution}]; got {self.crop}")

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Occupancy:
        return cls(**{name: args[name] for name in cls.arguments if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        coords = self._kept.get(item.sha256)
        if coords is None:
            coords = read_voxels(item.root / "voxels" / f"{item.sha256}.ply", self.resolution).byte()
            if self.cache:
                self._kept[item.sha256] = coords
        coords, side = coords.long(), self.resolution
        if self.augment:
            turns, mirror = torch.randint(4, (), generator=generator), torch.randint(2, (), generator=generator)
            coords = _turned(coords, int(turns), side)
            if mirror:
                coords = torch.stack([side - 1 - coords[:, 0], *coords[:, 1:].T], 1)
        if self.crop is not None:
            around = coords[torch.randint(len(coords), (), generator=generator)]
            shift = torch.randint(-(self.crop // 4), self.crop // 4 + 1, (3,), generator=generator)
            coords = coords - (around + shift - self.crop // 2)
            side = self.crop
            coords = coords[((coords >= 0) & (coords < side)).all(1)]
        grid = torch.zeros(1, side, side, side)
        grid[0, coords[:, 0], coords[:, 1], coords[:, 2]] = 1
        return {"ss": grid}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"ss": torch.stack([item["ss"] for item in items])}


@dataclass(frozen=True)
class StructureLatents:
    """``x_0 [B, C, r, r, r]`` float32: latents of the structure encoder.

    Args:
        latent_model: whose.
        normalization: ``{"mean": [C], "std": [C]}``; None: as they are, which is official.
        cache: keep them in memory.
    """

    latent_model: str
    normalization: Mapping[str, Sequence[float]] | None = None
    cache: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    arguments: ClassVar[tuple[str, ...]] = ("latent_model", "normalization", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"ss_latent_{self.latent_model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> StructureLatents:
        _require(args, "latent_model")
        return cls(**{name: args[name] for name in cls.arguments if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        mean = self._kept.get(item.sha256)
        if mean is None:
            path = item.root / "ss_latents" / self.latent_model / f"{item.sha256}.npz"
            (array,) = read_arrays(path, "mean")
            if array.ndim != 4 or len(set(array.shape[1:])) != 1:
                raise ValueError(f"{path} must hold mean [C, r, r, r]; got {list(array.shape)}")
            mean = torch.from_numpy(array.astype(np.float32))
            if self.cache:
                self._kept[item.sha256] = mean
        if self.normalization is not None:
            center, scale = (values.view(-1, 1, 1, 1) for values in _statistics(self.normalization, len(mean)))
            mean = (mean - center) / scale
        return {"x_0": mean}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"x_0": torch.stack([item["x_0"] for item in items])}


@dataclass(frozen=True)
class Latents:
    """A SparseTensor of structured latents, under `key`.

    Args:
        latent_model: whose: feature model and encoder.
        resolution: voxels per side.
        normalization: ``{"mean": [C], "std": [C]}``; None: as they are.
        cache: keep them in memory, in half precision.
        key: ``latents``, or ``x_0`` where they are what a flow learns.
    """

    latent_model: str
    resolution: int = 64
    normalization: Mapping[str, Sequence[float]] | None = None
    cache: bool = False
    key: str = "latents"
    _kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    arguments: ClassVar[tuple[str, ...]] = ("latent_model", "resolution", "normalization", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"latent_{self.latent_model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Latents:
        _require(args, "latent_model")
        return cls(**{name: args[name] for name in (*cls.arguments, "key") if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        kept = self._kept.get(item.sha256)
        if kept is None:
            path = item.root / "latents" / self.latent_model / f"{item.sha256}.npz"
            kept = _voxel_arrays(path, "coords", "feats", self.resolution)
            if self.cache:
                self._kept[item.sha256] = kept = kept[0].byte(), kept[1].half()
        coords, feats = kept[0].int(), kept[1].float()
        if self.normalization is not None:
            center, scale = _statistics(self.normalization, feats.shape[1])
            feats = (feats - center) / scale
        return {"coords": coords, "feats": feats}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {self.key: _batched(items, self.resolution)}


@dataclass(frozen=True)
class Features:
    """``feats``: a SparseTensor of back-projected features, the input of the latent encoder.

    Args:
        model: whose features.
        resolution: voxels per side.
        cache: keep them in memory, in half precision.
    """

    model: str
    resolution: int = 64
    cache: bool = False
    _kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    arguments: ClassVar[tuple[str, ...]] = ("model", "resolution", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"feature_{self.model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Features:
        _require(args, "model")
        return cls(**{name: args[name] for name in cls.arguments if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        kept = self._kept.get(item.sha256)
        if kept is None:
            path = item.root / "features" / self.model / f"{item.sha256}.npz"
            kept = _voxel_arrays(path, "indices", "patchtokens", self.resolution)
            if self.cache:
                self._kept[item.sha256] = kept = kept[0].byte(), kept[1].half()
        return {"coords": kept[0].int(), "feats": kept[1].float()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"feats": _batched(items, self.resolution)}


def _require(args: Mapping[str, Any], name: str) -> None:
    if not args.get(name):
        raise ValueError(f"the dataset needs the argument {name!r}; it has {', '.join(args) or 'none'}")


def _voxel_arrays(path: Any, coords_name: str, feats_name: str, resolution: int) -> tuple[Tensor, Tensor]:
    """``coords [N, 3]`` int32 and ``feats [N, C]`` float32 of an .npz, checked."""
    coords, feats = read_arrays(path, coords_name, feats_name)
    if coords.ndim != 2 or coords.shape[1] != 3 or feats.ndim != 2 or len(feats) != len(coords) or not len(coords):
        shapes = f"{list(coords.shape)} and {list(feats.shape)}"
        raise ValueError(f"{path} must hold {coords_name} [N, 3] and {feats_name} [N, C] with N > 0; got {shapes}")
    if coords.min() < 0 or coords.max() >= resolution:
        raise ValueError(f"{path} must have {coords_name} in [0, {resolution}); got {coords.min()} to {coords.max()}")
    return torch.from_numpy(coords.astype(np.int32)), torch.from_numpy(feats.astype(np.float32))


def _batched(items: Sequence[Mapping[str, Any]], resolution: int) -> SparseTensor:
    coords = [torch.nn.functional.pad(item["coords"], (1, 0), value=i) for i, item in enumerate(items)]
    return SparseTensor.from_coords(torch.cat(coords), torch.cat([item["feats"] for item in items]), resolution)


def _statistics(normalization: Mapping[str, Sequence[float]], channels: int) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(normalization[name], dtype=torch.float32) for name in ("mean", "std"))
    if mean.shape != (channels,) or std.shape != (channels,) or not bool((std > 0).all()):
        raise ValueError(f"normalization must have {channels} means and positive stds; got {dict(normalization)}")
    return mean, std


def _turned(coords: Tensor, turns: int, side: int) -> Tensor:
    """Voxels turned by quarters about z, as `torch.rot90` turns the grid's x towards y."""
    x, y, z = coords.unbind(1)
    for _ in range(turns % 4):
        x, y = side - 1 - y, x
    return torch.stack([x, y, z], 1)
