"""Every operator on every backend: sizes that fit no tile, tensors that are not contiguous, tensors in the wrong place.

A backend is tested as soon as the operator names a kernel for it: nothing here has to be changed for a new kernel,
and `tests/support/operator_cases.py` gets an entry for a new operator.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import trellis_kernels
from tests.support.backends import running_on
from tests.support.fields import random_field
from tests.support.operator_cases import CASES, CHANNELS, HEADS, WIDTH, noise, offsets, voxels
from tests.support.sparse_maps import neighbors_of
from trellis_kernels import OPERATORS

NAMES = sorted(name.removeprefix("trellis_kernels::") for name in OPERATORS)
# "interpreter" for rooms in Triton, "emulated" for rooms in CUDA C++: their GPU kernels, run on the host.
ON_HOST = {"triton": "interpreter", "cuda": "emulated"}
SIZES = (0, 1, 37)
# Which of two equal values a threshold takes differs by rounding; these are compared as a whole.
LOOSE = {"rasterize_gaussians": 0.02}


def operator(name: str) -> Any:
    return OPERATORS[f"trellis_kernels::{name}"]


def has_gpu_kernel(name: str) -> bool:
    """Whether the module that the operator names for a GPU has its function by now."""
    module = operator(name).kernels.get("cuda")
    return module is not None and hasattr(importlib.import_module(module), name)


def places() -> list[Any]:
    """(operator, backend) for every kernel there is."""
    found = []
    for name in NAMES:
        kernels = operator(name).kernels
        found.append(pytest.param(name, "cpu", id=f"{name}-cpu"))
        if has_gpu_kernel(name):
            backend = ON_HOST[kernels["cuda"].rpartition(".")[2]]
            found.append(pytest.param(name, backend, id=f"{name}-{backend}"))
            found.append(pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu))
    return found


def arguments(name: str, rows: int) -> tuple[Any, ...]:
    if name not in CASES:
        pytest.fail(f"{name} has no arguments in tests/support/operator_cases.py")
    return CASES[name](rows)


def run(name: str, backend: str, args: tuple[Any, ...]) -> list[Tensor]:
    with running_on(backend):
        if backend == "cuda":
            args = tree_map_only(Tensor, lambda tensor: tensor.cuda(), args)
        result = operator(name)(*args)
    return [value.cpu() for value in (result if isinstance(result, tuple | list) else (result,))]


def strided(tensor: Tensor) -> Tensor:
    """The same values with a gap after each."""
    if tensor.ndim == 0:
        return tensor
    spread = tensor.new_empty(*tensor.shape, 2)
    spread[..., 0], spread[..., 1] = tensor, 1
    return spread[..., 0]


def assert_same(name: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if name in LOOSE:
            if one.is_floating_point():
                assert not len(one) or (one - other).abs().mean() < LOOSE[name]
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(("name", "backend"), places())
def test_any_number_of_rows_is_right(name: str, backend: str, rows: int) -> None:
    args = arguments(name, rows)
    expected = operator(name).reference(*args)
    expected = list(expected) if isinstance(expected, tuple | list) else [expected]
    if name == "conv_plan":
        pytest.skip("a plan is whatever its own kernels read")
    assert_same(name, run(name, backend, args), expected)


@pytest.mark.parametrize(("name", "backend"), places())
def test_tensors_need_not_be_contiguous(name: str, backend: str) -> None:
    args = arguments(name, 37)
    spread = tree_map_only(Tensor, strided, args)
    assert_same(name, run(name, backend, spread), run(name, backend, args))


@pytest.mark.parametrize("name", [name for name in NAMES if has_gpu_kernel(name)])
def test_a_gpu_kernel_refuses_tensors_of_the_host(name: str) -> None:
    launch = getattr(importlib.import_module(operator(name).kernels["cuda"]), name)
    with pytest.raises(ValueError, match="a CUDA kernel needs tensors on a CUDA device; got one on cpu"):
        launch(*arguments(name, 37))


def calls() -> dict[str, Any]:
    """Public functions with tensors of more than one meaning, and all of their arguments."""
    n, scene = 37, CASES["rasterize_gaussians"](5)
    feats, maps, weight = noise(n, CHANNELS), neighbors_of(voxels(n)), noise(CHANNELS, 27, CHANNELS)
    bounds, gain = offsets(n), noise(2, CHANNELS)
    field = random_field(n, 2, 5, 4)
    return {
        "submanifold_conv": (trellis_kernels.submanifold_conv, (feats, maps, weight, noise(CHANNELS))),
        "subdivided_conv": (trellis_kernels.subdivided_conv, (feats, maps, weight, noise(CHANNELS))),
        "submanifold_conv_weight_gradient": (trellis_kernels.submanifold_conv_weight_gradient, (feats, maps, feats)),
        "pointwise_conv": (trellis_kernels.pointwise_conv, (feats, noise(8, 1, CHANNELS), noise(8))),
        "sparse_pool": (trellis_kernels.sparse_pool, CASES["sparse_pool"](n)),
        "upsample": (trellis_kernels.upsample, CASES["upsample"](n)),
        "varlen_attention": (trellis_kernels.varlen_attention, CASES["varlen_attention"](n)),
        "windowed_attention": (trellis_kernels.windowed_attention, CASES["windowed_attention"](n)),
        "extract_mesh": (trellis_kernels.extract_mesh, CASES["surface_topology"](n)),
        "rasterize_gaussians": (trellis_kernels.rasterize_gaussians, (*scene[:7], 33, 17, scene[7])),
        "render_radiance_field": (trellis_kernels.render_radiance_field, field.arguments()),
        "render_voxels": (
            trellis_kernels.render_voxels,
            (field.positions, noise(n, 3), *field.arguments()[4:-1]),
        ),
        "spherical_harmonics": (trellis_kernels.spherical_harmonics, (noise(n, 4, 3), noise(n, 3))),
        "modulated_layer_norm": (
            lambda *args: trellis_kernels.modulated_layer_norm(*args, eps=1e-6),
            (feats, gain, gain, bounds),
        ),
        "gated_residual": (trellis_kernels.gated_residual, (feats, feats, gain, bounds)),
        "qk_rms_norm": (
            trellis_kernels.qk_rms_norm,
            (noise(n, 3, HEADS, WIDTH), noise(HEADS, WIDTH), noise(HEADS, WIDTH)),
        ),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", list(calls()))
def test_tensors_on_two_devices_are_one_clear_error(name: str, device: str) -> None:
    function, args = calls()[name]
    args = tree_map_only(Tensor, lambda tensor: tensor.to(device), args)
    function(*args)
    positions = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
    for stranger in positions:
        mixed = [value.to("meta") if index == stranger else value for index, value in enumerate(args)]
        with pytest.raises(ValueError, match=r"\w+ must be on (cpu|cuda:0|meta) like \w+; got (cpu|cuda:0|meta)"):
            function(*mixed)


def vast(count: int) -> Tensor:
    """`count` float16 zeros that take no memory until they are written (Linux: pages come when they are touched)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which older Pythons do not name
    return torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.float16)


