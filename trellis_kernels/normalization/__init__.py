"""Normalisation of rows and of attention heads, with the modulation, gates and residuals around it in a block.

Rows of B segments lie end to end and `offsets` says where each begins. What a segment has of its own - scale, shift,
gate of a timestep - is read from its ``[B, C]`` row: no ``[N, C]`` copy of it is made. In half precision all of an
operator is computed in float32 and rounded once, where separate torch operators would round after each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.normalization import reference
from trellis_kernels.operator import Operator
from trellis_kernels.precision import compute_dtype
from trellis_kernels.shapes import FLOATS, expect

__all__ = [
    "gated_residual",
    "head_rms_norm",
    "layer_norm",
    "modulated_layer_norm",
    "qk_rms_norm",
    "residual_layer_norm",
]

_KERNELS = {
    "cpu": "trellis_kernels.normalization.cpu",
    "cuda": "trellis_kernels.normalization.triton",
}


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """Normalise each row to mean 0 and variance 1, then apply an affine map if there is one.

        out[n] = (x[n] - mean(x[n])) / sqrt(var(x[n]) + eps) * weight + bias

    Args:
        x: ``[N, C]`` float.
        weight: ``[C]`` float. None: neither weight nor bias.
        bias: ``[C]``, dtype of `weight`.
        eps: added to the variance.

    Returns:
        ``[N, C]``, dtype of `x`.

    Raises:
        ValueError, TypeError: if a shape or dtype is not one of the above, or only one of weight and bias is given.

    Source:
        Ba et al. 2016, "Layer Normalization".
    """
    gain, shift = (None if values is None else _row("weight and bias", values) for values in (weight, bias))
    _expect_rows(x, gain, shift, None)
    out, _, _ = _layer_norm(x, gain, shift, None, eps, 0.0)
    return out


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, offsets: Tensor, *, eps: float) -> Tensor:
    """Normalise each row, then scale and shift it as its segment says.

        out[n] = (x[n] - mean(x[n])) / sqrt(var(x[n]) + eps) * (1 + scale[b]) + shift[b]        (n in segment b)

    Args:
        x: ``[N, C]`` float.
        scale: ``[B, C]`` float; its rows need not be contiguous to each other.
        shift: ``[B, C]``, dtype of `scale`.
        offsets: ``[B + 1]`` int32, non-decreasing from 0 to N: segment b is rows ``offsets[b] : offsets[b + 1]``.
        eps: added to the variance.

    Returns:
        ``[N, C]``, dtype of `x`.

    Raises:
        ValueError, TypeError: if a shape, dtype or offset is not one of the above (offsets on a GPU are not checked;
            no value of theirs makes a kernel read outside the tensors).

    Source:
        Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3.2 (adaLN).
    """
    _expect_rows(x, scale, shift, offsets)
    out, _, _ = _layer_norm(x, scale, shift, offsets, eps, 1.0)
    return out


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    *,
    offsets: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum for the next branch, in one pass.

        total = gated_residual(x, update, gate, offsets), or x + update without a gate
        out = layer_norm(total, weight, bias), or modulated_layer_norm(total, scale, shift, offsets)

    Args:
        x: ``[N, C]`` float, the residual stream.
        update: ``[N, C]``, dtype of `x`: what the branch adds.
        offsets: see `modulated_layer_norm`. None: all rows are one segment.
        gate: see `gated_residual`. None: the update is added as it is.
        weight: see `layer_norm`.
        bias: see `layer_norm`.
        scale: see `modulated_layer_norm`; not together with `weight`.
        shift: see `modulated_layer_norm`.
        eps: added to the variance.

    Returns:
        ``total [N, C]`` and ``out [N, C]``, dtype of `x`. In half precision `out` is made from the total before it is
            rounded (CPU) or after (GPU).

    Raises:
        ValueError, TypeError: if a shape, dtype or offset is not one of the above.
    """
    if weight is not None and scale is not None:
        raise ValueError("residual_layer_norm must be given weight and bias or scale and shift, not both")
    gain = scale if weight is None else _row("weight and bias", weight)
    moved = shift if bias is None else _row("weight and bias", bias)
    _expect_rows(x, gain, moved, offsets)
    expect(x=(x, "N C"), update=(update, "N C", x.dtype))
    if gate is not None:
        _expect_gate(x, gate, offsets)
    total, out, _, _ = _residual_layer_norm(x, update, gate, gain, moved, offsets, eps, float(weight is None))
    return total, out


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """``x + gate[b] * update`` with the gate of each row's segment.

    Args:
        x: ``[N, C]`` float.
        update: ``[N, C]``, dtype of `x`.
        gate: ``[B, C]`` float.
        offsets: see `modulated_layer_norm`.

    Returns:
        ``[N, C]``, dtype of `x`.

    Raises:
        ValueError, TypeError: if a shape, dtype or offset is not one of the above.
    """
    expect(x=(x, "N C", FLOATS), update=(update, "N C", x.dtype), offsets=(offsets, "B+1", torch.int32))
    _expect_gate(x, gate, offsets)
    return _gated_residual(x, update, gate, offsets)


