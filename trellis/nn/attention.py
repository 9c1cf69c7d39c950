"""Multi-head attention over packed sequences: one implementation for dense grids, sparse voxels and conditioning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

import trellis_kernels
from trellis.nn.norm import HeadRMSNorm
from trellis.nn.segments import Segments
from trellis.nn.sparse import VoxelGrid

AttentionMode = Literal["full", "swin", "shift_window", "shift_sequence", "shift_order"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Attention groups that are not contiguous rows: ``order [N]`` int32 lists rows group by group, split at `offsets`.

    Args:
        order: ``[N]`` int32, a permutation of the rows.
        offsets: ``[W + 1]`` int32, where each group starts in `order`.
    """

    order: Tensor
    offsets: Tensor


def cubic_windows(grid: VoxelGrid, window_size: int, shift: int) -> Windows:
    """Cubes of ``window_size^3`` voxels, displaced by `shift`. For `VoxelGrid.derive`."""
    return Windows(*trellis_kernels.window_partition(grid.coords, window_size, shift))


def curve_windows(
    grid: VoxelGrid, window_size: int, curve: str, transposed: bool, coord_shift: int, shift: int
) -> Windows:
    """Runs of `window_size` voxels along a space-filling curve. For `VoxelGrid.derive`.

    Args:
        grid: the voxels.
        window_size: voxels per run.
        curve: "morton" or "hilbert".
        transposed: walk the curve with x and y exchanged.
        coord_shift: added to the coordinates before the curve is walked.
        shift: the first run of each sample is shorter by this many voxels.
    """
    code = {"morton": trellis_kernels.morton_order, "hilbert": trellis_kernels.hilbert_order}[curve]
    shifted = torch.cat([grid.coords[:, :1], grid.coords[:, 1:] + coord_shift], dim=1)
    order = code(shifted, transposed)
    starts, position = [], 0
    for length in grid.segments.lengths:
        starts.append(position)
        first = window_size - shift
        starts.extend(range(position + first, position + length, window_size))
        position += length
    offsets = torch.tensor([*sorted({s for s in starts if s < position}), position], dtype=torch.int32)
    return Windows(order.int(), offsets.to(grid.coords.device, non_blocking=True))


def attention_layout(grid: VoxelGrid, mode: AttentionMode, window_size: int | None, block: int) -> Segments | Windows:
    """Which rows attend to which in block number `block` of a trunk: alternate blocks shift their windows.

    Source:
        Section 2.4 of the TRELLIS facts (official `attn_mode`); "swin" is what every released model uses.
    """
    if mode == "full":
        return grid.segments
    if mode not in get_args(AttentionMode):
        raise ValueError(f"attn_mode must be one of {', '.join(get_args(AttentionMode))}; got {mode!r}")
    if window_size is None:
        raise ValueError(f"attn_mode {mode!r} needs window_size; got None")
    odd = block % 2
    if mode == "swin":
        return grid.derive(cubic_windows, window_size, odd * (window_size // 2))
    if mode == "shift_window":
        return grid.derive(curve_windows, window_size, "morton", False, 16 * odd, 0)
    if mode == "shift_sequence":
        return grid.derive(curve_windows, window_size, "morton", False, 0, odd * (window_size // 2))
    return grid.derive(curve_windows, window_size, ("morton", "hilbert")[block % 4 // 2], bool(odd), 0, 0)


class SelfAttention(nn.Module):
    """``[N, C] -> [N, C]``. Parameter names are those of the official checkpoints."""

    def __init__(self, channels: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_rms_norm = HeadRMSNorm(num_heads, channels // num_heads)
            self.k_rms_norm = HeadRMSNorm(num_heads, channels // num_heads)

    def forward(self, x: Tensor, layout: Segments | Windows) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1))
        normed = qkv
        if self.qk_norm:
            gammas = self.q_rms_norm.gamma, self.k_rms_norm.gamma
            normed = trellis_kernels.qk_rms_norm(qkv, *gammas, with_value=isinstance(layout, Windows))
        if isinstance(layout, Windows):
            out = trellis_kernels.windowed_attention(normed, layout.order, layout.offsets)
        else:
            query, key, value = normed[:, 0], normed[:, 1], qkv[:, 2]
            out = trellis_kernels.varlen_attention(query, key, value, layout.offsets, layout.offsets)
        return self.to_out(out.flatten(1))


class KeyValue(NamedTuple):
    """What a cross-attention reads of its context: it depends on the context alone."""

    key: Tensor
    value: Tensor


class CrossAttention(nn.Module):
    """``[N, C]`` attends to ``[M, Cc] -> [N, C]``."""

    def __init__(self, channels: int, context_channels: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_rms_norm = HeadRMSNorm(num_heads, channels // num_heads)
            self.k_rms_norm = HeadRMSNorm(num_heads, channels // num_heads)

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values ``[M, H, D]`` of a context ``[M, Cc]``."""
        key, value = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return KeyValue(self.k_rms_norm(key) if self.qk_norm else key, value)

    def forward(self, x: Tensor, segments: Segments, context: Tensor | KeyValue, context_segments: Segments) -> Tensor:
        query = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        key, value = context if isinstance(context, KeyValue) else self.key_value(context)
        if self.qk_norm:
            query = self.q_rms_norm(query)
        out = trellis_kernels.varlen_attention(query, key, value, segments.offsets, context_segments.offsets)
        return self.to_out(out.flatten(1))
