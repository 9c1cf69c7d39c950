"""What the fitting examples share: the loop, the measures, and how a result is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from examples.scene import BACKGROUND, Scene, held_out_cameras, pictures, training_cameras
from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras
from trellis_kernels import ssim_map

Metrics = dict[str, float]
LAST_RATE = 0.03  # of the first learning rate, reached exponentially
Draw = Callable[[Cameras, Tensor], Tensor]
"""From cameras and a background ``[3]`` to ``[V, 3, H, W]`` pictures."""
Groups = list[dict[str, Any]]
"""Parameters for `torch.optim.Adam`, each with its first learning rate."""


def fit_views(
    scene: Scene,
    draw: Draw,
    parameters: Groups,
    steps: int,
    resolution: int,
    generator: torch.Generator,
    title: str,
) -> Metrics:
    """Fit parameters to 24 pictures of a scene, one picture per step, with Adam and falling learning rates.

    Each step puts another color behind the picture, so that nothing can pass for background by its color.

    Args:
        scene: what the pictures show.
        draw: what is fitted.
        parameters: what may change.
        steps: how many.
        resolution: pixels per side of the pictures.
        generator: for the order of the pictures.
        title: of the progress bar.

    Returns:
        PSNR in dB of training and held-out views before and after, of whole pictures and of the object alone.
    """
    cameras, others = training_cameras(), held_out_cameras()
    targets, masks = pictures(scene, cameras, resolution)
    views = {"training": (cameras, targets, masks), "held_out": (others, *pictures(scene, others, resolution))}
    adam = optimizer(parameters)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: LAST_RATE ** (step / steps))

    plain = torch.tensor(BACKGROUND)

    @torch.no_grad()
    def measures(moment: str) -> Metrics:
        found = {}
        for name, (some, truth, inside) in views.items():
            images = torch.cat([draw(camera, plain) for camera in some])
            found[f"psnr_{name}_{moment}"] = psnr(images, truth)
            found[f"psnr_{name}_object_{moment}"] = psnr(images, truth, inside[:, None])
        return found

    metrics = measures("before")
    for view in drawn_views(len(cameras), steps, generator, title):
        color = torch.rand(3, generator=generator)
        behind = (1 - masks[view]) * (color - plain)[:, None, None]
        fit_step(adam, draw, cameras[view], color, targets[view : view + 1] + behind)
        decay.step()
    return metrics | measures("after")


def groups(representation: object, rates: dict[str, float]) -> Groups:
    """The named tensors of a representation with a learning rate each."""
    return [{"params": [getattr(representation, name)], "lr": rate} for name, rate in rates.items()]


def optimizer(parameters: Groups) -> torch.optim.Adam:
    """Adam, quick to forget, for a view says little about what it does not show."""
    return torch.optim.Adam(parameters, betas=(0.9, 0.99), eps=1e-15)


def fit_step(adam: torch.optim.Adam, draw: Draw, cameras: Cameras, background: Tensor, targets: Tensor) -> None:
    """Draw, compare, and change the parameters of `adam` once."""
    loss = photometric_loss(draw(cameras, background), targets)
    adam.zero_grad()
    loss.backward()
    adam.step()


def photometric_loss(images: Tensor, targets: Tensor, ssim_weight: float = 0.2) -> Tensor:
    """``(1 - w) L1 + w (1 - SSIM)`` of ``[V, 3, H, W]`` pictures, as 3D Gaussian splatting is trained."""
    similarity = ssim_map(images, targets).mean()
    return (1 - ssim_weight) * (images - targets).abs().mean() + ssim_weight * (1 - similarity)


def psnr(images: Tensor, targets: Tensor, weights: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]; `weights`, broadcast over them, say what counts."""
    squares = (images.detach().clamp(0, 1) - targets).double().square()
    weights = torch.ones_like(squares) if weights is None else weights.expand_as(squares)
    return float(-10 * torch.log10((squares * weights).sum() / weights.sum()))


def iou(masks: Tensor, targets: Tensor) -> float:
    """Intersection over union of pixels that are covered by more than half."""
    inside, wanted = masks > 0.5, targets > 0.5
    return float((inside & wanted).sum() / (inside | wanted).sum())


def drawn_views(views: int, steps: int, generator: torch.Generator, description: str) -> Iterator[int]:
    """A view for each step, each once before any comes again, with a progress bar."""
    order: list[int] = []
    for _ in track(range(steps), description, console=Console(stderr=True)):
        order = order or torch.randperm(views, generator=generator).tolist()
        yield order.pop()


def save_results(folder: Path, metrics: Metrics, targets: Tensor, fits: Tensor) -> None:
    """Write ``metrics.json`` and ``views.png``: target, fit and error (times 4) of up to four views, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "metrics.json") as path:
        path.write_text(json.dumps({name: round(value, 4) for name, value in metrics.items()}, indent=2) + "\n")
    save_comparison(folder / "views.png", targets[:4], fits[:4])


def save_comparison(path: Path, targets: Tensor, fits: Tensor) -> None:
    """A picture with a row ``target | fit | 4 x error`` for each of ``[V, 3, H, W]``, two rows side by side."""
    error = (1 - 4 * (fits - targets).abs()).clamp(0, 1)
    rows = torch.cat([targets, fits, error], -1)
    save_picture(path, [torch.cat(list(pair), -1) for pair in rows.split(2 if len(rows) % 2 == 0 else 1)])


def save_picture(path: Path, rows: Sequence[Tensor]) -> None:
    """Write rows ``[3, H, W]`` of one width, one below the other."""
    pixels = torch.cat(list(rows), -2).detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, optimize=True)
