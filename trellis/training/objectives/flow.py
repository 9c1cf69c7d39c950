"""Flow matching on dense and sparse latents, with dropped conditions for guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trellis.nn.sparse import SparseTensor
from trellis.representations.gaussians import Gaussians
from trellis.training.config import ConfigError
from trellis.training.objectives.structure_vae import dice_loss

SH_C0 = 0.5 / math.pi**0.5  # the spherical harmonic of degree 0
COLOR_WEIGHT = 10.0  # makes squares of usual errors about as large as the other terms


def path(x0: Tensor, noise: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """``x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) noise``; `t` broadcasts over the others."""
    return (1 - t) * x0 + (sigma_min + (1 - sigma_min) * t) * noise


def velocity(x0: Tensor, noise: Tensor, sigma_min: float) -> Tensor:
    """``d x_t / d t``."""
    return (1 - sigma_min) * noise - x0


class FlowMatching:
    """Mean square error of the predicted velocity; if asked for, also of what it decodes to.

    A latent is as rich as its details, and a picture tells little of those: a small flow that learns from few samples
    finds the shape and the colors late. With `lambda_decoded` some samples of a pass start from pure noise, t = 1,
    where only the condition tells anything: their estimate ``x_0 = x_1 - v`` goes through ``models["decoder"]``, which
    should be frozen, and what comes out is compared, not the latent. A structure's is compared with the occupancy
    ``batch["ss"]`` (dice and binary cross-entropy), a structured latent's Gaussians with those of the true latent.

    Source:
        Lipman et al. 2023, "Flow matching for generative modeling"; Esser et al. 2024 (the distribution of t); official
        FlowMatchingTrainer and its mixins (golden values ``train_utils``).

    Args:
        t_schedule: ``{"name": "uniform"}`` or ``{"name": "logitNormal", "args": {"mean", "std"}}``.
        sigma_min: noise left at t = 0.
        p_uncond: probability that a sample's condition is replaced by the null condition.
        token_dropout: up to this share of a condition's tokens become zeros, another share for each sample (ours; 0 as
            officially): a flow that learns from few objects must not know them by one corner.
        lambda_decoded: weight of what is decoded (ours; 0 as officially).
        decoded_samples: how many samples of a pass are decoded, the first; fewer than there are.
        decoded_noise: standard deviation of the noise that these start from: 1, or 0 for none, which takes a sampler
            with `temperature` 0 and asks nothing of a small model but what the condition tells.
    """

    def __init__(
        self,
        t_schedule: Mapping[str, Any] | None = None,
        sigma_min: float = 1e-5,
        p_uncond: float = 0.1,
        token_dropout: float = 0.0,
        lambda_decoded: float = 0.0,
        decoded_samples: int = 8,
        decoded_noise: float = 1.0,
    ) -> None:
        if decoded_samples < 1:
            raise ValueError(f"decoded_samples must be at least 1; got {decoded_samples}")
        if not decoded_noise >= 0:
            raise ValueError(f"decoded_noise must not be negative; got {decoded_noise}")
        schedule = t_schedule or {"name": "logitNormal", "args": {"mean": 0.0, "std": 1.0}}
        self.schedule, arguments = schedule.get("name"), dict(schedule.get("args", {}))
        if self.schedule not in ("uniform", "logitNormal"):
            raise ValueError(f"t_schedule must be uniform or logitNormal; got {self.schedule!r}")
        allowed = {"mean", "std"} if self.schedule == "logitNormal" else set()
        unknown = sorted(set(arguments) - allowed)
        if unknown:
            raise ValueError(f"t_schedule {self.schedule} has no {unknown[0]!r}; known are {sorted(allowed)}")
        if not 0 <= p_uncond <= 1:
            raise ValueError(f"p_uncond must be in [0, 1]; got {p_uncond}")
        if not 0 <= token_dropout <= 1:
            raise ValueError(f"token_dropout must be in [0, 1]; got {token_dropout}")
        self.mean, self.std = arguments.get("mean", 0.0), arguments.get("std", 1.0)
        self.sigma_min, self.p_uncond, self.token_dropout = sigma_min, p_uncond, token_dropout
        self.lambda_decoded, self.decoded_samples, self.decoded_noise = lambda_decoded, decoded_samples, decoded_noise

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count]`` in (0, 1)."""
        if self.schedule == "uniform":
            return torch.rand(count, generator=generator, device=generator.device)
        normal = torch.randn(count, generator=generator, device=generator.device)
        return torch.sigmoid(self.mean + self.std * normal)

    def drop(self, cond: Tensor, null: Tensor, generator: torch.Generator) -> Tensor:
        """Conditions ``[B, L, C]``, some replaced by the null condition ``[1, L, C]``, others without some tokens."""
        if self.p_uncond:
            dropped = torch.rand(len(cond), generator=generator, device=generator.device) < self.p_uncond
            cond = torch.where(dropped.to(cond.device)[:, None, None], null.to(cond), cond)
        if self.token_dropout:
            share = self.token_dropout * torch.rand(len(cond), 1, 1, generator=generator, device=generator.device)
            kept = torch.rand(*cond.shape[:2], 1, generator=generator, device=generator.device) >= share
            cond = cond * kept.to(cond)
        return cond

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        latent: Tensor | SparseTensor = batch["x_0"]
        x0 = latent.feats if isinstance(latent, SparseTensor) else latent
        noise = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0)
        times = self.draw_times(len(latent), generator).to(x0.device)
        cond = self.drop(batch["cond"], batch["neg_cond"], generator)
        samples = latent.segments.index if isinstance(latent, SparseTensor) else torch.arange(len(x0), device=x0.device)
        first = 0  # sample whose velocity is compared; those before it are decoded
        if self.lambda_decoded:
            self._check(models, batch)
            first = self.decoded_samples
            times[:first] = 1
            noise[samples < first] *= self.decoded_noise
        noisy = path(x0, noise, times[samples].view(-1, *(1,) * (x0.ndim - 1)), self.sigma_min)
        if isinstance(latent, SparseTensor):
            predicted = models["denoiser"](latent.with_feats(noisy), 1000 * times, cond).feats
        else:
            predicted = models["denoiser"](noisy, 1000 * times, cond)
        errors = (predicted.float() - velocity(x0, noise, self.sigma_min)).square()
        if not self.lambda_decoded:
            error = errors.mean()
            return {"loss": error, "mse": error}
        error = errors[samples >= first].mean()
        decoder, estimates = models["decoder"], noisy - predicted.float()
        if isinstance(latent, SparseTensor):
            found, wanted = first_samples(latent, (estimates, x0), batch, first)
            with torch.no_grad():
                true = decoder(wanted)
            terms = gaussian_terms(decoder(found), true, latent.grid.require_resolution())
        else:
            terms = decoded_terms(decoder(estimates[:first]).float(), batch["ss"][:first].float())
        decoded = torch.stack([term for name, term in terms.items() if name != "iou"]).sum()
        return {"loss": error + self.lambda_decoded * decoded, "mse": error, **terms}

    def _check(self, models: Mapping[str, nn.Module], batch: dict[str, Any]) -> None:
        sparse = isinstance(batch["x_0"], SparseTensor)
        if "decoder" not in models or not (sparse or "ss" in batch):
            needed = "Gaussian decoder among the models (role 'decoder')"
            if not sparse:
                needed = "structure decoder among the models (role 'decoder') and the dataset's argument 'occupancy'"
            raise ConfigError(f"lambda_decoded needs a {needed}")
        samples = len(batch["x_0"])
        if samples <= self.decoded_samples:
            raise ConfigError(
                f"decoded_samples must be less than the samples of a pass, {samples}; got {self.decoded_samples}"
            )


