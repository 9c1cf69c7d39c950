"""Attention beside the ways plain torch offers.

    pytest benchmarks/bench_attention.py

Windows: 8^3 over thin shells, 12 heads of 64, as in the released latent decoders. Full attention: 16 heads, token
counts of the flow models; 1374 is the number of image tokens. GFLOP/s counts the two products (five in the backward).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as dense_attention

from benchmarks.device import device, measure
from tests.support.scenes import sphere_voxels
from trellis_kernels import use_reference, varlen_attention, window_partition, windowed_attention

FULL = pytest.mark.full
WINDOWS = [  # edge of the grid
    pytest.param(36, id="5k"),
    pytest.param(70, id="20k"),
    pytest.param(86, id="30k", marks=FULL),
]
DENSE = [  # queries, keys, heads, width
    pytest.param(4096, 4096, 16, 64, id="4096"),
    pytest.param(4096, 1374, 16, 64, id="4096 to 1374"),
    pytest.param(5657, 5657, 16, 64, id="5657", marks=FULL),
    pytest.param(5657, 1374, 16, 64, id="5657 to 1374", marks=FULL),
    pytest.param(4096, 4096, 16, 80, id="4096, width 80", marks=FULL),
    pytest.param(20000, 20000, 16, 64, id="20000", marks=FULL),
]
Run = Callable[[Tensor], Tensor]


def trellis(order: Tensor, offsets: Tensor) -> Run:
    return lambda qkv: windowed_attention(qkv, order, offsets)


def reference(order: Tensor, offsets: Tensor) -> Run:
    def run(qkv: Tensor) -> Tensor:
        with use_reference():
            return windowed_attention(qkv, order, offsets)

    return run


def loop(order: Tensor, offsets: Tensor) -> Run:
    """Gather one window, attend, scatter; next window."""
    windows = order.long().split(offsets.diff().tolist())

    def run(qkv: Tensor) -> Tensor:
        out = torch.empty_like(qkv[:, 0])
        for rows in windows:
            query, key, value = qkv[rows].permute(1, 2, 0, 3)[:, None]
            out[rows] = dense_attention(query, key, value)[0].transpose(0, 1)
        return out

    return run


def buckets(order: Tensor, offsets: Tensor) -> Run:
    """Windows of equal length as one batch."""
    lengths, starts, buckets = offsets.diff(), offsets[:-1], []
    for length in lengths.unique().tolist():
        first = starts[lengths == length]
        buckets.append(
            (len(first), length, order[(first[:, None] + torch.arange(length, device=order.device)).flatten()].long())
        )

    def run(qkv: Tensor) -> Tensor:
        out = torch.empty_like(qkv[:, 0])
        for count, length, rows in buckets:
            query, key, value = qkv[rows].unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
            out[rows] = dense_attention(query, key, value).transpose(1, 2).flatten(0, 1)
        return out

    return run


def padded(order: Tensor, offsets: Tensor) -> Run:
    """All windows as one batch, padded to the longest and masked."""
    lengths = offsets.diff()
    column = torch.arange(int(lengths.max()), device=order.device)
    there = column < lengths[:, None]
    rows = order[torch.where(there, offsets[:-1, None] + column, 0)].long()

    def run(qkv: Tensor) -> Tensor:
        query, key, value = qkv[rows].permute(2, 0, 3, 1, 4)
        attended = dense_attention(query, key, value, attn_mask=there[:, None, None]).transpose(1, 2)
        out = torch.empty_like(qkv[:, 0])
        out[rows[there]] = attended[there]
        return out

    return run


def forward_and_backward(run: Run, x: Tensor, upstream: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(run(x), x, upstream)[0]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("implementation", [trellis, reference, loop, buckets, padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("edge", WINDOWS)
def test_windows(
    benchmark, implementation: Callable[..., Run], edge: int, backward: bool, request: pytest.FixtureRequest
) -> None:
    benchmark_is_full = request.config.getoption("--full")
    if implementation is reference and edge > 36:
        pytest.skip("the reference is timed on the small problem only")
    if (backward or implementation is loop) and edge > 36 and not benchmark_is_full:
        pytest.skip("on the small problem only, unless --full")
    with device():
        coords = sphere_voxels(edge)
        order, offsets = window_partition(coords, 8, 4)
        qkv = torch.randn(len(coords), 3, 12, 64, requires_grad=backward)
    run, pairs = implementation(order, offsets), int(offsets.diff().long().square().sum())
    benchmark.group = f"windows {'forward and backward' if backward else 'forward'}, {len(coords)} voxels"
    with torch.no_grad():
        torch.testing.assert_close(run(qkv), trellis(order, offsets)(qkv), rtol=1e-4, atol=1e-4)
    if backward:
        step = forward_and_backward(run, qkv, torch.randn(len(coords), 12, 64, device=device()))
        measure(benchmark, step, rounds=2, warmup=1, gflop=7e-9 * 2 * pairs * 12 * 64)
    else:
        with torch.inference_mode():
            measure(benchmark, lambda: run(qkv), rounds=3, warmup=1, gflop=2e-9 * 2 * pairs * 12 * 64)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return dense_attention(*heads_first)[0].transpose(0, 1).contiguous()


def ours_varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query_offsets, key_offsets = (torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in (query, key))
    return varlen_attention(query, key, value, query_offsets, key_offsets)


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=FULL)], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("implementation", [ours_varlen, sdpa], ids=["trellis", "sdpa"])
@pytest.mark.parametrize(("queries", "keys", "heads", "width"), DENSE)
def test_one_sequence(
    benchmark, implementation: Callable[..., Tensor], queries: int, keys: int, heads: int, width: int, backward: bool
) -> None:
    with device():
        inputs = [torch.randn(n, heads, width, requires_grad=backward) for n in (queries, keys, keys)]
        upstream = torch.randn(queries, heads, width)
    benchmark.group = (
        f"full {'forward and backward' if backward else 'forward'}, {queries} to {keys} tokens, {heads} x {width}"
    )
    few = [inputs[0].detach()[:64], *(x.detach() for x in inputs[1:])]
    torch.testing.assert_close(implementation(*few), sdpa(*few), rtol=1e-4, atol=1e-5)
    products = 2e-9 * queries * keys * heads * width
    if backward:
        step = lambda: torch.autograd.grad(implementation(*inputs), inputs, upstream)  # noqa: E731
        measure(benchmark, step, rounds=2, warmup=1, gflop=7 * products)
    else:
        with torch.inference_mode():
            measure(benchmark, lambda: implementation(*inputs), rounds=3, warmup=1, gflop=2 * products)


def per_sequence(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    sequences = zip(query.split(lengths), key.split(keys), value.split(keys), strict=True)
    return torch.cat([sdpa(*sequence) for sequence in sequences])


@pytest.mark.parametrize("implementation", ["trellis", "per_sequence"])
def test_ragged_batch(benchmark, implementation: str) -> None:
    generator = random.Random(0)
    lengths, keys = ([generator.randint(20, 900) for _ in range(16)] for _ in range(2))
    with device():
        query, key, value = (torch.randn(sum(n), 16, 64) for n in (lengths, keys, keys))
        offsets = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, keys)]
    runs = {
        "trellis": lambda: varlen_attention(query, key, value, *offsets),
        "per_sequence": lambda: per_sequence(query, key, value, lengths, keys),
    }
    torch.testing.assert_close(*(run() for run in runs.values()), rtol=1e-4, atol=1e-5)
    benchmark.group = "ragged batch of 16 sequences of 20 to 900 tokens, 16 x 64"
    pairs = sum(n * m for n, m in zip(lengths, keys, strict=True))
    with torch.inference_mode():
        measure(benchmark, runs[implementation], rounds=5, warmup=1, gflop=4e-9 * pairs * 16 * 64)


@pytest.mark.parametrize("implementation", ["trellis", "unique"])
def test_partition(benchmark, implementation: str) -> None:
    with device():
        coords = sphere_voxels(86).contiguous()
    benchmark.group = f"window_partition, {len(coords)} voxels"

    def unique() -> object:
        with use_reference():
            return window_partition(coords, 8, 4)

    runs = {"trellis": lambda: window_partition(coords, 8, 4), "unique": unique}
    measure(benchmark, runs[implementation], rounds=20, warmup=1, gigabytes=1e-9 * len(coords) * (16 + 4))
