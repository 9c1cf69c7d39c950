"""Space-filling curves: reference, the defining property of each curve, permutations."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS, running_on
from tests.support.scenes import random_voxels, shuffled_within_samples, sphere_voxels
from trellis_kernels import (
    hilbert_codes,
    hilbert_order,
    morton_codes,
    morton_order,
    use_reference,
)

CODES = pytest.mark.parametrize("codes", [morton_codes, hilbert_codes], ids=lambda f: f.__name__)
ORDERS = pytest.mark.parametrize("order", [morton_order, hilbert_order], ids=lambda f: f.__name__)
CODES_OF = {morton_order: morton_codes, hilbert_order: hilbert_codes}
Curve = Callable[..., Tensor]


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu), "reference"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the kernels of each device, then on the references."""
    with use_reference() if request.param == "reference" else running_on(request.param):
        yield request.param


values_are_named = pytest.mark.parametrize("anywhere", ["cpu", "emulated", "reference"], indirect=True)
few_examples = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_coords(count: int, bits: int, batch: int = 3) -> Tensor:
    return torch.cat([torch.randint(batch, (count, 1)), torch.randint(2**bits, (count, 3))], 1).int()


def full_grid(bits: int) -> Tensor:
    return random_voxels(2**bits, 1.0)


@CODES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 10, 14, 16])
@pytest.mark.parametrize("count", [0, 1, 777])
def test_codes_agree_with_reference(
    codes: Curve, transposed: bool, bits: int, count: int, instruction_set: str
) -> None:
    coords = random_coords(count, bits, batch=32768)
    actual = codes(coords, transposed, bits)
    with use_reference():
        assert torch.equal(actual, codes(coords, transposed, bits))


@CUDA_BACKENDS
@CODES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 777])
def test_gpu_kernels_agree_with_reference(backend: str, codes: Curve, transposed: bool, bits: int, count: int) -> None:
    coords = random_coords(count, bits, batch=32768)
    order = {morton_codes: morton_order, hilbert_codes: hilbert_order}[codes]
    actual, permutation = codes(coords, transposed, bits), order(coords, transposed, bits)
    with use_reference():
        assert torch.equal(actual, codes(coords, transposed, bits))
        assert torch.equal(permutation, order(coords, transposed, bits))


@CODES
@pytest.mark.parametrize("used", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("bits", [8, 15, 16])
def test_codes_of_small_coordinates_agree_with_reference(
    codes: Curve, used: int, bits: int, instruction_set: str
) -> None:
    """The kernel skips the levels of the curve above the largest coordinate."""
    coords = random_coords(300, used)
    actual = codes(coords, False, bits)
    with use_reference():
        assert torch.equal(actual, codes(coords, False, bits))


@ORDERS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [5, 16])
@pytest.mark.parametrize("count", [0, 1, 40_000])
def test_orders_agree_with_reference(order: Curve, transposed: bool, bits: int, count: int) -> None:
    coords = random_coords(count, bits, batch=70)  # with 5 bits many voxels coincide: their order is kept
    actual = order(coords, transposed, bits)
    with use_reference():
        assert torch.equal(actual, order(coords, transposed, bits))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "grid"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (16, 4)])
def test_hilbert_curve_goes_from_face_to_face(anywhere: str, bits: int, grid: int, transposed: bool) -> None:
    """It visits the whole grid, one step along one axis at a time: what makes a curve a Hilbert curve."""
    coords = full_grid(grid)
    codes = hilbert_codes(coords, transposed, bits)
    walk = coords[codes.argsort()]
    assert walk.diff(dim=0).abs().sum(1).eq(1).all()
    assert torch.equal(codes.sort()[0], torch.arange(8**grid))  # a grid in the corner is visited before all else
    assert walk[0].tolist() == [0, 0, 0, 0]
    end = walk[-1, 1:]
    assert end.count_nonzero() == 1  # ends in another corner of one face
    assert end.max() == 2**grid - 1


