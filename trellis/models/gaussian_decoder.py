"""Gaussian decoder: structured latent -> G Gaussians per voxel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trellis.models.latent_trunk import LatentTrunk, TrunkConfig, initialise_trunk_
from trellis.nn.hammersley import hammersley
from trellis.nn.sparse import SparseTensor
from trellis.representations.gaussians import GaussianConfig, Gaussians

# Channels per Gaussian and the shape of each attribute, in the order the network writes them.
_ATTRIBUTES: dict[str, tuple[int, ...]] = {
    "_xyz": (3,),
    "_features_dc": (1, 3),
    "_scaling": (3,),
    "_rotation": (4,),
    "_opacity": (1,),
}
_REPRESENTATION = {
    "lr",
    "perturb_offset",
    "voxel_size",
    "num_gaussians",
    "2d_filter_kernel_size",
    "3d_filter_kernel_size",
    "scaling_bias",
    "opacity_bias",
    "scaling_activation",
}


@dataclass(frozen=True, kw_only=True)
class GaussianDecoderConfig(TrunkConfig):
    """The trunk's arguments, and `representation_config` with the official keys (section 7 of the facts)."""

    representation_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = set(self.representation_config)
        if given != _REPRESENTATION:
            wrong = sorted(given ^ _REPRESENTATION)
            raise ValueError(f"representation_config must have {sorted(_REPRESENTATION)}; missing or unknown: {wrong}")
        if set(self.representation_config["lr"]) != set(_ATTRIBUTES):
            raise ValueError(f"representation_config lr must have {sorted(_ATTRIBUTES)}")


class GaussianDecoder(LatentTrunk):
    """``decoder(slat) -> list[Gaussians]``, one per sample; the Gaussians of a voxel are contiguous."""

    offset_perturbation: Tensor

    def __init__(self, config: GaussianDecoderConfig) -> None:
        super().__init__(config, config.latent_channels)
        representation = config.representation_config
        self.count = int(representation["num_gaussians"])
        self.voxel_size = float(representation["voxel_size"])
        self.gains = {name: float(gain) for name, gain in representation["lr"].items()}
        self.gaussian_config = GaussianConfig(
            scaling_bias=representation["scaling_bias"],
            scaling_activation=representation["scaling_activation"],
            opacity_bias=representation["opacity_bias"],
            filter_kernel_size_3d=representation["3d_filter_kernel_size"],
            filter_kernel_size_2d=representation["2d_filter_kernel_size"],
        )
        spread = torch.stack([torch.tensor(hammersley(i, 3, self.count)) for i in range(self.count)])
        offsets = torch.atanh((2 * spread.float() - 1) / self.voxel_size)
        self.register_buffer("offset_perturbation", offsets if representation["perturb_offset"] else 0 * offsets)
        self.out_layer = nn.Linear(config.model_channels, 14 * self.count)
        initialise_trunk_(self)

    def features(self, slat: SparseTensor) -> SparseTensor:
        """``[N, 14 G]``: the raw network output."""
        return slat.with_feats(self.out_layer(self.normalised_trunk(slat)))

    def forward(self, slat: SparseTensor) -> list[Gaussians]:
        features = self.features(slat)
        return [self._gaussians(features.sample(index)) for index in range(len(features))]

    def _gaussians(self, features: SparseTensor) -> Gaussians:
        parts, start, resolution = {}, 0, self.config.resolution
        for name, shape in _ATTRIBUTES.items():
            width = self.count * torch.Size(shape).numel()
            part = features.feats[:, start : start + width].unflatten(1, (self.count, *shape))
            parts[name], start = part * self.gains[name], start + width
        centers = (features.coords[:, None, 1:].to(features.feats.dtype) + 0.5) / resolution
        offsets = torch.tanh(parts["_xyz"] + self.offset_perturbation) / resolution * 0.5 * self.voxel_size
        return Gaussians(
            xyz=(centers + offsets).flatten(0, 1),
            features_dc=parts["_features_dc"].flatten(0, 1),
            scaling=parts["_scaling"].flatten(0, 1),
            rotation=parts["_rotation"].flatten(0, 1),
            opacity=parts["_opacity"].flatten(0, 1),
            config=self.gaussian_config,
        )