def qk_rms_norm(qkv: Tensor, query_gamma: Tensor, key_gamma: Tensor, *, with_value: bool = False) -> Tensor:
    """Normalise the queries and keys of packed attention inputs, each head by its root mean square.

        out[n, 0, h] = qkv[n, 0, h] / max(|qkv[n, 0, h]|, 1e-12) * query_gamma[h] * sqrt(D); keys (part 1) likewise

    Args:
        qkv: ``[N, 3, H, D]`` float: query, key and value of each row.
        query_gamma: ``[H, D]`` float.
        key_gamma: ``[H, D]``, dtype of `query_gamma`.
        with_value: whether the result has the values, unchanged, as its third part.

    Returns:
        ``[N, 3, H, D]`` with the values, else ``[N, 2, H, D]``; dtype of `qkv`.

    Raises:
        ValueError, TypeError: if a shape or dtype is not one of the above.

    Source:
        Section 2.3 of the TRELLIS facts (official multi-head RMS norm); Dehghani et al. 2023 for the idea.
    """
    expect(
        qkv=(qkv, "N 3 H D", FLOATS),
        query_gamma=(query_gamma, "H D", FLOATS),
        key_gamma=(key_gamma, "H D", query_gamma.dtype),
    )
    return _head_rms_norm(qkv, query_gamma, key_gamma, 3 if with_value else 2)


def head_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """`qk_rms_norm` of one tensor: ``[N, H, D]`` with ``gamma [H, D]``.

    Raises:
        ValueError, TypeError: if a shape or dtype is not one of those of `qk_rms_norm`.
    """
    expect(x=(x, "N H D", FLOATS), gamma=(gamma, "H D", FLOATS))
    return _head_rms_norm(x.unsqueeze(1), gamma, None, 1).squeeze(1)


def _row(name: str, values: Tensor) -> Tensor:
    if values.ndim != 1:
        raise ValueError(f"{name} must be [C]; got {list(values.shape)}")
    return values.unsqueeze(0)


def _expect_rows(x: Tensor, gain: Tensor | None, shift: Tensor | None, offsets: Tensor | None) -> None:
    expect(x=(x, "N C", FLOATS))
    if x.shape[1] == 0:
        raise ValueError("x must have at least 1 channel; got 0")
    if gain is None or shift is None:
        if gain is not shift:
            raise ValueError("weight and bias, or scale and shift, must be given together; got only one of them")
        return
    expect(x=(x, "N C"), weight_or_scale=(gain, "B C", FLOATS), bias_or_shift=(shift, "B C", gain.dtype))
    if offsets is not None:
        expect(x=(x, "N C"), offsets=(offsets, "B+1", torch.int32))
    _expect_segments("scale", gain, offsets)


def _expect_gate(x: Tensor, gate: Tensor, offsets: Tensor | None) -> None:
    expect(x=(x, "N C"), gate=(gate, "B C", FLOATS))
    _expect_segments("gate", gate, offsets)


def _expect_segments(name: str, values: Tensor, offsets: Tensor | None) -> None:
    segments = 1 if offsets is None else offsets.shape[0] - 1
    if values.shape[0] != 1 and values.shape[0] != segments:
        raise ValueError(f"{name} must have a row for each of {segments} segments; got {values.shape[0]}")