def test_hilbert_curve_fills_each_octant_before_the_next(anywhere: str) -> None:
    coords = full_grid(4)
    walk = coords[hilbert_order(coords)]
    for size in (2, 4, 8):
        octants = (walk[:, 1:] // size).view(-1, size**3, 3)
        assert (octants == octants[:, :1]).all()


def test_morton_code_interleaves_bits(anywhere: str) -> None:
    coords = random_coords(50, 16)
    for (batch, x, y, z), code, other in zip(
        coords.tolist(), morton_codes(coords).tolist(), morton_codes(coords, True).tolist(), strict=True
    ):
        digits = [f"{value:016b}" for value in (x, y, z)]
        assert code == int(f"{batch:b}" + "".join("".join(triple) for triple in zip(*digits, strict=True)), 2)
        digits = [digits[1], digits[0], digits[2]]
        assert other == int(f"{batch:b}" + "".join("".join(triple) for triple in zip(*digits, strict=True)), 2)


@CODES
def test_transposed_exchanges_x_and_y(anywhere: str, codes: Curve) -> None:
    coords = random_coords(100, 9)
    assert torch.equal(codes(coords, True, 9), codes(coords[:, [0, 2, 1, 3]], False, 9))
    assert not torch.equal(codes(coords, True, 9), codes(coords, False, 9))


@CUDA_BACKENDS
@ORDERS
@given(seed=st.integers(0, 99), transposed=st.booleans(), bits=st.sampled_from([4, 10, 16]))
@few_examples
def test_order_is_a_permutation_that_keeps_samples_apart(
    backend: str, order: Curve, seed: int, transposed: bool, bits: int
) -> None:
    coords = shuffled_within_samples(random_voxels(9, 0.3, batch=3, seed=seed), seed)
    permutation = order(coords, transposed, bits)
    assert torch.equal(permutation.sort()[0], torch.arange(len(coords)))
    assert torch.equal(coords[permutation, 0], coords[:, 0])  # the batch was sorted, and still is
    assert CODES_OF[order](coords[permutation], transposed, bits).diff().gt(0).all()


@CUDA_BACKENDS
@ORDERS
def test_neighbors_in_order_are_close_in_space(backend: str, order: Curve) -> None:
    coords = sphere_voxels(32)
    step = (coords[order(coords)].diff(dim=0)[:, 1:].abs().sum(1)).float().mean()
    assert step < 4 < 10 < shuffled_within_samples(coords).diff(dim=0).abs().sum(1).float().mean()


@ORDERS
def test_results_do_not_depend_on_the_thread_count(order: Curve) -> None:
    coords = random_coords(70_000, 5)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(order(coords))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_are_ordinary_torch_operators() -> None:
    coords = random_coords(20, 4)
    for name in ("morton_codes", "hilbert_codes", "morton_order", "hilbert_order"):
        torch.library.opcheck(getattr(torch.ops.trellis_kernels, name).default, (coords, True, 16))


@ORDERS
def test_compiles_without_graph_breaks(order: Curve) -> None:
    coords = random_coords(20, 4)
    assert torch.equal(torch.compile(order, fullgraph=True, backend="aot_eager")(coords), order(coords))


@values_are_named
@pytest.mark.parametrize("function", [morton_codes, hilbert_codes, morton_order, hilbert_order])
def test_coordinates_out_of_range_are_named(anywhere: str, function: Curve) -> None:
    def named(limit: str, text: str) -> str:  # CUDA kernels know only what must be
        limit = "[0, 2^bits), batch in [0, 32767] (CUDA kernel" if anywhere == "emulated" else limit
        return re.escape(f"coords must be in {limit}" + text * (anywhere != "emulated"))

    coords = torch.zeros(3000, 4, dtype=torch.int32)
    coords[1900, 2] = coords[2500, 0] = -1
    with pytest.raises(ValueError, match=named("[0, 65535] (batch: [0, 32767])", "; got [0, 0, -1, 0] in row 1900")):
        function(coords)
    coords[1900, 2] = 32
    with pytest.raises(ValueError, match=named("[0, 31] (batch: [0, 32767])", "; got [0, 0, 32, 0] in row 1900")):
        function(coords, False, 5)
    coords[2500] = 0
    coords[1900] = coords.new_tensor([32768, 0, 0, 0])
    with pytest.raises(ValueError, match=named("[0, 65535] (batch: [0, 32767])", "; got [32768, 0, 0, 0] in row 1900")):
        function(coords)


@CUDA_BACKENDS
@CODES
def test_views_of_other_tensors_are_read_in_place(backend: str, codes: Curve) -> None:
    coords = random_coords(50, 9)
    wide = torch.cat([coords, coords + 1], 1)[:, :4]
    unaligned = torch.cat([coords.new_zeros(1), coords.flatten()])[1:].view(-1, 4)  # not from a 16-byte word on
    for view in (wide, unaligned):
        assert torch.equal(codes(view), codes(coords))


@CUDA_BACKENDS
def test_arguments_that_do_not_fit_are_named(backend: str) -> None:
    coords = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 16\]; got 17"):
        hilbert_codes(coords, bits=17)
    with pytest.raises(ValueError, match=r"coords must be \[N, 4\] with N=2; got \[2, 3\]"):
        morton_order(coords[:, :3])
    with pytest.raises(TypeError, match=r"coords must be torch.int32; got torch.int64"):
        hilbert_order(coords.long())
