"""Draws the pictures of docs/rendering.md: `python -m benchmarks.pictures [FOLDER]`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tests.support.golden import golden
from tests.support.objects import lumpy
from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras
from trellis.renderers.gaussians import render_gaussians
from trellis.renderers.radiance_field import render_radiance_field, render_voxels
from trellis.renderers.show import show
from trellis.renderers.turntable import save_sheet, to_bytes, turntable_cameras, view_rows
from trellis.representations.gaussians import GaussianConfig, Gaussians
from trellis.representations.radiance_field import RadianceField

_FOUR = Cameras.orbit([-0.3, 1.2, 2.9, 4.5], [0.35, 0.1, 0.6, 0.2], fov=math.radians(27))
_LEAST, _MOST = 1e-8, 1e-2  # ends of the scale of errors


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images")
    mesh, gaussians, field = lumpy(5, 64)
    rows = [np.concatenate(list(view_rows(one, _FOUR, 200, 1.0, 3)), 1) for one in (mesh, gaussians, field)]
    save_sheet(rows, folder / "representations.png", 1)

    turn = turntable_cameras(300)[torch.arange(0, 300, 30)]
    strips = [np.concatenate(list(view_rows(mesh, turn, 96, 1.0, 4, what)), 1) for what in ("color", "normal")]
    save_sheet(strips, folder / "turntable.png", 1)

    coords = (field.positions * field.resolution).int()
    coarse = (coords // 2).unique(dim=0)
    cells = [to_bytes(render_voxels(coarse, _FOUR[:1], 200, 1.0, 3, grid=32).colors)[0]]
    cells += [to_bytes(show(mesh, _FOUR[:1], 200, 1.0, 3, what))[0] for what in ("normal", "depth")]
    cells += [to_bytes(show(gaussians, _FOUR[:1], 200, 1.0, 3, what))[0] for what in ("depth", "alpha")]
    save_sheet(cells, folder / "kinds.png", len(cells))

    with atomic_path(folder / "oracles.png") as path:
        _oracles().save(path)


def _oracles() -> Image.Image:
    """For each oracle: what it says, what we draw, and how far apart they are."""
    rows = []
    for name, (expected, actual) in {"Gaussians": _gaussian_oracle(), "radiance field": _trivec_oracle()}.items():
        error = (expected - actual).abs().amax(0)
        cells = [_enlarged(to_bytes(image)) for image in (expected, actual)] + [_enlarged(_heat(error))]
        worst = f"max {float(error.max()):.1e}, {int((error > 1e-4).sum())} of {error.numel()} pixels above 1e-4"
        titles = [f"{name}: oracle", "ours", worst]
        rows.append(np.concatenate([_titled(c, t) for c, t in zip(cells, titles, strict=True)], 1))
    picture = np.concatenate([*rows, _scale(rows[0].shape[1])])
    return Image.fromarray(picture)


def _gaussian_oracle() -> tuple[Tensor, Tensor]:
    item = golden("render_gaussian_oracle")
    config = GaussianConfig(filter_kernel_size_3d=0.0, scaling_activation="exp")
    gaussians = Gaussians(
        item["in.xyz"] + 0.5,
        item["in.features_dc"][:, None],
        item["in.scale"].log() - config.raw_scaling_bias,
        item["in.quat_wxyz"] - torch.tensor([1.0, 0, 0, 0]),
        item["in.opacity"].logit() - config.raw_opacity_bias,
        config,
    )
    cameras = Cameras(item["in.extrinsics"][None], item["in.intrinsics"][None])
    return item["out.color"], render_gaussians(gaussians, cameras, 64, item["in.bg"]).colors[0]


def _trivec_oracle() -> tuple[Tensor, Tensor]:
    item = golden("render_trivec_oracle")
    depth = int(item["in.depth_level"][0])
    tensors = {"trivec": item["in.trivec"], "density": item["in.density"], "features_dc": item["in.features_dc"]}
    field = RadianceField(item["in.position"], depth, **tensors, resolution=2**depth)
    cameras = Cameras(item["in.extrinsics"][None], item["in.intrinsics"][None])
    images = render_radiance_field(field, cameras, 28, item["in.bg"], 1, jitter=item["in.jitter"][None])
    return item["out.color"], images.colors[0]


def _heat(error: Tensor) -> np.ndarray:
    """``[H, W, 3]``: black, purple, orange, white by the logarithm of the error."""
    low, high = math.log10(_LEAST), math.log10(_MOST)
    share = ((error.double().clamp_min(_LEAST).log10() - low) / (high - low)).clamp(0, 1).numpy()
    stops = np.array([[0, 0, 0], [90, 20, 120], [240, 120, 30], [255, 255, 255]], dtype=np.float64)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(share, at, stops[:, i]) for i in range(3)], -1).round().astype(np.uint8)


def _enlarged(image: np.ndarray, side: int = 256) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))


def _titled(cell: np.ndarray, title: str) -> np.ndarray:
    strip = Image.new("RGB", (cell.shape[1], 18), "white")
    ImageDraw.Draw(strip).text((4, 3), title, fill="black")
    return np.concatenate([np.asarray(strip), cell])


def _scale(width: int) -> np.ndarray:
    steps = torch.logspace(math.log10(_LEAST), math.log10(_MOST), width, dtype=torch.float64)
    ticks = Image.new("RGB", (width, 18), "white")
    draw = ImageDraw.Draw(ticks)
    for power in range(-8, -1):
        x = (power + 8) / 6 * (width - 1)
        draw.text((min(max(x - 10, 2), width - 34), 3), f"1e{power}", fill="black")
    return np.concatenate([np.repeat(_heat(steps[None]), 12, 0), np.asarray(ticks)])


if __name__ == "__main__":
    main()
