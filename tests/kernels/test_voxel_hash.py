"""Voxel maps: reference, brute force, the analytic map of subdivided voxels, golden values."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS, running_on, to_backend
from tests.support.golden import golden
from tests.support.scenes import random_voxels, shuffled_within_samples, sphere_voxels
from trellis_kernels import (
    coarsen,
    neighbor_map,
    subdivide_coords,
    subdivided_neighbor_map,
    unique_coords,
    use_reference,
)
from trellis_kernels.voxel_hash import cuda as launches

ENDS = torch.tensor([0, 1, 3, 4, 65531, 65532, 65534, 65535])
SETS = {
    "none": torch.zeros(0, 4, dtype=torch.int32),
    "one": torch.tensor([[3, 65535, 0, 7]], dtype=torch.int32),
    "full grid": random_voxels(9, 1.0),
    "two samples": shuffled_within_samples(random_voxels(13, 0.2, batch=2)),
    "scattered": shuffled_within_samples(random_voxels(64, 0.003)),
    "ends of the range": torch.cartesian_prod(torch.tensor([0, 1, 65535]), ENDS, ENDS, ENDS).int(),
    "surface": sphere_voxels(24, batch=2),
}
voxel_sets = pytest.mark.parametrize("coords", SETS.values(), ids=SETS.keys())
few_examples = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
small_sets = st.lists(st.tuples(st.integers(0, 1), *[st.integers(0, 6)] * 3), unique=True, max_size=60).map(
    lambda rows: torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)
)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu), "reference"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the kernels of each device, then on the references."""
    with use_reference() if request.param == "reference" else running_on(request.param):
        yield request.param


def details(text: str, where: str) -> str:
    """What follows in a message; CUDA kernels know only what must be, and what a thread finds wrong."""
    return r" \(CUDA kernel" if where == "emulated" else text


values_are_named = pytest.mark.parametrize("anywhere", ["cpu", "emulated", "reference"], indirect=True)


