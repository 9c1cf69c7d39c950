"""render_radiance_field and render_voxels: reference, oracle, closed forms, derivatives."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from tests.support.fields import (
    ASIDE,
    BOX,
    Field,
    assert_close_outside_thresholds,
    facing,
    field_of,
    loss,
    operands_with_gradient,
    oracle,
    random_field,
    surface_field,
    uniform,
    whole_grid,
)
from trellis_kernels import render_radiance_field, render_voxels, use_reference
from trellis_kernels.radiance_field import cuda, reference

OPS = torch.ops.trellis_kernels


@CUDA_BACKENDS
def test_oracle(backend: str) -> None:
    item, field = oracle()
    images = render_radiance_field(*field.arguments())
    assert_close_outside_thresholds(images.colors[0].permute(2, 0, 1), item["out.color"])
    assert_close_outside_thresholds(images.alphas[0], item["out.alpha"])
    assert_close_outside_thresholds(images.depths[0], item["out.depth"])
    assert_close_outside_thresholds(images.median_depths[0], item["out.percent_depth"])


@pytest.mark.parametrize("jitter", [0.0, 0.3])
@CUDA_BACKENDS
def test_four_uniform_leaves_in_a_row_absorb_as_their_length_says(jitter: float, backend: str) -> None:
    """32 samples of 1 / 32: none is lost or doubled at the faces between leaves, even where samples lie on them."""
    field = facing(uniform([[1, 1, z] for z in range(4)], 2, sums=1.2, box=ASIDE), 2.0)
    assert field.jitter is not None
    images = render_radiance_field(*field._replace(jitter=torch.full_like(field.jitter, jitter)).arguments())
    sigma = math.log1p(math.exp(1.2))
    shares = [math.exp(-sigma * k / 32) * (1 - math.exp(-sigma / 32)) for k in range(32)]
    depths = [1.5 + (k + jitter) / 32 for k in range(32)]
    median = next(z for k, z in enumerate(depths) if math.exp(-sigma * (k + 1) / 32) < 0.5)
    expected = torch.tensor([1 - math.exp(-sigma), sum(map(math.prod, zip(shares, depths, strict=True))), median])
    actual = torch.stack([images.alphas, images.depths, images.median_depths], -1)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=0, atol=2e-6)


@CUDA_BACKENDS
def test_a_dense_leaf_stops_the_ray_at_once(backend: str) -> None:
    """Alpha is at most 0.999, which leaves a thousandth: the first sample takes it, or the second."""
    field = facing(uniform([[1, 1, 2]], 2, sums=1e6, box=ASIDE), 2.0)
    images = render_radiance_field(*field.arguments()[:-1], None)
    assert (images.alphas - 0.999).min() > -1e-6
    torch.testing.assert_close(images.median_depths, torch.full_like(images.alphas, 2.0))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), depth=st.integers(1, 2))
def test_one_leaf_is_the_same_field_as_its_parts(seed: int, depth: int) -> None:
    """A product of straight lines is continued exactly beyond the centers of the intervals."""
    torch.manual_seed(seed)
    rank, parts = 3, 2**depth
    offset, slope = torch.rand(rank, 3) + 0.3, torch.randn(rank, 3) / 2
    whole = field_of(torch.zeros(1, 3, dtype=torch.long), 0, 13, 9, rank=rank, entries=4 * parts, seed=seed, opacity=3)
    split = field_of(whole_grid(depth), depth, 13, 9, rank=rank, entries=4, seed=seed)

    def lines(field: Field, entries: int) -> Field:
        places = (torch.arange(entries) + 0.5) / entries
        corners = field.positions - 0.5 / 2**field.depth
        places = corners[:, None, :, None] + places / 2**field.depth  # [N, 1, 3, D]
        rows = [0] * len(corners)
        return field._replace(
            trivec=offset[..., None] + slope[..., None] * places,
            density=whole.density[rows],
            features=whole.features[rows],
            jitter=whole.jitter,
            background=whole.background,
        )

    images = [render_radiance_field(*f.arguments()) for f in (lines(whole, 4 * parts), lines(split, 4))]
    for one, other in zip(*images, strict=True):
        assert_close_outside_thresholds(one, other, 2e-5)


def test_features_alone_color_the_field() -> None:
    field = facing(uniform([[1, 1, 1]], 2, sums=200.0, box=ASIDE), 2.0)
    images = render_radiance_field(*field.arguments())
    color = (reference.C0 * field.features.sum(1)).sigmoid()[0]
    expected = images.alphas[..., None] * color + (1 - images.alphas[..., None]) * field.background
    torch.testing.assert_close(images.colors, expected)


@CUDA_BACKENDS
def test_used_rank_drops_the_last_factors(backend: str) -> None:
    field = random_field(20, 2, 15, 11)
    fewer = field._replace(trivec=field.trivec[:, :2], density=field.density[:, :2], features=field.features[:, :2])
    some = render_radiance_field(*field.arguments(), used_rank=2)
    torch.testing.assert_close(some.colors, render_radiance_field(*fewer.arguments()).colors)


def test_corners_and_centers_of_cells_are_the_same_leaves() -> None:
    field = random_field(20, 3, 15, 11)
    corners = field._replace(positions=(field.positions * 8).floor() / 8)
    for one, other in zip(*(render_radiance_field(*f.arguments()) for f in (field, corners)), strict=True):
        assert torch.equal(one, other)


def test_the_principal_point_moves_the_picture() -> None:
    field = random_field(20, 2, 16, 16)
    field = field._replace(jitter=None)
    moved = field._replace(intrinsics=field.intrinsics + torch.tensor([[0, 0, 0.25], [0, 0, -0.125], [0, 0, 0]]))
    one, other = (render_radiance_field(*f.arguments()).colors[0] for f in (field, moved))
    torch.testing.assert_close(other[:-2, 4:], one[2:, :-4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("opacity", [0.2, 3.0, 40.0])
def test_gradients_are_those_of_autograd_through_the_reference(opacity: float) -> None:
    field = random_field(30, 2, 8, 7, views=2, opacity=opacity).to(torch.float64)
    results = []
    for render in (OPS.render_radiance_field, reference.render_radiance_field):
        operands, leaves = operands_with_gradient(field)
        results.append(torch.autograd.grad(loss(render(*operands)), leaves))
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_gradcheck() -> None:
    field = random_field(5, 1, 3, 2, rank=2, entries=3).to(torch.float64)
    operands, leaves = operands_with_gradient(field)

    def render(*tensors: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in zip((1, 2, 3, 6), tensors, strict=True):
            operands[place] = tensor
        return OPS.render_radiance_field(*operands)[:3]

    torch.autograd.gradcheck(render, leaves, atol=1e-6)


def test_opcheck() -> None:
    field = random_field(4, 1, 3, 2, rank=2, entries=3)
    operands, _ = operands_with_gradient(field)
    torch.library.opcheck(OPS.render_radiance_field.default, operands)
    torch.library.opcheck(OPS.trace_voxels.default, (field.positions, *field[4:6], 1, list(BOX), 3, 2))


def test_compiles_as_one_graph() -> None:
    field = random_field(6, 2, 5, 4, rank=2, entries=3)
    images = torch.compile(render_radiance_field, fullgraph=True, backend="aot_eager")(*field.arguments())
    torch.testing.assert_close(images.colors, render_radiance_field(*field.arguments()).colors)


def test_the_second_derivative_is_refused() -> None:
    operands, leaves = operands_with_gradient(random_field(4, 1, 3, 2, rank=2, entries=3))
    (first,) = torch.autograd.grad(loss(OPS.render_radiance_field(*operands)), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of render_radiance_field"):
        first.sum().backward()


@CUDA_BACKENDS
def test_voxels_are_solid_and_clamped(backend: str) -> None:
    """A column of two: the nearer is seen, at its face."""
    field = facing(uniform([[1, 1, 2], [1, 1, 1]], 2, sums=0.0, box=ASIDE), 2.0)
    colors = torch.tensor([[0.0, 0.0, 0.5], [0.25, 1.5, -1.0]], requires_grad=True)
    arguments = (field.depth, ASIDE, field.extrinsics, field.intrinsics, 3, 2, field.background)
    images = render_voxels(field.positions, colors, *arguments)
    torch.testing.assert_close(images.colors, torch.tensor([0.25, 1, 0]).expand(1, 2, 3, 3))
    torch.testing.assert_close(images.depths, torch.full((1, 2, 3), 1.75))
    assert torch.equal(images.alphas, torch.ones(1, 2, 3))
    assert torch.equal(images.median_depths, images.depths)
    images.colors.sum().backward()
    assert torch.equal(colors.grad, torch.tensor([[0.0, 0, 0], [6, 0, 0]]))


def test_voxels_are_where_a_dense_field_is() -> None:
    field = random_field(60, 3, 40, 30)
    dense = field._replace(density=torch.full_like(field.density, 1e7), trivec=torch.ones_like(field.trivec))
    opaque = render_radiance_field(*dense.arguments())
    camera = (field.depth, field.box, *field[4:6], field.width, field.height, field.background)
    images = render_voxels(field.positions, torch.rand(60, 3), *camera)
    different = (opaque.alphas > 0.5) != (images.alphas > 0.5)  # a ray may cut a corner between two samples
    assert different.sum() < 40
    same = (images.alphas > 0.5) & ~different
    assert 100 < same.sum() < 1100
    step = 0.5 / 4 / 8 * 1.01
    gap = (opaque.median_depths - images.median_depths)[same]
    assert ((gap > -1e-5) & (gap < step)).float().mean() > 0.95
    seen = images.colors[~(images.alphas > 0.5)]
    assert torch.equal(seen, field.background.expand_as(seen))


def both(field: Field) -> tuple[list[Tensor], list[Tensor]]:
    """Images, crossings and gradients by the kernels and by their definitions."""
    generator = torch.Generator().manual_seed(5)
    results = []
    for mode in (nullcontext(), use_reference()):
        with mode:
            out = OPS.render_radiance_field(*field.operands())
            if not results:
                weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in out[:3]]
            *tensors, depth, box, width, height = field.operands()
            arguments = (*weights, *tensors, out[4], depth, box, width, height)
            voxels = OPS.trace_voxels(field.positions, *field[4:6], depth, box, width, height)
            results.append([*out, *voxels, *OPS.render_radiance_field_gradient(*arguments)])
    return results[0], results[1]


def assert_agree(field: Field, tolerance: float = 1e-4) -> None:
    for actual, expected in zip(*both(field), strict=True):
        if expected.shape == (len(field.extrinsics), field.height, field.width) and expected.dtype == torch.int32:
            assert (actual != expected).sum() <= max(2, expected.numel() // 1000)
        else:
            scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            assert_close_outside_thresholds(actual, expected, tolerance * scale)


PROBLEMS = [
    {"count": 0, "depth": 2},
    {"count": 1, "depth": 0, "rank": 1, "entries": 2, "width": 1, "height": 1},
    {"count": 8, "depth": 1, "rank": 3, "entries": 40},  # more samples in a leaf than are evaluated at once
    {"count": 512, "depth": 3, "opacity": 0.05, "views": 2},  # a full grid that a ray crosses
    {"count": 200, "depth": 5, "rank": 17, "box": (-0.5, -0.4, -0.6, 1.0, 0.7, 1.3)},
    {"count": 60, "depth": 3, "opacity": 400.0, "rank": 8},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", range(len(PROBLEMS)))
def test_kernels_agree_with_their_definitions(problem: int, dtype: torch.dtype, instruction_set: str) -> None:
    field = random_field(**{"width": 19, "height": 13} | PROBLEMS[problem]).to(dtype)
    assert_agree(field, 1e-4 if dtype == torch.float32 else 1e-10)


@CUDA_BACKENDS
@pytest.mark.parametrize("problem", range(len(PROBLEMS)))
def test_backends_agree_with_their_definitions(problem: int, backend: str) -> None:
    assert_agree(random_field(**{"width": 19, "height": 13} | PROBLEMS[problem]))


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    assert_agree(random_field(60, 3, 15, 11).to(dtype), 2e-2 if dtype == torch.bfloat16 else 2e-3)


@CUDA_BACKENDS
def test_a_grid_of_depth_10(backend: str) -> None:
    cells = torch.tensor([[512, 512, 512], [511, 511, 512], [0, 1023, 3]])
    field = field_of(cells, 10, 16, 16, opacity=50.0)
    lens = field.intrinsics * torch.tensor([[400.0, 1, 1], [1, 400, 1], [1, 1, 1]])
    out, expected = both(field._replace(intrinsics=lens))
    assert expected[4].sum() > 20
    assert torch.equal(out[4], expected[4])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    field = surface_field(4, 50, 41, views=2, opacity=0.3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernels_only(field))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@CUDA_BACKENDS
def test_cameras_in_several_groups_add_up(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of runs too long for the memory that they may take: one camera at a time."""
    monkeypatch.setattr(cuda, "RUNS", 50)
    assert_agree(random_field(40, 2, 9, 7, views=3))


def kernels_only(field: Field) -> list[Tensor]:
    operands, leaves = operands_with_gradient(field)
    out = OPS.render_radiance_field(*operands)
    return [*out, *torch.autograd.grad(loss(out), leaves)]
