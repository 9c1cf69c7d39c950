"""Radiance-field decoder: structured latent -> a Strivec radiance field per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trellis.models.latent_trunk import LatentTrunk, TrunkConfig, initialise_trunk_
from trellis.nn.sparse import SparseTensor
from trellis.representations.radiance_field import RadianceField


@dataclass(frozen=True, kw_only=True)
class RadianceDecoderConfig(TrunkConfig):
    """The trunk's arguments, and ``representation_config = {"rank": R, "dim": D}``."""

    representation_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.representation_config) != {"rank", "dim"}:
            raise ValueError(f"representation_config must have rank and dim; got {sorted(self.representation_config)}")

    @property
    def rank(self) -> int:
        return int(self.representation_config["rank"])

    @property
    def dim(self) -> int:
        return int(self.representation_config["dim"])


class RadianceDecoder(LatentTrunk):
    """``decoder(slat) -> list[RadianceField]``, one per sample.

    Per voxel, in this order: R x 3 x D trivector factors (1 is added), R densities, R x 3 colors.
    """

    def __init__(self, config: RadianceDecoderConfig) -> None:
        super().__init__(config, config.latent_channels)
        self.representation = config
        self.out_layer = nn.Linear(config.model_channels, config.rank * (3 * config.dim + 1 + 3))
        initialise_trunk_(self)

    def features(self, slat: SparseTensor) -> SparseTensor:
        """``[N, R (3 D + 4)]``: the raw network output."""
        return slat.with_feats(self.out_layer(self.normalised_trunk(slat)))

    def forward(self, slat: SparseTensor) -> list[RadianceField]:
        config, features = self.representation, self.features(slat)
        samples = (features.sample(index) for index in range(len(features)))
        rank, dim = config.rank, config.dim
        fields = []
        for sample in samples:
            trivec, density, color = sample.feats.split([rank * 3 * dim, rank, rank * 3], dim=1)
            fields.append(
                RadianceField(
                    positions=(sample.coords[:, 1:].to(trivec.dtype) + 0.5) / config.resolution,
                    depth=int(math.log2(config.resolution)),
                    trivec=trivec.unflatten(1, (rank, 3, dim)) + 1,
                    density=density,
                    features_dc=color.unflatten(1, (rank, 1, 3)),
                    resolution=config.resolution,
                )
            )
        return fields
