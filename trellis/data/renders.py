"""Renders with their cameras, and ground-truth meshes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.data.objects import Object
from trellis.preparation.arrays import read_picture, read_views


@dataclass(frozen=True)
class Renders:
    """Random training views.

    ``image [B, 3, S, S]`` sRGB in [0, 1], not premultiplied, ``alpha [B, S, S]``, ``extrinsics [B, 4, 4]``,
    ``intrinsics [B, 3, 3]``; with several views ``[B, V, ...]``.

    Args:
        image_size: S.
        views: V of each sample, without repetition.
    """

    image_size: int
    views: int = 1
    columns: tuple[str, ...] = ("rendered",)

    arguments: ClassVar[tuple[str, ...]] = ("image_size", "views")

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.views < 1:
            raise ValueError(f"image_size and views must be positive; got {self.image_size} and {self.views}")

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Renders:
        if "image_size" not in args:
            raise ValueError(f"the dataset needs the argument 'image_size'; it has {', '.join(args) or 'none'}")
        return cls(**{name: args[name] for name in cls.arguments if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        paths, cameras = read_views(item.root / "renders" / item.sha256)
        if len(paths) < self.views:
            raise ValueError(f"{item.sha256} must have {self.views} views; it has {len(paths)}")
        chosen = torch.randperm(len(paths), generator=generator)[: self.views]
        size = (self.image_size, self.image_size)
        pictures = [read_picture(paths[i]) for i in chosen.tolist()]
        resized = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).float() / 255
        sample = {
            "image": pixels[..., :3].permute(0, 3, 1, 2),
            "alpha": pixels[..., 3],
            "extrinsics": cameras.extrinsics[chosen],
            "intrinsics": cameras.intrinsics[chosen],
        }
        return sample if self.views > 1 else {name: value[0] for name, value in sample.items()}

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
        from trellis.representations.mesh_reading import read_mesh

        mesh = read_mesh(item.root / "renders" / item.sha256 / "mesh.ply").mesh
        return {"vertices": mesh.vertices, "faces": mesh.faces.int()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        meshes: list[tuple[Tensor, Tensor]] = [(item["vertices"], item["faces"]) for item in items]
        return {"mesh": meshes}
