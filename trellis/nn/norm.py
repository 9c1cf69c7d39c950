"""Normalisation layers. All compute in float32 at least and return the dtype they were given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

import trellis_kernels
from trellis.nn.segments import Segments


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """LayerNorm of packed rows ``[N, C]``; parameters stay float32 in a half-precision model."""

    def forward(self, input: Tensor) -> Tensor:
        return trellis_kernels.layer_norm(input, self.weight, self.bias, eps=self.eps)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, segments: Segments) -> Tensor:
        """``norm(x) * (1 + scale) + shift``, ``[B, C]`` values for each row's sequence; for a norm without affine."""
        return trellis_kernels.modulated_layer_norm(x, scale, shift, segments.offsets, eps=self.eps)

    def after(
        self,
        x: Tensor,
        update: Tensor,
        segments: Segments | None = None,
        *,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``x + gate * update``, and this norm of it, modulated by `scale` and `shift` if they are given.

        Args:
            x: ``[N, C]`` residual stream.
            update: ``[N, C]`` what a branch adds to it.
            segments: the sequences of `x`, of which each has its gate, scale and shift.
            gate: ``[B, C]``; None: 1.
            scale: ``[B, C]``, for a norm without affine; None: no modulation.
            shift: ``[B, C]``, with `scale`.
        """
        return trellis_kernels.residual_layer_norm(
            x,
            update.to(x.dtype),
            offsets=None if segments is None else segments.offsets,
            gate=gate,
            weight=self.weight,
            bias=self.bias,
            scale=scale,
            shift=shift,
            eps=self.eps,
        )


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a dense ``[B, C, X, Y, Z]`` map, at each voxel."""

    def forward(self, input: Tensor) -> Tensor:
        x = widen(input).movedim(1, -1)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1).to(input.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a dense ``[B, C, X, Y, Z]`` map."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(widen(input), self.num_groups, self.weight, self.bias, self.eps).to(input.dtype)


class SparseGroupNorm(nn.GroupNorm):
    """GroupNorm of packed voxels ``[N, C]``: statistics per sample over the group's channels and all its voxels."""

    def forward(self, input: Tensor, segments: Segments) -> Tensor:  # type: ignore[override]
        samples = [self._normalise(sample) for sample in input.split(segments.lengths) if len(sample)]
        return samples[0] if len(samples) == 1 else torch.cat(samples) if samples else input

    def _normalise(self, sample: Tensor) -> Tensor:
        # In the layout of the voxels: torch's group_norm wants channels first, two copies of a large tensor.
        groups = widen(sample).unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(0, 2), correction=0, keepdim=True)
        normalised = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1)
        return torch.addcmul(self.bias, normalised, self.weight).to(sample.dtype)


class HeadRMSNorm(nn.Module):
    """Root-mean-square norm with a gain per head and channel (query-key normalisation), ``[N, H, D]``."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return trellis_kernels.head_rms_norm(x, self.gamma)
