"""What GPU launches ask of a device: its properties, and its current stream.

Rooms call these through the module (``cuda_device.properties(...)``), so that tests can put an H100's properties
in their place and run every GPU kernel on a machine that has no GPU.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Properties(NamedTuple):
    """What the choice of a kernel's configuration may depend on.

    Args:
        name: of the device, for messages.
        capability: compute capability, e.g. ``(9, 0)``.
        multiprocessors: how many there are.
        shared_memory: bytes of shared memory one block may have.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


def properties(tensor: Tensor) -> Properties:
    """Properties of the GPU a tensor is on.

    Raises:
        ValueError: the tensor is not on a GPU.
    """
    _expect_gpu(tensor)
    return _properties(tensor.get_device())


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which the GPU of `tensor` is the current one: launches go to the current device."""
    _expect_gpu(tensor)
    return torch.cuda.device(tensor.device)


def stream(tensor: Tensor) -> int:
    """Handle of the current stream on the GPU of `tensor`."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, as kernels read it in 16-byte words; a view may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def native(tensor: Tensor) -> Any:
    """The module of compiled CUDA kernels, `_cuda`, once it is known to have code for the GPU of `tensor`.

    Raises:
        ImportError: it was not built.
        RuntimeError: it was built for other GPUs.
        ValueError: the tensor is not on a GPU.
    """
    return _native(properties(tensor))


@functools.cache
def _native(device: Properties) -> Any:
    try:
        module = importlib.import_module("trellis_kernels._cuda")
    except ImportError as error:
        raise ImportError(
            "the CUDA kernels are not built (trellis_kernels._cuda); with nvcc in PATH or CUDA_HOME, run "
            "`pip install -e .` in the project; `trellis doctor` shows what was found"
        ) from error
    require_code_for(device, module.architectures)
    return module


def require_code_for(device: Properties, architectures: tuple[int, ...]) -> None:
    """Machine code runs on its own generation from its own revision on; the newest is there as PTX for later ones.

    Raises:
        RuntimeError: nothing in a binary of these architectures runs on the device.
    """
    major, minor = device.capability
    capability = 10 * major + minor
    if capability > max(architectures) or any(a // 10 == major and a <= capability for a in architectures):
        return
    built = ";".join(map(str, architectures))
    raise RuntimeError(
        f"trellis_kernels._cuda was built for {built} and has no code for {device.name} (capability {major}.{minor}); "
        f"rebuild it with TRELLIS_CUDA_ARCHITECTURES={capability} pip install -e ."
    )


def _expect_gpu(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise ValueError(f"a CUDA kernel needs tensors on a CUDA device; got one on {tensor.device}")


@functools.cache
def _properties(index: int) -> Properties:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 49152)
    return Properties(found.name, (found.major, found.minor), found.multi_processor_count, shared)
