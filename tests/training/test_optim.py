import math

import pytest
import torch
from torch import nn

from tests.support.golden import golden
from trellis.training.clip import AdaptiveGradClipper, FixedClipper, build_clipper
from trellis.training.config import ConfigError, Named
from trellis.training.optim import FlatOptimizer, LossScale, learning_rate_factor
from trellis.training.weights import FlatWeights

ADAMW = Named("AdamW", {"lr": 1e-2, "weight_decay": 0.1})


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].to(dtype)
    return model


def run(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    hidden = model[0](x.to(model[0].weight.dtype)).float()
    return model[2](model[1](hidden)).square().sum()


def test_the_clipper_gives_the_official_values() -> None:
    values = golden("train_utils")
    clipper = AdaptiveGradClipper(**values.info["clipper"])
    clipped, limits = [], []
    for gradient in values["in.grads"]:
        clipped.append(gradient * clipper.factor(float(gradient.norm())))
        limits.append(clipper.max_norm)
    values.check("out.clipped_grads", torch.stack(clipped))
    values.check("out.max_norm_after", torch.tensor(limits))


def test_the_clipper_adapts_to_small_norms_and_forgets_none_of_them_when_saved() -> None:
    clipper = AdaptiveGradClipper(max_norm=1.0, clip_percentile=50, buffer_size=4)
    for norm in (0.1, 0.2, math.inf, 0.3, 0.4):
        assert clipper.factor(norm) == 1.0
    assert clipper.max_norm == pytest.approx(0.25)
    other = AdaptiveGradClipper(max_norm=1.0, clip_percentile=50, buffer_size=4)
    other.restore(clipper.state())
    assert [other.factor(norm) for norm in (1.0, 2.0)] == [clipper.factor(norm) for norm in (1.0, 2.0)]
    assert other.state() == clipper.state()


def test_flat_training_equals_training_each_parameter() -> None:
    ours, theirs, inputs = network(), network(), torch.linspace(-1, 1, 12).view(4, 3)
    weights = FlatWeights({"model": ours}, [0.8])
    optimizer = FlatOptimizer(ADAMW, weights, FixedClipper(0.5), LossScale(enabled=False))
    reference = torch.optim.AdamW(theirs.parameters(), **ADAMW.args)
    average = [p.detach().clone() for p in theirs.parameters()]
    for _ in range(5):
        weights.zero_gradient()
        run(ours, inputs).backward()
        report = optimizer.step(1.0)
        reference.zero_grad()
        run(theirs, inputs).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        average = [0.8 * a + 0.2 * p.detach() for a, p in zip(average, theirs.parameters(), strict=True)]
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(weights.state("model", 0.8).values(), average, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_rounded_from_a_float32_master(dtype: torch.dtype) -> None:
    model, inputs = network(dtype), torch.linspace(-1, 1, 12).view(4, 3)
    weights = FlatWeights({"model": model})
    scale = LossScale(10.0, 1e-3)
    optimizer = FlatOptimizer(Named("SGD", {"lr": 1e-5}), weights, FixedClipper(), scale)
    before = weights.master.clone()
    weights.zero_gradient()
    (run(model, inputs) * scale.factor).backward()
    report = optimizer.step(1.0)
    exact = torch.autograd.grad(run(network(), inputs), list((reference := network()).parameters()), allow_unused=True)
    assert exact[0] is None
    exact = torch.autograd.grad(run(reference, inputs), list(reference.parameters()))
    norm = float(torch.cat([g.flatten() for g in exact]).norm())
    assert report.grad_norm == pytest.approx(norm, rel=2e-2)
    assert not torch.equal(weights.master, before)  # a step too small for half precision is not lost
    assert scale.log2 == pytest.approx(10.001)
    for entry in weights.entries:
        rounded = weights.master[entry.rows].view(entry.parameter.shape).to(entry.parameter.dtype)
        assert torch.equal(entry.parameter, rounded)


def test_a_step_that_is_not_finite_is_skipped_and_halves_the_scale() -> None:
    model = network(torch.float16)
    weights, scale = FlatWeights({"model": model}, [0.5]), LossScale(20.0)
    optimizer = FlatOptimizer(ADAMW, weights, AdaptiveGradClipper(1.0), scale)
    before = weights.master.clone()
    weights.zero_gradient()
    (run(model, torch.full((4, 3), 0.1)) * 2.0**40).backward()
    report = optimizer.step(1.0)
    assert not report.finite
    assert scale.log2 == 19.0
    assert torch.equal(weights.master, before)
    assert optimizer.clipper.state()["count"] == 0


def test_schedules() -> None:
    warm = Named("linear_warmup", {"warmup": 3})
    assert [learning_rate_factor(warm, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = Named("cosine", {"warmup": 2, "final": 0.1})
    values = [learning_rate_factor(cosine, step, 12) for step in range(13)]
    assert values[2] == 1.0
    assert values[7] == pytest.approx(0.55)
    assert values[12] == pytest.approx(0.1)
    assert learning_rate_factor(None, 5, 10) == 1.0
    with pytest.raises(ConfigError, match="cosine has no 'steep'; known are final, steps, warmup"):
        learning_rate_factor(Named("cosine", {"steep": 1}), 0, 1)


def test_wrong_arguments_are_named() -> None:
    weights = FlatWeights({"model": network()})
    with pytest.raises(ConfigError, match=r"optimizer AdamW: .*momentum"):
        FlatOptimizer(Named("AdamW", {"momentum": 1}), weights, FixedClipper(), LossScale())
    with pytest.raises(ConfigError, match="AdaptiveGradClipper has no 'norm'; known are max_norm"):
        build_clipper(Named("AdaptiveGradClipper", {"norm": 1}))
    with pytest.raises(ConfigError, match="must be a number or AdaptiveGradClipper"):
        build_clipper(Named("Clipper", {}))
    with pytest.raises(ValueError, match="must have a parameter to train"):
        FlatWeights({"model": nn.ReLU()})


def test_the_scale_and_the_clipper_are_taken_over() -> None:
    def fresh() -> FlatOptimizer:
        weights = FlatWeights({"model": network()})
        return FlatOptimizer(ADAMW, weights, AdaptiveGradClipper(1.0, buffer_size=2), LossScale(12.0))

    one, other = fresh(), fresh()
    for _ in range(3):
        one.weights.gradient.fill_(1e-3 * one.scale.factor)
        one.step(1.0)
    other.restore(one.tensors(), one.state())
    assert other.state() == one.state() != fresh().state()
    assert all(torch.equal(other.tensors()[key], value) for key, value in one.tensors().items())
