"""A dataset and configurations small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellis.training.config import TrainingConfig

RESOLUTION = 8
VAE = {"latent_channels": 2, "num_res_blocks": 1, "num_res_blocks_middle": 1}
FLOW = {
    "resolution": 4,
    "in_channels": 2,
    "out_channels": 2,
    "model_channels": 24,
    "cond_channels": 12,
    "num_blocks": 2,
    "num_heads": 2,
    "patch_size": 2,
    "qk_rms_norm": True,
}


class Balls:
    """Occupancy of balls of random size, or random latents with a condition."""

    def __init__(self, count: int = 10, *, latents: bool = False, broken: int | None = None) -> None:
        self.count, self.latents, self.broken = count, latents, broken

    def __len__(self) -> int:
        return self.count

    def num_voxels(self, index: int) -> int:
        return 1

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if index == self.broken:
            raise ValueError("this one is broken")
        noise = torch.rand((), generator=generator)
        if self.latents:
            place = torch.arange(2 * 64).view(2, 4, 4, 4)
            return {"x_0": torch.sin(place * (index + 1.0)), "cond": torch.cos(torch.arange(36.0) * index).view(3, 12)}
        axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION - 0.5
        x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
        radius = 0.2 + 0.02 * index + 0.05 * noise
        return {"ss": (x * x + y * y + z * z < radius**2).float()[None]}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        if self.latents:
            batch["neg_cond"] = torch.zeros(1, 3, 12)
        return batch


class Reconstruction:
    arguments = ("loss_type", "lambda_kl")

    def __call__(
        self, models: dict[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        mean, logvar = models["encoder"](batch["ss"])
        noise = torch.randn(mean.shape, generator=generator)
        logits = models["decoder"](mean + noise * (0.5 * logvar).exp())
        bce = nn.functional.binary_cross_entropy_with_logits(logits, batch["ss"])
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
        return {"loss": bce + 1e-3 * kl, "bce": bce, "kl": kl}


class Flow:
    arguments = ("p_uncond", "t_schedule", "sigma_min")

    def __call__(
        self, models: dict[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        x0 = batch["x_0"]
        t = torch.rand(len(x0), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        place = t.view(-1, 1, 1, 1, 1)
        velocity = models["denoiser"]((1 - place) * x0 + place * noise, 1000 * t, batch["cond"])
        mse = (velocity - (noise - x0)).square().mean()
        return {"loss": mse, "mse": mse}


def vae_config(**args: Any) -> TrainingConfig:
    models = {
        "encoder": {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": [8, 16], **VAE}},
        "decoder": {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": [16, 8], **VAE}},
    }
    return _config(models, "SparseStructure", "SparseStructureVaeTrainer", args)


def flow_config(**args: Any) -> TrainingConfig:
    models = {"denoiser": {"name": "SparseStructureFlowModel", "args": FLOW}}
    return _config(models, "ImageConditionedSparseStructureLatent", "ImageConditionedFlowMatchingCFGTrainer", args)


def _config(models: Any, dataset: str, trainer: str, args: dict[str, Any]) -> TrainingConfig:
    args = {
        "max_steps": 12,
        "batch_size": 4,
        "optimizer": {"name": "AdamW", "args": {"lr": 3e-3, "weight_decay": 0.0}},
        "ema_rate": [0.9],
        "grad_clip": {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "buffer_size": 4}},
        "i_save": 5,
        **args,
    }
    return TrainingConfig.from_json(
        {"models": models, "dataset": {"name": dataset, "args": {}}, "trainer": {"name": trainer, "args": args}}
    )
