"""Latent flow: a U-shaped diffusion transformer on the active voxels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from trellis.models.structure_flow import FlowConfig, FlowModel, initialise_flow_
from trellis.nn.block import modulation_layer
from trellis.nn.context import Context
from trellis.nn.conv import SparseResBlock, zero_
from trellis.nn.embedding import TimestepEmbedder, position_embedding
from trellis.nn.sparse import SparseTensor


@dataclass(frozen=True, kw_only=True)
class LatentFlowConfig(FlowConfig):
    """The flow arguments and those of the convolutional ends.

    Args:
        num_io_res_blocks: residual blocks at each end.
        io_block_channels: width of the ends, or None for none (then `patch_size` has no effect).
        use_skip_connection: concatenate the input blocks' features in the output blocks.
    """

    num_io_res_blocks: int = 2
    io_block_channels: list[int] | None = None
    use_skip_connection: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_rms_norm_cross:
            raise ValueError("qk_rms_norm_cross is not available in the latent flow: no official model has it")
        if self.io_block_channels is not None:
            if len(self.io_block_channels) != 1:
                raise ValueError(f"io_block_channels must have one entry; got {self.io_block_channels}")
            if self.share_mod:
                raise ValueError("share_mod cannot be combined with io_block_channels")
            if self.patch_size != 2:
                raise ValueError(f"patch_size must be 2 with io_block_channels; got {self.patch_size}")


class LatentFlow(FlowModel):
    """``model(x, t [B] in [0, 1000], cond [B, L, Cc]) -> velocity`` on the voxels of the SparseTensor `x`."""

    def __init__(self, config: LatentFlowConfig) -> None:
        super().__init__()
        self.config: LatentFlowConfig = config
        width, depth = config.model_channels, config.num_io_res_blocks
        self.torso = ("input_blocks", "blocks", "out_blocks") if config.io_block_channels else ("blocks",)
        self.t_embedder = TimestepEmbedder(width)
        if config.share_mod:
            self.adaLN_modulation = modulation_layer(width)
        edge = config.io_block_channels[0] if config.io_block_channels else width
        self.input_layer = nn.Linear(config.in_channels, edge)
        self.blocks = nn.ModuleList(config.block() for _ in range(config.num_blocks))
        self.out_layer = nn.Linear(edge, config.out_channels)
        initialised_last: list[SparseResBlock] = []
        if config.io_block_channels:
            skip = 2 if config.use_skip_connection else 1
            self.input_blocks = nn.ModuleList(
                [SparseResBlock(edge, edge, width) for _ in range(depth - 1)]
                + [SparseResBlock(edge, width, width, "down")]
            )
            self.out_blocks = nn.ModuleList(
                [SparseResBlock(skip * width, edge, width, "up")]
                + [SparseResBlock(skip * edge, edge, width) for _ in range(depth - 1)]
            )
            initialised_last = [*self.input_blocks, *self.out_blocks]
        initialise_flow_(self)
        for block in initialised_last:
            zero_(block.conv2)

    def forward(self, x: SparseTensor, t: Tensor, cond: Tensor | Context) -> SparseTensor:
        config, dtype = self.config, self.torso_dtype
        timestep = self.t_embedder(t)
        if config.share_mod:
            timestep = self.adaLN_modulation(timestep)
        timestep = timestep.to(dtype)
        hidden = x.with_feats(self.input_layer(x.feats).to(dtype))
        skips: list[SparseTensor] = []
        if config.io_block_channels:
            for block in self.input_blocks:
                hidden = block(hidden, timestep)
                skips.append(hidden)
        position = position_embedding(hidden.coords[:, 1:], config.model_channels).to(dtype)
        feats = self.run_blocks(hidden.feats + position, hidden.segments, timestep, cond)
        hidden = hidden.with_feats(feats)
        if config.io_block_channels:
            for block in self.out_blocks:
                skip = skips.pop()
                if config.use_skip_connection:
                    hidden = hidden.with_feats(torch.cat([hidden.feats, skip.feats], dim=1))
                hidden = block(hidden, timestep, onto=x)
        feats = layer_norm(hidden.feats, hidden.feats.shape[-1:]).to(x.feats.dtype)  # half precision here (trap 15)
        return x.with_feats(self.out_layer(feats))
