"""Strivec fields shaped like decoded objects beside the vectorised definition.

pytest benchmarks/bench_radiance_field.py
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import device, measure
from tests.support.fields import surface_field
from trellis_kernels import render_radiance_field, use_reference


@pytest.mark.parametrize("implementation", ["ours", "reference"])
def test_small_field(benchmark, implementation: str) -> None:
    """920 leaves of a 16^3 grid at 64^2 pixels."""
    with device():
        field = surface_field(4, 64, 64)

    def run() -> torch.Tensor:
        if implementation == "ours":
            return render_radiance_field(*field.arguments()).colors
        with use_reference():
            return render_radiance_field(*field.arguments()).colors

    benchmark.group = f"radiance field, 920 leaves of 16^3, 64^2, {torch.get_num_threads()} threads"
    measure(benchmark, run, rounds=3)
