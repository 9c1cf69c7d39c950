"""Latent encoder: back-projected image features on voxels -> structured latent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trellis.models.latent_trunk import LatentTrunk, TrunkConfig, initialise_trunk_
from trellis.nn.sparse import SparseTensor

INITIAL_LOGVAR = -4.0


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(TrunkConfig):
    """The trunk's arguments, and `in_channels`, the width of the image features."""

    in_channels: int


class LatentEncoder(LatentTrunk):
    """``encoder(x [N, in_channels]) -> mean, logvar``, SparseTensors ``[N, latent_channels]`` on the same voxels."""

    def __init__(self, config: LatentEncoderConfig) -> None:
        super().__init__(config, config.in_channels)
        self.out_layer = nn.Linear(config.model_channels, 2 * config.latent_channels)
        initialise_trunk_(self)
        # Official training starts with means of 0 and a variance of 1, and takes long to find a signal in that noise.
        nn.init.xavier_uniform_(self.out_layer.weight[: config.latent_channels])
        nn.init.constant_(self.out_layer.bias[config.latent_channels :], INITIAL_LOGVAR)

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
        mean, logvar = self.out_layer(self.normalised_trunk(x)).chunk(2, dim=-1)
        return x.with_feats(mean), x.with_feats(logvar)
