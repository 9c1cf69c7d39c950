"""submanifold_conv, subdivided_conv and their gradients: reference, dense convolution, golden values."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d

from tests.support.golden import golden
from tests.support.scenes import random_voxels, sphere_voxels
from tests.support.sparse_maps import children_of, neighbors_of
from trellis_kernels import (
    pointwise_conv,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    submanifold_conv_weight_gradient,
    use_reference,
)

OPS = torch.ops.trellis_kernels
CONVS = [submanifold_conv, subdivided_conv]
# Relative to the largest value; half precision is rounded once from float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def all_six(neighbors: Tensor, ci: int, co: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every operator of the room that convolves, on random arguments."""
    n, taps = neighbors.shape
    feats, bias = random(n, ci, dtype=dtype), random(co, dtype=dtype)
    weight = random(co, taps, ci, dtype=dtype) / (taps * ci) ** 0.5
    gradient, fine = random(n, co, dtype=dtype), random(8 * n, co, dtype=dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: OPS.submanifold_conv(feats, neighbors, weight, bias),
        "without bias": lambda: OPS.submanifold_conv(feats, neighbors, weight, None),
        "input gradient": lambda: OPS.submanifold_conv_input_gradient(gradient, neighbors, weight),
        "weight gradient": lambda: OPS.submanifold_conv_weight_gradient(feats, neighbors, gradient),
    }
    if taps == 27:
        calls |= {
            "subdivided": lambda: OPS.subdivided_conv(feats, neighbors, weight, bias),
            "subdivided, without bias": lambda: OPS.subdivided_conv(feats, neighbors, weight, None),
            "subdivided, input gradient": lambda: OPS.subdivided_conv_input_gradient(fine, neighbors, weight),
            "subdivided, weight gradient": lambda: OPS.subdivided_conv_weight_gradient(feats, neighbors, fine),
        }
    return calls


