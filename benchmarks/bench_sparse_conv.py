"""Sparse convolution beside its peers, on surfaces whose voxels have 12 of 27 neighbors, as released models see.

    pytest benchmarks/bench_sparse_conv.py --benchmark-only [--full]

One group per problem, one row per implementation, all on the same inputs, checked against each other before timing.
A peer's row also says how much longer it takes than ours (``times ours``): the two are run in turn there, because
neighbors on a shared machine disturb runs that are minutes apart. Peers get what they can prepare beforehand:

- ``torch_taps``: gather, matmul, index_add per tap, from the neighbor map, like ours.
- ``torch_pairs``: the same with the pairs of every tap listed before timing, and the weight in torch's best layout.
- ``cusparse``: one dense product with all taps' weights, then a sparse one (CuPy, GPU only).
- ``torch_dense``: conv3d over the whole grid, scattering and gathering not timed.
- ``spconv``: its CPU wheel, its indices cached before timing; both sides with one thread, because with two its
  results are wrong. Install it beside torch: ``pip install --no-deps --target DIR spconv cumm==0.7.11 pccm ccimport
  fire lark portalocker``, then ``PYTHONPATH=DIR``.
- ``torch_sgemm``: torch.mm of 2048^3, for the rate this machine has at this moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv3d

from benchmarks import peers
from benchmarks.device import ON_CPU, device, seconds
from benchmarks.device import measure as measure_row
from tests.support.scenes import sphere_voxels
from tests.support.sparse_maps import children_of, neighbors_of
from trellis_kernels import (
    conv_plan,
    sparse_pool,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    submanifold_conv_weight_gradient,
    upsample,
    use_reference,
)

Run = Callable[[], Tensor]
full = pytest.mark.full


@dataclass
class Problem:
    coords: Tensor
    neighbors: Tensor
    feats: Tensor
    weight: Tensor
    resolution: int
    plan: Tensor  # what a GPU prepares once per neighbor map; empty on a CPU

    @property
    def pairs(self) -> int:
        return int((self.neighbors >= 0).sum())

    @property
    def gflop(self) -> float:
        return 2e-9 * self.pairs * self.weight.shape[0] * self.weight.shape[2]


@cache
def surface(resolution: int) -> tuple[Tensor, Tensor]:
    with device():
        coords = sphere_voxels(resolution, thickness=0.6)
        return coords, neighbors_of(coords)


def problem(resolution: int, ci: int, co: int) -> Problem:
    coords, neighbors = surface(resolution)
    plan = conv_plan(neighbors, gradients=True)
    torch.manual_seed(0)
    with device():
        feats, weight = torch.randn(len(coords), ci), torch.randn(co, 27, ci)
    return Problem(coords, neighbors, feats, weight, resolution, plan)


def trellis(p: Problem) -> Run:
    return lambda: submanifold_conv(p.feats, p.neighbors, p.weight, plan=p.plan)


def reference(p: Problem) -> Run:
    def run() -> Tensor:
        with use_reference():
            return submanifold_conv(p.feats, p.neighbors, p.weight)

    return run


def torch_taps(p: Problem) -> Run:
    weight = p.weight.permute(1, 2, 0).contiguous()

    def run() -> Tensor:
        out = p.feats.new_zeros(len(p.feats), weight.shape[2])
        for tap in range(27):
            present = (p.neighbors[:, tap] >= 0).nonzero()[:, 0]
            out.index_add_(0, present, p.feats[p.neighbors[present, tap].long()] @ weight[tap])
        return out

    return run


def listed(neighbors: Tensor) -> list[tuple[Tensor, Tensor]]:
    present = [(neighbors[:, tap] >= 0).nonzero()[:, 0] for tap in range(27)]
    return [(rows, neighbors[rows, tap].long()) for tap, rows in enumerate(present)]


def torch_pairs(p: Problem) -> Run:
    pairs, weight = listed(p.neighbors), p.weight.permute(1, 2, 0).contiguous()

    def run() -> Tensor:
        out = p.feats.new_zeros(len(p.feats), weight.shape[2])
        for (rows, sources), matrix in zip(pairs, weight, strict=True):
            out.index_add_(0, rows, p.feats[sources] @ matrix)
        return out

    return run


def torch_dense(p: Problem) -> Run:
    _, x, y, z = p.coords.long().T
    grid = p.feats.new_zeros(1, p.feats.shape[1], *(p.resolution,) * 3)
    grid[0, :, x, y, z] = p.feats.T
    kernel = p.weight.unflatten(1, (3, 3, 3)).movedim(-1, 1).contiguous()
    return lambda: conv3d(grid, kernel, padding=1)[0][:, x, y, z].T


def cusparse(p: Problem) -> Run:
    return peers.cusparse(p.feats, p.neighbors, p.weight)


def spconv(p: Problem) -> Run:
    layer, grid = peers.spconv_layer(p.coords, p.feats, p.weight, p.resolution)
    with torch.inference_mode():
        actual, expected = layer(grid).features, trellis(p)()
    if float((actual - expected).norm() / expected.norm()) > 1e-5:
        pytest.skip("spconv's result is wrong here, so its time means nothing")
    return lambda: layer(grid).features


def in_turn(first: Run, second: Run, rounds: int) -> tuple[float, float]:
    """The best time of each."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, run in enumerate((first, second)):
            best[i] = min(best[i], seconds(run))
    return best[0], best[1]