def first_samples(
    latent: SparseTensor, feats: Sequence[Tensor], batch: Mapping[str, Any], count: int
) -> list[SparseTensor]:
    """The first `count` samples of a batch with each of `feats` ``[N, C]``, as a decoder takes them.

    That is with the mean and scale ``batch["normalization"] [2, C]``, if the dataset took them out.
    """
    rows = latent.coords[:, 0] < count
    mean, std = batch.get("normalization", (0.0, 1.0))
    part = SparseTensor.from_coords(latent.coords[rows], feats[0][rows], latent.grid.require_resolution(), count)
    return [part.with_feats(values[rows] * std + mean) for values in feats]


def decoded_terms(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Dice, binary cross-entropy, and for the log the IoU of predicted occupancy ``[B, 1, R, R, R]``."""
    with torch.no_grad():
        occupied, wanted = logits > 0, target > 0.5
        iou = (occupied & wanted).sum() / (occupied | wanted).sum().clamp_min(1)
    return {
        "dice": dice_loss(logits, target),
        "bce": binary_cross_entropy_with_logits(logits, target),
        "iou": iou,
    }


def gaussian_terms(found: Sequence[Gaussians], wanted: Sequence[Gaussians], resolution: int) -> dict[str, Tensor]:
    """How far Gaussians are from those of the same voxels.

    ``color`` is the mean square difference (sRGB) times `COLOR_WEIGHT`: where a color is uncertain, its mean is wanted;
    the median of bright and dark ones is often black. The others are means of absolute differences: ``opacity``,
    ``place`` (in voxels, of which the unit cube has `resolution` a side), ``scale`` (logarithms). All but the opacity's
    count as much as the wanted Gaussian is opaque: nobody sees the others.
    """
    values: dict[str, list[Tensor]] = {"color": [], "opacity": [], "place": [], "scale": []}
    weights = []
    for each, true in zip(found, wanted, strict=True):
        weights.append(true.opacities)
        color = 0.5 + SH_C0 * each.features_dc.squeeze(1)  # not below 0 cut off: there it must learn too
        values["color"].append(COLOR_WEIGHT * (color - true.colors.clamp(max=1)).square())
        values["opacity"].append((each.opacities - true.opacities)[:, None])
        values["place"].append((each.means - true.means) * resolution)
        values["scale"].append((each.scales / true.scales).log())
    weight = torch.cat(weights)
    terms = {name: torch.cat(parts).abs().mean(1) for name, parts in values.items()}
    opacity = terms.pop("opacity").mean()
    seen = {name: (term * weight).sum() / weight.sum().clamp_min(1e-6) for name, term in terms.items()}
    return {**seen, "opacity": opacity}
