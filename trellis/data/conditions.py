"""What the flows are conditioned on: a picture, a caption, or tokens of them that were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.data.cache import Cache
from trellis.data.objects import Object
from trellis.preparation.arrays import Place, read_arrays, read_picture, read_views


@dataclass(frozen=True)
class ImageCondition:
    """``cond [B, 3, S, S]`` in [0, 1]: a random conditioning picture, cropped to its object, on black.

    Args:
        image_size: S.
    """

    image_size: int = 518
    columns: tuple[str, ...] = ("cond_rendered",)

    arguments: ClassVar[tuple[str, ...]] = ("image_size",)

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> ImageCondition:
        return cls(**{name: args[name] for name in cls.arguments if name in args})

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        paths, _ = read_views(item.root / "renders_cond" / item.sha256)
        path = paths[int(torch.randint(len(paths), (), generator=generator))]
        picture = read_picture(path)
        box = picture.getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"{path} must show something; its alpha is 0 everywhere")
        # As officially: the last column and row are counted as inside of the box.
        left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
        x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2 * 1.2
        cropped = picture.crop((int(x - half), int(y - half), int(x + half), int(y + half)))
        resized = cropped.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(resized).astype(np.float32) / 255)
        return {"cond": (pixels[..., :3] * pixels[..., 3:]).permute(2, 0, 1).contiguous()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"cond": torch.stack([item["cond"] for item in items])}


@dataclass(frozen=True)
class TextCondition:
    """``cond``: a random caption of each object."""

    columns: tuple[str, ...] = ("captions",)

    arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> TextCondition:
        return cls()

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        if not item.captions:
            raise ValueError(f"{item.sha256} must have captions; it has none")
        return {"cond": item.captions[int(torch.randint(len(item.captions), (), generator=generator))]}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"cond": [item["cond"] for item in items]}


@dataclass(frozen=True)
class TokenCondition:
    """``cond [B, L, C]`` float32: tokens in conditions/, of a random picture or caption.

    Args:
        cond_model: whose tokens; of several encoders one is drawn for each sample. All must have the same L and C.
        weights: how often each is drawn; None: equally often.
        cache: keeps them.
    """

    cond_model: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    cache: Cache = field(default_factory=Cache)

    arguments: ClassVar[tuple[str, ...]] = ("cond_model", "cond_weights", "cache", "image_size")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"condition_{name}" for name in self.cond_model[:1])

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> TokenCondition:
        given = args["cond_model"]
        names = (given,) if isinstance(given, str) else tuple(given)
        weights = args.get("cond_weights")
        if weights is not None and (len(weights) != len(names) or min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(f"cond_weights must be {len(names)} numbers, not all zero; got {weights}")
        return cls(
            names, None if weights is None else tuple(map(float, weights)), Cache(bool(args.get("cache", False)))
        )

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        shares = torch.tensor(self.weights or [1.0] * len(self.cond_model))
        name = self.cond_model[int(torch.multinomial(shares, 1, generator=generator))]
        path = item.root / "conditions" / name / f"{item.sha256}.npz"
        (tokens,) = self.cache.get((name, item), lambda: (_tokens(path),))
        return {"cond": tokens[int(torch.randint(len(tokens), (), generator=generator))].float()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"cond": torch.stack([item["cond"] for item in items])}


def _tokens(path: Place) -> Tensor:
    """``[K, L, C]``, checked."""
    (array,) = read_arrays(path, "tokens")
    if array.ndim != 3 or not len(array) or array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path} must hold tokens [K, L, C] with K > 0, finite numbers; got {got}")
    return torch.from_numpy(array)
