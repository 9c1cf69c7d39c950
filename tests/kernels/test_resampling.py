"""sparse_pool, upsample and subdivide (room sparse_conv)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.backends import TRITON_BACKENDS
from tests.support.golden import golden
from trellis_kernels import sparse_pool, subdivide, upsample, use_reference
from trellis_kernels.sparse_conv import POOL_MODES

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def rows_and_map(rows: int, count: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inverse = torch.randint(count, (rows,), generator=generator, dtype=torch.int32)
    return torch.randn(rows, channels, generator=generator), inverse


def test_golden_pooling() -> None:
    item = golden("sparse_ops")
    item.check("out.down_feats", sparse_pool(item["in.feats"], item["out.down_idx"], 149, "biased_mean"))


def test_golden_upsampling() -> None:
    item = golden("sparse_ops")
    item.check("out.up_feats_of_2x_plus_1", upsample(2 * item["out.down_feats"] + 1, item["out.down_idx"]))


def test_golden_subdivision() -> None:
    item = golden("sparse_ops")
    item.check("out.subdiv_feats", subdivide(item["in.feats"]))


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "count", "channels"), [(0, 3, 2), (1, 1, 1), (50, 20, 7), (3000, 400, 33)])
def test_pooling_agrees_with_the_reference(mode: str, dtype: torch.dtype, rows: int, count: int, channels: int) -> None:
    feats, inverse = rows_and_map(rows, count, channels)
    actual = sparse_pool(feats.to(dtype), inverse, count, mode)
    with use_reference():
        expected = sparse_pool(feats.to(dtype), inverse, count, mode)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


@TRITON_BACKENDS
@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize(
    ("rows", "count", "channels", "dtype"),
    [(1, 1, 1, torch.float64), (70, 9, 7, torch.float16), (20, 30, 130, torch.bfloat16)],
)
def test_every_backend_agrees_with_the_reference_there_and_back(
    backend: str, mode: str, rows: int, count: int, channels: int, dtype: torch.dtype
) -> None:
    inverse = torch.arange(rows, dtype=torch.int32) * 7 % count
    fine, coarse = torch.randn(rows, channels).to(dtype), torch.randn(count, channels).to(dtype)

    def both_and_their_gradients() -> list[torch.Tensor]:
        x, y = fine.clone().requires_grad_(), coarse.clone().requires_grad_()
        pooled, spread = sparse_pool(x, inverse, count, mode), upsample(y, inverse)
        return [pooled, spread, *torch.autograd.grad((pooled, spread), (x, y), (coarse, fine))]

    actual = both_and_their_gradients()
    with use_reference():
        torch.testing.assert_close(actual, both_and_their_gradients())


@TRITON_BACKENDS
def test_nothing_into_nothing(backend: str) -> None:
    empty, inverse = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int32)
    assert sparse_pool(empty, inverse, 0, "mean").shape == (0, 4)
    assert upsample(empty, inverse).shape == (0, 4)
    assert subdivide(empty).shape == (0, 4)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_modes_divide_by_what_they_say(reference: bool) -> None:
    feats, inverse = torch.tensor([[3.0], [6.0], [5.0]]), torch.tensor([0, 0, 2], dtype=torch.int32)
    expected = {"sum": [9, 0, 5], "mean": [4.5, 0, 5], "biased_mean": [3, 0, 2.5]}
    for mode, values in expected.items():
        with use_reference() if reference else torch.no_grad():
            assert sparse_pool(feats, inverse, 3, mode).flatten().tolist() == values


@given(seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_upsampling_is_the_adjoint_of_the_sum(seed: int) -> None:
    fine, inverse = rows_and_map(40, 9, 3, seed)
    coarse = torch.randn(9, 3, dtype=torch.float64)
    left = (sparse_pool(fine.double(), inverse, 9, "sum") * coarse).sum()
    torch.testing.assert_close(left, (fine * upsample(coarse, inverse)).sum())


def test_the_mean_of_an_upsampled_tensor_is_that_tensor() -> None:
    coarse, inverse = torch.randn(5, 3), torch.arange(20, dtype=torch.int32) % 5
    torch.testing.assert_close(sparse_pool(upsample(coarse, inverse), inverse, 5, "mean"), coarse)


def test_children_are_eight_equal_rows_in_a_row() -> None:
    assert subdivide(torch.tensor([[1.0], [2.0]])).flatten().tolist() == [1.0] * 8 + [2.0] * 8


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    feats, inverse = rows_and_map(5000, 700, 33)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sparse_pool(feats, inverse, 700, "mean"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", POOL_MODES)
def test_gradients_of_pooling_are_the_numerical_ones_twice(mode: str) -> None:
    feats, inverse = rows_and_map(9, 4, 2)
    feats = feats.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparse_pool(x, inverse, 5, mode), feats)
    assert torch.autograd.gradgradcheck(lambda x: sparse_pool(x, inverse, 5, mode), feats)


def test_gradients_of_upsampling_and_subdividing_are_the_numerical_ones_twice() -> None:
    feats = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    inverse = torch.tensor([0, 3, 3, 1, 3], dtype=torch.int32)
    for function in (lambda x: upsample(x, inverse), subdivide):
        assert torch.autograd.gradcheck(function, feats)
        assert torch.autograd.gradgradcheck(function, feats)


def test_are_ordinary_torch_operators() -> None:
    feats, inverse = rows_and_map(9, 4, 2)
    feats.requires_grad_()
    torch.library.opcheck(torch.ops.trellis_kernels.sparse_pool.default, (feats, inverse, 4, "biased_mean"))
    torch.library.opcheck(torch.ops.trellis_kernels.upsample.default, (feats, inverse))


def test_compile_without_graph_breaks() -> None:
    feats, inverse = rows_and_map(9, 4, 2)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return subdivide(upsample(sparse_pool(x, inverse, 4, "mean"), inverse))

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(feats), there_and_back(feats))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_is_an_error(wrong: int) -> None:
    inverse = torch.tensor([0, wrong, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"inverse must be in \[0, count\) with count=4; got {wrong}"):
        sparse_pool(torch.zeros(3, 2), inverse, 4, "sum")
    with pytest.raises(ValueError, match=rf"inverse must be in \[0, M\) with M=4; got {wrong}"):
        upsample(torch.zeros(4, 2), inverse)


def test_names_the_argument_that_does_not_fit() -> None:
    feats, inverse = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="mode must be 'sum' or 'mean' or 'biased_mean'; got 'max'"):
        sparse_pool(feats, inverse, 4, "max")
    with pytest.raises(ValueError, match="count must be at least 0; got -1"):
        sparse_pool(feats, inverse, -1, "sum")
    with pytest.raises(ValueError, match=r"inverse must be \[N\] with N=3; got \[4\]"):
        sparse_pool(feats, torch.zeros(4, dtype=torch.int32), 4, "sum")
    with pytest.raises(TypeError, match=r"inverse must be torch.int32; got torch.int64"):
        upsample(feats, inverse.long())
    with pytest.raises(ValueError, match=r"feats must be \[N, C\]; got \[3\]"):
        subdivide(torch.zeros(3))
