"""Branches of guidance as one batch, and conditions projected once: the same velocities as one forward per branch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trellis.models.latent_flow import LatentFlow, LatentFlowConfig
from trellis.models.structure_flow import FlowConfig, StructureFlow
from trellis.nn.context import Context
from trellis.nn.sparse import SparseTensor
from trellis.sampling import multidiffusion, stochastic, timesteps, with_guidance

SHARED = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "cond_channels": 12, "num_blocks": 2}
SHARED |= {"num_heads": 2, "qk_rms_norm": True}


def structure_flow(**changes: Any) -> StructureFlow:
    return randomised(StructureFlow(FlowConfig(**SHARED | {"resolution": 4, "patch_size": 2} | changes)))


def latent_flow() -> LatentFlow:
    config = LatentFlowConfig(**SHARED, resolution=8, patch_size=2, num_io_res_blocks=2, io_block_channels=[32])
    return randomised(LatentFlow(config))


def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def dense_state(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, 4, 4)


def sparse_state(batch: int) -> SparseTensor:
    occupied = torch.rand(batch, 8, 8, 8) < 0.15 * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
    coords = occupied.nonzero()
    return SparseTensor.from_coords(coords, torch.randn(len(coords), 3), 8)


FLOWS = pytest.mark.parametrize(
    ("flow", "state"), [(structure_flow, dense_state), (latent_flow, sparse_state)], ids=["structure", "latent"]
)


def one_forward_each(model: Any, x: Any, t: float, conds: Sequence[Tensor]) -> list[Tensor]:
    """What the batch must equal: a forward with the tokens of each condition."""
    batch = len(x)
    times = torch.full((batch,), 1000 * t)
    return [feats_of(model(x, times, cond.expand(batch, -1, -1))) for cond in conds]


def feats_of(x: Tensor | SparseTensor) -> Tensor:
    return x.feats if isinstance(x, SparseTensor) else x


class Counted:
    """A model that tells what it was asked for."""

    def __init__(self, model: Any) -> None:
        self.model, self.batches, self.projections = model, [], 0

    def __call__(self, x: Any, t: Tensor, cond: Any) -> Any:
        self.batches.append(len(t))
        return self.model(x, t, cond)

    def context(self, cond: Tensor) -> Context:
        self.projections += 1
        return self.model.context(cond)


@FLOWS
@pytest.mark.parametrize(("batch", "conds"), [(1, 1), (3, 1), (3, 3)])
def test_branches_in_one_batch_equal_two_forwards(
    flow: Callable[[], Any], state: Callable[[int], Any], batch: int, conds: int
) -> None:
    model, x = Counted(flow()), state(batch)
    cond, negative = torch.randn(conds, 5, 12), torch.randn(1, 5, 12)
    with torch.inference_mode():
        velocity = with_guidance(model, cond, negative, 2.0, (0.5, 1.0))
        found = [velocity(x, t) for t in (0.9, 0.6, 0.3)]
        for v, t, guided in zip(found, (0.9, 0.6, 0.3), (True, True, False), strict=True):
            positive, other = one_forward_each(model.model, x, t, [cond, negative])
            expected = 3 * positive - 2 * other if guided else positive
            torch.testing.assert_close(feats_of(v), expected, rtol=1e-5, atol=1e-5)
            assert not isinstance(v, SparseTensor) or v.grid is x.grid
    assert model.batches == [2 * batch, 2 * batch, batch]
    assert model.projections == 1


@FLOWS
@pytest.mark.parametrize("views", [3, 6])
def test_views_equal_one_forward_each(flow: Callable[[], Any], state: Callable[[int], Any], views: int) -> None:
    model, x = Counted(flow()), state(1)
    conds, negative = torch.randn(views, 5, 12), torch.zeros(1, 5, 12)
    with torch.inference_mode():
        times = timesteps(4)[:-1]
        alternating = stochastic(model, conds, negative, 2.0, (0.4, 1.0), 4)
        together = multidiffusion(model, conds, negative, 2.0, (0.4, 1.0))
        for step, t in enumerate(times):
            *each, other = one_forward_each(model.model, x, t, [*conds.split(1), negative])
            for v, positive in ((alternating, each[step % views]), (together, torch.stack(each).mean(0))):
                expected = 3 * positive - 2 * other if t >= 0.4 else positive
                torch.testing.assert_close(feats_of(v(x, t)), expected, rtol=1e-5, atol=1e-5)
    assert model.projections == (2 if views == 3 else 0)  # many conditions are not kept
    assert max(model.batches) == 2


@FLOWS
def test_a_context_is_the_condition(flow: Callable[[], Any], state: Callable[[int], Any]) -> None:
    model, x = flow(), state(2)
    tokens, times = torch.randn(3, 5, 12), torch.tensor([100.0, 900.0])
    context = model.context(tokens)
    for chosen in ([0, 1], [2, 0], [1, 1]):
        out, expected = model(x, times, context.select(chosen)), model(x, times, tokens[chosen])
        torch.testing.assert_close(feats_of(out), feats_of(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cond must have batch 2 like x; got 3"):
        model(x, times, context)


def test_normalised_keys_of_the_cross_attention_are_kept_too() -> None:
    model, x, tokens = structure_flow(qk_rms_norm_cross=True), dense_state(2), torch.randn(2, 5, 12)
    times = torch.tensor([100.0, 900.0])
    torch.testing.assert_close(model(x, times, model.context(tokens)), model(x, times, tokens), rtol=1e-5, atol=1e-5)


def test_conditions_of_different_lengths_are_run_apart() -> None:
    model, x = structure_flow(), dense_state(1)
    cond, negative = torch.randn(1, 5, 12), torch.randn(1, 3, 12)
    positive, other = one_forward_each(model, x, 0.7, [cond, negative])
    with torch.no_grad():
        out = with_guidance(model, cond, negative, 2.0)(x, 0.7)
    torch.testing.assert_close(out, 3 * positive - 2 * other, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_model_at_every_step() -> None:
    """With gradients nothing is kept from one step to the next: its graph would be gone after the first backward."""
    model, x = structure_flow().requires_grad_(), dense_state(1)
    velocity = with_guidance(model, torch.randn(1, 5, 12), torch.zeros(1, 5, 12), 2.0)
    weight = model.blocks[0].cross_attn.to_kv.weight
    for t in (0.9, 0.4):
        (gradient,) = torch.autograd.grad(velocity(x, t).sum(), weight)
        assert bool((gradient != 0).any())
