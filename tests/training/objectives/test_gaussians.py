import pytest
import torch
from torch import nn

from tests.support.golden import golden
from tests.training.objectives.scene import GAUSSIANS, TRUNK, pictures, voxels
from trellis.checkpoints import build_model
from trellis.training.batches import seeded
from trellis.training.objectives import build_objective
from trellis.training.objectives.gaussians import GaussianVae
from trellis.training.objectives.pictures import PictureLoss, Pictures


def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return {
            "encoder": build_model("ElasticSLatEncoder", {**TRUNK, "in_channels": 6}),
            "decoder": build_model("ElasticSLatGaussianDecoder", {**TRUNK, "representation_config": GAUSSIANS}),
        }


def test_pictures_are_compared_with_the_official_losses() -> None:
    values = golden("train_utils")
    images, targets = values["in.img1"], values["in.img2"]
    total, terms = PictureLoss("l1", 0.2, 0.0, "none")(images, targets)
    values.check("out.l1", terms["l1"])
    values.check("out.ssim", terms["ssim"], max_abs=1e-4, rms=1e-4)
    values.check("out.psnr", terms["psnr"])
    torch.testing.assert_close(total, values["out.l1"] + 0.2 * (1 - values["out.ssim"]), rtol=1e-4, atol=1e-4)
    values.check("out.l2", PictureLoss("l2", 0.0, 0.0, "none")(images, targets)[0])


def test_backgrounds_are_black_or_white_behind_what_is_transparent() -> None:
    batch = pictures(16, objects=4, views=3)
    seen = Pictures.of(batch)
    backgrounds = seen.backgrounds(seeded(0))
    assert backgrounds.shape == (4, 3, 3)
    assert set(backgrounds.unique().tolist()) == {0.0, 1.0}
    images = seen.before(backgrounds).unflatten(0, (4, 3))
    torch.testing.assert_close(images[..., 0, 0], backgrounds)
    assert torch.equal(images[:, :, :, 8, 8], seen.images[:, :, :, 8, 8])
    single = {name: value[:, 0] for name, value in batch.items()}
    assert Pictures.of(single).images.shape == (4, 1, 3, 16, 16)
    with pytest.raises(ValueError, match="image must be"):
        Pictures.of({**single, "image": torch.zeros(4, 3, 16, 8)})


def test_the_terms_add_up_and_every_parameter_gets_a_gradient() -> None:
    regularizations = {"lambda_vol": 100.0, "lambda_opacity": 0.1}
    objective = GaussianVae("l1", 0.2, 0.0, 0.5, regularizations)
    trained = models()
    batch = {"feats": voxels(6, copies=2), **pictures(24, objects=2)}
    terms = objective(trained, batch, seeded(0))
    expected = terms["l1"] + 0.2 * (1 - terms["ssim"]) + 0.5 * terms["kl"] + 100 * terms["vol"] + 0.1 * terms["opacity"]
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    without = [name for model in trained.values() for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert objective(trained, batch, seeded(0))["loss"] == terms["loss"]


def test_a_latent_vae_with_gaussians_overfits_one_object() -> None:
    args = {"lambda_lpips": 0.0, "lambda_kl": 1e-6, "regularizations": {"lambda_opacity": 1e-3}}
    objective = build_objective("SLatVaeGaussianTrainer", args)
    trained = models()
    optimizer = torch.optim.AdamW([p for model in trained.values() for p in model.parameters()], lr=5e-3)
    batch = {"feats": voxels(6), **pictures(32)}
    curve = []
    for step in range(60):
        terms = objective(trained, batch, seeded(step))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        curve.append(float(terms["psnr"]))
    assert sum(curve[-5:]) / 5 > 22
    assert sum(curve[-5:]) > sum(curve[:5]) + 30
