from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.golden import Golden, golden
from trellis.nn.sparse import SparseTensor
from trellis.sampling import FlowStep, euler, multidiffusion, stochastic, timesteps, with_guidance
from trellis.sampling.flow_euler import data_to_noise, noise_to_data, to_data, to_noise


@pytest.fixture(scope="module")
def item() -> Golden:
    return golden("samplers")


def dense_velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """The analytic velocity of the golden item."""
    shape = (-1, *(1,) * (x.ndim - 1))
    return torch.sin(3 * t / 1000).view(shape) * x + cond.flatten(1).mean(dim=1).view(shape) + 0.1 * torch.cos(x)


def check(item: Golden, run: str, steps: list[FlowStep[Tensor]]) -> None:
    item.check(f"out.{run}.samples", steps[-1].x)
    item.check(f"out.{run}.pred_x_t", torch.stack([step.x for step in steps]))
    if f"out.{run}.pred_x_0" in item.tensors:
        item.check(f"out.{run}.pred_x_0", torch.stack([step.estimate for step in steps]))


@pytest.mark.parametrize("run", ["euler", "euler_r3", "cfg", "interval", "interval2"])
def test_trajectories_are_the_official_ones(item: Golden, run: str) -> None:
    settings = item.info["runs"][run]
    strength = settings.get("cfg_strength", 0.0)
    interval = tuple(settings.get("cfg_interval", (0.0, 1.0)))
    velocity = with_guidance(dense_velocity, item["in.cond"], item["in.neg_cond"], strength, interval)
    check(item, run, list(euler(velocity, item["in.noise"], settings["steps"], settings["rescale_t"])))
    np.testing.assert_array_equal(timesteps(settings["steps"], settings["rescale_t"]), item[f"out.{run}.t_seq"].numpy())


@pytest.mark.parametrize("mode", ["stochastic", "multidiffusion"])
def test_multi_image_modes_are_the_official_ones(item: Golden, mode: str) -> None:
    settings = item.info["runs"][f"multi_{mode}"]
    guidance = (settings["cfg_strength"], tuple(settings["cfg_interval"]))
    conds, negative = item["in.multi_cond"], item["in.neg_cond"]
    velocity: Callable[[Tensor, float], Tensor]
    if mode == "stochastic":
        velocity = stochastic(dense_velocity, conds, negative, *guidance, settings["steps"], settings["rescale_t"])
    else:
        velocity = multidiffusion(dense_velocity, conds, negative, *guidance)
    check(item, f"multi_{mode}", list(euler(velocity, item["in.noise"], settings["steps"], settings["rescale_t"])))


def test_sparse_trajectory_is_the_official_one(item: Golden) -> None:
    def velocity(x: SparseTensor, t: Tensor, cond: Tensor) -> SparseTensor:
        rows = x.segments.index
        return x.with_feats(torch.sin(3 * t / 1000)[rows, None] * x.feats + cond.flatten(1).mean(dim=1)[rows, None])

    noise = SparseTensor.from_coords(item["in.sparse.coords"], item["in.sparse.noise"])
    guided = with_guidance(velocity, item["in.cond"], item["in.neg_cond"], 3.0, (0.5, 1.0))
    *_, last = euler(guided, noise, 6, 3.0)
    item.check("out.sparse.samples", last.x.feats)


def test_conversions_are_the_official_ones(item: Golden) -> None:
    t, sigma = item.info["conversions"]["t"], item.info["conversions"]["sigma_min"]
    x, v = item["in.noise"], item["in.v"]
    data, noise = to_data(x, v, t, sigma), to_noise(x, v, t)
    item.check("out.x0", data)
    item.check("out.eps", noise)
    item.check("out.xstart_to_eps", data_to_noise(x, data, t, sigma))
    item.check("out.eps_to_xstart", noise_to_data(x, noise, t, sigma))


def test_guidance_of_zero_never_asks_for_the_negative(item: Golden) -> None:
    asked = []

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        asked.append(float(cond.mean()))
        return x

    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    list(euler(with_guidance(model, ones, zeros, 0.0), item["in.noise"], 4))
    assert asked == [1.0] * 4


def test_exact_for_a_constant_velocity() -> None:
    """Rectified flow of straight lines: any number of steps gives the data."""
    data, noise = torch.randn(3, 4), torch.randn(3, 4)
    for steps in (1, 7):
        *_, last = euler(lambda x, t: noise - data, noise, steps, 3.0)
        torch.testing.assert_close(last.x, data, rtol=1e-5, atol=1e-5)


def test_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        timesteps(0)


def test_refuses_a_condition_of_another_batch() -> None:
    velocity = with_guidance(dense_velocity, torch.zeros(3, 1, 1), torch.zeros(1, 1, 1), 1.0)
    with pytest.raises(ValueError, match=r"cond must have batch 1 or 2; got \[3, 1, 1\]"):
        velocity(torch.zeros(2, 3), 1.0)
