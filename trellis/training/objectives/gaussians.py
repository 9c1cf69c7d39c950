"""The latent VAE with the Gaussian decoder: image features on voxels through the latent to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trellis.renderers.gaussians import render_gaussians
from trellis.representations.gaussians import Gaussians
from trellis.training.objectives.latents import draw_normal, kl_divergence
from trellis.training.objectives.pictures import PictureLoss, Pictures

NEAR, FAR = 0.8, 1.6


class GaussianVae:
    """Pictures of the decoded Gaussians against renders of the object, random black or white behind both.

    Args:
        loss_type: `l1` or `l2`.
        lambda_ssim: weight of ``1 - SSIM``.
        lambda_lpips: weight of the perceptual distance.
        lambda_kl: weight of the latent's divergence.
        regularizations: ``lambda_vol`` (mean product of the scales) and ``lambda_opacity`` (mean square of
            ``opacity - 1``).
        perceptual: `lpips` (officially), `efficientnet_lite0` or `none` (ours).

    Source:
        Official SLatVaeGaussianTrainer; section 15 of the facts.
    """

    def __init__(
        self,
        loss_type: str = "l1",
        lambda_ssim: float = 0.2,
        lambda_lpips: float = 0.2,
        lambda_kl: float = 1e-6,
        regularizations: Mapping[str, float] | None = None,
        perceptual: str = "lpips",
    ) -> None:
        self.regularizations = dict(regularizations or {})
        unknown = sorted(set(self.regularizations) - {"lambda_vol", "lambda_opacity"})
        if unknown:
            raise ValueError(f"regularizations has no {unknown[0]!r}; known are lambda_vol, lambda_opacity")
        self.lambda_kl = lambda_kl
        self.compare = PictureLoss(loss_type, lambda_ssim, lambda_lpips, perceptual)

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        pictures = Pictures.of(batch)
        mean, logvar = models["encoder"](batch["feats"])
        latent = mean.with_feats(draw_normal(mean.feats.float(), logvar.feats.float(), generator))
        decoded: list[Gaussians] = models["decoder"](latent)
        backgrounds = pictures.backgrounds(generator)
        renders = []
        for index, gaussians in enumerate(decoded):
            cameras = pictures.cameras(index, NEAR, FAR)
            renders.append(render_gaussians(gaussians, cameras, pictures.resolution, backgrounds[index]).colors)
        loss, terms = self.compare(torch.cat(renders), pictures.before(backgrounds))
        terms["kl"] = kl_divergence(mean.feats.float(), logvar.feats.float())
        loss = loss + self.lambda_kl * terms["kl"]
        if "lambda_vol" in self.regularizations:
            terms["vol"] = torch.cat([gaussians.scales for gaussians in decoded]).prod(dim=1).mean()
            loss = loss + self.regularizations["lambda_vol"] * terms["vol"]
        if "lambda_opacity" in self.regularizations:
            terms["opacity"] = torch.cat([gaussians.opacities for gaussians in decoded]).sub(1).square().mean()
            loss = loss + self.regularizations["lambda_opacity"] * terms["opacity"]
        return {"loss": loss, **terms}
