from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from tests.support.backends import CUDA_BACKENDS, running_on
from tests.support.golden import golden
from tests.support.mesh_network import mesh_features
from tests.support.meshes import canonical, euler_characteristic, signed_volume
from tests.support.scenes import random_voxels
from trellis_kernels import ExtractedMesh, extract_mesh, use_reference
from trellis_kernels.mesh_extraction import ExtractionTerms
from trellis_kernels.mesh_extraction.tables import corner_offsets


def full_grid(resolution: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(resolution)] * 3).int().reshape(-1, 3)


def sphere(resolution: int, radius: float = 0.35, colors: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Network output for a sphere on the full grid: zero weights and deformation, the sdf exact, colors 0."""
    coords = full_grid(resolution)
    points = (coords[:, None] + corner_offsets()).to(dtype) / resolution - 0.5
    feats = torch.zeros(len(coords), 53 + 8 * colors, dtype=dtype)
    feats[:, :8] = points.norm(dim=2) - radius + 1 / resolution
    return feats


def reference(coords: Tensor, feats: Tensor, resolution: int, training: bool) -> ExtractedMesh:
    with use_reference():
        return extract_mesh(coords, feats, resolution, training)


@pytest.fixture(scope="module")
def network_output() -> tuple[Tensor, Tensor]:
    return mesh_features(golden("slat_dec_mesh"))


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu), "reference"])
def _anywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on the kernels of each device, then on the references."""
    with use_reference() if request.param == "reference" else running_on(request.param):
        yield


anywhere = pytest.mark.usefixtures("_anywhere")
few_examples = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
operators = torch.ops.trellis_kernels


def on_host(mesh: ExtractedMesh) -> ExtractedMesh:
    terms = None if mesh.terms is None else ExtractionTerms(*(tensor.cpu() for tensor in mesh.terms))
    return ExtractedMesh(mesh.vertices.cpu(), mesh.faces.cpu(), mesh.attributes.cpu(), terms)


def test_the_network_behind_the_golden_mesh_is_the_official_one(network_output: tuple[Tensor, Tensor]) -> None:
    coords, feats = network_output
    golden("slat_dec_mesh").check("out.coords", coords)
    golden("slat_dec_mesh").check("out.feats", feats, max_abs=2e-5)


@anywhere
@pytest.mark.parametrize("sample", [0, 1])
def test_extraction_gives_the_official_mesh(sample: int, network_output: tuple[Tensor, Tensor]) -> None:
    item = golden("slat_dec_mesh")
    coords, feats = (tensor.to(torch.get_default_device()) for tensor in network_output)
    rows = coords[:, 0] == sample
    coords, feats, resolution = coords[rows, 1:].contiguous(), feats[rows], item.info["dense_res"]

    mesh = on_host(extract_mesh(coords, feats, resolution, False))
    assert [len(mesh.vertices), len(mesh.faces)] == item[f"out.{sample}.num"].tolist()
    distance, nearest = torch.cdist(item[f"out.{sample}.vertices"].double(), mesh.vertices.double()).min(1)
    assert distance.max() <= 5e-5
    assert (mesh.attributes[nearest] - item[f"out.{sample}.vertex_attrs"]).abs().max() <= 2e-4
    corners = item[f"out.{sample}.face_corners"].double().flatten(0, 1)
    distance, nearest = torch.cdist(corners, mesh.vertices.double()).min(1)
    assert distance.max() <= 5e-5
    stored = {min((a, b, c), (b, c, a), (c, a, b)) for a, b, c in nearest.view(-1, 3).tolist()}
    assert stored <= {min((a, b, c), (b, c, a), (c, a, b)) for a, b, c in mesh.faces.tolist()}

    mesh = on_host(extract_mesh(coords, feats, resolution, True))
    assert [len(mesh.vertices), len(mesh.faces)] == item[f"train.{sample}.num"].tolist()
    terms = mesh.terms
    assert terms is not None
    regularization = terms.consistency + 0.5 * terms.deviation + 0.2 * terms.weight_magnitude
    assert math.isclose(regularization, item[f"train.{sample}.reg_loss"], rel_tol=1e-6)
    item.check(f"train.{sample}.tsdf_v", terms.grid_positions)
    item.check(f"train.{sample}.tsdf_s", terms.grid_sdf)


@anywhere
@pytest.mark.parametrize("training", [False, True])
def test_a_sphere_becomes_a_closed_surface_of_its_size_facing_outward(training: bool) -> None:
    errors = []
    for resolution in (10, 20):
        mesh = extract_mesh(full_grid(resolution), sphere(resolution), resolution, training)
        assert mesh.success
        assert euler_characteristic(mesh.faces) == 2
        assert (mesh.vertices.norm(dim=1) - 0.35).abs().max() < 2 / resolution**2
        torch.testing.assert_close(mesh.attributes, torch.full_like(mesh.attributes, 0.5))
        errors.append(signed_volume(mesh.vertices, mesh.faces) / (4 / 3 * math.pi * 0.35**3) - 1)
    assert abs(errors[1]) < 0.03
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.3)  # second order


