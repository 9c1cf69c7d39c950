"""Fit 3D Gaussians to pictures of an object, from a random start.

    python -m examples.fit_gaussians --out out/gaussians

Their number stays what it is: none is added or removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print_json
from torch import Tensor

from examples.fitting import Metrics, fit_views, groups, save_results
from examples.scene import BACKGROUND, Scene, held_out_cameras, pictures, textured_object
from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background
from trellis.renderers.gaussians import render_gaussians
from trellis.representations.gaussians import GaussianConfig, Gaussians

CONFIG = GaussianConfig(scaling_activation="exp", scaling_bias=0.012, opacity_bias=0.1, filter_kernel_size_3d=5e-4)
LEARNING_RATES = {"xyz": 2e-3, "features_dc": 2e-2, "scaling": 1e-2, "rotation": 1e-2, "opacity": 5e-2}


def main(
    steps: Annotated[int, typer.Option(help="one view each")] = 1600,
    resolution: Annotated[int, typer.Option(help="pixels per side")] = 256,
    seed: int = 0,
    count: Annotated[int, typer.Option(help="how many Gaussians")] = 20_000,
    out: Annotated[Path, typer.Option(help="folder of metrics.json, views.png and fit.ply")] = Path("out/gaussians"),
) -> None:
    """Fit, show the measures and write them with pictures."""
    scene = textured_object()
    metrics, gaussians = fit(scene, steps, resolution, seed, count)
    targets, _ = pictures(scene, held_out_cameras(), resolution)
    save_results(out, metrics, targets, draw(gaussians, resolution, held_out_cameras()))
    gaussians.save(out / "fit.ply")
    print_json(data=metrics)


def fit(scene: Scene, steps: int, resolution: int, seed: int, count: int) -> tuple[Metrics, Gaussians]:
    """The measures of `fit_views` and the Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    gaussians = random_gaussians(count, generator)
    parameters = groups(gaussians, LEARNING_RATES)
    metrics = fit_views(
        scene, lambda *view: draw(gaussians, resolution, *view), parameters, steps, resolution, generator, "Gaussians"
    )
    return metrics, gaussians


def random_gaussians(count: int, generator: torch.Generator) -> Gaussians:
    """Small round ones anywhere in the unit cube, of random color and hardly opaque; their tensors are parameters."""
    tensors = {
        "xyz": torch.rand(count, 3, generator=generator),
        "features_dc": torch.rand(count, 1, 3, generator=generator) - 0.5,
        "scaling": torch.zeros(count, 3),
        "rotation": 0.1 * torch.randn(count, 4, generator=generator),
        "opacity": torch.zeros(count, 1),
    }
    return Gaussians(**{name: values.requires_grad_() for name, values in tensors.items()}, config=CONFIG)


def draw(gaussians: Gaussians, resolution: int, cameras: Cameras, background: Background = BACKGROUND) -> Tensor:
    """``[V, 3, H, W]`` in front of the background."""
    return render_gaussians(gaussians, cameras, resolution, background).colors


if __name__ == "__main__":
    typer.run(main)
