"""Scenes and cameras that nobody should make: nothing hangs, everything is finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.objects import lumpy
from trellis.renderers.camera import Cameras
from trellis.renderers.gaussians import render_gaussians
from trellis.renderers.mesh import render_mesh
from trellis.renderers.radiance_field import render_radiance_field
from trellis.renderers.show import Shown, show
from trellis.representations.gaussians import Gaussians
from trellis.representations.mesh import Mesh
from trellis.representations.radiance_field import RadianceField

MESH, GAUSSIANS, FIELD = lumpy(2, 16)
BLUE = (0.0, 0.0, 1.0)
BROKEN = Cameras(torch.full((1, 4, 4), math.nan), Cameras.orbit(0.0, 0.0).intrinsics)


def empty() -> list[Shown]:
    tensors = ("xyz", "features_dc", "scaling", "rotation", "opacity")
    gaussians = Gaussians(**{name: getattr(GAUSSIANS, name)[:0] for name in tensors}, config=GAUSSIANS.config)
    parts = {name: getattr(FIELD, name)[:0] for name in ("positions", "trivec", "density", "features_dc")}
    return [Mesh(MESH.vertices[:0], MESH.faces[:0]), gaussians, RadianceField(**parts, depth=4, resolution=16)]


@pytest.mark.parametrize("index", range(3))
def test_an_empty_scene_is_background(index: int) -> None:
    picture = show(empty()[index], Cameras.orbit([0.0, 1.0], 0.3), 8, BLUE)
    assert torch.equal(picture[:, :, 4, 4], torch.tensor([BLUE] * 2))


@pytest.mark.parametrize("shown", [MESH, GAUSSIANS, FIELD], ids=["mesh", "gaussians", "field"])
@pytest.mark.parametrize("what", ["color", "depth", "alpha"])
def test_one_pixel_and_a_camera_inside_are_finite(shown: Shown, what: str) -> None:
    one = show(shown, Cameras.orbit(0.3, 0.2), 1, BLUE, what=what)  # type: ignore[arg-type]
    assert one.shape == (1, 3, 1, 1)
    inside = show(shown, Cameras.look_at((0.0, 0.01, 0.0), (1.0, 0.0, 0.0)), 16, BLUE, what=what)  # type: ignore[arg-type]
    assert one.isfinite().all()
    assert inside.isfinite().all()


@pytest.mark.parametrize("shown", [MESH, GAUSSIANS, FIELD], ids=["mesh", "gaussians", "field"])
def test_a_camera_that_is_not_finite_sees_the_background(shown: Shown) -> None:
    picture = show(shown, BROKEN, 8, BLUE)
    assert torch.equal(picture[0, :, 4, 4], torch.tensor(BLUE))


def _finite(render: Callable[[], tuple[Tensor | None, ...]], leaves: list[Tensor]) -> None:
    images = [image for image in render() if image is not None]
    assert all(image.isfinite().all() for image in images)
    total = sum((image.sum() for image in images if image.requires_grad), torch.zeros(()))
    for gradient in torch.autograd.grad(total, leaves):
        assert gradient.isfinite().all()


def test_broken_vertices_spoil_neither_pictures_nor_gradients() -> None:
    vertices = MESH.vertices.clone()
    vertices[3], vertices[7] = math.nan, math.inf
    vertices[8] = vertices[9]  # triangles without area
    extrinsics = Cameras.orbit([0.3, 2.0], 0.2).extrinsics.requires_grad_()
    cameras = Cameras(extrinsics, Cameras.orbit([0.3, 2.0], 0.2).intrinsics)
    vertices.requires_grad_()
    mesh = Mesh(vertices, MESH.faces, MESH.colors, MESH.normals)
    _finite(lambda: render_mesh(mesh, cameras, 24, ssaa=2), [vertices, extrinsics])
    sound = (MESH.faces != 3).all(1) & (MESH.faces != 7).all(1)
    without = Mesh(vertices, MESH.faces[sound])
    assert torch.equal(
        render_mesh(mesh, cameras, 24, returns=["depths"]).depths, render_mesh(without, cameras, 24).depths
    )


def test_broken_voxels_and_gaussians_are_left_out() -> None:
    cameras = Cameras.orbit([0.3, 2.0], 0.2)
    trivec = FIELD.trivec.clone()
    trivec[5] = math.nan
    trivec.requires_grad_()
    field = RadianceField(FIELD.positions, 4, trivec, FIELD.density, FIELD.features_dc, 16)
    _finite(lambda: render_radiance_field(field, cameras, 24, ssaa=1), [trivec])
    xyz = GAUSSIANS.xyz.clone()
    xyz[5] = math.nan
    xyz.requires_grad_()
    tensors = {name: getattr(GAUSSIANS, name) for name in ("features_dc", "scaling", "rotation", "opacity")}
    gaussians = Gaussians(xyz, **tensors, config=GAUSSIANS.config)
    _finite(lambda: render_gaussians(gaussians, cameras, 24), [xyz])
