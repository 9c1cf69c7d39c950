"""The transformer blocks of every model, on packed sequences: dense grids and sparse voxels are the same to them."""

from __future__ import annotations

from torch import Tensor, nn

from trellis.nn.attention import CrossAttention, SelfAttention, Windows
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
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


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
        self, x: Tensor, segments: Segments, timestep: Tensor, context: Tensor, context_segments: Segments
    ) -> Tensor:
        """``[N, C] -> [N, C]``.

        Args:
            x: ``[N, C]`` tokens of B sequences, end to end.
            segments: the B sequences of `x`.
            timestep: ``[B, C]`` embedding of each sequence's timestep, or ``[B, 6C]`` shared modulation.
            context: ``[M, Cc]`` conditioning tokens, end to end.
            context_segments: the B sequences of `context`.
        """
        modulation = timestep if self.shared_modulation else self.adaLN_modulation(timestep)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation.chunk(6, dim=-1)
        x = x + per_row(gate1, segments) * self.self_attn(modulate(self.norm1(x), shift1, scale1, segments), segments)
        x = x + self.cross_attn(self.norm2(x), segments, context, context_segments)
        return x + per_row(gate3, segments) * self.mlp(modulate(self.norm3(x), shift3, scale3, segments))


def modulation_layer(channels: int, chunks: int = 6) -> nn.Sequential:
    """``[B, C] -> [B, chunks * C]``, zero at initialisation."""
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, chunks * channels))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """``x * (1 + scale) + shift`` with the ``[B, C]`` values of each row's sequence."""
    return x * (1 + per_row(scale, segments)) + per_row(shift, segments)


def per_row(value: Tensor, segments: Segments) -> Tensor:
    """``[B, C]`` -> something that broadcasts over ``[N, C]``; for one sequence without a copy."""
    return value if value.shape[0] == 1 else value[segments.index]
