"""One step of each flow model, the conditional and the unconditional forward as one batch of two.

    pytest benchmarks/bench_flow.py

Full size on a GPU (TRELLIS-image-large, seeded random weights, float16 torso), a small model on a CPU. ``torch`` is the
same network written in plain torch (benchmarks/plain_flow.py), ``torch_compiled`` that through torch.compile, and
``trellis_graph`` ours as a CUDA graph: where it is faster, the host cannot keep up. What follows from the
conditioning alone is computed before, as in the pipeline; plain torch computes it in each step, as the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device import ON_CPU, ON_GPU, device, measure
from benchmarks.full_scale import CONTEXT, seed, seeded_model
from benchmarks.plain_flow import flow_gflop, graphed, plain_structure_flow
from benchmarks.scenes import object_voxels
from trellis.models.structure_flow import FlowConfig, StructureFlow
from trellis.nn.segments import Segments
from trellis.nn.sparse import SparseTensor, VoxelGrid
from trellis.sampling.graphs import GraphedFlow

SMALL = FlowConfig(
    resolution=16, in_channels=8, model_channels=256, cond_channels=256, out_channels=8, num_blocks=4, num_heads=4,
    patch_size=2, qk_rms_norm=True,
)  # fmt: skip
full_size = [ON_GPU, pytest.mark.priority(1)]


@cache
def structure_flow(size: str) -> Any:
    if size == "full":
        return seeded_model("structure_flow", device(), half=True)
    return seed(StructureFlow(SMALL)).to(device())


@pytest.mark.parametrize(
    ("size", "implementation"),
    [
        pytest.param("small", "trellis", marks=ON_CPU),
        pytest.param("small", "torch", marks=ON_CPU),
        pytest.param("full", "trellis", marks=full_size),
        pytest.param("full", "trellis_graph", marks=full_size),
        pytest.param("full", "torch", marks=full_size),
        pytest.param("full", "torch_compiled", marks=[ON_GPU, pytest.mark.priority(6)]),
    ],
)
def test_structure_step(benchmark, size: str, implementation: str) -> None:
    model = structure_flow(size)
    config, context = model.config, CONTEXT[1] if size == "full" else 64
    with device(), torch.inference_mode():
        x = torch.randn(2, config.in_channels, *(config.resolution,) * 3)
        t, cond = torch.full((2,), 500.0), torch.randn(2, context, config.cond_channels)
        ready = model.context(cond)  # once per image
    runs: dict[str, Callable[[], Tensor]] = {
        "trellis": lambda: model(x, t, ready),
        "torch": lambda: plain_structure_flow(model, x, t, cond),
    }
    with torch.inference_mode():
        if implementation == "trellis_graph":
            replay = GraphedFlow(model)
            runs[implementation] = lambda: replay(x, t, ready)
        elif implementation == "torch_compiled":
            compiled = torch.compile(plain_structure_flow)
            runs[implementation] = lambda: compiled(model, x, t, cond)
        run = runs[implementation]
        actual, expected = run().float(), runs["torch"]().float()
        assert float((actual - expected).norm() / expected.norm()) < (1e-4 if size == "small" else 2e-2)
        tokens = (config.resolution // config.patch_size) ** 3
        shape = f"{tokens} tokens, {config.num_blocks} x {config.model_channels}"
        benchmark.group = f"structure flow step, batch 2, {shape}"
        gflop = 2 * flow_gflop(tokens, config, context)
        measure(benchmark, run, rounds=5, warmup=1, gflop=gflop, dtype=model.torso_dtype)


@pytest.mark.parametrize("implementation", ["trellis", "trellis_graph"])
@pytest.mark.priority(1)
@ON_GPU
def test_latent_step(benchmark, implementation: str) -> None:
    model = seeded_model("latent_flow", device(), half=True)
    one = object_voxels()
    coords = torch.cat([one, one + torch.tensor([1, 0, 0, 0], dtype=torch.int32)]).to(device())
    grid = VoxelGrid(coords, Segments.uniform(2, len(one), coords.device), 64)
    with device(), torch.inference_mode():
        x = SparseTensor(grid, torch.randn(len(coords), model.config.in_channels))
        t, cond = torch.full((2,), 500.0), torch.randn(2, *CONTEXT[1:])
    tokens = len((one[:, 1:] // 2).unique(dim=0))
    benchmark.group = f"latent flow step, batch 2, {len(one)} voxels, {tokens} tokens, maps ready"
    with torch.inference_mode():
        ready = model.context(cond)
        run = lambda: model(x, t, ready).feats  # noqa: E731
        run()
        if implementation == "trellis_graph":
            run = graphed(run)
        gflop = 2 * flow_gflop(tokens, model.config, CONTEXT[1])
        measure(benchmark, run, rounds=3, gflop=gflop, dtype=model.torso_dtype)
