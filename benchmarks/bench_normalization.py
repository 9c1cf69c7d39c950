"""Norms, modulation, gates and residuals of a flow block beside the same in torch's own operators.

pytest benchmarks/bench_normalization.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import normalize

from benchmarks.device import device, measure, on_gpu
from trellis_kernels import gated_residual, modulated_layer_norm, qk_rms_norm, residual_layer_norm

EPS = 1e-6
# Tokens of each sample, channels: structure flow alone and guided, latent flow of two objects.
SHAPES = {"4096 x 1024": [4096], "2 x 4096 x 1024": [4096, 4096], "(5657 + 4100) x 1024": [5657, 4100]}
CHANNELS, HEADS = 1024, 16
Run = Callable[[], object]


class Block:
    """What the chains of one block read."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(0)
        dtype = torch.float16 if on_gpu() else torch.float32
        with device():
            self.offsets = torch.tensor([0, *lengths]).cumsum(0).int()
            self.index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self.x, self.update = (torch.randn(sum(lengths), CHANNELS).to(dtype) for _ in range(2))
            self.qkv = torch.randn(sum(lengths), 3, HEADS, CHANNELS // HEADS).to(dtype)
            self.shift, self.scale, self.gate = torch.randn(len(lengths), 3 * CHANNELS).to(dtype).chunk(3, dim=1)
            self.weight, self.bias = torch.randn(CHANNELS), torch.randn(CHANNELS)
            self.gammas = [torch.randn(HEADS, CHANNELS // HEADS) for _ in range(2)]

    def own(self, values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[self.index]

    def torch_norm(self, x: Tensor, *affine: Tensor) -> Tensor:
        return torch_layer_norm(x.float(), (CHANNELS,), *affine, eps=EPS).to(x.dtype)


def modulated_norm(b: Block) -> dict[str, Callable[[], list[Tensor]]]:
    return {
        "ours": lambda: [modulated_layer_norm(b.x, b.scale, b.shift, b.offsets, eps=EPS)],
        "torch": lambda: [b.torch_norm(b.x) * (1 + b.own(b.scale)) + b.own(b.shift)],
    }


def residual_norm(b: Block) -> dict[str, Callable[[], list[Tensor]]]:
    def separate() -> list[Tensor]:
        total = b.x + b.own(b.gate) * b.update
        return [total, b.torch_norm(total, b.weight, b.bias)]

    def ours() -> list[Tensor]:
        keys = {"gate": b.gate, "weight": b.weight, "bias": b.bias}
        return list(residual_layer_norm(b.x, b.update, offsets=b.offsets, **keys, eps=EPS))

    return {"ours": ours, "torch": separate}


def gate(b: Block) -> dict[str, Callable[[], list[Tensor]]]:
    return {
        "ours": lambda: [gated_residual(b.x, b.update, b.gate, b.offsets)],
        "torch": lambda: [b.x + b.own(b.gate) * b.update],
    }


def heads(b: Block) -> dict[str, Callable[[], list[Tensor]]]:
    def separate() -> list[Tensor]:
        factor = (CHANNELS // HEADS) ** 0.5
        return [
            (normalize(part.float(), dim=-1) * gamma * factor).to(part.dtype)
            for part, gamma in zip(b.qkv.unbind(1), b.gammas, strict=False)
        ]

    return {"ours": lambda: list(qk_rms_norm(b.qkv, *b.gammas).unbind(1)), "torch": separate}


CHAINS = {
    "modulated norm": (modulated_norm, 2),
    "residual norm": (residual_norm, 4),
    "gate": (gate, 3),
    "heads": (heads, 4),
}


@pytest.mark.parametrize("implementation", ["ours", "torch", "torch.compile"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chain(benchmark, shape: str, chain: str, implementation: str) -> None:
    if implementation == "torch.compile" and not on_gpu():
        pytest.skip("inductor's fusion is a peer on a GPU; on a CPU it compiles for longer than everything else runs")
    benchmark.group = f"normalization {chain} {shape}"
    build, passes = CHAINS[chain]
    block = Block(SHAPES[shape])
    with torch.no_grad():
        ways = build(block)
        run = torch.compile(ways["torch"]) if implementation == "torch.compile" else ways[implementation]
        tolerance = 2e-2 if on_gpu() else 1e-4
        for out, expected in zip(run(), ways["torch"](), strict=True):
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        measure(benchmark, run, rounds=5, warmup=1, gigabytes=passes * block.x.nbytes / 1e9, dtype=block.x.dtype)


@pytest.mark.parametrize("implementation", ["ours", "torch"])
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_and_its_gradient(benchmark, chain: str, implementation: str) -> None:
    benchmark.group = f"normalization training {chain} 2 x 4096 x 1024"
    block = Block(SHAPES["2 x 4096 x 1024"])
    leaves = [block.x, block.update, block.qkv, block.weight, block.bias, *block.gammas]
    for leaf in leaves:
        leaf.requires_grad_()
    block.shift, block.scale, block.gate = (
        part.detach().clone().requires_grad_() for part in (block.shift, block.scale, block.gate)
    )
    leaves += [block.shift, block.scale, block.gate]
    chain_of, passes = CHAINS[chain]
    forward = chain_of(block)[implementation]
    upstream = [torch.ones_like(out) for out in forward()]

    def run() -> object:
        return torch.autograd.grad(forward(), leaves, upstream, allow_unused=True)

    measure(benchmark, run, rounds=3, warmup=1, gigabytes=3 * passes * block.x.nbytes / 1e9, dtype=block.x.dtype)