def by_dictionary(coords: Tensor, kernel_size: int) -> Tensor:
    """The neighbor map, one look-up at a time."""
    row = {tuple(voxel): n for n, voxel in enumerate(coords.tolist())}
    steps = [step - kernel_size // 2 for step in range(kernel_size)]
    return torch.tensor(
        [
            [row.get((b, x + dx, y + dy, z + dz), -1) for dx in steps for dy in steps for dz in steps]
            for b, x, y, z in row
        ],
        dtype=torch.int32,
    ).reshape(-1, kernel_size**3)


@CUDA_BACKENDS
@voxel_sets
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_neighbor_map_agrees_with_reference(backend: str, coords: Tensor, kernel_size: int) -> None:
    coords = to_backend(coords, backend)
    actual = neighbor_map(coords, kernel_size)
    with use_reference():
        expected = neighbor_map(coords, kernel_size)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kernel_size", [3, 11])
def test_neighbor_map_is_what_a_dictionary_finds(anywhere: str, kernel_size: int) -> None:
    coords = shuffled_within_samples(random_voxels(12, 0.05, batch=2))
    assert torch.equal(neighbor_map(coords, kernel_size), by_dictionary(coords, kernel_size))


def test_voxels_at_the_ends_of_the_range_are_not_neighbors_across_it(anywhere: str) -> None:
    coords = to_backend(SETS["ends of the range"], anywhere)
    assert torch.equal(neighbor_map(coords), by_dictionary(coords, 3))


@CUDA_BACKENDS
@given(coords=small_sets, kernel_size=st.sampled_from([1, 3, 5]))
@few_examples
def test_neighbor_relation_is_symmetric(backend: str, coords: Tensor, kernel_size: int) -> None:
    neighbors, taps = neighbor_map(coords, kernel_size), kernel_size**3
    n, k = (neighbors >= 0).nonzero(as_tuple=True)
    assert torch.equal(neighbors[neighbors[n, k].long(), taps - 1 - k].long(), n)
    assert torch.equal(neighbors[:, taps // 2].long(), torch.arange(len(coords)))


@CUDA_BACKENDS
@given(coords=small_sets, seed=st.integers(0, 99))
@few_examples
def test_neighbor_map_follows_a_permutation_of_the_voxels(backend: str, coords: Tensor, seed: int) -> None:
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed), device="cpu").to(coords.device)
    rank = torch.cat([order.argsort(), torch.tensor([-1])]).int()  # old row -> new row; -1 stays
    assert torch.equal(neighbor_map(coords[order]), rank[neighbor_map(coords).long()][order])


@CUDA_BACKENDS
@voxel_sets
@pytest.mark.parametrize("factor", [1, 2, 3, 65535, 2**40])
def test_coarsen_agrees_with_reference(backend: str, coords: Tensor, factor: int) -> None:
    coords = to_backend(coords, backend)
    coarse, inverse = coarsen(coords, factor)
    with use_reference():
        expected, expected_inverse = coarsen(coords, factor)
    assert torch.equal(coarse, expected)
    assert torch.equal(inverse, expected_inverse)


@CUDA_BACKENDS
@pytest.mark.parametrize("spread", [1, 40, 65535], ids="up to {}".format)
def test_coarsen_of_many_repeated_voxels_agrees_with_reference(backend: str, spread: int) -> None:
    count = 5_000 if backend == "emulated" else 50_000
    coords = torch.randint(0, spread + 1, (count, 4), dtype=torch.int32)
    coarse, inverse = coarsen(coords, 2)
    with use_reference():
        expected, expected_inverse = coarsen(coords, 2)
    assert torch.equal(coarse, expected)
    assert torch.equal(inverse, expected_inverse)


@given(coords=small_sets, factor=st.integers(1, 4), repeat=st.integers(1, 3))
@few_examples
def test_coarse_voxels_are_a_sorted_set_that_covers_the_fine_ones(
    anywhere: str, coords: Tensor, factor: int, repeat: int
) -> None:
    coords = coords.repeat(repeat, 1)
    coarse, inverse = coarsen(coords, factor)
    rows = [(b, x // factor, y // factor, z // factor) for b, x, y, z in coords.tolist()]
    assert [tuple(row) for row in coarse.tolist()] == sorted(set(rows))
    assert [tuple(row) for row in coarse[inverse.long()].tolist()] == rows


@CUDA_BACKENDS
@voxel_sets
def test_subdivided_coords_and_their_map_agree_with_reference(backend: str, coords: Tensor) -> None:
    coords = to_backend(coords, backend) // coords.new_tensor([1, 2, 2, 2]).to(coords)
    coords = unique_coords(coords)[0]
    neighbors = neighbor_map(coords)
    actual, actual_map = subdivide_coords(coords), subdivided_neighbor_map(neighbors)
    with use_reference():
        assert torch.equal(actual, subdivide_coords(coords))
        assert torch.equal(actual_map, subdivided_neighbor_map(neighbors))


@given(coords=small_sets)
@few_examples
def test_subdivided_map_is_the_map_of_the_subdivided_voxels(anywhere: str, coords: Tensor) -> None:
    assert torch.equal(subdivided_neighbor_map(neighbor_map(coords)), neighbor_map(subdivide_coords(coords)))


def test_coarsening_undoes_subdivision(anywhere: str) -> None:
    coords = random_voxels(11, 0.3, batch=2)
    coarse, inverse = coarsen(subdivide_coords(coords))
    assert torch.equal(coarse, coords)
    assert torch.equal(inverse, torch.arange(len(coords), dtype=torch.int32).repeat_interleave(8))


def test_golden_coordinates(anywhere: str) -> None:
    item = golden("sparse_ops")
    coarse, inverse = coarsen(item["in.coords"])
    item.check("out.down_coords", coarse)
    item.check("out.down_idx", inverse)
    item.check("out.subdiv_coords", subdivide_coords(item["in.coords"]))


def test_results_do_not_depend_on_the_thread_count() -> None:
    coords = shuffled_within_samples(subdivide_coords(sphere_voxels(48, batch=2)))
    assert len(coords) > 2 * 32768  # enough for the kernels to use several threads
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        neighbors = neighbor_map(coords)
        results.append((neighbors, *coarsen(coords), subdivide_coords(coords), subdivided_neighbor_map(neighbors)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


CUDA_KERNELS = pytest.mark.parametrize(
    "backend", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@CUDA_KERNELS
@voxel_sets
def test_a_hash_table_without_an_empty_slot_is_searched_to_its_end(
    backend: str, coords: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look-up of an empty brick passes all slots, every insertion those taken before it."""
    coords = to_backend(coords[:400], backend)
    with use_reference():
        expected = [neighbor_map(coords), *coarsen(coords)]
        bricks = len((coords // coords.new_tensor([1, 2, 4, 4])).unique(dim=0)) if len(coords) else 1
        runs = len((coarsen(coords)[0] // coords.new_tensor([1, 1, 1, 32])).unique(dim=0)) if len(coords) else 1
    monkeypatch.setattr(launches, "_capacity", lambda voxels: bricks)
    assert torch.equal(neighbor_map(coords), expected[0])
    monkeypatch.setattr(launches, "_capacity", lambda voxels: runs)
    for actual, wanted in zip(coarsen(coords), expected[1:], strict=True):
        assert torch.equal(actual, wanted)


@CUDA_KERNELS
def test_voxels_whose_bricks_collide_are_told_apart(backend: str) -> None:
    """Bricks that all belong into the same few slots of a table at its usual size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2**15, (120_000,), generator=generator, device="cpu").unique()
    keys = (x << 28) + 1
    count = 200
    home = [mixed(key) * 2 * count >> 32 for key in keys.tolist()]
    x = x[torch.tensor(home, device="cpu") < 3][:count]
    assert len(x) == count
    rows = torch.stack([torch.zeros_like(x), 2 * x, torch.zeros_like(x), torch.zeros_like(x)], 1)
    coords = to_backend(rows[torch.randperm(count, generator=generator, device="cpu")].int(), backend)
    with use_reference():
        expected = neighbor_map(coords)
    assert torch.equal(neighbor_map(coords), expected)


def mixed(key: int) -> int:
    """Upper half of the kernel's hash: murmur3's finalizer."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ key >> 33) * factor % 2**64
    return (key ^ key >> 33) >> 32


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_a_hash_table_that_is_too_small_is_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_capacity", lambda voxels: 2)
    with pytest.raises(ValueError, match="the hash table is full"):
        neighbor_map(SETS["full grid"])
    with pytest.raises(ValueError, match="the hash table is full"):
        unique_coords(SETS["full grid"])


def test_more_voxels_than_a_gpu_table_holds_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"coords must have fewer than 2\*\*30 rows on a GPU; got 1073741824"):
        launches._capacity(2**30)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_the_gpu_is_waited_for_only_where_a_size_depends_on_data(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coords, waits = random_voxels(6, 0.4), []

    def counted(name: str) -> Callable[..., object]:
        real = getattr(Tensor, name)
        return lambda *arguments: waits.append(name) or real(*arguments)

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    neighbors = neighbor_map(coords)
    subdivided_neighbor_map(neighbors)
    subdivide_coords(coords)
    assert waits == []
    coarsen(coords)
    assert waits == ["tolist"]


@CUDA_BACKENDS
def test_views_of_other_tensors_are_read_in_place(backend: str) -> None:
    coords = random_voxels(6, 0.4)
    wide = torch.cat([coords, coords + 1], 1)[:, :4]
    unaligned = torch.cat([coords.new_zeros(1), coords.flatten()])[1:].view(-1, 4)  # not from a 16-byte word on
    for view in (wide, unaligned):
        assert torch.equal(neighbor_map(view), neighbor_map(coords))
        assert torch.equal(subdivide_coords(view), subdivide_coords(coords))
        assert torch.equal(unique_coords(view)[0], coords)
    neighbors = neighbor_map(coords)
    part = torch.cat([neighbors[:1], neighbors])[1:]
    assert torch.equal(subdivided_neighbor_map(part), subdivided_neighbor_map(neighbors))


def test_are_ordinary_torch_operators() -> None:
    coords = random_voxels(4, 0.4)
    operators = torch.ops.trellis_kernels
    torch.library.opcheck(operators.neighbor_map.default, (coords, 3))
    torch.library.opcheck(operators.coarsen.default, (coords, 2))
    torch.library.opcheck(operators.subdivide_coords.default, (coords,))
    torch.library.opcheck(operators.subdivided_neighbor_map.default, (neighbor_map(coords),))


def test_compile_without_graph_breaks() -> None:
    def fine_map(coords: Tensor) -> tuple[Tensor, Tensor]:
        return subdivide_coords(coords), subdivided_neighbor_map(neighbor_map(coords))

    coords = random_voxels(4, 0.4)
    compiled = torch.compile(fine_map, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(coords), fine_map(coords), strict=True):
        assert torch.equal(actual, expected)


@values_are_named
@pytest.mark.parametrize("value", [-1, 65536])
@pytest.mark.parametrize("column", [0, 3])
def test_coordinates_out_of_range_are_named(anywhere: str, value: int, column: int) -> None:
    coords = random_voxels(16, 1.0)[:3000].clone()
    coords[1700, column] = coords[2500, 1] = value
    named = rf"; got {re.escape(str(coords[1700].tolist()))} in row 1700$"
    message = r"coords must be in \[0, 65535\]" + details(named, anywhere)
    with pytest.raises(ValueError, match=message):
        neighbor_map(coords)
    with pytest.raises(ValueError, match=message):
        unique_coords(coords)
    message = r"coords must be in \[0, 32767\]" + details(r"; got .* in row 1700$", anywhere)
    with pytest.raises(ValueError, match=message):
        subdivide_coords(coords)


@values_are_named
def test_children_out_of_range_are_an_error(anywhere: str) -> None:
    subdivide_coords(torch.tensor([[65535, 32767, 32767, 32767]], dtype=torch.int32))
    message = r"coords must be in \[0, 32767\]" + details(r"; got \[0, 1, 32768, 1\] in row 0$", anywhere)
    with pytest.raises(ValueError, match=message):
        subdivide_coords(torch.tensor([[0, 1, 32768, 1]], dtype=torch.int32))


@values_are_named
@pytest.mark.parametrize("order", [1, -1])
def test_repeated_voxels_are_named(anywhere: str, order: int) -> None:
    coords = random_voxels(12, 0.9)
    coords = coords.flip(0) if order < 0 else coords
    coords[700] = coords[900] = coords[40]
    coords[50] = coords[1200]
    named = rf"; got \[{', '.join(map(str, coords[40].tolist()))}\] in rows 40 and 700$"
    message = "coords must hold each voxel once" + details(named, anywhere)
    with pytest.raises(ValueError, match=message):
        neighbor_map(coords)


@values_are_named
@pytest.mark.parametrize("bad", [-2, 5])
def test_rows_out_of_range_are_named(anywhere: str, bad: int) -> None:
    neighbors = torch.full((5, 27), -1, dtype=torch.int32)
    neighbors[3, 2] = bad
    message = r"neighbors must be in \[-1, " + (r"N\) \(CUDA" if anywhere == "emulated" else rf"5\); got {bad}$")
    with pytest.raises(ValueError, match=message):
        subdivided_neighbor_map(neighbors)


@CUDA_BACKENDS
def test_arguments_that_do_not_fit_are_named(backend: str) -> None:
    coords = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="kernel_size must be odd and positive; got 2"):
        neighbor_map(coords, 2)
    with pytest.raises(ValueError, match="factor must be positive; got 0"):
        coarsen(coords, 0)
    with pytest.raises(ValueError, match=r"coords must be \[N, 4\] with N=2; got \[2, 3\]"):
        neighbor_map(coords[:, :3])
    with pytest.raises(TypeError, match=r"coords must be torch.int32; got torch.int64"):
        unique_coords(coords.long())
    with pytest.raises(ValueError, match=r"neighbors must be \[N, 27\] with N=2; got \[2, 4\]"):
        subdivided_neighbor_map(coords)