def measure(
    benchmark, group: str, run: Run, ours: Run | None, gflop: float = 0, gigabytes: float = 0, rounds: int = 5
) -> None:
    benchmark.group = group
    with torch.inference_mode():
        actual = run()
        if ours is not None:
            expected = ours()
            assert float((actual - expected).norm() / expected.norm()) < 1e-5
            del expected
            theirs, mine = in_turn(run, ours, rounds)
            benchmark.extra_info["times ours"] = round(theirs / mine, 2)
        del actual
        measure_row(benchmark, run, rounds=rounds, warmup=1, gflop=gflop, gigabytes=gigabytes)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = [(resolution, channels) for resolution in (32, 64) for channels in (32, 64, 128, 256)]
LARGE = [(32, 512), (32, 768), pytest.param(64, 512, marks=full), pytest.param(64, 768, marks=full)]


@pytest.mark.parametrize("implementation", [trellis, torch_taps, torch_pairs, cusparse], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("resolution", "channels"), [*SMALL, *LARGE])
def test_forward(benchmark, implementation: Callable[[Problem], Run], resolution: int, channels: int) -> None:
    p = problem(resolution, channels, channels)
    group = f"submanifold_conv {resolution}^3 {channels}->{channels}, {len(p.coords)} voxels"
    ours = None if implementation is trellis else trellis(p)
    measure(benchmark, group, implementation(p), ours, p.gflop, rounds=20 if channels < 256 else 4)


@pytest.mark.parametrize(("resolution", "channels"), LARGE)
def test_rate_of_sgemm(benchmark, resolution: int, channels: int) -> None:
    """Same group as test_forward; its `our rate` is the fraction of sgemm's rate that submanifold_conv has."""
    p = problem(resolution, channels, channels)
    with device():
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    benchmark.group = f"submanifold_conv {resolution}^3 {channels}->{channels}, {len(p.coords)} voxels"
    with torch.inference_mode():
        theirs, mine = in_turn(lambda: a @ b, trellis(p), 4)
        gflop = 2e-9 * 2048**3
        measure_row(benchmark, lambda: a @ b, rounds=4, gflop=gflop)
    benchmark.extra_info |= {"implementation": "torch_sgemm", "rate": "sgemm"}
    benchmark.extra_info["our rate"] = round((p.gflop / mine) / (gflop / theirs), 2)


@ON_CPU
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("implementation", [trellis, spconv], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("resolution", "channels"), [(r, c) for r in (32, 64) for c in (32, 64, 128)])
def test_forward_on_one_thread(benchmark, implementation, resolution: int, channels: int) -> None:
    p = problem(resolution, channels, channels)
    group = f"submanifold_conv, one thread, {resolution}^3 {channels}->{channels}, {len(p.coords)} voxels"
    ours = None if implementation is trellis else trellis(p)
    measure(benchmark, group, implementation(p), ours, p.gflop, rounds=10)


@pytest.mark.parametrize("implementation", [trellis, torch_dense, reference], ids=lambda f: f.__name__)
@pytest.mark.parametrize("channels", [32, pytest.param(128, marks=full)])
def test_forward_beside_dense(benchmark, implementation: Callable[[Problem], Run], channels: int) -> None:
    p = problem(64, channels, channels)
    ours = None if implementation is trellis else trellis(p)
    group = f"submanifold_conv and dense, 64^3 {channels}->{channels}"
    measure(benchmark, group, implementation(p), ours, p.gflop, rounds=3)