def assert_kernels_agree_with_references(neighbors: Tensor, ci: int, co: int, dtype: torch.dtype) -> None:
    for name, call in all_six(neighbors, ci, co, dtype).items():
        actual = call()
        with use_reference():
            expected = call()
        assert actual.dtype == dtype
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        tolerance = TOLERANCE[dtype] * scale
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("channels", "occupancy"), [((1, 1), 1.0), ((3, 5), 0.4), ((17, 33), 1.0), ((32, 32), 0.05), ((64, 96), 0.3)]
)
def test_kernels_agree_with_references(instruction_set: str, channels: tuple[int, int], occupancy: float) -> None:
    neighbors = neighbors_of(random_voxels(5, occupancy, batch=2))
    for dtype in (torch.float32, torch.float64):
        assert_kernels_agree_with_references(neighbors, *channels, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    assert_kernels_agree_with_references(neighbors_of(random_voxels(5, 0.4)), 19, 21, dtype)


@pytest.mark.parametrize("channels", [(300, 50), (40, 800)], ids="{0[0]}->{0[1]}".format)
def test_kernels_agree_where_channels_are_blocked(instruction_set: str, channels: tuple[int, int]) -> None:
    assert_kernels_agree_with_references(neighbors_of(random_voxels(3, 0.6)), *channels, torch.float32)


def test_kernels_agree_where_voxels_are_blocked(instruction_set: str) -> None:
    """More voxels than one task takes; for the weight gradient, more than are listed at a time."""
    neighbors = neighbors_of(random_voxels(33, 0.97, batch=1))
    assert len(neighbors) > 32 * 1024
    feats, gradient = random(len(neighbors), 2), random(len(neighbors), 3)
    weight = random(3, 27, 2)
    for call in (
        lambda: submanifold_conv(feats, neighbors, weight),
        lambda: submanifold_conv_weight_gradient(feats, neighbors, gradient),
    ):
        with use_reference():
            expected = call()
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("voxels", [0, 1])
def test_none_or_one_voxel(instruction_set: str, voxels: int) -> None:
    neighbors = neighbors_of(random_voxels(2, 1.0)[:voxels])
    assert_kernels_agree_with_references(neighbors.view(voxels, 27), 3, 5, torch.float32)


@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernel_sizes(instruction_set: str, kernel: int) -> None:
    neighbors = neighbors_of(random_voxels(6, 0.3), kernel)
    assert_kernels_agree_with_references(neighbors, 6, 10, torch.float32)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    neighbors = neighbors_of(sphere_voxels(20))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append([call() for call in all_six(neighbors, 33, 47, torch.float32).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def dense(coords: Tensor, feats: Tensor, weight: Tensor, resolution: int) -> Tensor:
    """conv3d over the grid of one sample, read at the voxels."""
    _, x, y, z = coords.long().T
    grid = feats.new_zeros(feats.shape[1], *(resolution,) * 3)
    grid[:, x, y, z] = feats.T
    kernel = weight.unflatten(1, (3, 3, 3)).movedim(-1, 1)
    return conv3d(grid[None], kernel, padding=1)[0][:, x, y, z].T


@pytest.mark.parametrize("occupancy", [0.3, 1.0])
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_is_dense_convolution_read_at_the_occupied_voxels(occupancy: float, reference: bool) -> None:
    coords = random_voxels(6, occupancy)
    feats, weight = random(len(coords), 4), random(7, 27, 4)
    with use_reference() if reference else torch.no_grad():
        actual = submanifold_conv(feats, neighbors_of(coords), weight)
    torch.testing.assert_close(actual, dense(coords, feats, weight, 6))


@pytest.mark.parametrize("occupancy", [0.3, 1.0])
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_subdivided_is_dense_convolution_of_the_children(occupancy: float, reference: bool) -> None:
    coords = random_voxels(5, occupancy)
    feats, weight = random(len(coords), 4), random(3, 27, 4)
    with use_reference() if reference else torch.no_grad():
        actual = subdivided_conv(feats, neighbors_of(coords), weight)
    torch.testing.assert_close(actual, dense(children_of(coords), subdivide(feats), weight, 10))


def test_subdivided_rounds_little_more_than_the_plain_pair() -> None:
    """Its differences cancel; in float32 that must not cost more than a few times the plain rounding error."""
    coords = sphere_voxels(12)
    feats, weight = random(len(coords), 128, dtype=torch.float32), random(16, 27, 128, dtype=torch.float32)
    fine = neighbors_of(children_of(coords))
    exact = submanifold_conv(subdivide(feats.double()), fine, weight.double())
    plain = (submanifold_conv(subdivide(feats), fine, weight) - exact).norm() / exact.norm()
    collapsed = (subdivided_conv(feats, neighbors_of(coords), weight) - exact).norm() / exact.norm()
    assert plain < 4e-7
    assert collapsed < 4 * plain


def test_golden_convolution() -> None:
    item = golden("sparse_ops")
    parameters = item.parameters()
    weight = parameters["conv.conv.weight"].view(5, 27, 6)
    arguments = item["in.feats"], neighbors_of(item["in.coords"]), weight, parameters["conv.conv.bias"]
    item.check("out.subm_conv3", submanifold_conv(*arguments))
    with use_reference():
        item.check("out.subm_conv3", submanifold_conv(*arguments))


def test_golden_pointwise_convolution_reads_the_stored_memory_again() -> None:
    item = golden("sparse_ops")
    parameters = item.parameters()
    weight, bias = parameters["conv1.conv.weight"], parameters["conv1.conv.bias"]
    item.check("out.subm_conv1x1", pointwise_conv(item["in.feats"], weight, bias))
    item.check("out.subm_conv1x1", pointwise_conv(item["in.feats"], weight.view(4, 1, 6)) + bias)


@given(scale=st.floats(-4, 4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_is_linear(scale: float, seed: int) -> None:
    neighbors = neighbors_of(random_voxels(4, 0.4, seed=seed))
    a, b, weight = random(len(neighbors), 3), random(len(neighbors), 3), random(2, 27, 3)
    for conv in CONVS:
        apart = conv(a, neighbors, weight) + scale * conv(b, neighbors, weight)
        torch.testing.assert_close(conv(a + scale * b, neighbors, weight), apart)


@given(seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_commutes_with_reordering_the_voxels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coords = random_voxels(4, 0.4, seed=seed)
    order = torch.randperm(len(coords), generator=generator)
    feats, weight = random(len(coords), 3), random(2, 27, 3)
    there = submanifold_conv(feats, neighbors_of(coords), weight)
    torch.testing.assert_close(submanifold_conv(feats[order], neighbors_of(coords[order]), weight), there[order])


@pytest.mark.parametrize("conv", CONVS, ids=lambda f: f.__name__)
def test_gradients_are_the_numerical_ones_twice(conv: Callable[..., Tensor]) -> None:
    neighbors = neighbors_of(random_voxels(3, 0.3))
    feats = random(len(neighbors), 2).requires_grad_()
    weight, bias = random(3, 27, 2).requires_grad_(), random(3).requires_grad_()
    # Random projections: a full Jacobian of the second derivative is large.
    assert torch.autograd.gradcheck(conv, (feats, neighbors, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, (feats, neighbors, weight, bias), fast_mode=True)


@pytest.mark.parametrize("conv", CONVS, ids=lambda f: f.__name__)
def test_full_gradient_check_on_few_voxels(conv: Callable[..., Tensor]) -> None:
    neighbors = neighbors_of(random_voxels(2, 0.7))
    feats, weight = random(len(neighbors), 2).requires_grad_(), random(2, 27, 2).requires_grad_()
    assert torch.autograd.gradcheck(conv, (feats, neighbors, weight, random(2).requires_grad_()))


@pytest.mark.parametrize("kind", ["submanifold_conv", "subdivided_conv"])
def test_are_ordinary_torch_operators(kind: str) -> None:
    """Schema, fake tensors, autograd registration and torch.compile, all at once."""
    neighbors = neighbors_of(random_voxels(3, 0.4))
    n = len(neighbors)
    feats, weight = torch.randn(n, 3, requires_grad=True), torch.randn(2, 27, 3, requires_grad=True)
    gradient = torch.randn(n if kind == "submanifold_conv" else 8 * n, 2, requires_grad=True)
    for suffix, arguments in {
        "": (feats, neighbors, weight, torch.randn(2, requires_grad=True)),
        "_input_gradient": (gradient, neighbors, weight),
        "_weight_gradient": (feats, neighbors, gradient),
    }.items():
        torch.library.opcheck(getattr(OPS, kind + suffix).default, arguments)


@pytest.mark.parametrize("conv", [*CONVS, pointwise_conv], ids=lambda f: f.__name__)
def test_compiles_without_graph_breaks(conv: Callable[..., Tensor]) -> None:
    neighbors = neighbors_of(random_voxels(4, 0.4))
    maps = () if conv is pointwise_conv else (neighbors,)
    arguments = torch.randn(len(neighbors), 3), *maps, torch.randn(2, 27 if maps else 1, 3), torch.randn(2)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), conv(*arguments))


def test_takes_tensors_that_are_not_contiguous() -> None:
    neighbors = neighbors_of(random_voxels(4, 0.4))
    feats, weight = torch.randn(3, len(neighbors)).T, torch.randn(27, 3, 5).permute(2, 0, 1)
    expected = submanifold_conv(feats.contiguous(), neighbors, weight.contiguous())
    assert torch.equal(submanifold_conv(feats, neighbors.T.contiguous().T, weight), expected)


@pytest.mark.parametrize("wrong", [-2, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("conv", CONVS, ids=lambda f: f.__name__)
def test_a_neighbor_out_of_range_is_an_error(instruction_set: str, conv: Callable[..., Tensor], wrong: int) -> None:
    neighbors = torch.full((5, 27), -1, dtype=torch.int32)
    neighbors[3, 7] = wrong
    with pytest.raises(ValueError, match=rf"neighbors must be in \[-1, N\) with N=5; got {wrong}"):
        conv(torch.zeros(5, 4), neighbors, torch.zeros(8, 27, 4))
    with pytest.raises(ValueError, match="neighbors must be in"):
        submanifold_conv_weight_gradient(torch.zeros(5, 4), neighbors, torch.zeros(5, 2))


def test_names_the_argument_that_does_not_fit() -> None:
    feats, neighbors = torch.zeros(2, 4), torch.full((2, 27), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weight must be \[Co, K, Ci\] with Co=8, K=27, Ci=4; got \[8, 27, 5\]"):
        submanifold_conv(feats, neighbors, torch.zeros(8, 27, 5))
    with pytest.raises(ValueError, match=r"bias must be \[Co\] with Co=8; got \[9\]"):
        submanifold_conv(feats, neighbors, torch.zeros(8, 27, 4), torch.zeros(9))
    with pytest.raises(ValueError, match=r"neighbors must be \[N, 27\] with N=2; got \[2, 8\]"):
        subdivided_conv(feats, neighbors[:, :8], torch.zeros(8, 27, 4))
    with pytest.raises(ValueError, match=r"weight must be \[Co, 1, Ci\] with Co=8, Ci=4; got \[8, 27, 4\]"):
        pointwise_conv(feats, torch.zeros(8, 27, 4))
    with pytest.raises(TypeError, match=r"neighbors must be torch.int32; got torch.int64"):
        submanifold_conv(feats, neighbors.long(), torch.zeros(8, 27, 4))
    with pytest.raises(TypeError, match=r"weight must be torch.float32; got torch.float64"):
        submanifold_conv(feats, neighbors, torch.zeros(8, 27, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out_gradient must be \[N, Co\] with N=2; got \[3, 3\]"):
        submanifold_conv_weight_gradient(feats, neighbors, torch.zeros(3, 3))
