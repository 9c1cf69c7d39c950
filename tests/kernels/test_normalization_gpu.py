"""The GPU kernels of normalization: parity, an independent truth, the error rule, compilation ahead of time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.test_normalization import (
    EPS,
    EVERY_FORM,
    TOLERANCE,
    Problem,
    by_normalize,
    by_torch,
    check_against_reference,
    gated_affine,
    gradients_of,
    head_inputs,
    modulated,
    offsets_of,
    residual_modulated,
)
from tests.support import aot
from tests.support.backends import TRITON_BACKENDS
from trellis_kernels import (
    gated_residual,
    head_rms_norm,
    layer_norm,
    modulated_layer_norm,
    qk_rms_norm,
    use_reference,
)
from trellis_kernels.normalization.triton import MAX_CHANNELS, tile_of

Form = Callable[[Problem], tuple[Tensor, ...]]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = [  # a tile has 1024 elements or one row
    pytest.param([0], 8, SINGLE, id="nothing"),
    pytest.param([1], 1, SINGLE, id="one"),
    pytest.param([3, 0, 70, 1], 20, SINGLE, id="ragged, one empty"),
    pytest.param([9, 40], 130, HALF, id="several slices, float16"),
    pytest.param([4, 7], 64, BRAIN, id="bfloat16"),
]


@TRITON_BACKENDS
@EVERY_FORM
@pytest.mark.parametrize(("lengths", "channels", "dtype"), CASES)
def test_agrees_with_reference_in_both_directions(
    backend: str, form: Form, lengths: list[int], channels: int, dtype: torch.dtype
) -> None:
    check_against_reference(form, Problem(lengths, channels, dtype))


@TRITON_BACKENDS
@pytest.mark.parametrize("channels", [1024, 1280])
def test_wide_rows_are_what_torch_computes(backend: str, channels: int) -> None:
    p = Problem([3, 2], channels)
    for form in (gated_affine, residual_modulated):
        for out, expected in zip(form(p), by_torch(p, form), strict=True):
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@TRITON_BACKENDS
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (21, 3, 20), (9, 2, 64)], ids=str)
@pytest.mark.parametrize(("with_value", "dtype"), [(False, HALF), (True, SINGLE)])
def test_heads_agree_with_reference_and_torch(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, with_value: bool
) -> None:
    qkv, *gammas = head_inputs(*shape, dtype)
    out = qk_rms_norm(qkv, *gammas, with_value=with_value)
    gradients = gradients_of((out,), [qkv, *gammas])
    with use_reference():
        expected = qk_rms_norm(qkv, *gammas, with_value=with_value)
        expected_gradients = gradients_of((expected,), [qkv, *gammas])
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(
        out[:, 1].double(), by_normalize(qkv[:, 1].double(), gammas[1].double()), rtol=1e-3, atol=2e-3
    )
    tolerance = TOLERANCE[dtype] | {"atol": 20 * TOLERANCE[dtype]["atol"]}
    torch.testing.assert_close(gradients, expected_gradients, **tolerance)


@TRITON_BACKENDS
def test_strided_heads_and_heads_of_zeros(backend: str) -> None:
    kv, gamma, _ = head_inputs(9, 2, 8)
    torch.testing.assert_close(head_rms_norm(kv[:, 1], gamma), by_normalize(kv[:, 1], gamma), **TOLERANCE[SINGLE])
    x = torch.zeros(2, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(head_rms_norm(x, torch.ones(1, 4)).sum(), x)
    torch.testing.assert_close(gradient, torch.full((2, 1, 4), 2e12))


@TRITON_BACKENDS
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(backend: str, dtype: torch.dtype) -> None:
    """And of the gradients at most three times; both against float64."""
    p = Problem([20, 13], 96, dtype)
    shift, scale, _ = p.modulation.chunk(3, dim=1)
    norm = torch.nn.functional.layer_norm(p.x.float(), (96,), eps=EPS).to(dtype)
    chain = (norm * (1 + scale[p.index]) + shift[p.index],)
    truth = by_torch(p, modulated)
    ours = modulated(p)
    assert error(ours[0], truth[0]) <= 2 * error(chain[0], truth[0])
    leaves = [p.x, p.modulation]
    for gradient, torchs, true in zip(*(gradients_of(out, leaves) for out in (ours, chain, truth)), strict=True):
        assert gradient is not None
        assert torchs is not None
        assert true is not None
        assert error(gradient, true) <= 3 * error(torchs, true) + 1e-6


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.detach().double() - truth.detach().double()).norm())


@TRITON_BACKENDS
def test_sums_do_not_change_from_call_to_call(backend: str) -> None:
    p = Problem([70, 3], 40)
    first, second = (gradients_of(gated_affine(p), p.leaves) for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("bounds", [[-7, 900, 5], [9, 2, -3], [0, 0, 0]])
def test_no_offset_makes_a_kernel_leave_its_tensors(backend: str, bounds: list[int]) -> None:
    """Nothing checks them on a GPU. Each row then has some segment's values, and rows in no segment no gradient."""
    x, own = torch.randn(5, 24, requires_grad=True), torch.tensor([[1.0], [2.0]]).repeat(1, 24).requires_grad_()
    out = gated_residual(x, x.detach(), own, torch.tensor(bounds, dtype=torch.int32))
    chosen = (out.detach() / x.detach() - 1).round()
    assert set(chosen.flatten().tolist()) <= {1.0, 2.0}
    modulated_layer_norm(x, own, own, torch.tensor(bounds, dtype=torch.int32), eps=EPS).sum().backward()


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_says_what_a_gpu_does_not_have(backend: str) -> None:
    with pytest.raises(TypeError, match=r"x must be torch.float16, .* on a GPU; got torch.float64"):
        layer_norm(torch.zeros(2, 3, dtype=torch.float64), eps=EPS)
    with pytest.raises(ValueError, match="x must have at most 32768 channels on a GPU; got 32769"):
        layer_norm(torch.zeros(1, MAX_CHANNELS + 1), eps=EPS)
    gate = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="gate must be"):
        gated_residual(torch.zeros(2, 3), torch.zeros(2, 3), gate, offsets_of([2]))


def test_tiles_are_powers_of_two_that_hold_a_row() -> None:
    for width in (1, 3, 64, 80, 128, 768, 1024, 1280, 2048, MAX_CHANNELS):
        rows, columns, warps = tile_of(width)
        assert columns >= width > columns // 2
        assert rows * columns >= 1024
        assert all(n & (n - 1) == 0 for n in (rows, columns, warps))
        assert 4 <= warps <= 32


@pytest.mark.aot
def test_compiled_for_each_architecture_without_spills() -> None:
    found = aot.compile_launches("tests.kernels.aot_normalization:launches")
    aot.check_limits(found)
    assert {row.kernel for row in found} == {
        "rows_forward", "norm_backward", "gate_backward", "heads_forward", "heads_backward"
    }  # fmt: skip
    for row in found:
        assert row.registers <= 128, row  # half of the warps a multiprocessor can hold, or more
