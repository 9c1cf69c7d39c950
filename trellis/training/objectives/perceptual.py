"""Distances between pictures by the features of a network. What a run used is what its log names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

PERCEPTUAL = ("lpips", "efficientnet_lite0", "none")
_STAGES = 5  # of EfficientNet-Lite0: strides 2, 4, 8, 16, 16


class Perceptual:
    """Mean perceptual distance of pictures, by name.

    ``lpips`` is LPIPS with VGG-16, from the package `lpips` and the weights that it and torchvision have on this
    machine. ``efficientnet_lite0`` is the same kind of distance without learned weights of the channels: features of a
    pretrained network, normalised at each place, squared difference, mean over places, sum over stages. Its numbers
    are not LPIPS. `term` is what a log calls the distance, so that it says what was measured.

    Args:
        name: one of `PERCEPTUAL`.

    Raises:
        ValueError: the name is another.
        ImportError: what it needs is not installed, or has no weights here.

    Source:
        Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    def __init__(self, name: str) -> None:
        if name not in PERCEPTUAL:
            raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL)}; got {name!r}")
        self.name = name
        self.term = {"lpips": "lpips", "efficientnet_lite0": "perceptual_efficientnet_lite0"}.get(name, "")
        self.network: Any = None
        self.distance: Callable[[Tensor, Tensor], Tensor] = self._features
        if name == "lpips":
            self.network, self.distance = _lpips(), self._lpips
        elif name == "efficientnet_lite0":
            from trellis.conditioning import load_conditioner

            self.network = load_conditioner(name, root=None, kind="image")

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Scalar distance of ``[B, 3, H, W]`` sRGB in [0, 1]; differentiable in `images`."""
        self.network.to(images.device)
        return self.distance(images, targets)

    def _lpips(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.network(2 * images - 1, 2 * targets - 1).mean()

    def _features(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network.stages(targets, count=_STAGES)
        total = images.new_zeros(())
        for ours, theirs in zip(self.network.stages(images, count=_STAGES), wanted, strict=True):
            difference = normalize(ours.float(), dim=1) - normalize(theirs.float(), dim=1)
            total = total + difference.square().sum(1).mean()
        return total


def _lpips() -> Any:
    import importlib

    try:
        package = importlib.import_module("lpips")
        network = package.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"lambda_lpips needs the package lpips and the VGG-16 weights of torchvision ({error}); without them say"
            ' "perceptual": "efficientnet_lite0" or "none" in trainer.args'
        ) from error
    return network.eval().requires_grad_(False)
