"""render_radiance_field and render_voxels: reference, oracle, closed forms, derivatives."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.fields import BOX, Field, field_of, oracle, random_field, surface_field
from trellis_kernels import render_radiance_field, render_voxels, use_reference
from trellis_kernels.radiance_field import reference

OPS = torch.ops.trellis_kernels
ASIDE = (-0.3, -0.3, -0.5, 1.0, 1.0, 1.0)  # a box in which the world's z axis is on no face of a leaf


def assert_close_outside_thresholds(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for the few values where rounding moves a sample across a threshold."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isfinite(), expected.isfinite())
    different = int(((actual - expected).abs() > tolerance).sum())
    assert different <= max(2, actual.numel() // 1000), f"{different} of {actual.numel()} values differ"


def uniform(cells: list[list[int]] | Tensor, depth: int, sums: float, **options: Any) -> Field:
    """All factors 1, so that every sample of every leaf has the density softplus(sums)."""
    field = field_of(torch.as_tensor(cells), depth, **{"width": 3, "height": 2, "rank": 2, "entries": 4} | options)
    return field._replace(trivec=torch.ones_like(field.trivec), density=torch.full_like(field.density, sums / 2))


def facing(field: Field, distance: float) -> Field:
    """Seen along z from `distance` before the origin, through a lens so long that rays are parallel."""
    extrinsics = torch.eye(4, dtype=field.trivec.dtype)[None].clone()
    extrinsics[0, 2, 3] = distance
    intrinsics = torch.tensor([[[1e9, 0, 0.5], [0, 1e9, 0.5], [0, 0, 1]]], dtype=field.trivec.dtype)
    return field._replace(extrinsics=extrinsics, intrinsics=intrinsics)


def whole_grid(depth: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(2**depth)] * 3).reshape(-1, 3)


def test_oracle() -> None:
    item, field = oracle()
    images = render_radiance_field(*field.arguments())
    assert_close_outside_thresholds(images.colors[0].permute(2, 0, 1), item["out.color"])
    assert_close_outside_thresholds(images.alphas[0], item["out.alpha"])
    assert_close_outside_thresholds(images.depths[0], item["out.depth"])
    assert_close_outside_thresholds(images.median_depths[0], item["out.percent_depth"])


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_four_uniform_leaves_in_a_row_absorb_as_their_length_says(jitter: float) -> None:
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


def test_a_dense_leaf_stops_the_ray_at_once() -> None:
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


def test_used_rank_drops_the_last_factors() -> None:
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


def operands_with_gradient(field: Field) -> tuple[list[Any], list[Tensor]]:
    operands = list(field.operands())
    places = (1, 2, 3, 6)
    for i in places:
        operands[i] = operands[i].detach().clone().requires_grad_()
    return operands, [operands[i] for i in places]


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs[:3]]
    return sum(((x * w).sum() for x, w in zip(outputs[:3], weights, strict=True)), torch.zeros(()))


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


def test_bad_leaves_are_left_out_and_get_no_gradient() -> None:
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
def test_a_camera_that_is_not_finite_sees_the_background(which: str, value: float) -> None:
    field = random_field(20, 2, 5, 4)
    getattr(field, which)[0, 0, 0] = value
    if which == "intrinsics" and value == torch.inf:
        field.intrinsics[0, 0, 0] = 0  # an infinite focal length is a fine camera; a focal length of zero is none
    images = render_radiance_field(*field.arguments())
    assert not images.alphas.any()
    assert not images.depths.any()
    assert torch.equal(images.colors, field.background[:, None, None].expand_as(images.colors))


def test_a_camera_inside_sees_what_is_before_it() -> None:
    """From the middle of a full block: leaves whose centers are 0.2 or less away in depth are not drawn."""
    field = facing(uniform(whole_grid(3), 3, sums=1.2, box=ASIDE), 0.0)
    images = render_radiance_field(*field.arguments()[:-1], None)
    expected = 1 - math.exp(-math.log1p(math.exp(1.2)) * 0.25)  # of centers 0.0625 + k / 8, those from 0.3125 on
    torch.testing.assert_close(images.alphas, torch.full_like(images.alphas, expected), rtol=0, atol=1e-5)


def test_nothing_to_draw() -> None:
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
        ({"trivec": torch.ones(3, 5, 3, 1)}, ValueError, r"trivec must be \[N, R, 3, D\] with D at least 2"),
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


def test_voxels_are_solid_and_clamped() -> None:
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
                weights = [torch.randn(x.shape, generator=generator).to(x) for x in out[:3]]
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    assert_agree(random_field(60, 3, 15, 11).to(dtype), 2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_a_grid_of_depth_10() -> None:
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


def kernels_only(field: Field) -> list[Tensor]:
    operands, leaves = operands_with_gradient(field)
    out = OPS.render_radiance_field(*operands)
    return [*out, *torch.autograd.grad(loss(out), leaves)]
