"""The fitting examples at a size of seconds: each must improve by what it is known to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples import fit_gaussians, fit_radiance_field, fit_silhouette, fit_texture
from examples.fitting import drawn_views, iou, psnr, save_results
from examples.scene import Scene, pictures, sphere, stone, textured_object, training_cameras
from tests.support.meshes import euler_characteristic, signed_volume


@pytest.fixture(scope="module")
def scene() -> Scene:
    return textured_object(texels=32, columns=48)


def test_object_is_closed_looks_outward_and_fits_the_unit_cube(scene: Scene) -> None:
    for mesh, euler in ((scene.mesh, 2 + 0), (stone(48), 2), (sphere(32), 2)):  # a torus has 0
        assert euler_characteristic(mesh.faces) == euler
        assert signed_volume(mesh.vertices, mesh.faces) > 0
        assert mesh.vertices.abs().max() < 0.5
    assert scene.texture.image.min() >= 0
    assert scene.texture.image.max() <= 1


def test_random_gaussians_become_the_object(scene: Scene) -> None:
    metrics, _ = fit_gaussians.fit(scene, steps=240, resolution=48, seed=0, count=4000)
    assert metrics["psnr_held_out_after"] > metrics["psnr_held_out_before"] + 3


def test_same_seed_gives_the_same_gaussians(scene: Scene) -> None:
    (first, a), (second, b) = (fit_gaussians.fit(scene, steps=6, resolution=32, seed=3, count=200) for _ in range(2))
    assert first == second
    assert torch.equal(a.means, b.means)
    assert torch.equal(a.colors, b.colors)


def test_faint_field_becomes_the_object(scene: Scene) -> None:
    metrics, _ = fit_radiance_field.fit(scene, steps=96, resolution=32, seed=0, grid=8)
    assert metrics["psnr_held_out_after"] > metrics["psnr_held_out_before"] + 2


def test_visual_hull_holds_every_vertex(scene: Scene) -> None:
    cameras = training_cameras()
    _, masks = pictures(scene, cameras, 48, ssaa=2)
    hull = fit_radiance_field.visual_hull(masks, cameras, 16)
    cells = {tuple(cell) for cell in (hull * 16).long().tolist()}
    assert {tuple(cell) for cell in ((scene.mesh.vertices + 0.5) * 16).long().tolist()} <= cells
    assert len(cells) < 16**3 / 2


def test_texture_is_recovered(scene: Scene) -> None:
    metrics, texture, seen = fit_texture.fit(scene, steps=96, resolution=48, seed=0)
    assert metrics["seen_texels"] > 0.9
    assert metrics["psnr_texture_after"] > metrics["psnr_texture_before"] + 10
    assert metrics["psnr_held_out_object_after"] > metrics["psnr_held_out_object_before"] + 10
    assert psnr(texture, scene.texture.image, seen[..., None]) == metrics["psnr_texture_after"]


def test_sphere_is_pulled_to_a_silhouette() -> None:
    metrics, mesh = fit_silhouette.fit(steps=240, resolution=64, seed=0, columns=32, smoothness=3)
    assert metrics["iou_held_out_before"] < 0.9
    assert metrics["iou_held_out_after"] > 0.95
    assert mesh.vertices.isfinite().all()


def test_every_view_is_drawn_before_any_comes_again() -> None:
    views = list(drawn_views(3, 7, torch.Generator().manual_seed(0), "test"))
    assert sorted(views[:3]) == sorted(views[3:6]) == [0, 1, 2]
    assert views == list(drawn_views(3, 7, torch.Generator().manual_seed(0), "test"))


def test_measures_are_those_of_their_formulas() -> None:
    targets = torch.zeros(1, 3, 4, 4)
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1
    images = targets + 0.1 * half
    assert psnr(images, targets, half) == pytest.approx(20)
    assert psnr(images, targets) == pytest.approx(20 + 3.0103)
    assert iou(half, torch.ones_like(half)) == 0.5


def test_results_are_written(tmp_path: Path) -> None:
    targets = torch.rand(4, 3, 8, 8)
    save_results(tmp_path / "new", {"psnr": 1.23456}, targets, targets)
    assert json.loads((tmp_path / "new/metrics.json").read_text()) == {"psnr": 1.2346}
    assert Image.open(tmp_path / "new/views.png").size == (48, 16)
