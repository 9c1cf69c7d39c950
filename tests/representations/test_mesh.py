import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.solids import box, joined, torus
from trellis.representations.mesh import Mesh, mesh_statistics

TOPOLOGY = ("components", "boundary_edges", "nonmanifold_edges", "nonmanifold_vertices", "euler_characteristic")
FLAGS = ("watertight", "manifold", "winding_consistent")


def faces_of(*rows: list[int]) -> Mesh:
    faces = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    count = int(faces.max()) + 1 if len(faces) else 0
    return Mesh(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), faces)


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "topology", "flags"),
    [
        (box(), (1, 0, 0, 0, 2), (True, True, True)),
        (torus(), (1, 0, 0, 0, 0), (True, True, True)),
        (joined(box(), torus(), box()), (3, 0, 0, 0, 4), (True, True, True)),
        (faces_of(), (0, 0, 0, 0, 0), (False, False, False)),
        (faces_of([0, 1, 2]), (1, 3, 0, 0, 1), (False, True, True)),
        (faces_of([0, 1, 2], [1, 0, 3]), (1, 4, 0, 0, 1), (False, True, True)),
        (faces_of([0, 1, 2], [0, 1, 3]), (1, 4, 0, 0, 1), (False, True, False)),
        (faces_of([0, 1, 2], [1, 0, 3], [0, 1, 4]), (1, 6, 1, 0, 1), (False, False, True)),
        (faces_of([0, 1, 2], [0, 3, 4]), (1, 6, 0, 1, 1), (False, False, True)),  # two fans at vertex 0
        (faces_of([0, 1, 2], [0, 0, 1], [5, 3, 5]), (1, 3, 0, 0, 1), (False, True, True)),
    ],
    ids=["box", "torus", "three", "none", "one", "two", "against", "book", "pinch", "degenerate"],
)
def test_topology_of_known_meshes(mesh: Mesh, topology: tuple[int, ...], flags: tuple[bool, ...]) -> None:
    statistics = mesh_statistics(mesh)
    assert tuple(statistics[name] for name in TOPOLOGY) == topology
    assert tuple(statistics[name] for name in FLAGS) == flags
    assert json.loads(json.dumps(statistics, allow_nan=False)) == statistics


def test_open_box_has_a_border() -> None:
    mesh = box()
    statistics = mesh_statistics(Mesh(mesh.vertices, mesh.faces[1:]))
    assert (statistics["boundary_edges"], statistics["watertight"], statistics["manifold"]) == (3, False, True)


def test_area_and_volume() -> None:
    statistics = mesh_statistics(box((0.5, 0.25, 0.125), center=(1e3, 0, 0)))
    assert statistics["volume"] == pytest.approx(0.5 * 0.25 * 0.125, rel=1e-3)  # float32 positions near 1000
    assert statistics["area"] == pytest.approx(2 * (0.5 * 0.25 + 0.5 * 0.125 + 0.25 * 0.125), rel=1e-3)
    mesh = torus(400, 200)
    statistics = mesh_statistics(mesh)
    assert statistics["volume"] == pytest.approx(2 * math.pi**2 * 0.3 * 0.1**2, rel=1e-3)
    assert statistics["area"] == pytest.approx(4 * math.pi**2 * 0.3 * 0.1, rel=1e-3)
    assert mesh_statistics(Mesh(mesh.vertices, mesh.faces.flip(1)))["volume"] == -statistics["volume"]


def test_passes_over_unused_vertices_and_degenerate_faces() -> None:
    mesh = box()
    extra = torch.tensor([[0, 0, 1], [9, 9, 9]])
    vertices = torch.cat([mesh.vertices, torch.full((2, 3), math.nan)])
    expected = mesh_statistics(mesh) | {"vertices": 10, "faces": 14, "unreferenced_vertices": 2, "degenerate_faces": 2}
    assert mesh_statistics(Mesh(vertices, torch.cat([mesh.faces, extra]))) == expected


def test_agrees_with_trimesh() -> None:
    for mesh in (box(), torus(), joined(torus(), box())):
        ours, theirs = mesh_statistics(mesh), as_trimesh(mesh)
        assert (ours["watertight"], ours["winding_consistent"]) == (theirs.is_watertight, theirs.is_winding_consistent)
        assert ours["euler_characteristic"] == theirs.euler_number
        assert ours["volume"] == pytest.approx(theirs.volume)
        assert ours["area"] == pytest.approx(theirs.area)