def far_keys(rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Attention to the last keys of so many that the number of an element needs 32 bits and a sign; the same of few."""
    query, key, value = (part.half().contiguous() for part in _qkv_parts(rows))
    many = 2**31 // (HEADS * WIDTH) + 64
    far = [vast(many * HEADS * WIDTH).view(many, HEADS, WIDTH) for _ in range(2)]
    for here, there in zip((key, value), far, strict=True):
        there[many - rows :] = here
    bounds = torch.tensor([0, 0, rows], dtype=torch.int32), torch.tensor([0, many - rows, many], dtype=torch.int32)
    near = torch.tensor([0, 0, rows], dtype=torch.int32)
    return (query, *far, *bounds), (query, key, value, near, near)


def far_rows(rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Windows of rows that lie far apart."""
    _, order, bounds = CASES["windowed_attention"](rows)
    near = torch.stack(_qkv_parts(rows), dim=1).half()
    stride = 2**31 // (rows - 2)
    far = vast(rows * stride).as_strided(near.shape, (stride, HEADS * WIDTH, WIDTH, 1))
    far.copy_(near)
    return (far, order, bounds), (near, order, bounds)


def far_voxels(rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Coarse voxels near the end of very many."""
    many, near = 2**31 // CHANNELS + 64, noise(rows, CHANNELS).half()
    far = vast(many * CHANNELS).view(many, CHANNELS)
    far[many - rows :] = near
    inverse = torch.arange(rows, dtype=torch.int32)
    return (far, inverse + many - rows), (near, inverse)


def _qkv_parts(rows: int) -> tuple[Tensor, ...]:
    return noise(rows, 3, HEADS, WIDTH).unbind(1)


FAR = {"varlen_attention": far_keys, "windowed_attention": far_rows, "upsample": far_voxels}


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until it is touched")
@pytest.mark.parametrize(
    ("name", "backend"),
    # The CPU kernel of attention widens all of the keys: 16 GB.
    [place for place in places() if place.values[0] in FAR and place.id != "varlen_attention-cpu"],
)
def test_elements_beyond_31_bits_are_reached(name: str, backend: str) -> None:
    far, near = FAR[name](37)
    assert_same(name, run(name, backend, far), run(name, backend, near))
