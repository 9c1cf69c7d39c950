"""Where a room's tests run: CPU kernels, GPU kernels on host tensors, and the GPU itself.

    @TRITON_BACKENDS
    def test_something(backend: str) -> None: ...

"interpreter" runs a Triton room's kernels in Triton's interpreter, "emulated" a CUDA room's in csrc/emulation, both on
host tensors; "cuda" runs on the GPU, where new tensors are made, too. The fixture is in tests/conftest.py.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.operator import use_kernels_of

ROOT = Path(__file__).parents[2]
H100 = cuda_device.Properties("stand-in for an H100", (9, 0), 132, 232_448)
_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TRITON_BACKENDS = pytest.mark.parametrize("backend", ["cpu", "interpreter", _CUDA], indirect=True)
CUDA_BACKENDS = pytest.mark.parametrize("backend", ["cpu", "emulated", _CUDA], indirect=True)


SANITIZE = [False]  # set by `pytest --sanitized`, see tests/conftest.py


@functools.cache
def emulated() -> Any:
    """The CUDA kernels compiled for the host (csrc/emulation), built if a source has changed."""
    folder = ROOT / "build" / ("emulated_sanitized" if SANITIZE[0] else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # pytest's workers build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "setup.py", "--quiet", "build_emulated", *(["--sanitize"] if SANITIZE[0] else [])]
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"csrc/cuda does not compile for the host:\n{done.stderr[-4000:]}")
    return load_emulated(folder)


def load_emulated(folder: Path) -> Any:
    (path,) = folder.glob("_cuda_emulated*.so")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def stand_in_device(properties: cuda_device.Properties = H100) -> Iterator[None]:
    """GPU launches see host tensors as those of a GPU with these properties."""
    with (
        patch.object(cuda_device, "properties", lambda tensor: properties),
        patch.object(cuda_device, "guard", lambda tensor: nullcontext()),
        patch.object(cuda_device, "stream", lambda tensor: 0),
        patch.object(cuda_device, "native", lambda tensor: emulated()),
    ):
        yield


@contextmanager
def gpu_kernels_on_host(properties: cuda_device.Properties = H100) -> Iterator[None]:
    """Every operator runs its GPU kernel, on host tensors."""
    with stand_in_device(properties), use_kernels_of("cuda"):
        yield


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    if backend == "cuda":
        with torch.device("cuda"):
            yield
    elif backend == "cpu":
        yield
    else:
        if backend == "interpreter" and torch.cuda.is_available():
            pytest.skip("this process has Triton compiled for the GPU; the cuda cases run instead")
        with gpu_kernels_on_host(), _bfloat16_products() if backend == "interpreter" else nullcontext():
            yield


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Triton's interpreter holds bfloat16 as its bits and multiplies matrices of those bits; here, of their values."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, values(a), values(b), *rest)

    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


def to_backend(tensor: Tensor, backend: str) -> Tensor:
    """For tensors that were not made by torch's own factories inside the test."""
    return tensor.to("cuda" if backend == "cuda" else "cpu")
