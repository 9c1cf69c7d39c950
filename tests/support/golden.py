"""Reads `tests/golden`: weights by formula, inputs and outputs of the official code, and the gate they must pass.

The format, the formula and the gate are described in tests/golden/README.md.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"

# (item, output) -> relative rms and max abs of what was checked in this session; pytest prints it at the end.
MEASURED: dict[tuple[str, str], tuple[float, float]] = {}


def formula_weight(key: str, shape: list[int], salt: str = "", gain: float = 1.0) -> Tensor:
    """The pseudo-random value of a parameter, a function of its key and shape alone."""
    mask = np.uint64(0xFFFFFFFF)
    offset = np.uint64((zlib.crc32((salt + key).encode()) * 2246822519 + 374761393) & 0xFFFFFFFF)
    count = math.prod(shape)
    x = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + offset) & mask
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & mask
    x ^= x >> np.uint64(16)
    u = (x.astype(np.float64) + 0.5) / 2**32 - 0.5
    if key.endswith("gamma") or (key.endswith("weight") and len(shape) == 1):
        value = 1 + 0.4 * u
    elif key.endswith("bias"):
        value = 0.4 * u
    else:
        value = u * (2 * math.sqrt(3) * gain / math.sqrt(count // shape[0]))
    return torch.from_numpy(value.astype(np.float32).reshape(shape))


@dataclass(frozen=True)
class Golden:
    """One item: `info` is the JSON, `tensors` the stored tensors by full name (``in.x``, ``out.y``)."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def parameters(self) -> dict[str, Tensor]:
        salt, gain = self.info.get("salt", ""), self.info.get("gain", 1.0)
        return {key: formula_weight(key, shape, salt, gain) for key, shape in self.info["params"]}

    def check(self, key: str, actual: Tensor, *, rms: float = 4e-6, max_abs: float = 1e-5) -> tuple[float, float]:
        """Assert the gate for output `key`; return (relative rms, max abs) for the table."""
        expected = self.tensors[key]
        full = self.info.get("full", {}).get(key)
        if full is not None:
            assert list(actual.shape) == full["shape"], f"{self.name} {key}: shape {list(actual.shape)}"
            sum_of_squares = float(actual.double().square().sum())
            assert math.isclose(sum_of_squares, full["sumsq"], rel_tol=1e-5), f"{self.name} {key}: sum of squares"
        rows = self.info.get("rows", {}).get(key)
        if rows is not None:
            actual = actual[self.tensors[rows].long()]
        assert actual.shape == expected.shape, f"{self.name} {key}: {list(actual.shape)} is not {list(expected.shape)}"
        if not expected.is_floating_point():
            assert torch.equal(actual.to(expected.dtype), expected), f"{self.name} {key}: integers differ"
            MEASURED[self.name, key] = (0.0, 0.0)
            return 0.0, 0.0
        difference = actual.double() - expected.double()
        relative = float(difference.norm() / expected.double().norm().clamp_min(1e-30))
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        MEASURED[self.name, key] = (relative, largest)
        assert relative <= rms, f"{self.name} {key}: relative rms {relative:.3g} > {rms}"
        assert largest <= max_abs, f"{self.name} {key}: max abs {largest:.3g} > {max_abs}"
        return relative, largest


def golden(name: str) -> Golden:
    info = json.loads((FOLDER / f"{name}.json").read_text())
    return Golden(name, info, load_file(FOLDER / f"{name}.safetensors"))
