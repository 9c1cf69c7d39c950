"""The GPU kernels of attention: on host tensors under Triton's interpreter, and on a GPU where there is one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import aot
from tests.support.attention import by_sequence, by_window, offsets_of, packed
from tests.support.backends import TRITON_BACKENDS
from trellis_kernels import use_reference, varlen_attention, window_partition, windowed_attention
from trellis_kernels.attention import flash
from trellis_kernels.attention.triton import head_parts
from trellis_kernels.operator import OPERATORS

_OPS = torch.ops.trellis_kernels
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
RAGGED = [  # query lengths, key lengths, width, dtype; a tile has 16 to 128 rows
    pytest.param([0], [0], 8, HALF, id="nothing"),
    pytest.param([1], [1], 1, SINGLE, id="one"),
    pytest.param([5, 1, 30], [7, 2, 40], 20, SINGLE, id="odd width, float32"),
    pytest.param([5, 1, 30], [7, 2, 40], 20, BRAIN, id="odd width, bfloat16"),
    pytest.param([3, 0, 4, 2, 0], [5, 6, 0, 1, 0], 16, HALF, id="empty sequences"),
    pytest.param([129, 63, 64], [31, 128, 65], 64, HALF, id="around a tile, float16"),
    pytest.param([33, 64, 63], [31, 32, 65], 64, SINGLE, id="around a tile, float32"),
    pytest.param([260], [140], 80, BRAIN, id="several tiles, bfloat16"),
    pytest.param([20], [35], 80, SINGLE, id="width 80, float32"),
    pytest.param([9], [70], 128, HALF, id="widest"),
]


def voxels(occupancy: float, edge: int = 4) -> Tensor:
    coords = (torch.rand(2, edge, edge, edge) < occupancy).nonzero().int()
    shuffled = coords[torch.randperm(len(coords))]
    return shuffled[shuffled[:, 0].argsort(stable=True)]


@TRITON_BACKENDS
@pytest.mark.parametrize(("queries", "keys", "width", "dtype"), RAGGED)
def test_ragged_sequences_agree_with_reference_in_both_directions(
    backend: str, queries: list[int], keys: list[int], width: int, dtype: torch.dtype
) -> None:
    inputs = [packed(sum(n), width, dtype) for n in (queries, keys, keys)]
    offsets = offsets_of(queries), offsets_of(keys)
    check_both_directions(lambda: varlen_attention(*inputs, *offsets), inputs)


@TRITON_BACKENDS
@pytest.mark.parametrize(
    ("occupancy", "width", "dtype"), [(0.0, 8, HALF), (1.0, 64, HALF), (0.3, 80, BRAIN), (0.3, 20, SINGLE)]
)
def test_windows_agree_with_reference_in_both_directions(
    backend: str, occupancy: float, width: int, dtype: torch.dtype
) -> None:
    order, offsets = window_partition(coords := voxels(occupancy), 3, 1)
    qkv = torch.randn(len(coords), 3, 1, width).to(dtype).requires_grad_()
    check_both_directions(lambda: windowed_attention(qkv, order, offsets), [qkv])


def check_both_directions(run: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    upstream = torch.randn_like(out := run())
    gradients = torch.autograd.grad(out, inputs, upstream)
    with use_reference():
        expected = run()
        expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for tensor, other in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(tensor, other, **TOLERANCE[out.dtype])


@TRITON_BACKENDS
def test_every_sequence_is_what_torch_computes_for_it(backend: str) -> None:
    queries, keys = [5, 1, 70], [7, 2, 70]
    inputs = [packed(sum(n), 24, torch.float32, heads=1) for n in (queries, keys, keys)]
    check_truth(
        varlen_attention(*inputs, offsets_of(queries), offsets_of(keys)), by_sequence(*inputs, queries, keys), inputs
    )


@TRITON_BACKENDS
def test_every_window_is_what_torch_computes_for_it(backend: str) -> None:
    order, offsets = torch.randperm(100).int(), offsets_of([0, 70, 1, 0, 29])
    qkv = torch.randn(100, 3, 2, 16, requires_grad=True)
    check_truth(windowed_attention(qkv, order, offsets), by_window(qkv, order, offsets), [qkv])


def check_truth(out: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 5e-6) -> None:
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream.double(), retain_graph=True)
    for tensor, other in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(tensor.double(), other.double(), rtol=tolerance, atol=tolerance)


@TRITON_BACKENDS
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 64), (torch.bfloat16, 80), (torch.float32, 64)])
def test_errors_are_those_of_plain_pytorch_in_the_same_dtype(
    backend: str, dtype: torch.dtype, width: int, windowed: bool
) -> None:
    """Flash attention's rule, against float64: at most twice plain PyTorch's error, gradients three times."""
    qkv, upstream = torch.randn(100, 3, 1, width).to(dtype), torch.randn(100, 1, width).to(dtype)
    order, offsets = torch.arange(100).int(), offsets_of([100])

    def ours(qkv: Tensor) -> Tensor:
        if windowed:
            return windowed_attention(qkv, order, offsets)
        return varlen_attention(*qkv.unbind(1), offsets, offsets)

    def plain(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(1, 2, 0, 3)
        return ((query @ key.mT * width**-0.5).softmax(-1) @ value).transpose(0, 1)

    truth = both_directions(plain, qkv.double(), upstream.double())
    allowed = [(x.double() - t).abs().max() for x, t in zip(both_directions(plain, qkv, upstream), truth, strict=True)]
    errors = [(x.double() - t).abs().max() for x, t in zip(both_directions(ours, qkv, upstream), truth, strict=True)]
    assert errors[0] <= 2 * allowed[0]
    assert errors[1] <= 3 * allowed[1]


def both_directions(run: Callable[[Tensor], Tensor], qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.clone().requires_grad_()
    return (out := run(qkv)).detach(), torch.autograd.grad(out, qkv, upstream)[0]


@TRITON_BACKENDS
def test_rows_may_lie_anywhere(backend: str) -> None:
    qkv, offsets = torch.randn(40, 3, 2, 16), offsets_of([30, 10])
    layouts = [
        [x.contiguous() for x in qkv.unbind(1)],
        list(qkv.unbind(1)),
        list(qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3).unbind(1)),  # heads outermost
        list(qkv.mT.contiguous().mT.unbind(1)),  # columns far from each other
    ]
    results = []
    for layout in layouts:
        parts = [x.detach().requires_grad_() for x in layout]
        out = varlen_attention(*parts, offsets, offsets)
        results.append((out, *torch.autograd.grad(out.sum(), parts)))  # the upstream gradient is one number, expanded
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@TRITON_BACKENDS
def test_large_logits_neither_overflow_nor_vanish(backend: str) -> None:
    query, key = (torch.randn(150, 1, 8) * 100 for _ in range(2))  # logits to about +-1e5
    key[0] -= 1e4 * query[0] / query[0].norm()  # the first maximum is far below those of later tiles of keys
    value, offsets = torch.randn(150, 1, 8), offsets_of([150])
    out = varlen_attention(query, key, value, offsets, offsets)
    torch.testing.assert_close(out.double(), by_sequence(query, key, value, [150], [150]), rtol=0.03, atol=1e-3)


@TRITON_BACKENDS
def test_gradients_are_finite_where_every_logit_is_far_below_zero(backend: str) -> None:
    """A key past the end of its sequence would have a logit of 0, whose probability would be e^280."""
    qkv, offsets = torch.randn(50, 3, 1, 8) * 0.1, offsets_of([20, 30])
    qkv[:, 0] += 10
    qkv[:, 1] -= 10
    qkv.requires_grad_()
    expected = by_window(qkv, order := torch.arange(50).int(), offsets)
    for out in (varlen_attention(*qkv.unbind(1), offsets, offsets), windowed_attention(qkv, order, offsets)):
        check_truth(out, expected, [qkv], tolerance=1e-3)


@TRITON_BACKENDS
def test_not_a_number_stays_where_it_belongs(backend: str) -> None:
    qkv = torch.randn(90, 3, 1, 8)
    qkv[70, 1] = torch.nan
    qkv.requires_grad_()
    offsets = offsets_of([20, 40, 30])
    for out in (
        varlen_attention(*qkv.unbind(1), offsets, offsets),
        windowed_attention(qkv, torch.arange(90).int(), offsets),
    ):
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
        for tensor in (out, gradient):
            assert tensor[:60].isfinite().all()
            assert tensor[60:].isnan().any()


GPU_KERNELS = pytest.mark.parametrize(
    "backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@GPU_KERNELS
def test_an_index_out_of_range_is_not_followed(backend: str) -> None:
    """The GPU does not check `order` and `offsets`, which would take waiting for it; it stays inside the tensors."""
    qkv, upstream = torch.randn(80, 3, 1, 16, requires_grad=True), torch.randn(80, 1, 16)
    order, offsets = torch.arange(80).int(), offsets_of([40, 40])
    expected = windowed_attention(qkv, order, offsets)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, upstream)
    order[50], order[60] = -(2**31), 2**31 - 1
    out = windowed_attention(qkv, order, offsets)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    assert torch.equal(out[:40], expected[:40])
    assert torch.equal(gradient[:40], expected_gradient[:40])
    for wrong in ([0, 40, 2**31 - 1], [0, 40, -5], [-(2**31), 40, 80]):
        out = windowed_attention(qkv, torch.arange(80).int(), torch.tensor(wrong, dtype=torch.int32))
        torch.autograd.grad(out, qkv, upstream)
        varlen_attention(*qkv.unbind(1), torch.tensor(wrong, dtype=torch.int32), offsets)


@GPU_KERNELS
def test_results_do_not_vary(backend: str) -> None:
    qkv, order, offsets = torch.randn(150, 3, 1, 64).half(), torch.randperm(150).int(), offsets_of([20, 130])
    upstream = torch.randn(150, 1, 64).half()
    for run in (
        lambda qkv: windowed_attention(qkv, order, offsets),
        lambda qkv: varlen_attention(*qkv.unbind(1), offsets, offsets),
    ):
        first, second = (both_directions(run, qkv, upstream) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@GPU_KERNELS
def test_rows_may_lie_beyond_two_to_the_31(backend: str) -> None:
    """Half of the memory is never touched: on a host it is only address space."""
    elements, stride = 2**31 + 2**20, 2**26
    cuda = backend == "cuda"
    memory = torch.zeros(elements, dtype=torch.float16) if cuda else torch.from_numpy(np.zeros(elements, np.float16))
    qkv = memory.as_strided((33, 3, 1, 16), (stride, 16, 16, 1)).copy_(torch.randn(33, 3, 1, 16))
    order, offsets, out = torch.arange(33).int(), offsets_of([3, 30]), torch.randn(33, 1, 16).half()
    results = []
    for x in (qkv, qkv.clone()):
        parts, logsumexp = x.unbind(1), torch.zeros(33, 1)
        results.append(
            [
                windowed_attention(x, order, offsets),
                varlen_attention(*parts, offsets, offsets),
                _OPS.windowed_attention_backward(out, x, out, logsumexp, order, offsets),
                *_OPS.varlen_attention_backward(out, *parts, out, logsumexp, offsets, offsets),
            ]
        )
    assert all(torch.equal(far, near) for far, near in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_host_does_not_wait(backend: str) -> None:
    qkv, order, offsets = torch.randn(80, 3, 2, 64, requires_grad=True), torch.arange(80).int(), offsets_of([30, 50])
    upstream = torch.randn(80, 2, 64)
    for run in (
        lambda: windowed_attention(qkv, order, offsets),
        lambda: varlen_attention(*qkv.unbind(1), offsets, offsets),
    ):
        torch.autograd.grad(run(), qkv, upstream)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(run(), qkv, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@TRITON_BACKENDS
@pytest.mark.parametrize("extent", [1, 40, 2**31])
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize(("window_size", "shift"), [(1, 0), (3, 20), (5000, 7)])
def test_partition_agrees_with_reference(backend: str, extent: int, rows: int, window_size: int, shift: int) -> None:
    coords = torch.randint(0, extent, (rows, 4))
    coords[:, 0] %= 3
    if extent == 2**31 and window_size < 5000:
        coords[:, 1:] %= 2**20  # 2^62 windows is the limit
    order, offsets = window_partition(coords.int(), window_size, shift)
    with use_reference():
        expected = window_partition(coords.int(), window_size, shift)
    assert torch.equal(order, expected[0])
    assert torch.equal(offsets, expected[1])


@TRITON_BACKENDS
def test_coords_that_have_no_window_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="coords must not be negative; got -2"):
        window_partition(torch.tensor([[0, 1, 2, 3], [0, 1, -2, 3]], dtype=torch.int32), 4, 0)
    with pytest.raises(ValueError, match="fewer than 2\\^62 windows"):
        window_partition(torch.full((1, 4), 2**31 - 1, dtype=torch.int32), 1, 0)


@pytest.mark.parametrize("width", range(1, 129))
def test_a_head_is_split_into_powers_of_two_that_hold_it(width: int) -> None:
    parts = head_parts(width)
    assert sum(parts) >= width
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in parts)
    assert parts[0] > parts[1]
    assert {64: (64, 0), 80: (64, 16), 128: (128, 0), 8: (16, 0)}.get(width, parts) == parts


@GPU_KERNELS
def test_what_the_kernels_do_not_have_is_refused(backend: str) -> None:
    order, offsets = torch.arange(4).int(), offsets_of([4])
    with pytest.raises(TypeError, match=r"on a GPU must be torch.float16, .*; got torch.float64"):
        windowed_attention(torch.randn(4, 3, 1, 8, dtype=torch.float64), order, offsets)
    with pytest.raises(ValueError, match="head width D must be at most 128 on a GPU; got 129"):
        windowed_attention(torch.randn(4, 3, 1, 129), order, offsets)


@pytest.mark.aot
def test_compiled_for_each_architecture_on_its_tensor_cores() -> None:
    found = aot.compile_launches("tests.kernels.aot_attention:launches")
    aot.check_limits(found)
    expected = {80: ("mma.sync",), 90: ("wgmma.mma_async",), 100: ("tcgen05.mma",)}
    for row in found:
        half = "float16" in row.constants  # of bfloat16 too; float32 products are exact, which those units are not
        assert row.instructions == (expected[row.arch] if half else ()), row


@TRITON_BACKENDS
def test_torchs_flash_attention_can_take_its_place(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the GPU a stand-in has the conventions of torch's: log-sum-exp [H, N], +inf where there is no key."""

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *others: Any, return_aux: Any) -> tuple[Tensor, Tensor]:
        assert others[2:] == (len(query), len(key))
        assert return_aux.lse
        out, logsumexp = OPERATORS["trellis_kernels::varlen_attention"].reference(query, key, value, *others[:2])
        return out, logsumexp.where(logsumexp.isfinite(), torch.inf).T

    if backend != "cuda":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    queries, keys = [5, 0, 30, 4], [7, 2, 40, 0]
    arguments = [torch.randn(sum(n), 2, 64).half() for n in (queries, keys, keys)] + [
        offsets_of(queries),
        offsets_of(keys),
    ]
    ours, theirs = (
        OPERATORS["trellis_kernels::varlen_attention"].reference(*arguments),
        flash.varlen_attention(*arguments),
    )
    for tensor, expected in zip(theirs, ours, strict=True):
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, expected, **TOLERANCE[torch.float16])
    monkeypatch.setattr(flash, "FASTER", frozenset({(9, 64)}))
    assert flash.is_faster(torch.float16, 64, (9, 0))
    assert not flash.is_faster(torch.float32, 64, (9, 0))