@pytest.mark.parametrize("implementation", ["trellis", "torch_pairs"])
@pytest.mark.parametrize("gradient", ["weight", "input"])
@pytest.mark.parametrize("channels", [32, 64, 128, 256])
def test_gradient(benchmark, implementation: str, gradient: str, channels: int) -> None:
    p = problem(64, channels, channels)
    out = torch.randn_like(p.feats)
    pairs, weight = listed(p.neighbors), p.weight.transpose(0, 1).contiguous()

    def torch_weight() -> Tensor:
        return torch.stack([out[rows].T @ p.feats[sources] for rows, sources in pairs], 1)

    def torch_input() -> Tensor:
        result = torch.zeros_like(p.feats)
        for (rows, sources), matrix in zip(pairs, weight, strict=True):
            result.index_add_(0, sources, out[rows] @ matrix)
        return result

    ops = torch.ops.trellis_kernels
    runs = {
        ("trellis", "weight"): lambda: submanifold_conv_weight_gradient(p.feats, p.neighbors, out, p.plan),
        ("trellis", "input"): lambda: ops.submanifold_conv_input_gradient(out, p.neighbors, p.weight, p.plan),
        ("torch_pairs", "weight"): torch_weight,
        ("torch_pairs", "input"): torch_input,
    }
    ours = None if implementation == "trellis" else runs["trellis", gradient]
    group = f"submanifold_conv {gradient} gradient 64^3 {channels}->{channels}"
    measure(benchmark, group, runs[implementation, gradient], ours, p.gflop)


# The two upsampling convolutions of the mesh decoder. The second one's parents are themselves children.
DECODER = [
    pytest.param(16, False, 768, 192, id="16^3->32^3-768->192"),
    pytest.param(16, True, 192, 96, id="32^3->64^3-192->96"),
    pytest.param(64, False, 768, 192, marks=full, id="64^3->128^3-768->192"),
    pytest.param(64, True, 192, 96, marks=full, id="128^3->256^3-192->96"),
]


@pytest.mark.parametrize("implementation", ["trellis", "plain_pair", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize(("resolution", "twice", "ci", "co"), DECODER)
def test_subdivided(benchmark, implementation: str, resolution: int, twice: bool, ci: int, co: int) -> None:
    coords = surface(resolution)[0]
    torch.manual_seed(0)
    with device():
        coords = children_of(coords) if twice else coords
        coarse, fine = neighbors_of(coords), neighbors_of(children_of(coords))
        feats, weight, out = torch.randn(len(coords), ci), torch.randn(co, 27, ci), torch.randn(8 * len(coords), co)
    ops = torch.ops.trellis_kernels
    runs: dict[str, Run] = {
        "trellis": lambda: subdivided_conv(feats, coarse, weight),
        "plain_pair": lambda: submanifold_conv(subdivide(feats), fine, weight),
        "input_gradient": lambda: ops.subdivided_conv_input_gradient(out, coarse, weight),
        "weight_gradient": lambda: ops.subdivided_conv_weight_gradient(feats, coarse, out),
    }
    products = int((fine >= 0).sum()) if implementation == "plain_pair" else 27 * len(coords)
    ours = runs["trellis"] if implementation == "plain_pair" else None
    benchmark.extra_info["products per child"] = round(products / len(fine), 2)
    direction = f" {implementation.replace('_', ' ')}" if "gradient" in implementation else ""
    group = f"subdivided_conv{direction} {ci}->{co}, {len(coords)} parents"
    measure(benchmark, group, runs[implementation], ours, 2e-9 * products * ci * co, rounds=3)


@pytest.mark.parametrize("implementation", ["trellis", "reference"])
@pytest.mark.parametrize("operation", ["sparse_pool", "upsample"])
def test_resampling(benchmark, implementation: str, operation: str) -> None:
    coords = surface(64)[0]
    _, inverse = torch.unique(coords // 2, dim=0, return_inverse=True)
    inverse, count = inverse.int(), int(inverse.max()) + 1
    with device():
        fine, coarse = torch.randn(len(coords), 128), torch.randn(count, 128)
    ours: Run = {
        "sparse_pool": lambda: sparse_pool(fine, inverse, count, "biased_mean"),
        "upsample": lambda: upsample(coarse, inverse),
    }[operation]

    def run() -> Tensor:
        with use_reference():
            return ours()

    moved = 4e-9 * (fine.numel() * 2 if operation == "upsample" else fine.numel() + coarse.numel())
    chosen, peer = (ours, None) if implementation == "trellis" else (run, ours)
    measure(benchmark, f"{operation} 64^3 to 32^3, 128 channels", chosen, peer, gigabytes=moved)
