"""What all renderers share: the size of the picture, supersampling and the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.renderers.downsample import downsample

Background = float | Sequence[float] | Tensor | Literal["random"]
"""One number for all channels, one per channel, ``[V, C]`` for each camera, or for each camera black or white."""

_AT_ONCE = 1 << 22  # pixels drawn before they are averaged: one picture of 512 with 4 x 4 samples


class VolumeImages(NamedTuple):
    """Pictures by V cameras of something that light passes through."""

    colors: Tensor
    """``[V, C, H, W]`` in front of the background, not clamped; sRGB unless other channels were asked for."""
    alphas: Tensor
    """``[V, H, W]`` in [0, 1]."""
    depths: Tensor
    """``[V, H, W]`` expected depth in world units: the mean over what is seen times its alpha."""
    median_depths: Tensor
    """``[V, H, W]``: depth at which half of the light is stopped, 0 where that much never is. No gradient."""


@dataclass(frozen=True)
class Canvas:
    """Square pictures by V cameras, drawn finer than they are wanted.

    Args:
        cameras: V cameras, on the device and in the dtype of what is drawn.
        resolution: pixels per side of the result.
        ssaa: samples per side of a pixel.
        background: ``[V, C]``.
    """

    cameras: Cameras
    resolution: int
    ssaa: int
    background: Tensor

    @classmethod
    def create(
        cls,
        cameras: Cameras,
        like: Tensor,
        resolution: int,
        ssaa: int,
        background: Background,
        channels: int = 3,
        generator: torch.Generator | None = None,
    ) -> Canvas:
        """Check the arguments that all renderers have.

        Args:
            cameras: V cameras.
            like: a tensor of what is drawn; it decides device and dtype.
            resolution: pixels per side, at least 1.
            ssaa: samples per side of a pixel, at least 1.
            background: see `Background`.
            channels: C.
            generator: for a random background, and only then.

        Raises:
            ValueError: naming the argument that is wrong.
        """
        if resolution < 1 or ssaa < 1:
            raise ValueError(f"resolution and ssaa must be at least 1; got {resolution} and {ssaa}")
        colors = background_colors(background, len(cameras), channels, generator).to(like)
        return cls(cameras.to(like), resolution, ssaa, colors)

    @property
    def samples(self) -> int:
        """Pixels per side that are drawn."""
        return self.resolution * self.ssaa

    def draw(self, drawer: Callable[[Canvas, slice], Any]) -> list[Tensor]:
        """Draw a few cameras at a time, so that supersampling needs little memory, and average the samples.

        Args:
            drawer: from a canvas of some of the cameras, and which they are, to a sequence of ``[v, S, S, C]`` or
                ``[v, S, S]``.

        Returns:
            Each of them as ``[V, C, H, W]`` or ``[V, H, W]``.
        """
        step = max(1, _AT_ONCE // self.samples**2)
        parts = []
        for start in range(0, max(len(self.cameras), 1), step):
            rows = slice(start, start + step)
            some = Canvas(self.cameras[rows], self.resolution, self.ssaa, self.background[rows])
            parts.append(some._average(drawer(some, rows)))
        return [torch.cat(images) for images in zip(*parts, strict=True)]

    def _average(self, drawn: Sequence[Tensor]) -> list[Tensor]:
        """From samples to pixels, channels first."""
        images = [image if image.ndim == 4 else image[..., None] for image in drawn]
        widths = [image.shape[-1] for image in images]
        finished = downsample(torch.cat(images, -1), self.ssaa).split(widths, 1)
        return [part if image.ndim == 4 else part[:, 0] for part, image in zip(finished, drawn, strict=True)]


def background_colors(
    background: Background, views: int, channels: int = 3, generator: torch.Generator | None = None
) -> Tensor:
    """``[views, channels]`` of any form of background; see `Background` and `Canvas.create`."""
    if isinstance(background, str):
        if background != "random":
            raise ValueError(f"background must be a color or 'random'; got {background!r}")
        if generator is None:
            raise ValueError("background 'random' needs a generator; got None")
        white = torch.randint(0, 2, (views, 1), generator=generator, device=generator.device)
        return white.expand(views, channels)
    color = torch.as_tensor(background)
    if not (color.ndim == 0 or list(color.shape) in ([channels], [views, channels])):
        raise ValueError(
            f"background must be a number, [C] or [V, C] with C={channels}, V={views}; got {list(color.shape)}"
        )
    return color.expand(views, channels)
