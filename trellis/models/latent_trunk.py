"""The transformer shared by the latent encoder and the three decoders: windowed attention on the active voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from trellis.models.config import Model, ModelConfig, initialise_
from trellis.nn.attention import AttentionMode, attention_layout
from trellis.nn.block import TransformerBlock
from trellis.nn.embedding import position_embedding
from trellis.nn.sparse import SparseTensor


@dataclass(frozen=True, kw_only=True)
class TrunkConfig(ModelConfig):
    """Arguments of the trunk; field names are the official constructor arguments.

    Args:
        resolution: voxels along each side.
        model_channels: width of the transformer.
        latent_channels: channels of the latent.
        num_blocks: transformer blocks.
        num_heads: attention heads; None: ``model_channels // num_head_channels``.
        num_head_channels: head width when `num_heads` is None.
        mlp_ratio: hidden width of the MLPs over `model_channels`.
        attn_mode: "swin" (cubic windows, shifted in every other block), "full", or a serialised mode.
        window_size: voxels along a window (swin) or in a run (serialised); None for "full".
        pe_mode: "ape".
        qk_rms_norm: normalise queries and keys.
    """

    resolution: int
    model_channels: int
    latent_channels: int
    num_blocks: int
    num_heads: int | None = None
    num_head_channels: int | None = 64
    mlp_ratio: float = 4
    attn_mode: str = "swin"
    window_size: int | None = None
    pe_mode: str = "ape"
    qk_rms_norm: bool = False

    def __post_init__(self) -> None:
        if self.pe_mode != "ape":
            raise ValueError(f"pe_mode must be 'ape'; got {self.pe_mode!r}")
        if self.attn_mode not in get_args(AttentionMode):
            raise ValueError(f"attn_mode must be one of {', '.join(get_args(AttentionMode))}; got {self.attn_mode!r}")
        if self.attn_mode != "full" and self.window_size is None:
            raise ValueError(f"attn_mode {self.attn_mode!r} needs window_size; got None")

    @property
    def heads(self) -> int:
        return self.num_heads if self.num_heads is not None else self.model_channels // (self.num_head_channels or 64)


class LatentTrunk(Model):
    """input layer + position embedding + transformer blocks; subclasses add what follows.

    Args:
        config: arguments of the trunk.
        in_channels: channels of the input features.
    """

    torso: tuple[str, ...] = ("blocks",)

    def __init__(self, config: TrunkConfig, in_channels: int) -> None:
        super().__init__()
        self.config: TrunkConfig = config
        self.input_layer = nn.Linear(in_channels, config.model_channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.model_channels, config.heads, mlp_ratio=config.mlp_ratio, qk_norm=config.qk_rms_norm
            )
            for _ in range(config.num_blocks)
        )

    def trunk(self, x: SparseTensor) -> SparseTensor:
        """``[N, Ci] -> [N, C]`` in the torso's dtype."""
        config = self.config
        position = position_embedding(x.coords[:, 1:], config.model_channels)
        feats = (self.input_layer(x.feats) + position).to(self.torso_dtype)
        mode = cast(AttentionMode, config.attn_mode)
        for index, block in enumerate(self.blocks):
            feats = block(feats, attention_layout(x.grid, mode, config.window_size, index))
        return x.with_feats(feats)

    def normalised_trunk(self, x: SparseTensor) -> Tensor:
        """Trunk, then the final layer norm (no parameters, eps 1e-5) in the dtype of the input."""
        feats = self.trunk(x).feats.to(x.feats.dtype)
        return layer_norm(feats, feats.shape[-1:])


def initialise_trunk_(model: LatentTrunk) -> None:
    """Official initialisation of an encoder or decoder: zero output layer."""
    initialise_(model)
    out_layer = model.get_submodule("out_layer")
    for parameter in out_layer.parameters():
        nn.init.zeros_(parameter)
