"""What this machine can do at this moment: the copy bandwidth and the matmul rate that other rows are fractions of.

pytest benchmarks/bench_machine.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import ON_GPU, device, measure, on_gpu

pytestmark = pytest.mark.priority(0)
HALF = [pytest.param(dtype, marks=ON_GPU) for dtype in ("bfloat16", "float16", "tf32")]


def test_copy(benchmark) -> None:
    """Bytes read plus bytes written per second, in a copy much larger than any cache."""
    source = torch.zeros((1 << 30) if on_gpu() else (256 << 20), dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    benchmark.group = "machine: copy"
    benchmark.extra_info["rate"] = "copy"
    measure(benchmark, lambda: target.copy_(source), rounds=5, warmup=1, gigabytes=2e-9 * source.numel())


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_matmul(benchmark, dtype: str) -> None:
    """Square product of random numbers (a GPU is faster, and cooler, on zeros)."""
    edge = 8192 if dtype != "float32" else 4096 if on_gpu() else 2048
    stored = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.randn(edge, edge, device=device(), dtype=stored) for _ in range(2))
    out = torch.empty_like(a)
    benchmark.group = f"machine: matmul {edge}^3, {dtype}"
    benchmark.extra_info["rate"] = "matmul"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        measure(benchmark, lambda: torch.mm(a, b, out=out), rounds=5, warmup=1, gflop=2e-9 * edge**3, dtype=dtype)
    finally:
        torch.set_float32_matmul_precision(before)
