"""Normalisation, modulation, gates and residuals of transformer blocks: kernels, references, gradients, errors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trellis_kernels import (
    gated_residual,
    head_rms_norm,
    layer_norm,
    modulated_layer_norm,
    qk_rms_norm,
    residual_layer_norm,
    use_reference,
)

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = list(TOLERANCE)
# Lengths of the segments and channels. Chunks of rows are 64 long, vectors up to 16 wide.
SHAPES = [
    pytest.param([0], 8, id="nothing"),
    pytest.param([1], 1, id="one"),
    pytest.param([3, 0, 70, 1], 20, id="ragged, one empty"),
    pytest.param([129], 33, id="odd"),
    pytest.param([5, 2], 128, id="wide"),
]
EPS = 1e-6


def either(reference: bool) -> AbstractContextManager[object]:
    return use_reference() if reference else nullcontext()


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Problem:
    """Rows of segments, and what each segment has of its own as strided rows of one modulation tensor."""

    def __init__(self, lengths: list[int], channels: int, dtype: torch.dtype = torch.float32) -> None:
        rows = sum(lengths)
        self.offsets = offsets_of(lengths)
        self.index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(self.offsets.device)
        self.x = (2 * torch.randn(rows, channels) + 0.5).to(dtype).requires_grad_()
        self.update = torch.randn(rows, channels).to(dtype).requires_grad_()
        self.modulation = torch.randn(len(lengths), 3 * channels).to(dtype).requires_grad_()
        self.weight = torch.randn(channels).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        self.bias = torch.randn(channels).to(torch.promote_types(dtype, torch.float32)).requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.update, self.modulation, self.weight, self.bias]


def plain(p: Problem) -> tuple[Tensor, ...]:
    return (layer_norm(p.x, eps=EPS),)


def affine(p: Problem) -> tuple[Tensor, ...]:
    return (layer_norm(p.x, p.weight, p.bias, eps=EPS),)


def modulated(p: Problem) -> tuple[Tensor, ...]:
    shift, scale, _ = p.modulation.chunk(3, dim=1)
    return (modulated_layer_norm(p.x, scale, shift, p.offsets, eps=EPS),)


def gated(p: Problem) -> tuple[Tensor, ...]:
    return (gated_residual(p.x, p.update, p.modulation.chunk(3, dim=1)[2], p.offsets),)


def gated_affine(p: Problem) -> tuple[Tensor, ...]:
    gate = p.modulation.chunk(3, dim=1)[2]
    return residual_layer_norm(p.x, p.update, offsets=p.offsets, gate=gate, weight=p.weight, bias=p.bias, eps=EPS)


def residual_modulated(p: Problem) -> tuple[Tensor, ...]:
    shift, scale, _ = p.modulation.chunk(3, dim=1)
    return residual_layer_norm(p.x, p.update, offsets=p.offsets, scale=scale, shift=shift, eps=EPS)


def residual_plain(p: Problem) -> tuple[Tensor, ...]:
    return residual_layer_norm(p.x, p.update, offsets=p.offsets, eps=EPS)


def by_torch(p: Problem, form: Callable[[Problem], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The independent truth: torch's own layer norm and broadcasting, in float64."""
    x, update, modulation, weight, bias = (leaf.double() for leaf in p.leaves)
    shift, scale, gate = (part[p.index] for part in modulation.chunk(3, dim=1))
    if form is gated:
        return (x + gate * update,)
    total = x + gate * update if form is gated_affine else x + update if "residual" in form.__name__ else x
    out = torch.nn.functional.layer_norm(total, x.shape[1:], eps=EPS)
    if "affine" in form.__name__:
        out = out * weight + bias
    elif "modulated" in form.__name__:
        out = out * (1 + scale) + shift
    return (out,) if total is x else (total, out)


FORMS = [plain, affine, modulated, gated, gated_affine, residual_modulated, residual_plain]
EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def gradients_of(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    upstream = [torch.linspace(-1, 1, out.numel()).reshape(out.shape).cos().to(out) for out in outputs]
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def check_against_reference(form: Callable[[Problem], tuple[Tensor, ...]], p: Problem) -> None:
    outputs = form(p)
    gradients = gradients_of(outputs, p.leaves)
    with use_reference():
        expected = form(p)
        expected_gradients = gradients_of(expected, p.leaves)
    torch.testing.assert_close(outputs, expected, **TOLERANCE[p.x.dtype])
    tolerance = TOLERANCE[p.x.dtype] | {"atol": 10 * TOLERANCE[p.x.dtype]["atol"]}  # sums over a segment's rows
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, **tolerance)


