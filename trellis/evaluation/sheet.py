"""The contact sheet: held-out pictures beside what was made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.conditioning.imaging import prepare_image
from trellis.evaluation.baselines import QUERY
from trellis.preparation.arrays import read_picture
from trellis.preparation.job import Job
from trellis.preparation.views import FRONT, render_views
from trellis.renderers.camera import Cameras
from trellis.renderers.show import show

SHEET_OBJECTS = 16
TILE = 160
TITLES = ("input", "Gaussians", "radiance field", "mesh", "truth")
_PARTS = ("gaussians", "radiance_field", "mesh")


def front_camera() -> Cameras:
    """From the front, a little from the right and above."""
    yaw, pitch, radius = FRONT + math.radians(25), math.radians(20), 2.0
    eye = (math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch))
    return Cameras.look_at([radius * value for value in eye])


def save_tiles(asset: Any, job: Job, path: Path) -> None:
    """Write one row of the sheet: the input on white, the asset's representations, and the object itself."""
    camera = front_camera()
    tiles = [_on_white(read_picture(job.root / "renders_cond" / job.sha256 / QUERY))]
    for name in _PARTS:
        part = getattr(asset, name)
        tiles.append(_tile(torch.ones(3, TILE, TILE) if part is None else show(part, camera, TILE, 1.0, 2)[0]))
    truth = render_views(dataclasses.replace(job).scene, camera, TILE, 3).images[0]
    tiles.append(_tile(truth[:3] * truth[3:] + 1 - truth[3:]))
    row = Image.new("RGB", (TILE * len(tiles), TILE), "white")
    for index, tile in enumerate(tiles):
        row.paste(tile, (index * TILE, 0))
    with atomic_path(path) as temporary:
        row.save(temporary)


def contact_sheet(rows: Sequence[tuple[str, Path]], path: Path, columns: int = 2) -> None:
    """Put rows that `save_tiles` wrote on one sheet.

    Args:
        rows: name of the object, and the picture of its row.
        path: PNG to write.
        columns: rows beside each other.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows must be non-empty; got none")
    pictures = [(name, Image.open(file).convert("RGB")) for name, file in rows]
    width, height = pictures[0][1].size
    gap, head, line = 24, 26, 18
    count = -(-len(pictures) // columns)
    size = (columns * (width + gap) - gap, head + count * (height + line))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, picture) in enumerate(pictures):
        left, top = index // count * (width + gap), head + index % count * (height + line)
        sheet.paste(picture, (left, top))
        draw.text((left + 4, top + height + 2), name, fill="#555555", font_size=12)
    for column in range(min(columns, -(-len(pictures) // count))):
        for index, title in enumerate(TITLES):
            middle = column * (width + gap) + (index + 0.5) * width / len(TITLES)
            draw.text((middle, 6), title, fill="black", anchor="mt", font_size=14)
    with atomic_path(path) as temporary:
        sheet.save(temporary, optimize=True)


def _on_white(picture: Image.Image) -> Image.Image:
    """A picture as the pipeline frames it, on white instead of black: dark objects are seen."""
    white = Image.new("L", picture.size, 255)
    covered = prepare_image(Image.merge("RGBA", (white, white, white, picture.getchannel("A"))))[0]
    framed = ImageChops.add(prepare_image(picture)[0], ImageChops.invert(covered))
    return framed.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _tile(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))
