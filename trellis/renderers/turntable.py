"""Previews: contact sheets of views, and the frames of a turn around an object; several objects side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background, background_colors
from trellis.renderers.show import Shown, What, show
from trellis.renderers.video import save_video
from trellis.representations.mesh_reading import ReadMesh

__all__ = [
    "preview",
    "save_sheet",
    "save_video",
    "snapshot_cameras",
    "to_bytes",
    "turntable_cameras",
    "turntable_frames",
    "view_rows",
]

_BATCH = 8  # cameras rendered at once


def turntable_cameras(count: int = 300) -> Cameras:
    """The official turn: once around at distance 2, swinging between 14 degrees below the horizon and 43 above it."""
    yaw = torch.linspace(0, 2 * 3.1415, count)  # the official number, not pi
    return Cameras.orbit(yaw, 0.25 + 0.5 * yaw.sin(), radius=2.0, fov=math.radians(40))


def snapshot_cameras(count: int = 4) -> Cameras:
    """Sides from far away, as the official four snapshots: evenly around from yaw -16 on, pitch 20, fov 8 degrees."""
    yaw = torch.arange(count) * (2 * math.pi / max(count, 1)) - math.radians(16)
    return Cameras.orbit(yaw, math.radians(20), radius=10.0, fov=math.radians(8))


def to_bytes(colors: Tensor) -> np.ndarray:
    """``[..., 3, H, W]`` sRGB, clamped to [0, 1], as ``[..., H, W, 3]`` uint8, rounded."""
    return (colors.detach().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def preview(
    shown: Shown | Sequence[Shown],
    path: str | Path,
    resolution: int = 512,
    background: Background = 1.0,
    cameras: Cameras | None = None,
    columns: int = 2,
    ssaa: int | None = None,
    what: What = "color",
) -> None:
    """Write a contact sheet of views as an image file of the suffix's format.

    One object: row by row. Several: a row per view and a column per object.

    Args:
        shown: what to show.
        path: usually ``.png``.
        resolution: pixels per side of each view.
        background: one color, or one per view.
        cameras: by default the four sides of `snapshot_cameras`.
        columns: views beside each other, of one object.
        ssaa: samples per side of a pixel, see `show`.
        what: see `show`.
    """
    cameras = cameras or snapshot_cameras()
    rows = view_rows(shown, cameras, resolution, background, ssaa, what)
    save_sheet(rows, path, columns if len(_several(shown)) == 1 else 1)


def save_sheet(pictures: Iterable[np.ndarray], path: str | Path, columns: int) -> None:
    """Write pictures ``[H, W, 3]`` uint8 row by row as an image file, whole or not at all.

    The rest of the last row has the color of the last picture's corner.
    """
    cells = list(pictures)
    blank = np.broadcast_to(cells[-1][:1, :1], cells[-1].shape)
    cells += [blank] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


def turntable_frames(
    shown: Shown | Sequence[Shown],
    count: int = 300,
    resolution: int = 512,
    background: Background = 0.0,
    cameras: Cameras | None = None,
    ssaa: int | None = None,
    what: What = "color",
) -> Iterator[np.ndarray]:
    """Yield frames ``[H, W, 3]`` uint8 of a turn around the objects, rendered as they are asked for."""
    return view_rows(shown, cameras or turntable_cameras(count), resolution, background, ssaa, what)


def view_rows(
    shown: Shown | Sequence[Shown],
    cameras: Cameras,
    resolution: int,
    background: Background = 0.0,
    ssaa: int | None = None,
    what: What = "color",
    generator: torch.Generator | None = None,
) -> Iterator[np.ndarray]:
    """Yield ``[H, n W, 3]`` uint8 for each camera: the n objects side by side. Arguments as of `show`."""
    objects = _several(shown)
    behind = background_colors(background, len(cameras), 3, generator)
    for begin in range(0, len(cameras), _BATCH):
        some = slice(begin, begin + _BATCH)
        views = [to_bytes(show(one, cameras[some], resolution, behind[some], ssaa, what)) for one in objects]
        yield from np.concatenate(views, 2)


def _several(shown: Shown | Sequence[Shown]) -> Sequence[Shown]:
    # A read mesh is a tuple itself.
    return list(shown) if isinstance(shown, (list, tuple)) and not isinstance(shown, ReadMesh) else [shown]  # type: ignore[list-item]
