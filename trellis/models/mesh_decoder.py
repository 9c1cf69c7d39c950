"""Mesh decoder: structured latent -> two subdivisions -> FlexiCubes at four times the resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import trellis_kernels
from trellis.models.latent_trunk import LatentTrunk, TrunkConfig, initialise_trunk_
from trellis.nn.conv import SubdivideBlock
from trellis.nn.sparse import SparseTensor
from trellis.representations.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class MeshDecoderConfig(TrunkConfig):
    """The trunk's arguments, and ``representation_config = {"use_color": bool}``."""

    representation_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.representation_config) != {"use_color"}:
            raise ValueError(f"representation_config must have use_color; got {sorted(self.representation_config)}")

    @property
    def use_color(self) -> bool:
        return bool(self.representation_config["use_color"])


class MeshDecoder(LatentTrunk):
    """``decoder(slat) -> list[Mesh]``, one per sample; an empty mesh where no surface was found.

    Per cube at four times the resolution, in this order: 8 signed distances, 8 x 3 deformations, 21 weights, and with
    color 8 x 6 corner attributes (color and normal map).
    """

    torso = ("blocks", "upsample")

    def __init__(self, config: MeshDecoderConfig) -> None:
        super().__init__(config, config.latent_channels)
        self.use_color = config.use_color
        width = config.model_channels
        self.upsample = nn.ModuleList([SubdivideBlock(width, width // 4), SubdivideBlock(width // 4, width // 8)])
        self.out_layer = nn.Linear(width // 8, 8 + 24 + 21 + (48 if config.use_color else 0))
        initialise_trunk_(self)

    @property
    def mesh_resolution(self) -> int:
        """Cubes along each side of the extraction grid."""
        return 4 * self.config.resolution

    def features(self, slat: SparseTensor) -> SparseTensor:
        """``[64 N, 53 or 101]`` on the grid of four times the resolution: the raw network output."""
        x = self.trunk(slat)
        for block in self.upsample:
            x = block(x)
        return x.with_feats(self.out_layer(x.feats.to(slat.feats.dtype)))

    def forward(self, slat: SparseTensor) -> list[Mesh]:
        features = self.features(slat)
        return [self.extract(features, index) for index in range(len(features))]

    def extract(self, features: SparseTensor, index: int) -> Mesh:
        """The mesh of one sample of what `features` returned."""
        rows = features.segments.slice(index)
        coords, feats = features.coords[rows, 1:].contiguous(), features.feats[rows]
        extracted = trellis_kernels.extract_mesh(coords, feats, self.mesh_resolution)
        attributes = extracted.attributes if self.use_color else None
        return Mesh(
            vertices=extracted.vertices,
            faces=extracted.faces,
            colors=None if attributes is None else attributes[:, :3],
            normals=None if attributes is None else attributes[:, 3:],
        )
