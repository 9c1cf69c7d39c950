"""CPU launch. The kernels are csrc/cpu/normalization*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype


def layer_norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, offsets: Tensor | None, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, *outputs = _layer_norm(x, None, None, gain, shift, offsets, eps, unit)
    return outputs[0], outputs[1], outputs[2]


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _layer_norm(x, update, gate, gain, shift, offsets, eps, unit)


def _layer_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = compute_dtype(x.dtype), x.shape[0]
    total = x.new_empty(0 if update is None else rows, x.shape[1], dtype=dtype)
    out, mean, rstd = (x.new_empty(shape, dtype=dtype) for shape in (x.shape, (rows,), (rows,)))
    inputs = _widened(x, update, gate, gain, shift)
    _launch(_cpu.layer_norm, *inputs, _bounds(offsets, x), eps, unit, total, out, mean, rstd)
    return total.to(x.dtype), out.to(x.dtype), mean, rstd


def layer_norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    gain: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, wide, wide_gain = _widened(out_gradient, x, gain)
    gradients = [torch.empty_like(tensor) for tensor in (wide, wide_gain, wide_gain)]
    bounds, mean, rstd = _bounds(offsets, x), mean.contiguous(), rstd.contiguous()
    _launch(_cpu.layer_norm_backward, upstream, wide, wide_gain, bounds, mean, rstd, unit, *gradients)
    own = x.dtype if gain is None else gain.dtype
    return gradients[0].to(x.dtype), gradients[1].to(own), gradients[2].to(own)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape, dtype=compute_dtype(x.dtype))
    _launch(_cpu.gated_residual, *_widened(x, update, gate), _bounds(offsets, x), out)
    return out.to(x.dtype)


def gated_residual_backward(
    out_gradient: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    upstream, wide, wide_gate = _widened(out_gradient, update, gate)
    gradients = torch.empty_like(wide), torch.empty_like(wide_gate)
    bounds = _bounds(offsets, update)
    _launch(_cpu.gated_residual_backward, upstream, wide, wide_gate, bounds, *gradients)
    return gradients[0].to(update.dtype), gradients[1].to(gate.dtype)


def head_rms_norm(x: Tensor, gamma: Tensor, second_gamma: Tensor | None, parts: int) -> Tensor:
    rows, _, heads, width = x.shape
    out = x.new_empty(rows, parts, heads, width, dtype=compute_dtype(x.dtype))
    (wide,) = _widened(x)
    _launch(_cpu.head_rms_norm, wide, _gammas(gamma, second_gamma, wide), out)
    return out.to(x.dtype)


def head_rms_norm_backward(
    out_gradient: Tensor, x: Tensor, gamma: Tensor, second_gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, wide = _widened(out_gradient, x)
    gammas = _gammas(gamma, second_gamma, wide)
    gradients = torch.empty_like(wide), torch.empty_like(gammas)
    _launch(_cpu.head_rms_norm_backward, upstream, wide, gammas, *gradients)
    sums = gradients[1].to(gamma.dtype)
    second = sums.new_empty(0, *gamma.shape[1:]) if second_gamma is None else sums[1].clone()
    return gradients[0].to(x.dtype), sums[0].clone(), second


def _launch(kernel: Callable[..., None], *arguments: Any) -> None:
    kernel(*arguments, torch.get_num_threads())


def _widened(first: Tensor, *others: Tensor | None) -> list[Tensor]:
    """All in the dtype of the arithmetic; what is absent as no rows."""
    dtype = compute_dtype(first.dtype)
    absent = first.new_empty(0, first.shape[1], dtype=dtype) if None in others else None
    wide = (absent if tensor is None else tensor.to(dtype).contiguous() for tensor in (first, *others))
    return [tensor for tensor in wide if tensor is not None]


def _bounds(offsets: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32) if offsets is None else offsets.contiguous()


def _gammas(gamma: Tensor, second_gamma: Tensor | None, like: Tensor) -> Tensor:
    return torch.stack([gamma] if second_gamma is None else [gamma, second_gamma]).to(like.dtype)
