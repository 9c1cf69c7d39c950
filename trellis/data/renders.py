"""Renders with their cameras, and ground-truth meshes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.data.cache import Cache
from trellis.data.objects import Object
from trellis.preparation.arrays import Place, read_picture, read_triangles, read_views


@dataclass(frozen=True)
class Renders:
    """Random training views.

    ``image [B, 3, S, S]`` sRGB in [0, 1], not premultiplied, ``alpha [B, S, S]``, ``extrinsics [B, 4, 4]``,
    ``intrinsics [B, 3, 3]``; with several views ``[B, V, ...]``.

    Args:
        image_size: S.
        views: V of each sample, without repetition.
        cache: keeps pictures in their final size, a byte per number.
    """

    image_size: int
    views: int = 1
    cache: Cache = field(default_factory=Cache)
    columns: tuple[str, ...] = ("rendered",)

    arguments: ClassVar[tuple[str, ...]] = ("image_size", "views", "cache")

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.views < 1:
            raise ValueError(f"image_size and views must be positive; got {self.image_size} and {self.views}")

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Renders:
        if "image_size" not in args:
            raise ValueError(f"the dataset needs the argument 'image_size'; it has {', '.join(args) or 'none'}")
        chosen = {name: args[name] for name in cls.arguments if name in args}
        return cls(**chosen | {"cache": Cache(bool(args.get("cache", False)))})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        folder = item.root / "renders" / item.sha256
        extrinsics, intrinsics = self.cache.get(item, lambda: _cameras(folder))
        if len(extrinsics) < self.views:
            raise ValueError(f"{item.sha256} must have {self.views} views; it has {len(extrinsics)}")
        chosen = torch.randperm(len(extrinsics), generator=generator)[: self.views]
        paths: list[Place] = []

        def read(view: int) -> tuple[Tensor]:
            paths[:] = paths or read_views(folder)[0]
            return (self._picture(paths[view]),)

        pictures = [self.cache.get((item, view), partial(read, view))[0] for view in chosen.tolist()]
        pixels = torch.stack(pictures).float() / 255
        sample = {
            "image": pixels[..., :3].permute(0, 3, 1, 2),
            "alpha": pixels[..., 3],
            "extrinsics": extrinsics[chosen],
            "intrinsics": intrinsics[chosen],
        }
        return sample if self.views > 1 else {name: value[0] for name, value in sample.items()}

    def _picture(self, path: Place) -> Tensor:
        """``[S, S, 4]`` uint8."""
        picture, size = read_picture(path), (self.image_size, self.image_size)
        resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized))

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            name: torch.stack([item[name] for item in items]) for name in ("image", "alpha", "extrinsics", "intrinsics")
        }


@dataclass(frozen=True)
class GroundTruthMesh:
    """``mesh``: for each sample ``(vertices [V, 3] float32, faces [F, 3] int32)`` of renders/<sha>/mesh.ply."""

    columns: tuple[str, ...] = ("rendered",)

    arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> GroundTruthMesh:
        return cls()

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        vertices, faces = read_triangles(item.root / "renders" / item.sha256 / "mesh.ply")
        return {"vertices": vertices, "faces": faces}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        meshes: list[tuple[Tensor, Tensor]] = [(item["vertices"], item["faces"]) for item in items]
        return {"mesh": meshes}


def _cameras(folder: Place) -> tuple[Tensor, Tensor]:
    cameras = read_views(folder)[1]
    return cameras.extrinsics, cameras.intrinsics
