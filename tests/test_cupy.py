"""Arrays of other libraries share memory with our tensors through DLPack: CuPy's on a GPU, NumPy's on the CPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.scenes import sphere_voxels
from tests.support.sparse_maps import neighbors_of
from trellis_kernels import morton_codes, neighbor_map, submanifold_conv


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param)


def device_of(library: ModuleType) -> str:
    return "cuda" if library.__name__ == "cupy" else "cpu"


def address(array: Any) -> int:
    return array.ctypes.data if hasattr(array, "ctypes") else array.data.ptr


def test_a_tensor_as_an_array_is_the_same_memory(library: ModuleType) -> None:
    tensor = torch.arange(12, dtype=torch.float32, device=device_of(library)).view(3, 4)
    array = library.from_dlpack(tensor)
    assert address(array) == tensor.data_ptr()
    assert (array.shape, str(array.dtype)) == ((3, 4), "float32")
    tensor[1, 2] = 100
    assert float(array[1, 2]) == 100
    array[2, 3] = -1
    assert tensor[2, 3].item() == -1


def test_an_array_as_a_tensor_is_the_same_memory(library: ModuleType) -> None:
    array = library.arange(12, dtype=library.int32).reshape(3, 4)
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == address(array)
    assert (tensor.device.type, tensor.dtype, tensor.shape) == (device_of(library), torch.int32, (3, 4))
    array[0, 0] = 7
    assert tensor[0, 0].item() == 7
    tensor[2, 3] = -1
    assert int(array[2, 3]) == -1


def test_a_kernel_reads_an_array_and_an_array_its_result(library: ModuleType) -> None:
    expected = neighbors_of(sphere_voxels(8))
    coords = library.asarray(sphere_voxels(8).numpy())
    neighbors = library.from_dlpack(neighbor_map(torch.from_dlpack(coords)))
    assert neighbors.tolist() == expected.tolist()


def test_a_convolution_of_arrays_equals_the_products_of_their_library(library: ModuleType) -> None:
    coords = sphere_voxels(6)
    table = library.asarray(neighbors_of(coords).numpy())
    random = library.random.RandomState(0)
    feats = random.standard_normal((len(coords), 16)).astype(library.float32)
    weight = random.standard_normal((16, 27, 16)).astype(library.float32)
    padded = library.concatenate([feats, library.zeros((1, 16), library.float32)])  # row -1: no neighbor
    expected = library.einsum("nki,oki->no", padded[table].astype(library.float64), weight.astype(library.float64))

    tensors = [torch.from_dlpack(array) for array in (feats, table, weight)]
    out = library.from_dlpack(submanifold_conv(*tensors))
    error = float(abs(out - expected).max() / abs(expected).max())
    assert error < (2e-6 if device_of(library) == "cpu" else 2e-3)  # on a GPU float32 products may be tf32


def test_a_strided_array_is_read_as_what_it_shows(library: ModuleType) -> None:
    rows = sphere_voxels(8)
    wide = library.zeros((len(rows), 8), library.int32)
    wide[:, ::2] = library.asarray(rows.numpy())
    view = torch.from_dlpack(wide[:, ::2])
    assert view.stride() == (8, 2)
    assert torch.equal(morton_codes(view).cpu(), morton_codes(rows))


def test_bfloat16_goes_as_its_bits(library: ModuleType) -> None:
    tensor = torch.tensor([1.0, -2.0], dtype=torch.bfloat16, device=device_of(library))
    bits = library.from_dlpack(tensor.view(torch.int16))
    assert address(bits) == tensor.data_ptr()
    assert [int(value) & 0xFFFF for value in bits] == [0x3F80, 0xC000]
    assert torch.equal(torch.from_dlpack(bits).view(torch.bfloat16), tensor)


def test_a_tensor_with_a_gradient_must_be_detached_first(library: ModuleType) -> None:
    tensor = torch.ones(3, device=device_of(library), requires_grad=True)
    with pytest.raises(BufferError, match="detach"):
        library.from_dlpack(tensor)
    assert address(library.from_dlpack(tensor.detach())) == tensor.data_ptr()


@pytest.mark.gpu
def test_streams_are_ordered_by_the_exchange() -> None:
    """What is still being computed on torch's stream is waited for by CuPy's, and the other way round."""
    cupy = pytest.importorskip("cupy")
    ours, theirs = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)

    def slow(x: Tensor) -> Tensor:
        for _ in range(200):
            x = x @ x
        return x

    big = torch.eye(2048, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(ours):
        produced = slow(big) * 3
        with theirs:
            doubled = cupy.from_dlpack(produced) * 2
            back = torch.from_dlpack(doubled)
        assert back[5, 5].item() == 6.0
