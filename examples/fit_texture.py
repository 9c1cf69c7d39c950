"""Recover the texture of a known shape from pictures of it, through `sample_texture` and `antialias`.

python -m examples.fit_texture --out out/texture
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print_json
from torch import Tensor

from examples.fitting import Metrics, fit_views, psnr, save_picture, save_results
from examples.scene import BACKGROUND, Scene, held_out_cameras, pictures, textured_object, training_cameras
from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background
from trellis.renderers.mesh import render_mesh


def main(
    steps: Annotated[int, typer.Option(help="one view each")] = 240,
    resolution: Annotated[int, typer.Option(help="pixels per side")] = 256,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of metrics.json, views.png and texture.png")] = Path("out/texture"),
) -> None:
    """Fit, show the measures and write them with pictures."""
    scene = textured_object()
    metrics, texture, seen = fit(scene, steps, resolution, seed)
    cameras = held_out_cameras()
    targets, _ = pictures(scene, cameras, resolution)
    save_results(out, metrics, targets, draw(scene, texture, resolution, cameras).detach())
    images = [scene.texture.image, texture, 1 - 4 * (texture - scene.texture.image).abs() * seen[..., None]]
    save_picture(out / "texture.png", [torch.cat(images, 1).permute(2, 0, 1)])
    print_json(data=metrics)


def fit(scene: Scene, steps: int, resolution: int, seed: int) -> tuple[Metrics, Tensor, Tensor]:
    """Fit a texture that is gray at first.

    Returns:
        The measures of `fit_views`, and PSNR of the texels that were seen; the texture ``[H, W, 3]``; which texels were
        seen, ``[H, W]``.
    """
    truth = scene.texture.image
    texture = torch.full_like(truth, 0.5).requires_grad_()
    seen = seen_texels(scene, training_cameras(), resolution)
    metrics = {"seen_texels": float(seen.float().mean()), "psnr_texture_before": psnr(texture, truth, seen[..., None])}
    metrics |= fit_views(
        scene,
        lambda *view: draw(scene, texture, resolution, *view),
        [{"params": [texture], "lr": 0.05}],
        steps,
        resolution,
        torch.Generator().manual_seed(seed),
        "texture",
    )
    return metrics | {"psnr_texture_after": psnr(texture, truth, seen[..., None])}, texture.detach(), seen


def draw(scene: Scene, image: Tensor, resolution: int, cameras: Cameras, background: Background = BACKGROUND) -> Tensor:
    """``[V, 3, H, W]``: the object with another texture, two samples per side of a pixel."""
    texture = dataclasses.replace(scene.texture, image=image)
    colors = render_mesh(scene.mesh, cameras, resolution, background, 2, texture, returns=("colors",)).colors
    assert colors is not None
    return colors


def seen_texels(scene: Scene, cameras: Cameras, resolution: int, least: float = 0.25) -> Tensor:
    """``[H, W]`` bool: texels that make up at least `least` of a pixel in at least one picture."""
    most = torch.zeros(scene.texture.image.shape[:2])
    for camera in cameras:
        image = torch.zeros_like(scene.texture.image, requires_grad=True)
        draw(scene, image, resolution, camera).sum().backward()
        assert image.grad is not None
        most = torch.maximum(most, image.grad[..., 0])
    return most > least


if __name__ == "__main__":
    typer.run(main)