@EVERY_FORM
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_agrees_with_reference_in_both_directions(
    instruction_set: str, form: Callable[[Problem], tuple[Tensor, ...]], lengths: list[int], channels: int
) -> None:
    check_against_reference(form, Problem(lengths, channels))


@EVERY_FORM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_agrees_with_reference(form: Callable[[Problem], tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    check_against_reference(form, Problem([3, 0, 70, 1], 36, dtype))


@EVERY_FORM
@pytest.mark.parametrize("reference", [False, True])
def test_is_what_torch_computes(form: Callable[[Problem], tuple[Tensor, ...]], reference: bool) -> None:
    p = Problem([3, 0, 70, 1], 36)
    with either(reference):
        outputs = form(p)
        gradients = gradients_of(outputs, p.leaves)
    expected = by_torch(p, form)
    for out, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out.double(), other, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, gradients_of(expected, p.leaves), strict=True):
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_FORM
def test_half_precision_is_nearer_the_truth_than_torch_operators(
    form: Callable[[Problem], tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    """Error at most that of the chain of separate operators in the same dtype, as official code runs it."""
    p = Problem([40, 30], 64, dtype)
    truth = by_torch(p, form)
    shift, scale, gate = (part[p.index] for part in p.modulation.chunk(3, dim=1))
    total = p.x
    if "gated" in form.__name__ or "residual" in form.__name__:
        total = p.x + gate * p.update if "gated" in form.__name__ else p.x + p.update
    affine_map = (p.weight, p.bias) if "affine" in form.__name__ else (None, None)
    chain = torch.nn.functional.layer_norm(total.float(), (64,), *affine_map, EPS).to(dtype)
    chain = chain * (1 + scale) + shift if "modulated" in form.__name__ else total if form is gated else chain
    error, expected = ((out.detach().double() - truth[-1].detach()).norm() for out in (form(p)[-1], chain))
    assert float(error) <= 1.01 * float(expected)


HEADS = [(0, 2, 8), (1, 1, 1), (70, 3, 20), (130, 2, 64)]


def head_inputs(rows: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    own = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(rows, 3, heads, width).to(dtype).requires_grad_()
    return qkv, *(torch.randn(heads, width).to(own).requires_grad_() for _ in range(2))


def by_normalize(x: Tensor, gamma: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1) * gamma * x.shape[-1] ** 0.5


@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads_agree_with_reference_and_torch(
    instruction_set: str, shape: tuple[int, int, int], dtype: torch.dtype, with_value: bool
) -> None:
    qkv, *gammas = head_inputs(*shape, dtype)
    out = qk_rms_norm(qkv, *gammas, with_value=with_value)
    gradients = gradients_of((out,), [qkv, *gammas])
    with use_reference():
        expected = qk_rms_norm(qkv, *gammas, with_value=with_value)
        expected_gradients = gradients_of((expected,), [qkv, *gammas])
    parts = [by_normalize(qkv[:, part].double(), gamma.double()) for part, gamma in enumerate(gammas)]
    truth = torch.stack(parts + [qkv[:, 2].double()] * with_value, 1)
    for actual, other in ((out, expected), (out.double(), truth)):
        torch.testing.assert_close(actual, other, **TOLERANCE[dtype])
    tolerance = TOLERANCE[dtype] | {"atol": 20 * TOLERANCE[dtype]["atol"]}
    torch.testing.assert_close(gradients, expected_gradients, **tolerance)
    torch.testing.assert_close(gradients, gradients_of((truth.to(dtype),), [qkv, *gammas]), **tolerance)


def test_one_tensor_of_heads_may_be_strided() -> None:
    kv, gamma, _ = head_inputs(9, 2, 8)
    torch.testing.assert_close(head_rms_norm(kv[:, 1], gamma), by_normalize(kv[:, 1], gamma), **TOLERANCE[kv.dtype])


@pytest.mark.parametrize("reference", [False, True])
def test_a_head_of_zeros_stays_zero_and_has_a_finite_gradient(reference: bool) -> None:
    x = torch.zeros(2, 1, 4, requires_grad=True)
    with either(reference):
        out = head_rms_norm(x, torch.ones(1, 4))
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.tolist() == torch.zeros(2, 1, 4).tolist()
    torch.testing.assert_close(gradient, torch.full((2, 1, 4), 2e12))


@EVERY_FORM
@pytest.mark.parametrize("reference", [False, True])
def test_gradients_are_those_of_finite_differences(
    form: Callable[[Problem], tuple[Tensor, ...]], reference: bool
) -> None:
    p = Problem([2, 0, 3], 4, torch.float64)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        p.x, p.update, p.modulation, p.weight, p.bias = leaves
        return form(p)

    with either(reference):
        assert torch.autograd.gradcheck(function, p.leaves)


def test_gradients_of_heads_are_those_of_finite_differences() -> None:
    inputs = head_inputs(3, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: qk_rms_norm(*leaves, with_value=True), inputs)
    assert torch.autograd.gradcheck(qk_rms_norm, inputs)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 40), st.floats(0.1, 10), st.floats(-5, 5))
def test_rows_are_independent_of_their_neighbors_scale_and_level(
    lengths: list[int], channels: int, factor: float, level: float
) -> None:
    """A row's own scale and level drop out, and each segment alone gives what it gives among others."""
    p = Problem(lengths, channels)
    shift, scale, _ = p.modulation.detach().chunk(3, dim=1)
    out = modulated_layer_norm(p.x.detach(), scale, shift, p.offsets, eps=0.0) if channels > 1 else None
    if out is not None:
        moved = modulated_layer_norm(factor * p.x.detach() + level, scale, shift, p.offsets, eps=0.0)
        torch.testing.assert_close(moved, out, rtol=1e-2, atol=1e-2)
    out = modulated_layer_norm(p.x.detach(), scale, shift, p.offsets, eps=EPS)
    for segment, rows in enumerate(p.x.detach().split(lengths)):
        alone = modulated_layer_norm(rows, scale[segment, None], shift[segment, None], offsets_of([len(rows)]), eps=EPS)
        begin = sum(lengths[:segment])
        assert torch.equal(out[begin : begin + len(rows)], alone)


def test_does_not_depend_on_the_number_of_threads() -> None:
    p = Problem([300, 0, 129, 77], 40)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        outputs = gated_affine(p) + residual_modulated(p)
        found.append([*outputs, *(g for g in gradients_of(outputs, p.leaves) if g is not None)])
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_keep_torchs_contract() -> None:
    p = Problem([3, 0, 5], 6)
    shift, scale, gate = (part.contiguous() for part in p.modulation.detach().chunk(3, dim=1))
    scale.requires_grad_()
    operators = torch.ops.trellis_kernels
    check = torch.library.opcheck
    check(operators.layer_norm.default, (p.x, scale, shift, p.offsets, EPS, 1.0))
    check(operators.layer_norm.default, (p.x, None, None, None, EPS, 0.0))
    check(operators.residual_layer_norm.default, (p.x, p.update, gate, scale, shift, p.offsets, EPS, 1.0))
    check(operators.gated_residual.default, (p.x, p.update, gate, p.offsets))
    qkv, *gammas = head_inputs(4, 2, 3)
    check(operators.head_rms_norm.default, (qkv, *gammas, 2))
    statistics = torch.randn(8), torch.rand(8) + 0.5
    inputs = [tensor.detach() for tensor in (p.update, p.x, scale)]
    heads = [tensor.detach() for tensor in (qkv[:, :2].clone(), qkv, *gammas)]
    quick = ("test_schema", "test_faketensor")
    check(operators.layer_norm_backward.default, (*inputs, p.offsets, *statistics, 1.0), test_utils=quick)
    check(operators.layer_norm_backward.default, (*inputs[:2], None, None, *statistics, 0.0), test_utils=quick)
    check(operators.gated_residual_backward.default, (*inputs[:2], gate, p.offsets), test_utils=quick)
    check(operators.head_rms_norm_backward.default, tuple(heads), test_utils=quick)


def test_compiles_without_breaks_in_both_directions() -> None:
    torch.compiler.reset()

    def chain(p: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
        x, update, modulation, weight, bias = p
        shift, scale, gate = modulation.chunk(3, dim=1)
        hidden = modulated_layer_norm(x, scale, shift, offsets, eps=EPS)
        total, hidden = residual_layer_norm(
            hidden, update, offsets=offsets, gate=gate, weight=weight, bias=bias, eps=EPS
        )
        heads = qk_rms_norm(hidden.view(-1, 3, 2, 2), *weight.view(3, 2, 2)[:2]).flatten(1)
        return gated_residual(total[:, :8], heads, gate[:, :8], offsets)

    p = Problem([3, 0, 5], 12)
    out = torch.compile(chain, fullgraph=True, backend="aot_eager")(tuple(p.leaves), p.offsets)
    expected = chain(tuple(p.leaves), p.offsets)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients_of((out,), p.leaves), gradients_of((expected,), p.leaves))


X, ROW, INTS = torch.zeros(4, 3), torch.zeros(1, 3), torch.tensor([0, 4], dtype=torch.int32)
TWO = torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_norm(X[0], eps=EPS), ValueError, r"x must be \[N, C\]; got \[3\]"),
        (lambda: layer_norm(X.int(), eps=EPS), TypeError, "x must be torch.float32 or .*; got torch.int32"),
        (lambda: layer_norm(X[:, :0], eps=EPS), ValueError, "x must have at least 1 channel; got 0"),
        (lambda: layer_norm(X, ROW[0], eps=EPS), ValueError, "weight and bias.* must be given together"),
        (lambda: layer_norm(X, ROW, ROW, eps=EPS), ValueError, r"weight and bias must be \[C\]; got \[1, 3\]"),
        (
            lambda: modulated_layer_norm(X, ROW[:, :2], ROW, INTS, eps=EPS),
            ValueError,
            r"weight_or_scale must be .* with .*C=3",
        ),
        (lambda: modulated_layer_norm(X, ROW.int(), ROW, INTS, eps=EPS), TypeError, "weight_or_scale must be"),
        (lambda: modulated_layer_norm(X, ROW, ROW, INTS.long(), eps=EPS), TypeError, "offsets must be torch.int32"),
        (
            lambda: modulated_layer_norm(X, X, X, TWO, eps=EPS),
            ValueError,
            "scale must have a row for each of 2 segments; got 4",
        ),
        (
            lambda: modulated_layer_norm(X, ROW, ROW, INTS - 1, eps=EPS),
            ValueError,
            "offsets must be non-decreasing from 0 to 4; got -1 to 3",
        ),
        (
            lambda: gated_residual(X, X, ROW, torch.tensor([0, 9, 4]).int()),
            ValueError,
            "offsets must be non-decreasing from 0 to 4",
        ),
        (
            lambda: gated_residual(X, X[:2], ROW, INTS),
            ValueError,
            r"update must be \[N, C\] with N=4, C=3",
        ),
        (lambda: gated_residual(X, X, X, TWO), ValueError, "gate must have a row for each of 2 segments; got 4"),
        (
            lambda: residual_layer_norm(X, X, weight=ROW[0], bias=ROW[0], scale=ROW, shift=ROW, eps=EPS),
            ValueError,
            "weight and bias or scale and shift, not both",
        ),
        (lambda: qk_rms_norm(X[:, :, None, None], ROW, ROW), ValueError, r"query_gamma must be \[H, D\]"),
        (lambda: head_rms_norm(X[:, None], ROW.long()), TypeError, "gamma must be torch.float32"),
    ],
)
def test_says_what_is_wrong(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_reference_says_what_is_wrong_with_offsets() -> None:
    with use_reference(), pytest.raises(ValueError, match="offsets must be non-decreasing from 0 to 4; got 0 to 3"):
        gated_residual(X, X, ROW, torch.tensor([0, 3]).int())


def test_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer_norm(x, eps=EPS).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of the normalisations"):
        gradient.sum().backward()


def test_non_contiguous_rows_are_as_good_as_contiguous_ones() -> None:
    p = Problem([3, 4], 8)
    turned = p.x.detach().T.contiguous().T
    shift, scale, gate = p.modulation.detach().chunk(3, dim=1)
    out = modulated_layer_norm(turned, scale, shift, p.offsets, eps=EPS)
    assert torch.equal(out, modulated(p)[0])
    out = gated_residual(turned, turned, gate, p.offsets)
    torch.testing.assert_close(out, turned + gate[p.index] * turned)
