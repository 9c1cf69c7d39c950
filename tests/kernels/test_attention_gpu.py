"""The GPU kernels of attention: on host tensors under Triton's interpreter, and on a GPU where there is one."""

import pytest
import torch
from torch import Tensor

from tests.support import aot
from tests.support.attention import by_sequence, by_window, offsets_of
from tests.support.backends import TRITON_BACKENDS
from trellis_kernels import use_reference, varlen_attention, window_partition, windowed_attention
from trellis_kernels.attention.triton import head_parts

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
RAGGED = [  # query lengths, key lengths, width; a tile has 32, 64 or 128 rows
    pytest.param([0], [0], 8, id="nothing"),
    pytest.param([1], [1], 1, id="one"),
    pytest.param([5, 1, 30], [7, 2, 40], 20, id="odd width"),
    pytest.param([3, 0, 4, 2, 0], [5, 6, 0, 1, 0], 16, id="empty sequences"),
    pytest.param([129, 63, 64], [31, 128, 65], 64, id="around a tile"),
    pytest.param([200], [140], 80, id="several tiles"),
    pytest.param([9], [70], 128, id="widest"),
]


def voxels(occupancy: float, edge: int = 5) -> Tensor:
    coords = (torch.rand(2, edge, edge, edge) < occupancy).nonzero().int()
    shuffled = coords[torch.randperm(len(coords))]
    return shuffled[shuffled[:, 0].argsort(stable=True)]


@TRITON_BACKENDS
@DTYPES
@pytest.mark.parametrize(("queries", "keys", "width"), RAGGED)
def test_ragged_sequences_agree_with_reference(
    backend: str, queries: list[int], keys: list[int], width: int, dtype: torch.dtype
) -> None:
    inputs = [torch.randn(sum(n), 2, width).to(dtype) for n in (queries, keys, keys)]
    offsets = offsets_of(queries), offsets_of(keys)
    out = varlen_attention(*inputs, *offsets)
    with use_reference():
        expected = varlen_attention(*inputs, *offsets)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@TRITON_BACKENDS
@DTYPES
@pytest.mark.parametrize(("occupancy", "width"), [(0.0, 8), (0.1, 80), (1.0, 64)])
def test_windows_agree_with_reference(backend: str, occupancy: float, width: int, dtype: torch.dtype) -> None:
    coords = voxels(occupancy)
    order, offsets = window_partition(coords, 5, 2)  # windows of up to 125 voxels
    qkv = torch.randn(len(coords), 3, 2, width).to(dtype)
    out = windowed_attention(qkv, order, offsets)
    with use_reference():
        expected = windowed_attention(qkv, order, offsets)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@TRITON_BACKENDS
def test_every_sequence_is_what_torch_computes_for_it(backend: str) -> None:
    queries, keys = [5, 1, 150], [7, 2, 70]
    query, key, value = (torch.randn(sum(n), 3, 24) for n in (queries, keys, keys))
    out = varlen_attention(query, key, value, offsets_of(queries), offsets_of(keys))
    torch.testing.assert_close(out.double(), by_sequence(query, key, value, queries, keys), rtol=1e-5, atol=1e-6)


@TRITON_BACKENDS
def test_every_window_is_what_torch_computes_for_it(backend: str) -> None:
    order, offsets = torch.randperm(220).int(), offsets_of([0, 170, 1, 0, 49])
    qkv = torch.randn(220, 3, 2, 16)
    out = windowed_attention(qkv, order, offsets)
    torch.testing.assert_close(out.double(), by_window(qkv, order, offsets), rtol=1e-5, atol=1e-6)


@TRITON_BACKENDS
@pytest.mark.parametrize("extent", [1, 7, 40, 2**31])
@pytest.mark.parametrize("rows", [0, 1, 2, 300])
@pytest.mark.parametrize(("window_size", "shift"), [(1, 0), (3, 20), (5000, 7)])
def test_partition_agrees_with_reference(backend: str, extent: int, rows: int, window_size: int, shift: int) -> None:
    coords = torch.randint(0, extent, (rows, 4))
    coords[:, 0] %= 3
    if extent == 2**31 and window_size < 5000:
        coords[:, 1:] %= 2**20  # 2^62 windows is the limit
    order, offsets = window_partition(coords.int(), window_size, shift)
    with use_reference():
        expected = window_partition(coords.int(), window_size, shift)
    assert torch.equal(order, expected[0])
    assert torch.equal(offsets, expected[1])


@TRITON_BACKENDS
def test_coords_that_have_no_window_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="coords must not be negative; got -2"):
        window_partition(torch.tensor([[0, 1, 2, 3], [0, 1, -2, 3]], dtype=torch.int32), 4, 0)
    with pytest.raises(ValueError, match="fewer than 2\\^62 windows"):
        window_partition(torch.full((1, 4), 2**31 - 1, dtype=torch.int32), 1, 0)


@pytest.mark.parametrize("width", range(1, 129))
def test_a_head_is_split_into_powers_of_two_that_hold_it(width: int) -> None:
    parts = head_parts(width)
    assert sum(parts) >= width
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in parts)
    assert parts[0] > parts[1]
    assert {64: (64, 0), 80: (64, 16), 128: (128, 0), 8: (16, 0)}.get(width, parts) == parts


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_what_the_kernels_do_not_have_is_refused(backend: str) -> None:
    order, offsets = torch.arange(4).int(), offsets_of([4])
    with pytest.raises(TypeError, match=r"on a GPU must be torch.float16, .*; got torch.float64"):
        windowed_attention(torch.randn(4, 3, 1, 8, dtype=torch.float64), order, offsets)
    with pytest.raises(ValueError, match="head width D must be at most 128 on a GPU; got 129"):
        windowed_attention(torch.randn(4, 3, 1, 129), order, offsets)


@pytest.mark.aot
def test_compiled_for_each_architecture_on_its_tensor_cores() -> None:
    found = aot.compile_launches("tests.kernels.aot_attention:launches")
    aot.check_limits(found)
    expected = {80: ("mma.sync",), 90: ("wgmma.mma_async",), 100: ("tcgen05.mma",)}
    for row in found:
        half = "float16" in row.constants  # of bfloat16 too; float32 products are exact, which those units are not
        assert row.instructions == (expected[row.arch] if half else ()), row
