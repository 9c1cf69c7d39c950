"""Training steps of sparse convolutions in half precision, with the neighbor map inside the timing.

    pytest benchmarks/bench_sparse_conv_gpu.py

FlexGEMM's eight training shapes: a shell of radius R / 2 and thickness 1.25, C -> C channels, L layers, forward and
backward. And five shapes of the released TRELLIS models. GFLOP/s counts the products of voxels that are neighbors,
three times (forward, two gradients); coordinates are given, everything derived from them is inside.

- ``masked_implicit_gemm``: our own version of FlexGEMM's published algorithm, see masked_gemm.py.
- ``torch_pairs``: pairs of every tap listed once per step, then gather, matmul, index_add with autograd.
- ``spconv``: its own indices once per step, where it is installed for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.device import ON_GPU, device, measure, on_gpu
from benchmarks.masked_gemm import masked_gemm, one_order
from benchmarks.peers import spconv_layer
from benchmarks.scenes import flexgemm_shell, object_voxels
from tests.support.sparse_maps import children_of
from trellis_kernels import conv_plan, neighbor_map, subdivide, subdivided_conv, submanifold_conv

DTYPE = torch.float16
Step = Callable[[], list[Tensor]]


class Shape(NamedTuple):
    """Voxels, channels in and out, layers."""

    coords: Callable[[], Tensor]
    resolution: int
    ci: int
    co: int
    layers: int = 1


@cache
def shell(resolution: int) -> Tensor:
    return flexgemm_shell(resolution, device())


def decoder_voxels(subdivisions: int) -> Tensor:
    """19k voxels at 64^3, subdivided; or at half the resolution for -1."""
    coords = object_voxels().to(device())
    if subdivisions < 0:
        return (coords // coords.new_tensor([1, 2, 2, 2])).unique(dim=0)
    for _ in range(subdivisions):
        with coords.device:
            coords = children_of(coords)
    return coords


FLEXGEMM = [(8, 1024, 16), (16, 1024, 8), (32, 1024, 4), (64, 1024, 2), (128, 512, 2), (256, 256, 2), (512, 128, 2),
            (1024, 64, 2)]  # fmt: skip
SHAPES = {f"shell {r}^3, {c}->{c}, {n} layers": Shape(lambda r=r: shell(r), r, c, c, n) for r, c, n in FLEXGEMM}
SHAPES |= {
    "latent flow 64^3, 128->128": Shape(lambda: decoder_voxels(0), 64, 128, 128),
    "latent flow 32^3, 1024->1024": Shape(lambda: decoder_voxels(-1), 32, 1024, 1024),
    "latent flow 64^3, 2048->128": Shape(lambda: decoder_voxels(0), 64, 2048, 128),
    "mesh decoder 128^3, 192->192": Shape(lambda: decoder_voxels(1), 128, 192, 192),
    "mesh decoder 256^3, 96->96": Shape(lambda: decoder_voxels(2), 256, 96, 96),
}
SMALL = {"shell 16^3, 16->16, 2 layers": Shape(lambda: shell(16), 16, 16, 16, 2)}


class Problem(NamedTuple):
    coords: Tensor
    feats: Tensor
    weights: list[Tensor]
    upstream: Tensor
    resolution: int


def problem(shape: Shape) -> Problem:
    dtype = DTYPE if on_gpu() else torch.float32
    torch.manual_seed(0)
    with device():
        coords = shape.coords()
        spread = (3 / (13 * shape.ci)) ** 0.5  # so that the features keep their size from layer to layer
        widths = [shape.ci] + [shape.co] * shape.layers
        weights = [
            ((torch.rand(co, 27, ci) * 2 - 1) * spread).to(dtype).requires_grad_() for ci, co in pairwise(widths)
        ]
        feats = torch.randn(len(coords), shape.ci).to(dtype).requires_grad_()
        upstream = torch.randn(len(coords), shape.co).to(dtype)
    return Problem(coords, feats, weights, upstream, shape.resolution)


def gradients(p: Problem, out: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, [p.feats, *p.weights], p.upstream)]


def trellis(p: Problem) -> Step:
    def step() -> list[Tensor]:
        neighbors, out = neighbor_map(p.coords), p.feats
        plan = conv_plan(neighbors, gradients=True)
        for weight in p.weights:
            out = submanifold_conv(out, neighbors, weight, plan=plan)
        return gradients(p, out)

    return step


def masked_implicit_gemm(p: Problem) -> Step:
    if not on_gpu():
        pytest.skip("a Triton kernel")

    def step() -> list[Tensor]:
        neighbors, out = neighbor_map(p.coords), p.feats
        plan = one_order(neighbors)
        for weight in p.weights:
            out = masked_gemm(out, neighbors, weight, plan)
        return gradients(p, out)

    return step


def torch_pairs(p: Problem) -> Step:
    def step() -> list[Tensor]:
        neighbors, out = neighbor_map(p.coords), p.feats
        present = [(neighbors[:, tap] >= 0).nonzero()[:, 0] for tap in range(27)]
        pairs = [(rows, neighbors[rows, tap].long()) for tap, rows in enumerate(present)]
        for weight in p.weights:
            result = out.new_zeros(len(out), weight.shape[0])
            for tap, (rows, sources) in enumerate(pairs):
                result = result.index_add(0, rows, out[sources] @ weight[:, tap].T)
            out = result
        return gradients(p, out)

    return step


def spconv(p: Problem) -> Step:
    pytest.importorskip("spconv.pytorch")
    if not on_gpu():
        pytest.skip("its CPU convolutions have no gradient")
    layers = [spconv_layer(p.coords, p.feats, weight, p.resolution)[0] for weight in p.weights]
    parameters = [layer.weight.requires_grad_() for layer in layers]

    def step() -> list[Tensor]:
        grid = spconv_layer(p.coords, p.feats, p.weights[0], p.resolution)[1]
        for layer in layers:
            grid = layer(grid)
        found = torch.autograd.grad(grid.features, [p.feats, *parameters], p.upstream)
        return [grid.features, found[0], *(x.view(x.shape[0], 27, -1) for x in found[1:])]

    return step


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    pairs = [(a.detach().float(), e.detach().float()) for a, e in zip(actual, expected, strict=True)]
    return all(float((a - e).norm() / e.norm()) < tolerance for a, e in pairs)


CASES = [pytest.param(name, marks=[ON_GPU, pytest.mark.priority(1 if "64^3" in name else 2)]) for name in SHAPES]


@pytest.mark.parametrize(
    "implementation", [trellis, masked_implicit_gemm, torch_pairs, spconv], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shape", [*SMALL, *CASES])
def test_training_step(benchmark, implementation: Callable[[Problem], Step], shape: str) -> None:
    p = problem((SHAPES | SMALL)[shape])
    step = implementation(p)
    if implementation is not trellis:
        assert close(step(), trellis(p)(), 1e-4 if p.feats.dtype == torch.float32 else 2e-2)
    pairs = int((neighbor_map(p.coords) >= 0).sum())
    benchmark.group = f"training step, map included, {shape}, {len(p.coords)} voxels"
    gflop = 3 * 2e-9 * pairs * sum(weight.shape[0] * weight.shape[2] for weight in p.weights)
    measure(benchmark, step, rounds=3, warmup=1, gflop=gflop, dtype=p.feats.dtype)


@pytest.mark.parametrize("implementation", ["trellis", "plain_pair"])
@pytest.mark.parametrize(("subdivisions", "ci", "co"), [(0, 768, 192), (1, 192, 96)])
@pytest.mark.priority(2)
@ON_GPU
def test_subdivided(benchmark, implementation: str, subdivisions: int, ci: int, co: int) -> None:
    """The mesh decoder's upsampling convolutions, forward, maps ready: the next convolution needs the finer one too."""
    coords = decoder_voxels(subdivisions)
    neighbors = neighbor_map(coords)
    with device():
        feats, weight = torch.randn(len(coords), ci).to(DTYPE), (torch.randn(co, 27, ci) / (13 * ci) ** 0.5).to(DTYPE)
        fine = neighbor_map(children_of(coords))
    coarse_plan, fine_plan = conv_plan(neighbors), conv_plan(fine)
    runs = {
        "trellis": lambda: subdivided_conv(feats, neighbors, weight, plan=coarse_plan),
        "plain_pair": lambda: submanifold_conv(subdivide(feats), fine, weight, plan=fine_plan),
    }
    pairs = int((fine >= 0).sum())
    with torch.inference_mode():
        assert close([runs[implementation]()], [runs["trellis"]()], 2e-2)
        benchmark.group = f"subdivided_conv {ci}->{co}, {len(coords)} parents, float16"
        benchmark.extra_info["GFLOP of the plain pair"] = round(2e-9 * pairs * ci * co)
        gflop = 2e-9 * 27 * len(coords) * ci * co
        measure(benchmark, runs[implementation], rounds=3, gflop=gflop, dtype=DTYPE)
