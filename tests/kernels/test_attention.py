import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.attention import by_sequence, by_window, either, offsets_of, packed
from tests.support.golden import golden
from tests.support.scenes import random_voxels, shuffled_within_samples
from trellis_kernels import use_reference, varlen_attention, window_partition, windowed_attention

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}
# query lengths, key lengths, width. Panels of queries are up to 64 long, blocks of keys 256, tasks 384 queries.
RAGGED = [
    pytest.param([0], [0], 8, id="nothing"),
    pytest.param([1], [1], 1, id="one"),
    pytest.param([5, 1, 30], [7, 2, 40], 20, id="odd width"),
    pytest.param([3, 0, 4, 2], [5, 6, 0, 1], 16, id="empty sequences"),
    pytest.param([63, 65, 130], [97, 31, 257], 64, id="around a block"),
    pytest.param([400], [520], 80, id="several tasks and blocks"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("queries", "keys", "width"), RAGGED)
def test_ragged_sequences_agree_with_reference_in_both_directions(
    instruction_set: str, queries: list[int], keys: list[int], width: int, dtype: torch.dtype
) -> None:
    check_varlen(queries, keys, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    check_varlen([5, 1, 30], [7, 2, 40], 20, dtype)
    check_windowed(0.1, 20, dtype)


def check_varlen(queries: list[int], keys: list[int], width: int, dtype: torch.dtype) -> None:
    inputs = packed(sum(queries), width, dtype), packed(sum(keys), width, dtype), packed(sum(keys), width, dtype)
    offsets = offsets_of(queries), offsets_of(keys)
    upstream = torch.randn(sum(queries), 2, width).to(dtype)
    out = varlen_attention(*inputs, *offsets)
    gradients = torch.autograd.grad(out, inputs, upstream)
    with use_reference():
        expected = varlen_attention(*inputs, *offsets)
        expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("occupancy", "width"), [(0.0, 8), (0.002, 8), (0.1, 64), (1.0, 20)])
def test_windows_agree_with_reference_in_both_directions(
    instruction_set: str, occupancy: float, width: int, dtype: torch.dtype
) -> None:
    check_windowed(occupancy, width, dtype)


def check_windowed(occupancy: float, width: int, dtype: torch.dtype) -> None:
    coords = shuffled_within_samples(random_voxels(9, occupancy, batch=2))
    order, offsets = window_partition(coords, 6, 3)
    qkv = torch.randn(len(coords), 3, 2, width).to(dtype).requires_grad_()
    upstream = torch.randn(len(coords), 2, width).to(dtype)
    out = windowed_attention(qkv, order, offsets)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    with use_reference():
        expected = windowed_attention(qkv, order, offsets)
        (expected_gradient,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE[dtype])


@pytest.mark.parametrize(("queries", "keys"), [([5, 1, 30], [7, 2, 40]), ([130], [300])])
def test_every_sequence_is_what_torch_computes_for_it(
    instruction_set: str, queries: list[int], keys: list[int]
) -> None:
    query, key, value = (packed(n, 24, torch.float32, heads=3).detach() for n in (sum(queries), sum(keys), sum(keys)))
    expected = by_sequence(query, key, value, queries, keys)
    out = varlen_attention(query, key, value, offsets_of(queries), offsets_of(keys))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    with use_reference():
        out = varlen_attention(query, key, value, offsets_of(queries), offsets_of(keys))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_window_is_what_torch_computes_for_it(instruction_set: str) -> None:
    coords = shuffled_within_samples(random_voxels(12, 0.3, batch=2))
    qkv = torch.randn(len(coords), 3, 2, 16)
    order, offsets = window_partition(coords, 8, 4)
    expected = by_window(qkv, order, offsets)
    out = windowed_attention(qkv, order, offsets)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_rounding_is_well_inside_the_gate_of_the_models(instruction_set: str) -> None:
    query, key, value = (torch.randn(n, 2, 64) for n in (300, 700, 700))
    out = varlen_attention(query, key, value, offsets_of([300]), offsets_of([700])).double()
    expected = by_sequence(query, key, value, [300], [700])
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [20, 300])
def test_large_logits_neither_overflow_nor_vanish(instruction_set: str, size: int, dtype: torch.dtype) -> None:
    query, key = (torch.randn(size, 1, 8, dtype=dtype) * 100 for _ in range(2))  # logits to about +-1e5
    key[0] -= 1e4 * query[0] / query[0].norm()  # the first maximum is far below those of later blocks of keys
    value = torch.randn(size, 1, 8, dtype=dtype)
    offsets = offsets_of([size])
    expected = by_sequence(query, key, value, [size], [size])
    out = varlen_attention(query, key, value, offsets, offsets).double()
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=0.03 if dtype == torch.float32 else 1e-9, atol=1e-3)


