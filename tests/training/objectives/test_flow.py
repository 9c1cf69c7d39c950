import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.golden import golden
from tests.training.tiny import FLOW, Balls, flow_config
from trellis import SparseTensor
from trellis.checkpoints import build_model
from trellis.representations.gaussians import GaussianConfig, Gaussians
from trellis.sampling.flow_euler import euler
from trellis.training.batches import seeded
from trellis.training.config import ConfigError
from trellis.training.log import read_log
from trellis.training.loop import train
from trellis.training.objectives.flow import COLOR_WEIGHT, FlowMatching, path, velocity


def sparse(counts: tuple[int, ...] = (5, 9)) -> SparseTensor:
    generator = seeded(0)
    rows = [
        torch.cat(
            [
                torch.full((n, 1), b),
                torch.stack(torch.unravel_index(torch.randperm(64, generator=seeded(b))[:n], (4, 4, 4)), 1),
            ],
            1,
        )
        for b, n in enumerate(counts)
    ]
    feats = torch.randn(sum(counts), 2, generator=generator)
    return SparseTensor.from_coords(torch.cat(rows), feats, resolution=4, batch_size=len(counts))


class Oracle(nn.Module):
    """Predicts zero, and remembers what it was asked."""

    def forward(self, x: torch.Tensor | SparseTensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        self.x, self.t, self.cond = x, t, cond
        return x.with_feats(torch.zeros_like(x.feats)) if isinstance(x, SparseTensor) else torch.zeros_like(x)


def test_path_and_velocity_are_the_official_ones() -> None:
    values = golden("train_utils")
    sigma, t = values.info["sigma_min"], values["in.fm_t"].view(-1, 1, 1)
    values.check("out.x_t", path(values["in.x0"], values["in.fm_noise"], t, sigma))
    values.check("out.v", velocity(values["in.x0"], values["in.fm_noise"], sigma))


def test_times_are_uniform_or_logit_normal() -> None:
    uniform = FlowMatching({"name": "uniform"}).draw_times(4000, seeded(0))
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    normal = FlowMatching({"name": "logitNormal", "args": {"mean": 1.0, "std": 0.5}}).draw_times(4000, seeded(0))
    logits = torch.logit(normal)
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((1.0, 0.5), abs=0.03)


def test_the_share_of_conditions_asked_for_is_dropped() -> None:
    flow = FlowMatching(p_uncond=0.25)
    dropped = flow.drop(torch.ones(2000, 2, 3), torch.zeros(1, 2, 3), seeded(0))
    assert float(1 - dropped.mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))  # a condition is dropped whole or not at all


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_error_is_of_the_velocity_at_the_noisy_point(kind: str) -> None:
    latent = sparse() if kind == "sparse" else torch.randn(2, 2, 4, 4, 4, generator=seeded(1))
    x0 = latent.feats if isinstance(latent, SparseTensor) else latent
    model = Oracle()
    batch = {"x_0": latent, "cond": torch.ones(2, 3, 12), "neg_cond": torch.zeros(1, 3, 12)}
    terms = FlowMatching(sigma_min=0.1, p_uncond=0.0)({"denoiser": model}, batch, seeded(3))
    noise = torch.randn(x0.shape, generator=seeded(3))
    torch.testing.assert_close(terms["loss"], velocity(x0, noise, 0.1).square().mean())
    assert torch.equal(model.cond, batch["cond"])
    t = model.t / 1000
    each = t[latent.segments.index, None] if isinstance(latent, SparseTensor) else t.view(-1, 1, 1, 1, 1)
    seen = model.x.feats if isinstance(latent, SparseTensor) else model.x
    torch.testing.assert_close(seen, path(x0, noise, each, 0.1))


