"""A budget of GPU memory: which models stay on the GPU, and which are brought there for their stage only.

`plan` is pure: from what each stage needs and the budget to the models that stay. `activation_bytes` says what a stage
needs beside its weights. Its coefficients are peaks measured on the pretended device of tests/support/pretend_cuda.py,
where tests hold them to the models, plus a margin for what kernels use internally; a GPU test compares them with
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from trellis.models.latent_flow import LatentFlow
from trellis.models.latent_trunk import LatentTrunk
from trellis.models.mesh_decoder import MeshDecoder
from trellis.models.structure_flow import StructureFlow
from trellis.models.structure_vae import StructureDecoder

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
WORKSPACE = 256 << 20  # libraries' scratch memory and a pipeline's small tensors
MARGIN = 1.1  # for kernels' own temporaries
BRANCHES = 2  # guidance runs the conditional and the unconditional branch as one batch
CONTEXTS = 4  # so many conditions are kept as keys and values at most
CONTEXT_TOKENS = 1374  # of an image at the released models' size
RESULTS = 5_000  # bytes per voxel of what the decoders returned so far: Gaussians, radiance field, mesh


@dataclass(frozen=True)
class Stage:
    """What one stage needs, in bytes.

    Args:
        role: of the model that runs in it.
        weights: of that model.
        activations: everything else.
    """

    role: str
    weights: int
    activations: int


@dataclass(frozen=True)
class Plan:
    """Which models stay on the GPU.

    Args:
        resident: roles of the models that stay; the others come for their stage.
        peak: bytes that the largest stage needs, with all that stays.
    """

    resident: frozenset[str]
    peak: int


def plan(stages: Sequence[Stage], budget: int) -> Plan:
    """Keep as many bytes of weights on the GPU as the budget allows at every stage.

    Args:
        stages: in any order; each role once.
        budget: bytes.

    Raises:
        ValueError: the largest stage does not fit even alone; it is named, with what it needs.
    """
    largest = max(stages, key=lambda stage: stage.weights + stage.activations)
    need = largest.weights + largest.activations
    if need > budget:
        raise ValueError(
            f"memory must be at least {_gb(need)} for {largest.role} ({_gb(largest.weights)} of weights and "
            f"{_gb(largest.activations)} to compute); got {_gb(budget)}"
        )
    best: Plan | None = None
    best_kept = -1
    for count in range(len(stages), -1, -1):
        for kept in combinations(stages, count):
            weights = sum(stage.weights for stage in kept)
            peak = weights + max(stage.activations + (0 if stage in kept else stage.weights) for stage in stages)
            if peak <= budget and weights > best_kept:
                best, best_kept = Plan(frozenset(stage.role for stage in kept), peak), weights
    assert best is not None
    return best


def parse_memory(value: str | int | None) -> int | None:
    """``"8GB"``, ``"512MiB"`` or a number of bytes; a GB is 10^9 bytes, a GiB 2^30.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|MIB|GIB)\s*", value.upper()) if isinstance(value, str) else None
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size <= 0:
        raise ValueError(f'memory must be a size such as "16GB", "8GB" or "6GiB", or a number of bytes; got {value!r}')
    return size


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def activation_bytes(module: Any, voxels: int, batch: int) -> int:
    """Bytes a stage needs beside its weights.

    Args:
        module: a model, or the conditioner.
        voxels: per object.
        batch: objects that go through the flows together; the decoders take one at a time.
    """
    if isinstance(module, StructureFlow | LatentFlow):
        config, size = module.config, module.torso_dtype.itemsize
        if isinstance(module, LatentFlow):
            rows, per_channel = voxels, 11 * size + 10
        else:
            rows, per_channel = (config.resolution // config.patch_size) ** 3, 10 * size + 10
        exact = BRANCHES * batch * rows * config.model_channels * per_channel
    elif isinstance(module, StructureDecoder):
        widest = max(width * 8.0**level for level, width in enumerate(module.config.channels))
        exact = int(16 * widest * 16**3) + 4 * batch * 64**3
    elif isinstance(module, MeshDecoder):
        exact = voxels * (161 * module.config.model_channels + batch * RESULTS)
    elif isinstance(module, LatentTrunk):
        per_channel = 11 * module.torso_dtype.itemsize + 4
        exact = voxels * (per_channel * module.config.model_channels + batch * RESULTS)
    else:  # a conditioner
        exact = 80 * batch * module.tokens * module.channels
    return int(MARGIN * exact) + WORKSPACE + context_bytes(module)


def context_bytes(module: Any) -> int:
    """Keys and values of the conditions, which guidance keeps for all steps of a flow."""
    if not isinstance(module, StructureFlow | LatentFlow):
        return 0
    config = module.config
    tokens = CONTEXTS * CONTEXT_TOKENS
    return 2 * tokens * config.num_blocks * config.model_channels * module.torso_dtype.itemsize


def to_host(module: nn.Module) -> None:
    """Move a module to host memory: page-locked where there is a GPU, so that it returns at full speed."""
    with torch.inference_mode(False), torch.no_grad():
        module.to("cpu")
        if torch.cuda.is_available():
            for holder, name, tensor in _tensors(module):
                if not tensor.is_pinned():
                    holder[name] = _like(tensor, tensor.pin_memory())


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module of the host on `device` for a while. The copy there is dropped, so changes of it are lost."""
    at_home = _tensors(module)
    with torch.inference_mode(False), torch.no_grad():
        for holder, name, tensor in at_home:
            holder[name] = _like(tensor, tensor.to(device, non_blocking=True))
    try:
        yield
    finally:
        for holder, name, tensor in at_home:
            holder[name] = tensor
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is kept for reuse would count against the budget


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Parameters and buffers, with the dictionaries they are in."""
    holders: list[dict[str, Any]] = [h for m in module.modules() for h in (m._parameters, m._buffers)]
    return [(holder, name, tensor) for holder in holders for name, tensor in holder.items() if tensor is not None]


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
