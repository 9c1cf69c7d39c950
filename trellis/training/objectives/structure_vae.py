"""The structure VAE: occupancy through a small dense latent and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

from trellis.training.objectives.latents import draw_normal, kl_divergence


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``1 - (2 sum p g + 1) / (sum p + sum g + 1)`` over the whole batch, p the predicted probability.

    Source:
        Milletari et al. 2016, "V-Net"; official SparseStructureVaeTrainer (golden value ``train_utils``).
    """
    probability = torch.sigmoid(logits)
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)


class StructureVae:
    """Reconstruction of ``batch["ss"] [B, 1, R, R, R]`` and the divergence of the latent.

    Args:
        loss_type: `dice`, `bce` or `l1`.
        lambda_kl: weight of the divergence.
        lambda_bce: weight of a binary cross-entropy added to another loss (ours; 0 as officially).
    """

    def __init__(self, loss_type: str = "bce", lambda_kl: float = 1e-6, lambda_bce: float = 0.0) -> None:
        if loss_type not in ("dice", "bce", "l1"):
            raise ValueError(f"loss_type must be dice, bce or l1; got {loss_type!r}")
        self.loss_type, self.lambda_kl, self.lambda_bce = loss_type, lambda_kl, lambda_bce

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        target: Tensor = batch["ss"].float()
        mean, logvar = models["encoder"](target)
        mean, logvar = mean.float(), logvar.float()
        logits = models["decoder"](draw_normal(mean, logvar, generator)).float()
        terms: dict[str, Tensor] = {}
        if self.loss_type == "dice":
            terms["dice"] = dice_loss(logits, target)
        elif self.loss_type == "l1":
            terms["l1"] = l1_loss(torch.sigmoid(logits), target)
        loss = sum(terms.values(), target.new_zeros(()))
        if self.loss_type == "bce" or self.lambda_bce:
            terms["bce"] = binary_cross_entropy_with_logits(logits, target)
            loss = loss + (1.0 if self.loss_type == "bce" else self.lambda_bce) * terms["bce"]
        terms["kl"] = kl_divergence(mean, logvar)
        loss = loss + self.lambda_kl * terms["kl"]
        with torch.no_grad():
            occupied, wanted = logits > 0, target > 0.5
            terms["iou"] = (occupied & wanted).sum() / (occupied | wanted).sum().clamp_min(1)
        return {"loss": loss, **terms}
