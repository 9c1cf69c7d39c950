"""Sinusoidal embeddings of positions and timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def position_embedding(coords: Tensor, channels: int) -> Tensor:
    """Sines and cosines of voxel coordinates, axis by axis.

        per axis: [sin(c w_0) ... sin(c w_F-1), cos(c w_0) ... cos(c w_F-1)],  w_i = 10000^(-i/F),  F = channels // 6

    Args:
        coords: ``[N, 3]`` integer voxel indices x, y, z.
        channels: C; what is left of it after ``6F`` is zeros.

    Returns:
        ``[N, C]`` float32.
    """
    count = channels // 6
    frequencies = 1.0 / 10000 ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    angles = coords[:, :, None].float() * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return pad(embedding, (0, channels - 6 * count))


def timestep_frequencies(timestep: Tensor, dim: int) -> Tensor:
    """``[B]`` timesteps in [0, 1000] -> ``[B, dim]`` float32: cosines, then sines, of geometric frequencies."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequencies
    return pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """``[B]`` timesteps in [0, 1000] -> ``[B, C]``, always in the precision of its own (float32) weights."""

    def __init__(self, channels: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, timestep: Tensor) -> Tensor:
        weight = next(self.mlp.parameters())
        return self.mlp(timestep_frequencies(timestep, self.frequency_dim).to(weight.dtype))