_layer_norm = Operator(
    "layer_norm(Tensor x, Tensor? gain, Tensor? shift, Tensor? offsets, float eps, float unit)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm,
    kernels=_KERNELS,
)
_layer_norm_backward = Operator(
    "layer_norm_backward(Tensor out_gradient, Tensor x, Tensor? gain, Tensor? offsets, Tensor mean, Tensor rstd,"
    " float unit) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    kernels=_KERNELS,
)
_residual_layer_norm = Operator(
    "residual_layer_norm(Tensor x, Tensor update, Tensor? gate, Tensor? gain, Tensor? shift, Tensor? offsets,"
    " float eps, float unit) -> (Tensor total, Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.residual_layer_norm,
    kernels=_KERNELS,
)
_gated_residual = Operator(
    "gated_residual(Tensor x, Tensor update, Tensor gate, Tensor? offsets) -> Tensor",
    reference=reference.gated_residual,
    kernels=_KERNELS,
)
_gated_residual_backward = Operator(
    "gated_residual_backward(Tensor out_gradient, Tensor update, Tensor gate, Tensor? offsets) -> (Tensor, Tensor)",
    reference=reference.gated_residual_backward,
    kernels=_KERNELS,
)
_head_rms_norm = Operator(
    "head_rms_norm(Tensor x, Tensor gamma, Tensor? second_gamma, int parts) -> Tensor",
    reference=reference.head_rms_norm,
    kernels=_KERNELS,
)
_head_rms_norm_backward = Operator(
    "head_rms_norm_backward(Tensor out_gradient, Tensor x, Tensor gamma, Tensor? second_gamma)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.head_rms_norm_backward,
    kernels=_KERNELS,
)


@_layer_norm.fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    statistic = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@_layer_norm_backward.fake
def _(out_gradient: Tensor, x: Tensor, gain: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    own = x.new_empty(0, x.shape[1]) if gain is None else gain.new_empty(gain.shape)
    return x.new_empty(x.shape), own, torch.empty_like(own)


@_residual_layer_norm.fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    statistic = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@_gated_residual.fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@_gated_residual_backward.fake
def _(out_gradient: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    return update.new_empty(update.shape), gate.new_empty(gate.shape)


@_head_rms_norm.fake
def _(x: Tensor, gamma: Tensor, second_gamma: Tensor | None, parts: int) -> Tensor:
    return x.new_empty(x.shape[0], parts, *x.shape[2:])


@_head_rms_norm_backward.fake
def _(out_gradient: Tensor, x: Tensor, gamma: Tensor, second_gamma: Tensor | None) -> tuple[Tensor, ...]:
    second = gamma.new_empty(0, *gamma.shape[1:]) if second_gamma is None else gamma.new_empty(gamma.shape)
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape), second


def _setup_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gain, _, offsets, _, ctx.unit = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gain, offsets, *output[1:])


def _differentiate_layer_norm(ctx: Any, out_gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return (None,) * 6
    return (*_norm_gradients(ctx.saved_tensors, ctx.unit, out_gradient), None, None, None)


def _norm_gradients(saved: tuple[Any, ...], unit: float, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, gain and shift."""
    x, gain, offsets, mean, rstd = saved
    gradients = _layer_norm_backward(out_gradient, x, gain, offsets, mean, rstd, unit)
    return gradients if gain is not None else (gradients[0], None, None)


def _setup_residual_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, update, gate, gain, _, offsets, _, ctx.unit = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if gate is None else update, gate, total, gain, offsets, mean, rstd)


def _differentiate_residual_layer_norm(
    ctx: Any, total_gradient: Tensor | None, out_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    update, gate, *saved = ctx.saved_tensors
    gain_gradient = shift_gradient = gate_gradient = None
    if out_gradient is not None:
        through, gain_gradient, shift_gradient = _norm_gradients(tuple(saved), ctx.unit, out_gradient)
        assert through is not None
        total_gradient = through if total_gradient is None else total_gradient + through
    if total_gradient is None:
        return (None,) * 8
    update_gradient = total_gradient
    if gate is not None:
        update_gradient, gate_gradient = _gated_residual_backward(total_gradient, update, gate, saved[2])
    return total_gradient, update_gradient, gate_gradient, gain_gradient, shift_gradient, None, None, None


def _setup_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_gated_residual(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    return out_gradient, *_gated_residual_backward(out_gradient, *ctx.saved_tensors), None


def _setup_head_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_head_rms_norm(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, second_gamma = ctx.saved_tensors
    gradient, first, second = _head_rms_norm_backward(out_gradient, x, gamma, second_gamma)
    return gradient, first, None if second_gamma is None else second, None


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the second derivative of the normalisations is not implemented")


_layer_norm.autograd(_differentiate_layer_norm, _setup_layer_norm)
_residual_layer_norm.autograd(_differentiate_residual_layer_norm, _setup_residual_layer_norm)
_gated_residual.autograd(_differentiate_gated_residual, _setup_gated_residual)
_head_rms_norm.autograd(_differentiate_head_rms_norm, _setup_head_rms_norm)
for _backward in (_layer_norm_backward, _gated_residual_backward, _head_rms_norm_backward):
    _backward.autograd(_refuse, _setup_nothing)
