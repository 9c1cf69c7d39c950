"""Structure VAE: occupancy 64^3 <-> latent 8 x 16^3, dense convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trellis.models.config import Model, ModelConfig
from trellis.nn.conv import Downsample3d, ResBlock3d, Upsample3d
from trellis.nn.norm import ChannelLayerNorm, GroupNorm


@dataclass(frozen=True, kw_only=True)
class StructureEncoderConfig(ModelConfig):
    """See `StructureEncoder`; `channels` go from fine to coarse."""

    in_channels: int
    latent_channels: int
    num_res_blocks: int
    channels: list[int]
    num_res_blocks_middle: int = 2
    norm_type: str = "layer"


@dataclass(frozen=True, kw_only=True)
class StructureDecoderConfig(ModelConfig):
    """See `StructureDecoder`; `channels` go from coarse to fine."""

    out_channels: int
    latent_channels: int
    num_res_blocks: int
    channels: list[int]
    num_res_blocks_middle: int = 2
    norm_type: str = "layer"


def _out_norm(norm_type: str, channels: int) -> nn.Module:
    if norm_type == "layer":
        return ChannelLayerNorm(channels)
    if norm_type == "group":
        return GroupNorm(32, channels)
    raise ValueError(f"norm_type must be 'layer' or 'group'; got {norm_type!r}")


class StructureEncoder(Model):
    """``[B, 1, R, R, R]`` occupancy in {0, 1} -> mean and log-variance, each ``[B, latent_channels, r, r, r]``.

    r is ``R / 2^(levels - 1)``: 64 -> 16 with the official three levels.
    """

    torso = ("blocks", "middle_block")

    def __init__(self, config: StructureEncoderConfig) -> None:
        super().__init__()
        self.config: StructureEncoderConfig = config
        widths = config.channels
        self.input_layer = nn.Conv3d(config.in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.blocks.extend(ResBlock3d(width) for _ in range(config.num_res_blocks))
            if level + 1 < len(widths):
                self.blocks.append(Downsample3d(width, widths[level + 1]))
        self.middle_block = nn.Sequential(*(ResBlock3d(widths[-1]) for _ in range(config.num_res_blocks_middle)))
        self.out_layer = nn.Sequential(
            _out_norm(config.norm_type, widths[-1]),
            nn.SiLU(),
            nn.Conv3d(widths[-1], 2 * config.latent_channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.input_layer(x).to(self.torso_dtype)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.middle_block(hidden).to(x.dtype)
        mean, logvar = self.out_layer(hidden).chunk(2, dim=1)
        return mean, logvar


class StructureDecoder(Model):
    """``[B, latent_channels, r, r, r]`` -> occupancy logits ``[B, 1, R, R, R]``; a voxel is occupied above 0."""

    torso = ("blocks", "middle_block")

    def __init__(self, config: StructureDecoderConfig) -> None:
        super().__init__()
        self.config: StructureDecoderConfig = config
        widths = config.channels
        self.input_layer = nn.Conv3d(config.latent_channels, widths[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResBlock3d(widths[0]) for _ in range(config.num_res_blocks_middle)))
        self.blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.blocks.extend(ResBlock3d(width) for _ in range(config.num_res_blocks))
            if level + 1 < len(widths):
                self.blocks.append(Upsample3d(width, widths[level + 1]))
        self.out_layer = nn.Sequential(
            _out_norm(config.norm_type, widths[-1]),
            nn.SiLU(),
            nn.Conv3d(widths[-1], config.out_channels, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.middle_block(self.input_layer(z).to(self.torso_dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return self.out_layer(hidden.to(z.dtype))


def occupied_coords(logits: Tensor, count: int | None = None) -> Tensor:
    """``[B, 1, R, R, R]`` logits -> ``[N, 4]`` int32 batch, x, y, z of the occupied voxels, lexicographic.

    Args:
        logits: occupied above 0.
        count: N where it is known; then the host need not wait for a GPU to count them.
    """
    occupied = logits[:, 0] > 0
    return (torch.nonzero(occupied) if count is None else torch.nonzero_static(occupied, size=count)).int()
