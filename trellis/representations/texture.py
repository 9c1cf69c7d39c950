"""A picture laid over a mesh."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trellis_kernels.shapes import FLOATS, expect


@dataclass(frozen=True, eq=False)
class Texture:
    """Colors of a surface as an image and where each corner of each triangle lies in it.

    Args:
        image: ``[H, W, C]`` float, row 0 at the top; sRGB in [0, 1] if C is 3.
        uv: ``[U, 2]`` float. Positions in the image: (0, 0) its top left corner and (1, 1) its bottom right, as glTF.
        faces: ``[F, 3]`` int64 rows of `uv`, a triangle for each of the mesh; None: uv belong to the vertices.
        wrap: what lies outside of the image: itself again, its border, or zero.
        filter: between texels, linear (and between mip levels) or the nearest alone.

    Raises:
        ValueError, TypeError: if a shape, dtype or choice is not one above.
    """

    image: Tensor
    uv: Tensor
    faces: Tensor | None = None
    wrap: Literal["repeat", "clamp", "zero"] = "repeat"
    filter: Literal["linear", "nearest"] = "linear"

    def __post_init__(self) -> None:
        arguments: dict[str, Any] = {"image": (self.image, "H W C", FLOATS), "uv": (self.uv, "U 2", FLOATS)}
        if self.faces is not None:
            arguments["faces"] = (self.faces, "F 3", torch.int64)
        expect(**arguments)
        if self.wrap not in ("repeat", "clamp", "zero"):
            raise ValueError(f"wrap must be 'repeat', 'clamp' or 'zero'; got {self.wrap!r}")
        if self.filter not in ("linear", "nearest"):
            raise ValueError(f"filter must be 'linear' or 'nearest'; got {self.filter!r}")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Texture:
        """The same texture on another device, its real numbers in another dtype; None: as they are."""
        faces = None if self.faces is None else self.faces.to(device)
        return dataclasses.replace(self, image=self.image.to(device, dtype), uv=self.uv.to(device, dtype), faces=faces)
