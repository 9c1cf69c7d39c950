"""Whole transformer blocks compile without graph breaks, and once for all lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trellis.nn.attention import KeyValue, Windows
from trellis.nn.block import ModulatedBlock, TransformerBlock
from trellis.nn.segments import Segments

# Tokens of each sample, tokens of each sample's condition.
LENGTHS = [
    ((5, 9), (4, 6)),
    ((7, 2), (4, 6)),
    ((11, 3), (2, 9)),
    ((64, 64), (5, 5)),
    ((1, 33), (13, 2)),
    ((8, 8), (7, 7)),
]
Inputs = Callable[[tuple[int, ...], tuple[int, ...]], tuple[Any, ...]]


def cross_attending(lengths: tuple[int, ...], context_lengths: tuple[int, ...]) -> tuple[Any, ...]:
    x, timestep = torch.randn(sum(lengths), 16), torch.randn(len(lengths), 16)
    context = torch.randn(sum(context_lengths), 8)
    return x, Segments.of(lengths), timestep, context, Segments.of(context_lengths)


def with_kept_keys(lengths: tuple[int, ...], context_lengths: tuple[int, ...]) -> tuple[Any, ...]:
    x, segments, timestep, _, context_segments = cross_attending(lengths, context_lengths)
    kept = KeyValue(*(torch.randn(sum(context_lengths), 2, 8) for _ in range(2)))
    return x, segments, timestep, kept, context_segments


def shared(lengths: tuple[int, ...], context_lengths: tuple[int, ...]) -> tuple[Any, ...]:
    x, segments, _, *others = cross_attending(lengths, context_lengths)
    return x, segments, torch.randn(len(lengths), 96), *others


def windowed(lengths: tuple[int, ...], context_lengths: tuple[int, ...]) -> tuple[Any, ...]:
    order = torch.randperm(sum(lengths)).int()
    return torch.randn(sum(lengths), 16), Windows(order, Segments.of((*lengths[:-1], 1, lengths[-1] - 1)).offsets)


def packed(lengths: tuple[int, ...], context_lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return torch.randn(sum(lengths), 16), Segments.of(lengths)


def modulated(**changes: Any) -> ModulatedBlock:
    return ModulatedBlock(16, 8, 2, **changes)


CASES = [
    pytest.param(lambda: modulated(qk_norm=True), cross_attending, id="structure and latent flow"),
    pytest.param(lambda: modulated(qk_norm=True), with_kept_keys, id="flow with kept keys"),
    pytest.param(lambda: modulated(qk_norm=True, qk_norm_cross=True), cross_attending, id="text XL flow"),
    pytest.param(lambda: modulated(shared_modulation=True), shared, id="shared modulation"),
    pytest.param(lambda: TransformerBlock(16, 2), windowed, id="latent encoder and decoders"),
    pytest.param(lambda: TransformerBlock(16, 2, qk_norm=True), packed, id="trunk with full attention"),
]


def randomised(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def check_every_length(build: Callable[[], nn.Module], inputs: Inputs, backend: str, backward: bool) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    block = randomised(build()).requires_grad_(backward)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for turn, lengths in enumerate(LENGTHS):
        arguments = inputs(*lengths)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            out = compiled(*arguments)
        expected = block(*arguments)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        if backward:
            pairs = zip(gradients(out, block), gradients(expected, block), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def gradients(out: Tensor, block: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), list(block.parameters()))


@pytest.mark.parametrize(("build", "inputs"), CASES)
def test_a_block_is_one_graph_for_all_lengths(build: Callable[[], nn.Module], inputs: Inputs) -> None:
    check_every_length(build, inputs, "aot_eager", backward=False)


def test_a_block_is_one_graph_for_all_lengths_in_training() -> None:
    check_every_length(lambda: modulated(qk_norm=True), cross_attending, "aot_eager", backward=True)
