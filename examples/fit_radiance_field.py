"""Fit a Strivec radiance field to pictures of an object; its voxels are those that no silhouette rules out.

python -m examples.fit_radiance_field --out out/radiance_field
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print_json
from torch import Tensor

from examples.fitting import Metrics, fit_views, groups, save_results
from examples.scene import BACKGROUND, Scene, held_out_cameras, pictures, textured_object, training_cameras
from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background
from trellis.renderers.radiance_field import render_radiance_field
from trellis.representations.radiance_field import RadianceField

LEARNING_RATES = {"trivec": 4e-2, "density": 0.5, "features_dc": 5e-2}
START_DENSITY = 20.0  # per world unit: an object that light passes through


def main(
    steps: Annotated[int, typer.Option(help="one view each")] = 240,
    resolution: Annotated[int, typer.Option(help="pixels per side")] = 256,
    seed: int = 0,
    grid: Annotated[int, typer.Option(help="voxels per axis, a power of two")] = 32,
    out: Annotated[Path, typer.Option(help="folder of metrics.json, views.png and the fit")] = Path("out/field"),
) -> None:
    """Fit, show the measures and write them with pictures."""
    scene = textured_object()
    metrics, field = fit(scene, steps, resolution, seed, grid)
    targets, _ = pictures(scene, held_out_cameras(), resolution)
    save_results(out, metrics, targets, draw(field, resolution, held_out_cameras()).detach())
    field.save(out / "fit.safetensors")
    print_json(data=metrics)


def fit(scene: Scene, steps: int, resolution: int, seed: int, grid: int) -> tuple[Metrics, RadianceField]:
    """The measures of `fit_views`, the number of voxels, and the field."""
    generator = torch.Generator().manual_seed(seed)
    _, masks = pictures(scene, training_cameras(), resolution)
    field = faint_field(visual_hull(masks, training_cameras(), grid), grid, generator)
    parameters = groups(field, LEARNING_RATES)
    metrics = fit_views(
        scene, lambda *view: draw(field, resolution, *view), parameters, steps, resolution, generator, "radiance field"
    )
    return {"voxels": float(len(field))} | metrics, field


def visual_hull(masks: Tensor, cameras: Cameras, grid: int) -> Tensor:
    """``[N, 3]`` centers, in the unit cube, of the voxels that no ``[V, H, W]`` mask rules out."""
    centers = (torch.cartesian_prod(*[torch.arange(grid)] * 3) + 0.5) / grid
    seen, depths = cameras.project(centers - 0.5)
    focal = float(cameras.intrinsics[:, 0, 0].max())
    reach = math.ceil(focal * math.sqrt(0.75) / grid / float(depths.min()) * masks.shape[-1])
    grown = torch.nn.functional.max_pool2d(masks[:, None], 2 * reach + 1, 1, reach)
    inside = torch.nn.functional.grid_sample(grown, 2 * seen[:, None] - 1, "nearest", align_corners=False)
    return centers[(inside[:, 0, 0] > 0.5).all(0)]


def faint_field(positions: Tensor, grid: int, generator: torch.Generator, rank: int = 8, dim: int = 8) -> RadianceField:
    """A field of low density and hardly any color in the given voxels; its factors are parameters."""
    count = len(positions)
    tensors = {
        "trivec": 1 + 0.2 * torch.randn(count, rank, 3, dim, generator=generator),
        "density": torch.full((count, rank), START_DENSITY / rank),
        "features_dc": 0.1 * torch.randn(count, rank, 1, 3, generator=generator),
    }
    parameters = {name: values.requires_grad_() for name, values in tensors.items()}
    return RadianceField(positions, depth=grid.bit_length() - 1, resolution=grid, **parameters)


def draw(field: RadianceField, resolution: int, cameras: Cameras, background: Background = BACKGROUND) -> Tensor:
    """``[V, 3, H, W]`` in front of the background, one ray per pixel."""
    return render_radiance_field(field, cameras, resolution, background, 1).colors


if __name__ == "__main__":
    typer.run(main)