def brute_force(faces: list[list[int]]) -> dict[str, Any]:
    """The same numbers, face by face."""
    faces = [face for face in faces if len(set(face)) == 3]
    directions: dict[frozenset[int], list[tuple[int, int]]] = defaultdict(list)
    owners: dict[frozenset[int], list[int]] = defaultdict(list)
    for number, face in enumerate(faces):
        for k in range(3):
            edge = face[k], face[(k + 1) % 3]
            directions[frozenset(edge)].append(edge)
            owners[frozenset(edge)].append(number)

    def parts(nodes: set[int], links: list[tuple[int, int]]) -> int:
        count, left = 0, set(nodes)
        while left:
            count, front = count + 1, {left.pop()}
            while front:
                front = {b for pair in links for a, b in (pair, pair[::-1]) if a in front and b in left}
                left -= front
        return count

    vertices = {vertex for face in faces for vertex in face}
    pinched = 0
    for vertex in vertices:
        around = {number for number, face in enumerate(faces) if vertex in face}
        links = [(a, b) for edge, own in owners.items() if vertex in edge for a in own for b in own]
        pinched += parts(around, links) > 1
    sizes = [len(own) for own in owners.values()]
    pairs = [edges for edges in directions.values() if len(edges) == 2]
    crowded = sum(size > 2 for size in sizes)
    return {
        "components": parts(vertices, [(min(edge), max(edge)) for edge in owners]),
        "boundary_edges": sizes.count(1),
        "nonmanifold_edges": crowded,
        "nonmanifold_vertices": pinched,
        "euler_characteristic": len(vertices) - len(sizes) + len(faces),
        "watertight": bool(faces) and set(sizes) == {2},
        "manifold": bool(faces) and crowded == pinched == 0,
        "winding_consistent": bool(faces) and all(a != b for a, b in pairs),
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), max_size=14))
def test_random_faces_agree_with_brute_force(rows: list[list[int]]) -> None:
    statistics = mesh_statistics(faces_of(*rows))
    expected = brute_force(rows)
    assert {name: statistics[name] for name in expected} == expected


def test_numbering_does_not_matter_and_a_long_strip_is_one_component() -> None:
    strip = torch.arange(20_000)[:, None] + torch.tensor([0, 1, 2])
    order = torch.randperm(20_002, generator=torch.Generator().manual_seed(1))
    for faces in (strip, order[strip], strip.flip(0)):
        began = time.perf_counter()
        statistics = mesh_statistics(Mesh(torch.rand(20_002, 3), faces))
        assert time.perf_counter() - began < 2
        assert (statistics["components"], statistics["manifold"], statistics["euler_characteristic"]) == (1, True, 1)


def test_statistics_refuse_wrong_indices_and_positions() -> None:
    with pytest.raises(ValueError, match=r"faces must be in \[0, 3\); got 0 to 3"):
        mesh_statistics(Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 3]])))
    with pytest.raises(ValueError, match="vertices must be finite"):
        mesh_statistics(Mesh(torch.full((3, 3), math.inf), torch.tensor([[0, 1, 2]])))


# --- normals -------------------------------------------------------------------------------------------------------


def test_vertex_normals_are_weighted_by_area() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 1]])
    mesh = Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]))  # areas 1 facing z and 1/2 facing x
    expected = torch.tensor([[1.0, 0, 2], [0, 0, 1], [1, 0, 2], [1, 0, 0]])
    torch.testing.assert_close(mesh.vertex_normals(), torch.nn.functional.normalize(expected))
    assert (box().vertex_normals() * box().vertices).sum(1).min() > 0.4  # outward


@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vertex_normals_have_length_one(scale: float, dtype: torch.dtype) -> None:
    mesh = torus()
    vertices = torch.cat([mesh.vertices * scale, torch.zeros(2, 3)]).to(dtype)
    normals = Mesh(vertices, torch.cat([mesh.faces, torch.tensor([[0, 0, -1 + len(vertices)]])])).vertex_normals()
    assert normals.dtype == dtype
    torch.testing.assert_close(normals.float().norm(dim=1), torch.ones(len(vertices)), rtol=0, atol=1e-2)
    assert normals[-2:].tolist() == [[0, 0, 1]] * 2


def test_vertex_normals_have_a_gradient() -> None:
    mesh = box()
    vertices = mesh.vertices.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Mesh(x, mesh.faces).vertex_normals(), vertices)


# --- files (GLB: test_gltf.py) -------------------------------------------------------------------------------------


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.double().numpy(), mesh.faces.numpy(), process=False)


def y_up(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows[:, 0], rows[:, 2], -rows[:, 1]], 1)


def read(path: Path) -> trimesh.Trimesh:
    loaded = trimesh.load(path, process=False, force="mesh", maintain_order=True)
    assert isinstance(loaded, trimesh.Trimesh)
    return loaded


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".OBJ"])
@pytest.mark.parametrize("colored", [True, False])
def test_obj_and_ply_round_trip(suffix: str, colored: bool, tmp_path: Path) -> None:
    mesh = torus() if colored else Mesh(torus().vertices, torus().faces)
    mesh.save(tmp_path / f"x{suffix}")
    loaded = read(tmp_path / f"x{suffix}")
    turn = y_up if suffix.lower() == ".obj" else (lambda rows: rows)
    torch.testing.assert_close(torch.tensor(loaded.vertices).float(), turn(mesh.vertices))
    assert loaded.faces.tolist() == mesh.faces.tolist()
    if suffix == ".ply":
        data = loaded.metadata["_ply_raw"]["vertex"]["data"]
        normals = np.stack([data[name] for name in ("nx", "ny", "nz")], 1)
    else:
        normals = np.loadtxt([line[3:] for line in (tmp_path / f"x{suffix}").open() if line.startswith("vn ")])
    torch.testing.assert_close(torch.tensor(normals).float(), turn(mesh.vertex_normals()), rtol=0, atol=1e-5)
    assert loaded.volume > 0
    assert loaded.visual.kind == ("vertex" if colored else None)
    if colored:
        colors = torch.tensor(np.array(loaded.visual.vertex_colors))[:, :3].float() / 255
        torch.testing.assert_close(colors, mesh.colors, rtol=0, atol=1 / 255)


