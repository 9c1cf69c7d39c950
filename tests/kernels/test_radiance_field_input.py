"""render_radiance_field with leaves, cameras and arguments that are not as they should be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.support.backends import CUDA_BACKENDS
from tests.support.fields import (
    ASIDE,
    BOX,
    Field,
    assert_close_outside_thresholds,
    facing,
    loss,
    operands_with_gradient,
    random_field,
    uniform,
    whole_grid,
)
from trellis_kernels import render_radiance_field, use_reference

OPS = torch.ops.trellis_kernels


@CUDA_BACKENDS
def test_bad_leaves_are_left_out_and_get_no_gradient(backend: str) -> None:
    """A factor that is not finite, a position that is not in the box, and the second leaf of a cell."""
    good = random_field(12, 2, 13, 9)
    extra = random_field(5, 2, 13, 9, seed=3)
    positions = extra.positions.clone()
    positions[0, 1], positions[1, 2], positions[2, 0] = 1.0, -0.1, torch.nan
    positions[3] = good.positions[7]
    trivec = extra.trivec.clone()
    trivec[4, 1, 2, 3] = torch.inf
    bad = extra._replace(positions=positions, trivec=trivec)
    joined = [torch.cat(pair) for pair in zip(good[:4], bad[:4], strict=True)]
    field = Field(*joined, *good[4:])
    results = []
    for one in (good, field):
        operands, leaves = operands_with_gradient(one)
        out = OPS.render_radiance_field(*operands)
        results.append((out, torch.autograd.grad(loss(out), leaves)))
    (expected, by_good), (actual, by_field) = results
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(by_field[:3], by_good[:3], strict=True):
        torch.testing.assert_close(one[:12], other)
        assert not one[12:].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["extrinsics", "intrinsics"])
@CUDA_BACKENDS
def test_a_camera_that_is_not_finite_sees_the_background(which: str, value: float, backend: str) -> None:
    field = random_field(20, 2, 5, 4)
    getattr(field, which)[0, 0, 0] = value
    if which == "intrinsics" and value == torch.inf:
        field.intrinsics[0, 0, 0] = 0  # an infinite focal length is a fine camera; a focal length of zero is none
    images = render_radiance_field(*field.arguments())
    assert not images.alphas.any()
    assert not images.depths.any()
    assert torch.equal(images.colors, field.background[:, None, None].expand_as(images.colors))


@CUDA_BACKENDS
def test_a_camera_inside_sees_what_is_before_it(backend: str) -> None:
    """From the middle of a full block: leaves whose centers are 0.2 or less away in depth are not drawn."""
    field = facing(uniform(whole_grid(3), 3, sums=1.2, box=ASIDE), 0.0)
    images = render_radiance_field(*field.arguments()[:-1], None)
    expected = 1 - math.exp(-math.log1p(math.exp(1.2)) * 0.25)  # of centers 0.0625 + k / 8, those from 0.3125 on
    torch.testing.assert_close(images.alphas, torch.full_like(images.alphas, expected), rtol=0, atol=1e-5)


@CUDA_BACKENDS
def test_nothing_to_draw(backend: str) -> None:
    field = random_field(0, 2, 5, 4, views=2)
    images = render_radiance_field(*field.arguments())
    assert torch.equal(images.colors, field.background[:, None, None].expand_as(images.colors))
    assert not images.alphas.any()
    none = field._replace(extrinsics=field.extrinsics[:0], intrinsics=field.intrinsics[:0], jitter=field.jitter[:0])
    images = render_radiance_field(*none._replace(background=field.background[0]).arguments())
    assert images.colors.shape == (0, 4, 5, 3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"depth": 11}, ValueError, "depth must be in 0..10; got 11"),
        ({"width": 0}, ValueError, "width and height must be in 1..16384; got 0 and 4"),
        ({"box": BOX[:5]}, ValueError, "aabb must be an origin and three positive sizes"),
        ({"box": (*BOX[:5], 0.0)}, ValueError, "aabb must be an origin and three positive sizes"),
        ({"trivec": torch.ones(3, 5, 3, 1)}, ValueError, r"trivec must be \[N, R, 3, D\] with D in 2\.\.1024"),
        ({"density": torch.ones(3, 5).double()}, TypeError, "density must be torch.float32; got torch.float64"),
        ({"features": torch.ones(3, 5, 4)}, ValueError, r"features must be \[N, R, 3\]"),
        ({"extrinsics": torch.eye(4)[None].requires_grad_()}, ValueError, "extrinsics must not require a gradient"),
        ({"jitter": torch.ones(1, 4, 4)}, ValueError, r"jitter must be \[1, 4, 5\]"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    field = random_field(3, 2, 5, 4)
    if "width" in change:
        field = field._replace(jitter=None)
    with pytest.raises(error, match=text):
        render_radiance_field(*field._replace(**change).arguments())


def test_used_rank_must_exist() -> None:
    with pytest.raises(ValueError, match=r"used_rank must be in 1\.\.5; got 6"):
        render_radiance_field(*random_field(3, 2, 5, 4).arguments(), used_rank=6)


@CUDA_BACKENDS
@pytest.mark.parametrize(("width", "height"), [(16384, 1), (1, 1500)])
def test_long_pictures(width: int, height: int, backend: str) -> None:
    """As wide as a picture may be, and higher than wide."""
    field = random_field(20, 2, width, height)._replace(jitter=None)
    images = render_radiance_field(*field.arguments())
    assert images.alphas.max() > 0.1
    assert all(bool(image.isfinite().all()) for image in images)
    with use_reference():
        expected = render_radiance_field(*field.arguments())
    assert_close_outside_thresholds(images.colors, expected.colors)
