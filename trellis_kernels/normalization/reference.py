"""What the normalisations of a transformer block mean, in plain PyTorch: float32 at least, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels.precision import compute_dtype

LEAST_NORM = 1e-12  # a head shorter than this is divided by this instead


def layer_norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, offsets: Tensor | None, eps: float, unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(compute_dtype(x.dtype))
    mean = wide.mean(1)
    centered = wide - mean[:, None]
    rstd = (centered.square().mean(1) + eps).rsqrt()
    out = centered * rstd[:, None]
    if gain is not None and shift is not None:
        segment = segment_of_rows(offsets, x)
        out = out * (unit + own_rows(gain, segment, out.dtype)) + own_rows(shift, segment, out.dtype)
    return out.to(x.dtype), mean, rstd


def layer_norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    gain: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = out_gradient.to(mean.dtype)
    normalised = (x.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    if gain is None:
        along, gain_gradient, shift_gradient = upstream, x.new_empty(0, x.shape[1]), x.new_empty(0, x.shape[1])
    else:
        segment = segment_of_rows(offsets, x)
        along = upstream * (unit + own_rows(gain, segment, mean.dtype))
        gain_gradient = sums_by_segment(upstream * normalised, segment, gain)
        shift_gradient = sums_by_segment(upstream, segment, gain)
    centered = along - along.mean(1, keepdim=True) - normalised * (along * normalised).mean(1, keepdim=True)
    return (rstd[:, None] * centered).to(x.dtype), gain_gradient, shift_gradient


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
    total = x + update if gate is None else gated_residual(x, update, gate, offsets)
    return total, *layer_norm(total, gain, shift, offsets, eps, unit)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) + own_rows(gate, segment_of_rows(offsets, x), dtype) * update.to(dtype)).to(x.dtype)


def gated_residual_backward(
    out_gradient: Tensor, update: Tensor, gate: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    upstream, segment = out_gradient.to(compute_dtype(update.dtype)), segment_of_rows(offsets, update)
    update_gradient = own_rows(gate, segment, upstream.dtype) * upstream
    return update_gradient.to(update.dtype), sums_by_segment(upstream * update, segment, gate)


def head_rms_norm(x: Tensor, gamma: Tensor, second_gamma: Tensor | None, parts: int) -> Tensor:
    gammas = _stacked(gamma, second_gamma, compute_dtype(x.dtype))
    out = x[:, :parts].to(gammas.dtype, copy=True)
    heads = out[:, : len(gammas)]
    norm = heads.norm(dim=-1, keepdim=True).clamp_min(LEAST_NORM)
    out[:, : len(gammas)] = heads / norm * gammas * x.shape[-1] ** 0.5
    return out.to(x.dtype)


def head_rms_norm_backward(
    out_gradient: Tensor, x: Tensor, gamma: Tensor, second_gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gammas = _stacked(gamma, second_gamma, compute_dtype(x.dtype))
    count, parts = len(gammas), out_gradient.shape[1]
    gradient = torch.zeros(x.shape, dtype=gammas.dtype, device=x.device)
    gradient[:, :parts] = out_gradient
    heads, upstream = x[:, :count].to(gammas.dtype), out_gradient[:, :count].to(gammas.dtype)
    norm = heads.norm(dim=-1, keepdim=True)
    scale = x.shape[-1] ** 0.5 / norm.clamp_min(LEAST_NORM)
    along = (upstream * gammas * heads).sum(-1, keepdim=True)
    projection = torch.where(norm > LEAST_NORM, along / norm.clamp_min(LEAST_NORM) ** 2, 0)
    gradient[:, :count] = scale * (upstream * gammas - heads * projection)
    sums = (upstream * heads * scale).sum(0).to(gamma.dtype)
    second = sums[1] if count == 2 else sums.new_empty(0, *gamma.shape[1:])
    return gradient.to(x.dtype), sums[0].clone(), second.clone()


def segment_of_rows(offsets: Tensor | None, x: Tensor) -> Tensor:
    """``[N]`` int64: which segment each row is in."""
    rows = torch.arange(x.shape[0], device=x.device)
    if offsets is None:
        return torch.zeros_like(rows)
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0] or bounds != sorted(bounds):
        raise ValueError(f"offsets must be non-decreasing from 0 to {x.shape[0]}; got {bounds[0]} to {bounds[-1]}")
    return torch.searchsorted(offsets[1:].long(), rows, right=True)


def own_rows(values: Tensor, segment: Tensor, dtype: torch.dtype) -> Tensor:
    """``[1 or B, C] -> [1 or N, C]``: the values of each row's segment."""
    return (values if values.shape[0] == 1 else values[segment]).to(dtype)


def sums_by_segment(values: Tensor, segment: Tensor, like: Tensor) -> Tensor:
    """``[N, C] -> [1 or B, C]``, as many rows as `like` has and in its dtype."""
    sums = torch.zeros(like.shape, dtype=values.dtype, device=values.device)
    index = torch.zeros_like(segment) if like.shape[0] == 1 else segment
    return sums.index_add(0, index, values).to(like.dtype)


def _stacked(gamma: Tensor, second_gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.stack([gamma] if second_gamma is None else [gamma, second_gamma]).to(dtype)
