"""The representations of one object lie over each other: same axes, same scale, before and after a file."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipelines.test_image_to_3d import picture
from tests.support.objects import Trio, lumpy
from trellis import ImageTo3D
from trellis.renderers.camera import Cameras
from trellis.renderers.radiance_field import render_voxels
from trellis.renderers.show import Shown, show
from trellis.representations.gaussians import Gaussians
from trellis.representations.radiance_field import RadianceField
from trellis.representations.reading import read_representation

CAMERAS = Cameras.orbit([-0.3, 1.2, 2.9, 4.5], [0.3, -0.2, 0.6, 0.1], fov=math.radians(30))
SIZE = 64
NAMES = ("mesh", "gaussians", "radiance_field")
SUFFIXES = {"mesh": "glb", "gaussians": "ply", "radiance_field": "safetensors"}


@cache
def trio() -> Trio:
    return lumpy(detail=4, resolution=32)


def views(shown: Shown, what: Any = "color") -> Tensor:
    """On a gray that the object has not."""
    return show(shown, CAMERAS, SIZE, 0.0, 2, what)


@cache
def original(name: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(views(getattr(trio(), name), what) for what in ("alpha", "color", "depth"))  # type: ignore[return-value]


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """``[V]`` intersection over union of two masks ``[V, 3, H, W]``."""
    a, b = one[:, 0] > 0.5, other[:, 0] > 0.5
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


def centroids(alpha: Tensor) -> Tensor:
    """``[V, 2]`` in pixels."""
    mask = alpha[:, 0]
    steps = torch.arange(SIZE, dtype=torch.float32) + 0.5
    total = mask.sum((1, 2))
    return torch.stack([(mask.sum(1) * steps).sum(1) / total, (mask.sum(2) * steps).sum(1) / total], 1)


def assert_overlay(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> None:
    assert overlap(one[0], other[0]).min() > 0.93  # 0.4 pixels all around: what the filter of Gaussians adds
    assert (centroids(one[0]) - centroids(other[0])).abs().max() < 0.3
    inner = ((one[0] > 0.99) & (other[0] > 0.97))[:, :1].expand_as(one[1])
    assert (one[1] - other[1]).abs()[inner].mean() < 0.02
    # Depth from black to white spans 1.73 world units: a hundredth of one is 0.006.
    assert (one[2] - other[2]).abs()[inner].mean() < 0.006


@pytest.mark.parametrize("name", ["gaussians", "radiance_field"])
def test_lies_over_the_mesh(name: str) -> None:
    assert_overlay(original("mesh"), original(name))


def test_the_object_has_no_symmetry_that_would_hide_a_mistake() -> None:
    """Any swap or mirroring of axes shows in the masks."""
    mesh = trio().mesh
    for axes in ((1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1), (0, 1, 2)):
        for signs in torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 3):
            if axes == (0, 1, 2) and (signs == 1).all():
                continue
            turned = type(mesh)(mesh.vertices[:, list(axes)] * signs, mesh.faces)
            alpha = show(turned, CAMERAS, SIZE, ssaa=1, what="alpha")
            assert overlap(original("mesh")[0], alpha).min() < 0.85, (axes, signs)


@pytest.mark.parametrize("name", NAMES)
def test_lies_over_itself_after_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{SUFFIXES[name]}"
    getattr(trio(), name).save(path)
    read = read_representation(path)
    again = tuple(views(read, what) for what in ("alpha", "color", "depth"))
    for one, other in zip(again, original(name), strict=True):
        assert (one - other).abs().mean() < 1e-3
        assert (one - other).abs().max() < 0.05
    assert_overlay(original("mesh"), again)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl"])
def test_mesh_files_lie_over_the_mesh(suffix: str, tmp_path: Path) -> None:
    trio().mesh.save(tmp_path / f"x.{suffix}")
    alpha = views(read_representation(tmp_path / f"x.{suffix}"), "alpha")
    torch.testing.assert_close(alpha, original("mesh")[0], rtol=0, atol=1e-2)


@pytest.mark.usefixtures("untrained_is_bundled")
def test_generated_representations_share_axes_and_scale(tmp_path: Path) -> None:
    """All three were decoded from the same voxels, and lie where those are: in memory and as files."""
    asset = ImageTo3D.from_pretrained(dtype=torch.float32)(picture(), seed=1, steps=2)
    voxels = torch.zeros([asset.slat.grid.require_resolution()] * 3, dtype=torch.bool)
    voxels[tuple(asset.slat.coords[:, 1:].long().T)] = True
    near = torch.nn.functional.max_pool3d(voxels[None].float(), 3, 1, 1)[0] > 0
    for name in NAMES:
        getattr(asset, name).save(tmp_path / f"{name}.{SUFFIXES[name]}")
        for shown in (getattr(asset, name), read_representation(tmp_path / f"{name}.{SUFFIXES[name]}")):
            points = world_points(shown)
            assert inside(points, near) > 0.99, name
            mirrored = [inside(points * signs, near) for signs in 1 - 2 * torch.eye(3)]
            swapped = [inside(points[:, list(axes)], near) for axes in ((1, 0, 2), (0, 2, 1), (2, 1, 0))]
            assert max(mirrored + swapped) < 0.9, name
    occupied = render_voxels(near, CAMERAS, SIZE, 0.0, 1).alphas
    for name in NAMES:
        alpha = views(getattr(asset, name), "alpha")[:, 0]
        assert (alpha * (1 - occupied)).sum() < 0.02 * alpha.sum(), name


def world_points(shown: Shown) -> Tensor:
    if isinstance(shown, Gaussians):
        return shown.means
    if isinstance(shown, RadianceField):
        return shown.positions - 0.5
    return shown[0].vertices if isinstance(shown, tuple) else shown.vertices


def inside(points: Tensor, grid: Tensor) -> float:
    """Share of points in a voxel that is set."""
    cells = ((points + 0.5) * len(grid)).long().clamp(0, len(grid) - 1)
    return float(grid[tuple(cells.T)].float().mean())
