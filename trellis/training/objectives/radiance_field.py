"""The radiance-field decoder: stored latents to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trellis.renderers.radiance_field import render_radiance_field
from trellis.representations.radiance_field import RadianceField
from trellis.training.objectives.pictures import PictureLoss, Pictures

NEAR, FAR = 0.8, 1.6


class RadianceFieldDecoding:
    """Pictures of the decoded radiance fields against renders of the object, random black or white behind both.

    Args:
        loss_type: `l1` or `l2`.
        lambda_ssim: weight of ``1 - SSIM``.
        lambda_lpips: weight of the perceptual distance.
        perceptual: `lpips` (officially), `efficientnet_lite0` or `none` (ours).
        ssaa: samples per side of a pixel (ours).

    Source:
        Official SLatVaeRadianceFieldDecoderTrainer; section 15 of the facts.
    """

    def __init__(
        self,
        loss_type: str = "l1",
        lambda_ssim: float = 0.2,
        lambda_lpips: float = 0.2,
        perceptual: str = "lpips",
        ssaa: int = 1,
    ) -> None:
        if ssaa < 1:
            raise ValueError(f"ssaa must be at least 1; got {ssaa}")
        self.ssaa = ssaa
        self.compare = PictureLoss(loss_type, lambda_ssim, lambda_lpips, perceptual)

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        pictures = Pictures.of(batch)
        fields: list[RadianceField] = models["decoder"](batch["latents"])
        backgrounds = pictures.backgrounds(generator)
        renders = []
        for index, decoded in enumerate(fields):
            cameras = pictures.cameras(index, NEAR, FAR)
            images = render_radiance_field(
                decoded, cameras, pictures.resolution, backgrounds[index], self.ssaa, jitter=generator
            )
            renders.append(images.colors)
        loss, terms = self.compare(torch.cat(renders), pictures.before(backgrounds))
        return {"loss": loss, **terms}
