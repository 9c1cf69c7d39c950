"""Structure flow: a diffusion transformer on the dense 16^3 structure latent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from trellis.models.config import Model, ModelConfig, initialise_
from trellis.nn.attention import KeyValue
from trellis.nn.block import ModulatedBlock, modulation_layer
from trellis.nn.context import Context
from trellis.nn.conv import patchify, unpatchify, zero_
from trellis.nn.embedding import TimestepEmbedder, position_embedding
from trellis.nn.segments import Segments


@dataclass(frozen=True, kw_only=True)
class FlowConfig(ModelConfig):
    """What the two flow models share; field names are the official constructor arguments.

    Args:
        resolution: voxels along each side of the latent grid.
        in_channels: channels of the latent.
        model_channels: width of the transformer.
        cond_channels: width of the conditioning tokens.
        out_channels: channels of the velocity.
        num_blocks: transformer blocks.
        num_heads: attention heads; None: ``model_channels // num_head_channels``.
        num_head_channels: head width when `num_heads` is None.
        mlp_ratio: hidden width of the MLPs over `model_channels`.
        patch_size: voxels per token along each axis.
        pe_mode: "ape" (absolute sinusoidal); the official "rope" was never trained and is refused.
        share_mod: one modulation layer for all blocks.
        qk_rms_norm: normalise queries and keys of the self-attention.
        qk_rms_norm_cross: the same in the cross-attention.
    """

    resolution: int
    in_channels: int
    model_channels: int
    cond_channels: int
    out_channels: int
    num_blocks: int
    num_heads: int | None = None
    num_head_channels: int | None = 64
    mlp_ratio: float = 4
    patch_size: int = 2
    pe_mode: str = "ape"
    share_mod: bool = False
    qk_rms_norm: bool = False
    qk_rms_norm_cross: bool = False

    def __post_init__(self) -> None:
        if self.pe_mode != "ape":
            raise ValueError(f"pe_mode must be 'ape'; got {self.pe_mode!r}")
        if self.model_channels % self.heads:
            raise ValueError(f"model_channels={self.model_channels} must be a multiple of num_heads={self.heads}")

    @property
    def heads(self) -> int:
        if self.num_heads is not None:
            return self.num_heads
        if not self.num_head_channels:
            raise ValueError("either num_heads or num_head_channels must be given")
        return self.model_channels // self.num_head_channels

    def block(self) -> ModulatedBlock:
        return ModulatedBlock(
            self.model_channels,
            self.cond_channels,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_rms_norm,
            qk_norm_cross=self.qk_rms_norm_cross,
            shared_modulation=self.share_mod,
        )


class FlowModel(Model):
    """What the two flow models share."""

    blocks: nn.ModuleList

    def context(self, cond: Tensor) -> Context:
        """What the blocks make of conditions ``[U, L, Cc]``, to be given to `forward` as its `cond` at every step."""
        blocks = [block for block in self.blocks if isinstance(block, ModulatedBlock)]
        return Context.of(blocks, cond.to(self.torso_dtype))

    def run_blocks(self, x: Tensor, segments: Segments, timestep: Tensor, cond: Tensor | Context) -> Tensor:
        """The transformer blocks, ``[N, C] -> [N, C]``; tokens are projected where a `Context` is read."""
        each: Iterable[Tensor | KeyValue] = cond
        if isinstance(cond, Context):
            lengths = cond.segments
        else:
            lengths = Segments.uniform(cond.shape[0], cond.shape[1], x.device)
            each = repeat(cond.flatten(0, 1).to(x.dtype), len(self.blocks))
        if len(lengths) != len(segments):
            raise ValueError(f"cond must have batch {len(segments)} like x; got {len(lengths)}")
        for block, context in zip(self.blocks, each, strict=True):
            x = block(x, segments, timestep, context, lengths)
        return x


class StructureFlow(FlowModel):
    """``model(x [B, C, R, R, R], t [B] in [0, 1000], cond [B, L, Cc]) -> velocity [B, C, R, R, R]``."""

    torso = ("blocks",)
    pos_emb: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config: FlowConfig = config
        width, patch = config.model_channels, config.patch_size
        self.t_embedder = TimestepEmbedder(width)
        if config.share_mod:
            self.adaLN_modulation = modulation_layer(width)
        axis = torch.arange(config.resolution // patch)
        grid = torch.cartesian_prod(axis, axis, axis)
        self.register_buffer("pos_emb", position_embedding(grid, width))
        self.input_layer = nn.Linear(config.in_channels * patch**3, width)
        self.blocks = nn.ModuleList(config.block() for _ in range(config.num_blocks))
        self.out_layer = nn.Linear(width, config.out_channels * patch**3)
        initialise_flow_(self)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | Context) -> Tensor:
        config = self.config
        expected = [config.in_channels, *(config.resolution,) * 3]
        if list(x.shape[1:]) != expected:
            raise ValueError(f"x must be [B, {', '.join(map(str, expected))}]; got {list(x.shape)}")
        tokens = patchify(x, config.patch_size)
        grid = tokens.shape[2:]
        segments = Segments.uniform(x.shape[0], grid.numel(), x.device)
        hidden = self.input_layer(tokens.flatten(2).mT) + self.pos_emb
        timestep = self.t_embedder(t)
        if config.share_mod:
            timestep = self.adaLN_modulation(timestep)
        dtype = self.torso_dtype
        hidden = self.run_blocks(hidden.flatten(0, 1).to(dtype), segments, timestep.to(dtype), cond).to(x.dtype)
        out = self.out_layer(layer_norm(hidden, hidden.shape[-1:]))
        return unpatchify(out.unflatten(0, (x.shape[0], *grid)).movedim(-1, 1), config.patch_size).contiguous()


def initialise_flow_(model: nn.Module) -> None:
    """Official initialisation of a flow: small timestep embedder, zero modulation and output."""
    initialise_(model)
    for name, module in model.named_modules():
        if name.startswith("t_embedder.mlp.") and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif name.endswith("adaLN_modulation") or name == "out_layer":
            zero_(module)
