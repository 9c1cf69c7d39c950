"""What all variational autoencoders share: drawing a latent, and its divergence from the unit normal."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_normal(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """``mean + exp(logvar / 2) noise``."""
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return mean + torch.exp(0.5 * logvar) * noise.to(mean)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over elements of the divergence of N(mean, exp(logvar)) from N(0, 1)."""
    return 0.5 * torch.mean(mean.square() + logvar.exp() - logvar - 1)
