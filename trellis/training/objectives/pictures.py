"""What the decoders' objectives share: cameras and pictures of a batch, and how far renders are from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.training.objectives.perceptual import Perceptual
from trellis_kernels import ssim_map


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch: B objects, V views of each.

    Args:
        images: ``[B, V, 3, H, W]`` sRGB in [0, 1], not multiplied with alpha.
        alphas: ``[B, V, H, W]`` in [0, 1].
        extrinsics: ``[B, V, 4, 4]``.
        intrinsics: ``[B, V, 3, 3]``.
    """

    images: Tensor
    alphas: Tensor
    extrinsics: Tensor
    intrinsics: Tensor

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Pictures:
        """From a batch; one view per object may come without its axis.

        Raises:
            ValueError: the shapes do not fit together, or pictures are not square.
        """
        parts = [batch[name].float() for name in ("image", "alpha", "extrinsics", "intrinsics")]
        if parts[0].ndim == 4:
            parts = [part[:, None] for part in parts]
        pictures = cls(*parts)
        if pictures.images.ndim != 5 or pictures.images.shape[-1] != pictures.images.shape[-2]:
            raise ValueError(f"image must be [B, 3, S, S] or [B, V, 3, S, S]; got {list(batch['image'].shape)}")
        return pictures

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]

    def cameras(self, index: int, near: float, far: float) -> Cameras:
        """The V cameras of one object."""
        return Cameras(self.extrinsics[index], self.intrinsics[index], near, far)

    def backgrounds(self, generator: torch.Generator) -> Tensor:
        """``[B, V, 3]``: black or white for each view."""
        shape = self.images.shape[:2]
        white = torch.rand(shape, generator=generator, device=generator.device) < 0.5
        return white.to(self.images)[..., None].expand(-1, -1, 3)

    def before(self, backgrounds: Tensor) -> Tensor:
        """``[B V, 3, H, W]``: the pictures in front of `backgrounds`."""
        alphas = self.alphas[:, :, None]
        return (self.images * alphas + backgrounds[..., None, None] * (1 - alphas)).flatten(0, 1)


class PictureLoss:
    """``L + lambda_ssim (1 - SSIM) + lambda_lpips perceptual``, L the mean absolute or square error.

    Args:
        loss_type: `l1` or `l2`.
        lambda_ssim: weight of the structural dissimilarity.
        lambda_lpips: weight of the perceptual distance.
        perceptual: which; see `Perceptual`. It is not made where its weight is 0.
    """

    def __init__(self, loss_type: str, lambda_ssim: float, lambda_lpips: float, perceptual: str) -> None:
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type must be l1 or l2; got {loss_type!r}")
        self.loss_type, self.lambda_ssim, self.lambda_lpips = loss_type, lambda_ssim, lambda_lpips
        self.perceptual = Perceptual(perceptual if lambda_lpips else "none")

    def __call__(self, images: Tensor, targets: Tensor, prefix: str = "") -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``[B, 3, H, W]`` pictures and its terms by name."""
        difference = images - targets
        square = difference.square().mean()
        total = difference.abs().mean() if self.loss_type == "l1" else square
        terms = {f"{prefix}{self.loss_type}": total}
        if self.lambda_ssim:
            dissimilarity = 1 - ssim_map(images.contiguous(), targets.contiguous()).mean()
            terms[f"{prefix}ssim"] = 1 - dissimilarity.detach()
            total = total + self.lambda_ssim * dissimilarity
        if self.perceptual.term:
            distance = self.perceptual(images, targets)
            terms[f"{prefix}{self.perceptual.term}"] = distance
            total = total + self.lambda_lpips * distance
        terms[f"{prefix}psnr"] = -10 * torch.log10(square.detach().clamp_min(1e-10))
        return total, terms
