"""From a photo to assets.

    pytest benchmarks/bench_pipeline.py

``full_size``: TRELLIS-image-large with seeded random weights, 25 + 25 steps, guidance while t is in [0.5, 1], to
Gaussians and mesh, on a GPU. Random weights make random voxels, so after the structure decoder has run, the voxels of a
shell of the usual number take the place of its own; and a random surface has several times the faces of a real one.
``trellis_graph`` replays the structure flow as a CUDA graph. ``nano``: the bundled model as a user calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.device import ON_GPU, device, measure
from benchmarks.full_scale import CONTEXT, seeded_model
from benchmarks.plain_flow import flow_gflop
from benchmarks.scenes import object_voxels
from trellis import ImageTo3D
from trellis.nn.segments import Segments
from trellis.nn.sparse import SparseTensor, VoxelGrid
from trellis.pipelines.settings import SamplerParams
from trellis.pipelines.stages import Condition, Run, run_sampler
from trellis.sampling import timesteps
from trellis.sampling.graphs import GraphedFlow

PHOTO = Path(__file__).parents[1] / "examples" / "coffee.png"
STAGES = ["image_encoder", "structure_flow", "structure_decoder", "latent_flow", "gaussian_decoder", "mesh_decoder"]
SAMPLER = SamplerParams(steps=25, guidance=7.5, interval=(0.5, 1.0), rescale_t=3.0)


def generate(models: dict[str, Any], image: Image.Image, noise: torch.Tensor, latent: torch.Tensor) -> tuple[Any, Any]:
    """Gaussians and mesh; nothing is kept from call to call."""
    tokens = models["image_encoder"].encode([image])
    condition, run = Condition(tokens, torch.zeros_like(tokens)), Run(None)
    structure = run_sampler(
        condition.velocity(models["structure_flow"], SAMPLER), noise, SAMPLER, "structure_flow", run
    )
    models["structure_decoder"](structure)
    coords = object_voxels().to(noise.device)
    grid = VoxelGrid(coords, Segments.uniform(1, len(coords), coords.device), 64)
    slat = run_sampler(
        condition.velocity(models["latent_flow"], SAMPLER), SparseTensor(grid, latent), SAMPLER, "latent_flow", run
    )
    return models["gaussian_decoder"](slat)[0], models["mesh_decoder"](slat)[0]


@pytest.mark.parametrize("implementation", ["trellis", "trellis_graph"])
@pytest.mark.priority(2)
@ON_GPU
def test_full_size(benchmark, implementation: str) -> None:
    models = {stage: seeded_model(stage, device(), half=True) for stage in STAGES}
    if implementation == "trellis_graph":
        models["structure_flow"] = GraphedFlow(models["structure_flow"])
    coords = object_voxels()
    image = Image.open(PHOTO).convert("RGB").resize((518, 518))
    with device():
        noise, latent = torch.randn(1, 8, 16, 16, 16), torch.randn(len(coords), 8)
    steps = timesteps(SAMPLER.steps, SAMPLER.rescale_t)[:-1]
    forwards = len(steps) + sum(SAMPLER.interval[0] <= t <= SAMPLER.interval[1] for t in steps)
    tokens = 16**3, len((coords[:, 1:] // 2).unique(dim=0))
    flows = [models["structure_flow"].config, models["latent_flow"].config]
    gflop = forwards * sum(flow_gflop(n, config, CONTEXT[1]) for n, config in zip(tokens, flows, strict=True))
    benchmark.group = f"photo to Gaussians and mesh, full size, {len(coords)} voxels, 25 + 25 steps"
    benchmark.extra_info |= {
        "forwards of each flow": forwards,
        "resident MiB": round(torch.cuda.memory_allocated() / 2**20),
    }
    with torch.inference_mode():
        measure(benchmark, lambda: generate(models, image, noise, latent), rounds=1, gflop=gflop, dtype=torch.float16)


@pytest.mark.priority(7)
def test_nano(benchmark) -> None:
    pipe = ImageTo3D.from_pretrained(device=device())
    steps = [pipe.sampler(stage, None, None, None).steps for stage in ("structure", "latent")]
    benchmark.group = f"photo to assets, bundled nano model, {steps[0]} + {steps[1]} steps"
    benchmark.extra_info["implementation"] = "trellis"
    measure(benchmark, lambda: pipe(PHOTO), rounds=2, warmup=1)
