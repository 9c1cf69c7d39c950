"""What lies on voxels: occupancy, features, structured latents; and structure latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trellis.data.cache import Cache
from trellis.data.objects import Object
from trellis.nn.sparse import SparseTensor
from trellis.preparation.arrays import Place, read_arrays, read_voxels


@dataclass(frozen=True)
class Occupancy:
    """``ss [B, 1, R, R, R]`` float32, 1 where a voxel is occupied.

    Args:
        resolution: R of the voxel files.
        crop: side of a random cube around a random occupied voxel, taken instead of the whole grid; the structure VAE
            is convolutional, so it learns the same from pieces, several times as fast.
        augment: random quarter turns about the vertical and mirrors in x.
        cache: keeps the voxels, three bytes each.
    """

    resolution: int = 64
    crop: int | None = None
    augment: bool = False
    cache: Cache = field(default_factory=Cache)
    columns: tuple[str, ...] = ("voxelized",)

    arguments: ClassVar[tuple[str, ...]] = ("resolution", "crop", "augment", "cache")

    def __post_init__(self) -> None:
        if self.crop is not None and not 1 <= self.crop <= self.resolution:
            raise ValueError(f"crop must be in [1, {self.resolution}]; got {self.crop}")

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Occupancy:
        return cls(**_chosen(args, *cls.arguments))

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        path = item.root / "voxels" / f"{item.sha256}.ply"
        (coords,) = self.cache.get(item, lambda: (read_voxels(path, self.resolution).byte(),))
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
        cache: keeps them.
    """

    latent_model: str
    normalization: Mapping[str, Sequence[float]] | None = None
    cache: Cache = field(default_factory=Cache)

    arguments: ClassVar[tuple[str, ...]] = ("latent_model", "normalization", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"ss_latent_{self.latent_model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> StructureLatents:
        _require(args, "latent_model")
        return cls(**_chosen(args, *cls.arguments))

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        path = item.root / "ss_latents" / self.latent_model / f"{item.sha256}.npz"
        (mean,) = self.cache.get(item, lambda: (_latent_grid(path),))
        if self.normalization is not None:
            center, scale = (values.view(-1, 1, 1, 1) for values in _statistics(self.normalization, len(mean)))
            mean = (mean - center) / scale
        return {"x_0": mean}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"x_0": torch.stack([item["x_0"] for item in items])}


@dataclass(frozen=True)
class Latents:
    """A SparseTensor of structured latents, under `key`; ``normalization [2, C]`` too, where it is taken out.

    Args:
        latent_model: whose: feature model and encoder.
        resolution: voxels per side.
        normalization: ``{"mean": [C], "std": [C]}``; None: as they are.
        cache: keeps them as they are in the files.
        key: ``latents``, or ``x_0`` where they are what a flow learns.
    """

    latent_model: str
    resolution: int = 64
    normalization: Mapping[str, Sequence[float]] | None = None
    cache: Cache = field(default_factory=Cache)
    key: str = "latents"

    arguments: ClassVar[tuple[str, ...]] = ("latent_model", "resolution", "normalization", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"latent_{self.latent_model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Latents:
        _require(args, "latent_model")
        return cls(**_chosen(args, *cls.arguments, "key"))

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        path = item.root / "latents" / self.latent_model / f"{item.sha256}.npz"
        coords, feats = self.cache.get(item, lambda: _voxel_arrays(path, "coords", "feats", self.resolution))
        coords, feats = coords.int(), feats.float()
        if self.normalization is not None:
            center, scale = _statistics(self.normalization, feats.shape[1])
            feats = (feats - center) / scale
        return {"coords": coords, "feats": feats}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {self.key: _batched(items, self.resolution)}
        if self.normalization is not None:
            batch["normalization"] = torch.stack(_statistics(self.normalization, items[0]["feats"].shape[1]))
        return batch


@dataclass(frozen=True)
class Features:
    """``feats``: a SparseTensor of back-projected features, the input of the latent encoder.

    Args:
        model: whose features.
        resolution: voxels per side.
        cache: keeps them as they are in the files.
    """

    model: str
    resolution: int = 64
    cache: Cache = field(default_factory=Cache)

    arguments: ClassVar[tuple[str, ...]] = ("model", "resolution", "cache")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"feature_{self.model}",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Features:
        _require(args, "model")
        return cls(**_chosen(args, *cls.arguments))

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        path = item.root / "features" / self.model / f"{item.sha256}.npz"
        coords, feats = self.cache.get(item, lambda: _voxel_arrays(path, "indices", "patchtokens", self.resolution))
        return {"coords": coords.int(), "feats": feats.float()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"feats": _batched(items, self.resolution)}


def _require(args: Mapping[str, Any], name: str) -> None:
    if not args.get(name):
        raise ValueError(f"the dataset needs the argument {name!r}; it has {', '.join(args) or 'none'}")


def _chosen(args: Mapping[str, Any], *names: str) -> dict[str, Any]:
    chosen = {name: args[name] for name in names if name in args}
    return chosen | {"cache": Cache(bool(args.get("cache", False)))}


def _latent_grid(path: Place) -> Tensor:
    """``[C, r, r, r]`` float32, checked."""
    (array,) = read_arrays(path, "mean")
    if array.ndim != 4 or len(set(array.shape[1:])) != 1 or not _finite(array):
        raise ValueError(f"{path} must hold mean [C, r, r, r], finite numbers; got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.float32))


def _voxel_arrays(path: Place, coords_name: str, feats_name: str, resolution: int) -> tuple[Tensor, Tensor]:
    """``coords [N, 3]`` uint8 and ``feats [N, C]`` float16 or float32 of an .npz, checked."""
    coords, feats = read_arrays(path, coords_name, feats_name)
    if coords.ndim != 2 or coords.shape[1] != 3 or feats.ndim != 2 or len(feats) != len(coords) or not len(coords):
        shapes = f"{list(coords.shape)} and {list(feats.shape)}"
        raise ValueError(f"{path} must hold {coords_name} [N, 3] and {feats_name} [N, C] with N > 0; got {shapes}")
    if not np.issubdtype(coords.dtype, np.integer) or coords.min() < 0 or coords.max() >= resolution:
        raise ValueError(f"{path} must have {coords_name} in [0, {resolution}); got {coords.min()} to {coords.max()}")
    x, y, z = coords.astype(np.int64).T
    if len(np.unique((x * resolution + y) * resolution + z)) != len(coords):
        raise ValueError(f"{path} must have each voxel once in {coords_name}")
    if not _finite(feats):
        raise ValueError(f"{path} must have finite numbers in {feats_name}; got {feats.dtype}")
    kept = feats if feats.dtype == np.float16 else feats.astype(np.float32)
    return torch.from_numpy(coords.astype(np.uint8)), torch.from_numpy(kept)


def _finite(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all())


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