def test_equal_logits_give_the_plain_mean(instruction_set: str) -> None:
    value = torch.randn(300, 1, 8)
    zeros, offsets = torch.zeros(300, 1, 8), offsets_of([300])
    out = varlen_attention(zeros, zeros, value, offsets, offsets)
    torch.testing.assert_close(out, value.mean(0, keepdim=True).expand(300, -1, -1), rtol=1e-5, atol=1e-6)


def test_one_key_returns_its_value_to_the_bit(instruction_set: str) -> None:
    query, key, value = torch.randn(70, 2, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    out = varlen_attention(query, key, value, offsets_of([70]), offsets_of([1]))
    assert torch.equal(out, value.expand(70, -1, -1))


def test_not_a_number_stays_where_it_belongs(instruction_set: str) -> None:
    query, key, value = torch.randn(40, 1, 8), torch.randn(40, 1, 8), torch.randn(40, 1, 8)
    key[25] = torch.nan
    out = varlen_attention(query, key, value, offsets_of([20, 20]), offsets_of([20, 20]))
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()


def test_threads_do_not_change_the_result() -> None:
    coords = random_voxels(12, 0.5)
    order, offsets = window_partition(coords, 8, 4)
    qkv = torch.randn(len(coords), 3, 2, 16, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = windowed_attention(qkv, order, offsets)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_inputs_are_read_as_they_are() -> None:
    qkv = torch.randn(30, 3, 2, 8)
    offsets = offsets_of([30])
    out = varlen_attention(*qkv.unbind(1), offsets, offsets)
    assert torch.equal(out, windowed_attention(qkv, torch.arange(30).int(), offsets))
    assert torch.equal(out, varlen_attention(*(x.contiguous() for x in qkv.unbind(1)), offsets, offsets))


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_order_of_keys_does_not_matter_and_values_act_linearly(
    lengths: list[tuple[int, int]], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = ([pair[i] for pair in lengths] for i in (0, 1))
    query, key, value = (torch.randn(n, 1, width, generator=generator) for n in (sum(queries), sum(keys), sum(keys)))
    offsets = offsets_of(queries), offsets_of(keys)
    out = varlen_attention(query, key, value, *offsets)
    runs = torch.arange(sum(keys)).split(keys)
    shuffle = torch.cat([run[torch.randperm(len(run), generator=generator)] for run in runs])
    shuffled = varlen_attention(query, key[shuffle], value[shuffle], *offsets)
    torch.testing.assert_close(out, shuffled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        2 * out + 1,
        varlen_attention(query, key, 2 * value + 1, *offsets)
        + (torch.tensor(keys).eq(0).repeat_interleave(torch.tensor(queries)).float()[:, None, None]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("reference", [False, True])
def test_gradients_are_the_derivatives(reference: bool) -> None:
    query, key, value = (torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7).int()

    def ragged(*tensors: Tensor) -> Tensor:
        return varlen_attention(*tensors, offsets_of([2, 4, 0]), offsets_of([5, 0, 4]))

    def windows(qkv: Tensor) -> Tensor:
        return windowed_attention(qkv, order, offsets_of([3, 4]))

    with either(reference):
        assert torch.autograd.gradcheck(ragged, (query, key, value), fast_mode=reference)
        assert torch.autograd.gradcheck(windows, qkv, fast_mode=reference)


def test_second_derivative_says_that_it_is_missing() -> None:
    qkv = torch.randn(4, 3, 1, 2, requires_grad=True)
    out = windowed_attention(qkv, torch.arange(4).int(), offsets_of([4]))
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of attention"):
        gradient.sum().backward()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("window_size", "shift"), [(4, 0), (4, 2), (8, 0), (8, 4)])
def test_windows_are_the_official_ones(window_size: int, shift: int, reference: bool) -> None:
    item, name = golden("sparse_ops"), f"out.win{window_size}_s{shift}"
    coords = item["in.coords"]
    with either(reference):
        order, offsets = window_partition(coords, window_size, shift)
    lengths = offsets.diff()
    rank = torch.empty_like(order)
    rank[order.long()] = torch.arange(len(lengths)).repeat_interleave(lengths).int()
    item.check(f"{name}.window_rank_per_voxel", rank)
    item.check(f"{name}.seq_lens", lengths)
    item.check(f"{name}.seq_batch", coords[order[offsets[:-1].long()].long(), 0])


@settings(deadline=None, max_examples=20)
@given(
    extent=st.sampled_from([1, 7, 40, 1000, 2**31]),
    rows=st.integers(0, 60),
    window_size=st.sampled_from([1, 3, 8, 5000]),
    shift=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_partition_agrees_with_reference(extent: int, rows: int, window_size: int, shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.randint(0, extent, (rows, 4), generator=generator)
    coords[:, 0] %= 3
    if extent == 2**31 and window_size < 5000:
        coords[:, 1:] %= 2**20  # 2^62 windows is the limit
    order, offsets = window_partition(coords.int(), window_size, shift)
    with use_reference():
        expected = window_partition(coords.int(), window_size, shift)
    assert torch.equal(order, expected[0])
    assert torch.equal(offsets, expected[1])


@pytest.mark.parametrize(
    "operator", ["varlen_attention", "varlen_attention_backward", "windowed_attention", "windowed_attention_backward"]
)
def test_operators_keep_their_promises_to_torch(operator: str) -> None:
    query, key, value = (torch.randn(n, 2, 8, requires_grad=True) for n in (6, 9, 9))
    qkv, logsumexp = torch.randn(6, 3, 2, 8, requires_grad=True), torch.zeros(6, 2)
    pair, one = (offsets_of([2, 4]), offsets_of([5, 4])), (torch.randperm(6).int(), offsets_of([2, 4]))
    arguments = {
        "varlen_attention": (query, key, value, *pair),
        "varlen_attention_backward": (*(x.detach() for x in (query, query, key, value, query)), logsumexp, *pair),
        "windowed_attention": (qkv, *one),
        "windowed_attention_backward": (query.detach(), qkv.detach(), query.detach(), logsumexp, *one),
    }
    torch.library.opcheck(getattr(torch.ops.trellis_kernels, operator).default, arguments[operator])


def test_partition_keeps_its_promises_to_torch() -> None:
    torch.library.opcheck(torch.ops.trellis_kernels.window_partition.default, (random_voxels(6, 0.2), 4, 2))


def test_both_compile_without_a_graph_break() -> None:
    def step(qkv: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        query, key, value = (2 * qkv).unbind(1)
        return windowed_attention(2 * qkv, order, offsets) + varlen_attention(query, key, value, offsets, offsets)

    qkv = torch.randn(20, 3, 2, 8, requires_grad=True)
    arguments = (qkv, torch.arange(20).int(), offsets_of([5, 15]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, out = step(*arguments), compiled(*arguments)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (expected, out)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ([0, 3, 2, 6], [0, 1, 2, 9], r"query_offsets must be non-decreasing from 0 to 6; got 0 to 6"),
        ([0, 3, 7], [0, 1, 9], r"query_offsets must be non-decreasing from 0 to 6; got 0 to 7"),
        ([0, 3, 6], [1, 1, 9], r"key_offsets must be non-decreasing from 0 to 9; got 1 to 9"),
        ([0, 3, 6], [0, 9], r"key_offsets must be \[B\+1\] with B\+1=3; got \[2\]"),
        ([], [], r"offsets must hold at least the leading 0; got \[\]"),
    ],
)
def test_wrong_offsets_are_refused(queries: list[int], keys: list[int], message: str, reference: bool) -> None:
    inputs = torch.randn(6, 1, 4), torch.randn(9, 1, 4), torch.randn(9, 1, 4)
    offsets = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
    with either(reference), pytest.raises(ValueError, match=message):
        varlen_attention(*inputs, *offsets)


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1]])
@pytest.mark.parametrize("reference", [False, True])
def test_an_order_that_is_no_permutation_is_refused(order: list[int], reference: bool) -> None:
    arguments = torch.randn(3, 3, 1, 4), torch.tensor(order).int(), offsets_of([3])
    with either(reference), pytest.raises(ValueError, match="order must hold each row number from 0 to 2 once"):
        windowed_attention(*arguments)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    qkv, order, offsets = torch.randn(6, 3, 2, 4), torch.arange(6).int(), offsets_of([6])
    with pytest.raises(ValueError, match=r"qkv must be \[N, 3, H, D\]"):
        windowed_attention(qkv[:, :2], order, offsets)
    with pytest.raises(ValueError, match=r"head width D must be at least 1; got 0"):
        windowed_attention(qkv[..., :0], order, offsets)
    with pytest.raises(TypeError, match=r"order must be torch.int32; got torch.int64"):
        windowed_attention(qkv, order.long(), offsets)
    with pytest.raises(TypeError, match=r"key must be torch.float32; got torch.float64"):
        varlen_attention(qkv[:, 0], qkv[:, 1].double(), qkv[:, 2], offsets, offsets)


@pytest.mark.parametrize("reference", [False, True])
def test_wrong_coords_are_refused(reference: bool) -> None:
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, -2, 3]], dtype=torch.int32)
    with either(reference), pytest.raises(ValueError, match="coords must not be negative; got -2"):
        window_partition(coords, 4, 0)
    with pytest.raises(ValueError, match="window_size must be at least 1; got 0"):
        window_partition(coords, 0, 0)
    with pytest.raises(ValueError, match="shift must not be negative; got -1"):
        window_partition(coords, 4, -1)


def test_more_windows_than_can_be_numbered_are_refused() -> None:
    coords = torch.full((1, 4), 2**31 - 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="fewer than 2\\^62 windows"):
        window_partition(coords, 1, 0)
