"""The transformer blocks of every model, on packed sequences: dense grids and sparse voxels are the same to them."""

from __future__ import annotations

from torch import Tensor, nn

import trellis_kernels
from trellis.nn.attention import CrossAttention, KeyValue, SelfAttention, Windows
from trellis.nn.norm import LayerNorm
from trellis.nn.segments import Segments


class MLP(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU("tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TransformerBlock(nn.Module):
    """Pre-norm block without conditioning: the trunk of the latent encoder and decoders."""

    def __init__(self, channels: int, num_heads: int, *, mlp_ratio: float = 4.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, num_heads, qk_norm=qk_norm)
        self.mlp = MLP(channels, mlp_ratio)

    def forward(self, x: Tensor, layout: Segments | Windows) -> Tensor:
        """``[N, C] -> [N, C]``; rows attend as `layout` says."""
        x, hidden = self.norm2.after(x, self.attn(self.norm1(x), layout))
        return x + self.mlp(hidden)


class ModulatedBlock(nn.Module):
    """Pre-norm block with adaLN-zero modulation (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

    The cross-attention is neither modulated nor gated, and its norm is the only affine one.

    Args:
        channels: C, width of the residual stream.
        context_channels: Cc, width of the conditioning tokens.
        num_heads: attention heads; divides `channels`.
        mlp_ratio: hidden width of the MLP over `channels`.
        qk_norm: normalise queries and keys of the self-attention.
        qk_norm_cross: the same in the cross-attention.
        shared_modulation: the block receives ``[B, 6C]`` modulation instead of computing it from the timestep.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        shared_modulation: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm(channels, eps=1e-6)
        self.norm3 = LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(channels, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(channels, context_channels, num_heads, qk_norm=qk_norm_cross)
        self.mlp = MLP(channels, mlp_ratio)
        self.shared_modulation = shared_modulation
        if not shared_modulation:
            self.adaLN_modulation = modulation_layer(channels)

    def forward(
        self, x: Tensor, segments: Segments, timestep: Tensor, context: Tensor | KeyValue, context_segments: Segments
    ) -> Tensor:
        """``[N, C] -> [N, C]``.

        Args:
            x: ``[N, C]`` tokens of B sequences, end to end.
            segments: the B sequences of `x`.
            timestep: ``[B, C]`` embedding of each sequence's timestep, or ``[B, 6C]`` shared modulation.
            context: ``[M, Cc]`` conditioning tokens, end to end, or what ``cross_attn.key_value`` made of them.
            context_segments: the B sequences of `context`.
        """
        modulation = timestep if self.shared_modulation else self.adaLN_modulation(timestep)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation.chunk(6, dim=-1)
        hidden = self.self_attn(self.norm1.modulated(x, scale1, shift1, segments), segments)
        x, hidden = self.norm2.after(x, hidden, segments, gate=gate1)
        hidden = self.cross_attn(hidden, segments, context, context_segments)
        x, hidden = self.norm3.after(x, hidden, segments, scale=scale3, shift=shift3)
        return trellis_kernels.gated_residual(x, self.mlp(hidden).to(x.dtype), gate3, segments.offsets)


def modulation_layer(channels: int, chunks: int = 6) -> nn.Sequential:
    """``[B, C] -> [B, chunks * C]``, zero at initialisation."""
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, chunks * channels))