def test_a_structure_flow_overfits_one_object(tmp_path: Path) -> None:
    args = {"max_steps": 150, "batch_size": 8, "i_save": 200, "p_uncond": 0.1}
    optimizer = {"name": "AdamW", "args": {"lr": 1e-2, "weight_decay": 0.0}}
    train(flow_config(**args, optimizer=optimizer), [], tmp_path, dataset=Balls(1, latents=True))
    curve = [line["mse"] for line in read_log(tmp_path)]
    assert sum(curve[-20:]) < 0.35 * sum(curve[:20])


def test_a_latent_flow_overfits_one_object() -> None:
    args = {**FLOW, "num_io_res_blocks": 1, "io_block_channels": [16]}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = build_model("SLatFlowModel", args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    one = sparse((20,))
    batch = {"x_0": one, "cond": torch.ones(1, 3, 12), "neg_cond": torch.zeros(1, 3, 12)}
    curve = []
    for step in range(80):
        loss = FlowMatching()({"denoiser": model}, batch, seeded(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert sum(curve[-20:]) < 0.7 * sum(curve[:20])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"t_schedule": {"name": "cubic"}}, "t_schedule must be uniform or logitNormal; got 'cubic'"),
        ({"t_schedule": {"name": "uniform", "args": {"mean": 1}}}, "t_schedule uniform has no 'mean'"),
        ({"p_uncond": 2}, "p_uncond must be in"),
        ({"token_dropout": -1}, r"token_dropout must be in \[0, 1\]; got -1"),
        ({"decoded_samples": 0}, "decoded_samples must be at least 1; got 0"),
        ({"decoded_noise": -1}, "decoded_noise must not be negative; got -1"),
    ],
)
def test_impossible_arguments_are_refused(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(**args)


def test_tokens_are_left_out_a_share_that_differs_by_sample() -> None:
    flow, cond = FlowMatching(p_uncond=0.0, token_dropout=0.8), torch.ones(200, 50, 4)
    kept = flow.drop(cond, torch.zeros(1, 50, 4), seeded(0))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(kept.amax(-1), kept.amin(-1))  # whole tokens
    shares = 1 - kept[..., 0].mean(1)
    assert float(shares.mean()) == pytest.approx(0.4, abs=0.05)
    assert float(shares.std()) == pytest.approx(0.8 / 12**0.5, abs=0.05)  # of a uniform distribution
    assert float(shares.max()) < 1
    assert torch.equal(FlowMatching(p_uncond=0.0).drop(cond, torch.zeros(1, 50, 4), seeded(0)), cond)


class Threshold(nn.Module):
    """Decodes a latent to twice as many voxels a side, occupied where its first channel is positive."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return 20 * latent[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)


def decoded_batch() -> dict[str, torch.Tensor]:
    x0 = torch.randn(6, 2, 4, 4, 4, generator=seeded(3)).sign()
    return {
        "x_0": x0,
        "ss": (Threshold()(x0) > 0).float(),
        "cond": torch.ones(6, 3, 12),
        "neg_cond": torch.zeros(1, 3, 12),
    }


def test_the_decoded_estimate_is_compared_with_the_occupancy() -> None:
    batch = decoded_batch()

    class Perfect(nn.Module):
        """Knows the data, from which the velocity at any place follows."""

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return (x - batch["x_0"]) / (t / 1000).view(-1, 1, 1, 1, 1)

    flow = FlowMatching(sigma_min=0.0, lambda_decoded=2.0, decoded_samples=2)
    perfect = flow({"denoiser": Perfect(), "decoder": Threshold()}, batch, seeded(0))
    assert float(perfect["loss"]) < 1e-4
    assert float(perfect["iou"]) == 1

    oracle = Oracle()  # its velocity is 0: what is decoded is x_1
    terms = flow({"denoiser": oracle, "decoder": Threshold()}, batch, seeded(0))
    torch.testing.assert_close(terms["loss"], terms["mse"] + 2 * (terms["dice"] + terms["bce"]))
    assert (oracle.t[:2] == 1000).all()
    assert (oracle.t[2:] < 1000).all()
    assert float(oracle.x[:2].std()) == pytest.approx(1, abs=0.15)  # nothing but noise
    occupied, wanted = Threshold()(oracle.x[:2]) > 0, batch["ss"][:2] > 0
    assert float(terms["iou"]) == pytest.approx(float((occupied & wanted).sum() / (occupied | wanted).sum()))
    assert float(terms["iou"]) < 0.6
    assert set(FlowMatching()({"denoiser": oracle}, batch, seeded(0))) == {"loss", "mse"}


def test_the_first_samples_learn_through_the_decoder_the_others_their_velocity() -> None:
    velocities = nn.Parameter(torch.zeros(6, 2, 4, 4, 4))

    class Free(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return velocities

    flow = FlowMatching(lambda_decoded=1.0, decoded_samples=4)
    terms = flow({"denoiser": Free(), "decoder": Threshold()}, decoded_batch(), seeded(0))
    (decoded,) = torch.autograd.grad(terms["dice"] + terms["bce"], velocities, retain_graph=True)
    (compared,) = torch.autograd.grad(terms["mse"], velocities)
    assert [bool(row.any()) for row in decoded] == [True] * 4 + [False] * 2
    assert [bool(row.any()) for row in compared] == [False] * 4 + [True] * 2
    assert not decoded[:, 1].any()  # which the decoder does not look at


def test_decoding_needs_a_decoder_the_occupancy_and_other_samples() -> None:
    flow, batch = FlowMatching(lambda_decoded=1.0, decoded_samples=6), decoded_batch()
    with pytest.raises(ConfigError, match="lambda_decoded needs a structure decoder among the models"):
        flow({"denoiser": Oracle()}, batch, seeded(0))
    with pytest.raises(ConfigError, match="decoded_samples must be less than the samples of a pass, 6; got 6"):
        flow({"denoiser": Oracle(), "decoder": Threshold()}, batch, seeded(0))
    del batch["ss"]
    with pytest.raises(ConfigError, match="the dataset's argument 'occupancy'"):
        flow({"denoiser": Oracle(), "decoder": Threshold()}, batch, seeded(0))


class Colors(nn.Module):
    """Decodes a structured latent of 2 channels to a Gaussian per voxel: gray of the first, opacity of the second."""

    def forward(self, latent: SparseTensor) -> list[Gaussians]:
        samples = [latent.sample(index) for index in range(len(latent))]
        return [
            Gaussians(
                xyz=(sample.coords[:, 1:] + 0.5) / 4,
                features_dc=sample.feats[:, :1, None].expand(-1, 1, 3),
                scaling=torch.zeros(len(sample.coords), 3),
                rotation=torch.zeros(len(sample.coords), 4),
                opacity=sample.feats[:, 1:],
            )
            for sample in samples
        ]


def structured_batch() -> dict[str, Any]:
    return {"x_0": sparse((5, 9, 3)), "cond": torch.ones(3, 3, 12), "neg_cond": torch.zeros(1, 3, 12)}


def test_decoded_gaussians_are_compared_with_those_of_the_latent() -> None:
    batch = structured_batch() | {"normalization": torch.tensor([[0.5, -1.0], [0.2, 0.7]])}
    mean, std = batch["normalization"]

    class Perfect(nn.Module):
        def forward(self, x: SparseTensor, t: torch.Tensor, cond: torch.Tensor) -> SparseTensor:
            return x.with_feats((x.feats - batch["x_0"].feats) / (t / 1000)[x.coords[:, 0], None])

    flow = FlowMatching(sigma_min=0.0, lambda_decoded=2.0, decoded_samples=2)
    models = {"denoiser": Perfect(), "decoder": Colors()}
    assert float(flow(models, batch, seeded(7))["loss"]) < 1e-4

    oracle = Oracle()  # its velocity is 0: what is decoded is x_1
    terms = flow({"denoiser": oracle, "decoder": Colors()}, batch, seeded(7))
    assert (oracle.t[:2] == 1000).all()
    assert float(oracle.t[2]) < 1000
    decoded = terms["color"] + terms["opacity"] + terms["place"] + terms["scale"]
    torch.testing.assert_close(terms["loss"], terms["mse"] + 2 * decoded)
    assert float(terms["place"]) == float(terms["scale"]) == 0
    rows = slice(0, 14)  # the first two samples
    found, true = (feats[rows] * std + mean for feats in (oracle.x.feats, batch["x_0"].feats))
    opacity, wanted = (torch.sigmoid(each[:, 1] + GaussianConfig().raw_opacity_bias) for each in (found, true))
    torch.testing.assert_close(terms["opacity"], (opacity - wanted).abs().mean())
    gray = 0.5 + found[:, 0] / (2 * math.pi**0.5)
    error = (gray - (0.5 + true[:, 0] / (2 * math.pi**0.5)).clamp(0, 1)).square() * COLOR_WEIGHT
    torch.testing.assert_close(terms["color"], (error * wanted).sum() / wanted.sum())


def test_the_first_structured_latents_learn_through_the_decoder_the_others_their_velocity() -> None:
    velocities = nn.Parameter(torch.zeros(17, 2))

    class Free(nn.Module):
        def forward(self, x: SparseTensor, t: torch.Tensor, cond: torch.Tensor) -> SparseTensor:
            return x.with_feats(velocities)

    flow = FlowMatching(lambda_decoded=1.0, decoded_samples=2)
    terms = flow({"denoiser": Free(), "decoder": Colors()}, structured_batch(), seeded(7))
    (decoded,) = torch.autograd.grad(terms["color"] + terms["opacity"], velocities, retain_graph=True)
    (compared,) = torch.autograd.grad(terms["mse"], velocities)
    assert decoded.any(1).tolist() == [True] * 14 + [False] * 3
    assert compared.any(1).tolist() == [False] * 14 + [True] * 3


def test_decoding_structured_latents_needs_a_decoder() -> None:
    flow = FlowMatching(lambda_decoded=1.0, decoded_samples=2)
    with pytest.raises(ConfigError, match="lambda_decoded needs a Gaussian decoder among the models"):
        flow({"denoiser": Oracle()}, structured_batch(), seeded(7))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_decoded_samples_can_start_without_noise(kind: str) -> None:
    oracle, batch = Oracle(), structured_batch() if kind == "sparse" else decoded_batch()
    decoder = Colors() if kind == "sparse" else Threshold()
    flow = FlowMatching(lambda_decoded=1.0, decoded_samples=2, decoded_noise=0.0)
    flow({"denoiser": oracle, "decoder": decoder}, batch, seeded(7))
    asked = [oracle.x.sample(index).feats for index in range(3)] if kind == "sparse" else oracle.x
    assert [bool(x.any()) for x in asked[:3]] == [False, False, True]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_our_sampler_finds_the_data_with_the_perfect_velocity(kind: str) -> None:
    sigma, steps = 0.01, 3
    latent = sparse() if kind == "sparse" else torch.randn(2, 2, 4, 4, 4, generator=seeded(1))
    x0 = latent.feats if isinstance(latent, SparseTensor) else latent
    noise = torch.randn(x0.shape, generator=seeded(2))
    perfect = velocity(x0, noise, sigma)
    wrapped = latent.with_feats if isinstance(latent, SparseTensor) else torch.Tensor.clone
    for step in euler(lambda x, t: wrapped(perfect), wrapped(noise), steps, sigma_min=sigma):
        estimate = step.estimate.feats if isinstance(step.estimate, SparseTensor) else step.estimate
        torch.testing.assert_close(estimate, x0, rtol=1e-4, atol=1e-5)
    end = step.x.feats if isinstance(step.x, SparseTensor) else step.x
    torch.testing.assert_close(end, path(x0, noise, torch.zeros(()), sigma), rtol=1e-4, atol=1e-5)