def test_obj_text_is_exactly_this(tmp_path: Path) -> None:
    vertices = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0.25, 0]])
    Mesh(vertices, torch.tensor([[0, 1, 2]]), colors=vertices).save(tmp_path / "x.obj")
    assert (tmp_path / "x.obj").read_text() == (
        "# trellis, y up\n"
        "v 0 0 -0 0 0 0\nv 0.5 0 -0 0.5 0 0\nv 0 0 -0.25 0 0.25 0\n"
        "vn 0 1 -0\nvn 0 1 -0\nvn 0 1 -0\n"
        "f 1//1 2//2 3//3\n"
    )


def test_stl_is_ours_in_orientation_and_repeats_corners(tmp_path: Path) -> None:
    mesh = torus()
    mesh.save(tmp_path / "x.stl")
    assert (tmp_path / "x.stl").stat().st_size == 84 + 50 * len(mesh.faces)
    assert not (tmp_path / "x.stl").read_bytes().startswith(b"solid")  # how ASCII files begin
    loaded = read(tmp_path / "x.stl")
    torch.testing.assert_close(torch.tensor(loaded.triangles).float(), mesh.vertices[mesh.faces], rtol=0, atol=0)
    assert loaded.volume == pytest.approx(mesh_statistics(mesh)["volume"], rel=1e-5)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_every_writer_takes_half_precision_gradients_and_degenerate_faces(suffix: str, tmp_path: Path) -> None:
    mesh = torus()
    vertices = torch.cat([mesh.vertices, torch.zeros(1, 3)]).half().requires_grad_()
    faces = torch.cat([mesh.faces, torch.tensor([[0, 0, 1]])])
    Mesh(vertices, faces, colors=vertices.detach() * 4).save(tmp_path / f"x{suffix}")  # colors beyond [0, 1]
    loaded = read(tmp_path / f"x{suffix}")
    assert np.isfinite(loaded.vertices).all()
    assert len(loaded.faces) == len(faces)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_colors_out_of_range_are_clamped(suffix: str, tmp_path: Path) -> None:
    mesh = box()
    assert mesh.colors is not None
    Mesh(mesh.vertices, mesh.faces, mesh.colors * 3 - 1).save(tmp_path / f"x{suffix}")
    loaded = trimesh.load(
        tmp_path / f"x{suffix}", process=False, force="mesh", maintain_order=True, skip_materials=True
    )
    np.testing.assert_array_equal(loaded.visual.vertex_colors[:, :3], mesh.colors.numpy() * 255)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_writers_refuse_what_cannot_be_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    empty = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"mesh must have faces to be saved as x\{suffix}; got an empty mesh"):
        empty.save(path)
    mesh = box()
    with pytest.raises(ValueError, match=r"faces must be in \[0, 8\); got 1 to 12"):
        Mesh(mesh.vertices, mesh.faces + 5 - 4 * (mesh.faces == 0)).save(path)
    for bad in (math.nan, 1e300):
        with pytest.raises(ValueError, match="vertices must be finite float32 numbers"):
            Mesh(mesh.vertices.double().index_fill(0, torch.tensor([3]), bad), mesh.faces).save(path)
    with pytest.raises(ValueError, match="colors must be finite"):
        Mesh(mesh.vertices, mesh.faces, mesh.vertices * math.nan).save(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_failed_save_leaves_the_former_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        box().save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_save_goes_by_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.glb, \.obj, \.ply, \.stl; got 'x\.gltf'"):
        box().save(tmp_path / "x.gltf")


# --- the dataclass -------------------------------------------------------------------------------------------------


def test_names_a_tensor_of_the_wrong_shape_or_dtype() -> None:
    zero = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"faces must be torch\.int64; got torch\.int32"):
        Mesh(zero, torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"colors must be \[V, 3\] with V=2; got \[3, 3\]"):
        Mesh(zero, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, 3))


def test_to_converts_real_numbers_only() -> None:
    mesh = box().to(dtype=torch.float64)
    assert mesh.colors is not None
    assert (mesh.vertices.dtype, mesh.faces.dtype, mesh.colors.dtype) == (torch.float64, torch.int64, torch.float64)
    assert Mesh(mesh.vertices, mesh.faces).to("cpu").colors is None