@anywhere
def test_no_cubes_or_no_change_of_sign_is_an_empty_mesh() -> None:
    coords = full_grid(2)
    for count, training in ((0, False), (0, True), (8, False), (8, True)):
        mesh = extract_mesh(coords[:count], torch.ones(count, 53 + 16), 2, training)
        assert not mesh.success
        assert mesh.vertices.shape == (0, 3)
        assert mesh.faces.shape == (0, 3)
        assert mesh.attributes.shape == (0, 2)
        if mesh.terms is not None:
            assert torch.equal(torch.stack(mesh.terms[:3]), torch.tensor([0.0, 0.0, 1.0 * (count > 0)]))
            assert mesh.terms.grid_sdf.shape == ((27 if count else 0),)


def noise(resolution: int, occupancy: float, colors: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):  # the same numbers on every device
        coords = random_voxels(resolution, occupancy, seed=seed)[:, 1:]
        generator = torch.Generator().manual_seed(seed)
        coords = coords[torch.randperm(len(coords), generator=generator)].contiguous()
        feats = torch.randn(len(coords), 53 + 8 * colors, generator=generator, dtype=torch.float64)
    device = torch.get_default_device()
    return coords.to(device), feats.to(device, dtype)


def results(mesh: ExtractedMesh) -> list[Tensor]:
    return [mesh.vertices, mesh.attributes, *(mesh.terms or ())]


