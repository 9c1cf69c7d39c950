"""One step of the fitting examples: one picture of 256^2, loss, gradients and Adam.

pytest benchmarks/bench_fitting.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks.device import ON_CPU, measure
from examples import fit_gaussians, fit_radiance_field, fit_texture
from examples.fitting import Draw, Groups, fit_step, groups, optimizer
from examples.scene import BACKGROUND, Scene, pictures, textured_object, training_cameras

SIZE = 256
Problem = tuple[Draw, Groups]


@cache
def scene() -> Scene:
    return textured_object()


def gaussians_20k() -> Problem:
    start = fit_gaussians.random_gaussians(20_000, torch.Generator().manual_seed(0))
    return lambda *view: fit_gaussians.draw(start, SIZE, *view), groups(start, fit_gaussians.LEARNING_RATES)


def radiance_field() -> Problem:
    cameras = training_cameras()
    hull = fit_radiance_field.visual_hull(pictures(scene(), cameras, 64)[1], cameras, 32)
    start = fit_radiance_field.faint_field(hull, 32, torch.Generator().manual_seed(0))
    return lambda *view: fit_radiance_field.draw(start, SIZE, *view), groups(start, fit_radiance_field.LEARNING_RATES)


def texture() -> Problem:
    image = torch.full_like(scene().texture.image, 0.5).requires_grad_()
    return lambda *view: fit_texture.draw(scene(), image, SIZE, *view), [{"params": [image], "lr": 0.05}]


@ON_CPU
@pytest.mark.parametrize("problem", [gaussians_20k, radiance_field, texture], ids=lambda f: f.__name__)
def test_fitting_step(benchmark, problem: Callable[[], Problem]) -> None:
    camera = training_cameras()[5]
    color = torch.tensor(BACKGROUND)
    target, _ = pictures(scene(), camera, SIZE)
    draw, parameters = problem()
    adam = optimizer(parameters)
    before = (draw(camera, color) - target).abs().mean()
    for _ in range(3):
        fit_step(adam, draw, camera, color, target)
    assert (draw(camera, color) - target).abs().mean() < before
    benchmark.group = f"fitting step, one view of {SIZE}^2, {torch.get_num_threads()} threads"
    measure(benchmark, lambda: fit_step(adam, draw, camera, color, target), rounds=5)