def gradient(mesh: ExtractedMesh, feats: Tensor) -> Tensor:
    """Of a fixed random combination of everything the mesh has."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64, device="cpu") for r in results(mesh)]
    weighted = [(r * draw.to(r.device)).sum() for r, draw in zip(results(mesh), draws, strict=True)]
    return torch.autograd.grad(torch.stack(weighted).sum(), feats)[0]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@CUDA_BACKENDS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("resolution", "occupancy", "colors"),
    [
        (1, 1, 1),
        (2, 1, 6),
        (5, 1, 0),
        (7, 0.3, 6),
        (64, 0.002, 2),
        (131, 0.0002, 3),
    ],  # words of 64 points; 1 to 3 of them
)
def test_kernel_agrees_with_the_reference(
    backend: str, resolution: int, occupancy: float, colors: int, dtype: torch.dtype, training: bool
) -> None:
    if backend == "emulated" and resolution >= 64:
        pytest.skip("takes seconds; test_topology_and_quads_are_those_of_the_reference does it in part")
    coords, feats = noise(resolution, occupancy, colors, dtype, seed=1)  # no sdf is 0, where distances have no gradient
    feats.requires_grad_()
    actual, expected = (f(coords, feats, resolution, training) for f in (extract_mesh, reference))
    assert torch.equal(actual.faces, expected.faces)
    tolerance = TOLERANCE[dtype]
    for a, b in zip(results(actual), results(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    with use_reference():
        expected_gradient = gradient(expected, feats)
    scale = float(expected_gradient.abs().max().clamp_min(1))
    torch.testing.assert_close(gradient(actual, feats), expected_gradient, rtol=0, atol=tolerance * scale)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("resolution", "occupancy"),
    [(3, 0), (1, 1), (2, 1), (5, 1), (8, 0.7), (64, 0.0008), (70, 0.0006)],  # words of 64 points; 1 and 2 of them
)
def test_topology_and_quads_are_those_of_the_reference(
    backend: str, resolution: int, occupancy: float, dtype: torch.dtype
) -> None:
    coords, feats = noise(resolution, occupancy, 0, dtype)
    topology = operators.surface_topology(coords, feats, resolution)
    gammas = torch.rand(len(topology[-2])).to(dtype)
    faces = operators.split_quads(topology[-1], gammas)
    with use_reference():
        expected = operators.surface_topology(coords, feats, resolution)
        assert torch.equal(faces, operators.split_quads(expected[-1], gammas))
    for actual, wanted in zip(topology, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)


@CUDA_BACKENDS
def test_kernel_agrees_with_the_reference_in_each_of_the_256_cases(backend: str) -> None:
    cases = torch.arange(256)
    coords = full_grid(7)[:256] * 3 + 1  # too far apart to meet
    feats = torch.randn(256, 53 + 8, dtype=torch.float64)
    inside = (cases[:, None] >> torch.arange(8) & 1).bool()
    feats[:, :8] = torch.where(inside, -1 - feats[:, :8].abs(), 1 + feats[:, :8].abs())
    actual, expected = (f(coords, feats, 22, False) for f in (extract_mesh, reference))
    assert torch.equal(actual.faces, expected.faces)
    torch.testing.assert_close(actual.vertices, expected.vertices)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    coords, feats = noise(20, 0.5, 6, torch.float32)
    feats.requires_grad_()
    before = torch.get_num_threads()
    expected = extract_mesh(coords, feats, 20, True)
    expected_gradient = gradient(expected, feats)
    try:
        torch.set_num_threads(threads)
        actual = extract_mesh(coords, feats, 20, True)
        actual_gradient = gradient(actual, feats)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual.faces, expected.faces)
    assert all(torch.equal(a, b) for a, b in zip(results(actual), results(expected), strict=True))
    assert torch.equal(actual_gradient, expected_gradient)


@anywhere
@pytest.mark.parametrize("training", [False, True])
def test_gradients_agree_with_finite_differences(training: bool) -> None:
    coords, feats = noise(3, 0.5, 2, torch.float64)
    feats[:, :8] += 0.3 * feats[:, :8].sign()  # away from changes of topology
    feats.requires_grad_()

    def run(x: Tensor) -> list[Tensor]:
        return results(extract_mesh(coords, x, 3, training))

    assert torch.autograd.gradcheck(run, feats, eps=1e-7, atol=1e-5, fast_mode=True)
    mesh = extract_mesh(coords, feats, 3, training)
    assert mesh.success
    columns = {"sdf": slice(0, 8), "deformation": slice(8, 32), "weights": slice(32, 53), "colors": slice(53, None)}
    for name, channels in columns.items():
        assert gradient(extract_mesh(coords, feats, 3, training), feats)[:, channels].abs().max() > 0, name


@anywhere
@few_examples
@given(
    seed=st.integers(0, 2**20),
    shift=st.tuples(*[st.integers(-3, 3)] * 3),
    training=st.booleans(),
)
def test_moving_the_cubes_by_whole_cells_moves_the_mesh(seed: int, shift: tuple[int, int, int], training: bool) -> None:
    coords, feats = noise(5, 0.4, 1, torch.float64, seed)
    middle = coords + 5  # nothing near the border of the grid, where quads are missing
    moved = middle + torch.tensor(shift, dtype=torch.int32)
    a, b = (extract_mesh(c, feats, 15, training) for c in (middle, moved))
    assert torch.equal(a.faces, b.faces)
    torch.testing.assert_close(b.vertices, a.vertices + torch.tensor(shift) / 15)
    torch.testing.assert_close(b.attributes, a.attributes)
    if training:
        assert a.terms is not None
        assert b.terms is not None
        torch.testing.assert_close(b.terms[:3], a.terms[:3])


@anywhere
@few_examples
@given(seed=st.integers(0, 2**20))
def test_the_order_of_the_cubes_does_not_matter(seed: int) -> None:
    coords, feats = noise(6, 0.6, 1, torch.float64, seed)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed))
    a, b = extract_mesh(coords, feats, 6), extract_mesh(coords[order], feats[order], 6)
    assert torch.equal(a.faces, b.faces)
    assert torch.equal(a.vertices, b.vertices)


@anywhere
@few_examples
@given(seed=st.integers(0, 2**20), occupancy=st.floats(0.02, 1))
def test_any_network_output_away_from_the_border_gives_a_closed_surface(seed: int, occupancy: float) -> None:
    coords, feats = noise(6, occupancy, 0, torch.float64, seed)
    mesh = extract_mesh(coords + 1, feats, 8)  # cells without cubes close it: what no cube touches is outside
    edges = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    assert torch.equal(
        (edges[:, 0] * len(mesh.vertices) + edges[:, 1]).sort().values,
        (edges[:, 1] * len(mesh.vertices) + edges[:, 0]).sort().values,
    )


def test_a_cell_without_a_cube_next_to_an_inside_point_is_extracted_with_zero_weights() -> None:
    feats = torch.zeros(1, 53, dtype=torch.float64)
    feats[:, :8] = -1 + 1 / 5  # all corners of the only cube inside by 1
    feats[:, 32:53] = 3.0  # its weights; its own cell is not crossed
    mesh = extract_mesh(torch.full((1, 3), 2, dtype=torch.int32), feats, 5)
    assert euler_characteristic(mesh.faces) == 2
    assert len(mesh.vertices) == 26  # the cells around it
    assert len(mesh.faces) == 48
    # Every crossing is half way (sdf -1 and +1): faces, edges and corners of the larger cube in this order of distance.
    distance = (mesh.vertices * 5).norm(dim=1).sort().values
    face, edge, corner = 1.0, 2**0.5 * 0.75, 3**0.5 * (0.5 + 0.5 / 3)
    expected = torch.tensor([face] * 6 + [edge] * 12 + [corner] * 8, dtype=torch.float64).sort().values
    torch.testing.assert_close(distance, expected)
    assert signed_volume(mesh.vertices, mesh.faces) > 0


def test_the_quad_of_an_edge_from_zero_still_faces_outward() -> None:
    coords = full_grid(4)
    feats = torch.zeros(64, 53, dtype=torch.float64)
    points = (coords[:, None] + corner_offsets() - 2).double()
    feats[:, :8] = points.abs().amax(2) - 1 + 1 / 4  # exactly 0 on the surface of a cube, -1 in its middle
    mesh = extract_mesh(coords, feats, 4)
    vertices, faces = canonical(mesh.vertices, mesh.faces)
    assert euler_characteristic(faces) == 2
    assert signed_volume(vertices, faces) > 0


@anywhere
def test_errors_name_what_is_wrong() -> None:
    coords, feats = full_grid(2), torch.zeros(8, 53)
    with pytest.raises(ValueError, match=r"coords must be in \[0, 1\); got 0 to 1$"):
        extract_mesh(coords, feats, 1)
    with pytest.raises(ValueError, match=r"coords must be in \[0, 2\); got -1 to 0$"):
        extract_mesh(coords - 1, feats, 2)
    with pytest.raises(ValueError, match=r"feats must have 53 \+ 8 C channels; got 54"):
        extract_mesh(coords, torch.zeros(8, 54), 2)
    with pytest.raises(ValueError, match=r"resolution must be in \[1, 4095\]; got 5000"):
        extract_mesh(coords, feats, 5000)
    with pytest.raises(TypeError, match=r"coords must be torch.int32; got torch.int64"):
        extract_mesh(coords.long(), feats, 2)
    with pytest.raises(ValueError, match=r"feats must be \[N, D\] with N=8; got \[7, 53\]"):
        extract_mesh(coords, feats[:7], 2)
    with pytest.raises(ValueError, match=r"coords must be distinct; got the same cube twice"):
        extract_mesh(torch.zeros(8, 3, dtype=torch.int32), feats, 2)


# Not on a GPU, where a check that fails ends the process's use of it.
@pytest.mark.parametrize("backend", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_the_kernel_refuses_maps_that_point_outside(backend: str, training: bool) -> None:
    coords, feats = noise(4, 1.0, 1, torch.float32)
    names = ("points", "point_cubes", "cells", "cell_cubes", "cell_points", "cases")
    *maps, vertex_cells, quads = operators.surface_topology(coords, feats, 4)
    for i, name in enumerate(names):
        if name == "points":
            continue
        broken = [m.clone() for m in maps]
        broken[i].view(-1)[-1] = 1 << 20
        with pytest.raises(ValueError, match=f"{name} must be in"):
            operators.surface_values(feats, *broken, vertex_cells, 4, training)
    for broken_cells in (vertex_cells[:-1], vertex_cells[[0, *range(len(vertex_cells))]]):
        with pytest.raises(ValueError, match="vertex_cells must have an entry for each dual vertex of the cases"):
            operators.surface_values(feats, *maps, broken_cells, 4, training)
    with pytest.raises(ValueError, match="quads must be in"):
        operators.split_quads(quads + len(vertex_cells), torch.zeros(len(vertex_cells)))


def test_operators_pass_opcheck() -> None:
    coords, feats = noise(3, 1.0, 1, torch.float32)
    *maps, quads = operators.surface_topology(coords, feats, 3)
    opcheck(operators.surface_topology.default, (coords, feats, 3))
    opcheck(operators.surface_values.default, (feats.requires_grad_(), *maps, 3, True))
    opcheck(operators.split_quads.default, (quads, torch.rand(len(maps[-1]))))


def test_values_compile_without_a_graph_break() -> None:
    coords, feats = noise(3, 1.0, 1, torch.float64)
    *maps, _ = operators.surface_topology(coords, feats, 3)
    feats.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        values = operators.surface_values(x, *maps, 3, True)
        return values[0].sum() + values[1].sum() + values[3].sum() + values[5].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(feats), loss(feats))
    actual, expected = (torch.autograd.grad(f(feats), feats)[0] for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)
