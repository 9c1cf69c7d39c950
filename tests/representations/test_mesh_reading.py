from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from tests.support.solids import box, torus
from trellis.representations.mesh import Mesh
from trellis.representations.mesh_reading import read_mesh


@pytest.mark.parametrize(("suffix", "tolerance"), [("glb", 1e-4), ("obj", 2 / 255), ("ply", 2 / 255)])
def test_reads_what_it_wrote(tmp_path: Path, suffix: str, tolerance: float) -> None:
    mesh = torus(7, 5)
    mesh.save(tmp_path / f"x.{suffix}")
    read, texture = read_mesh(tmp_path / f"x.{suffix}")
    assert texture is None
    torch.testing.assert_close(read.vertices, mesh.vertices, rtol=0, atol=1e-7)
    assert torch.equal(read.faces, mesh.faces)
    assert read.colors is not None
    assert mesh.colors is not None
    torch.testing.assert_close(read.colors, mesh.colors, rtol=0, atol=tolerance)


def test_reads_stl(tmp_path: Path) -> None:
    mesh = box((0.5, 0.3, 0.2), (0.1, 0.0, 0.0))
    mesh.save(tmp_path / "x.stl")
    read = read_mesh(tmp_path / "x.stl").mesh
    torch.testing.assert_close(read.vertices[read.faces], mesh.vertices[mesh.faces])
    assert read.colors is None
    assert len(read.vertices) == 8  # the format repeats every corner


def pictured() -> trimesh.Trimesh:
    """A square, glTF's y up, whose picture is red, green above blue, white."""
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8))
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
    square = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture)
    square.visual = trimesh.visual.TextureVisuals(uv=corners[:, :2], material=material)
    return square


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_reads_a_texture_with_row_0_at_the_top(tmp_path: Path, suffix: str) -> None:
    pictured().export(tmp_path / f"x.{suffix}")
    mesh, texture = read_mesh(tmp_path / f"x.{suffix}")
    assert texture is not None
    torch.testing.assert_close(texture.image[0, 0], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.01)
    assert texture.faces is not None
    top_left = (texture.uv[texture.faces] == 0).all(-1)
    torch.testing.assert_close(mesh.vertices[mesh.faces[top_left]], torch.tensor([[0.0, 0.0, 1.0]]))  # up is z here


def test_a_seam_does_not_open_the_surface(tmp_path: Path) -> None:
    """The file has a vertex twice where it lies in two places of the picture."""
    two = pictured()
    corners, uv = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0.0]]), np.eye(6, 2)
    other = trimesh.Trimesh(corners, [[0, 1, 2], [3, 4, 5]], process=False)
    other.visual = trimesh.visual.TextureVisuals(uv=uv, material=two.visual.material)
    other.export(tmp_path / "x.glb")
    mesh, texture = read_mesh(tmp_path / "x.glb")
    assert texture is not None
    assert len(mesh.vertices) == 4
    assert texture.faces is not None
    expected = torch.tensor(uv, dtype=torch.float32) * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(texture.uv[texture.faces.flatten()], expected, rtol=0, atol=1e-6)


def test_parts_are_placed_and_joined_and_colored_at_the_vertices(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    scene.add_geometry(pictured())
    place = np.diag([-1.0, 1, 1, 1])  # mirrored: the order of the corners turns round
    place[:3, 3] = [0, 3, 0]
    other = trimesh.creation.box((1, 1, 1))
    scene.add_geometry(other, transform=place)
    scene.export(tmp_path / "x.glb")
    mesh, texture = read_mesh(tmp_path / "x.glb")
    assert texture is None
    assert mesh.colors is not None
    assert len(mesh.faces) == 2 + 12
    torch.testing.assert_close(mesh.vertices[:, 2].max(), torch.tensor(3.5))
    solid = Mesh(mesh.vertices, mesh.faces[(mesh.vertices[mesh.faces][..., 2] > 2).all(1)])
    assert len(solid.faces) == 12
    outward = (solid.vertex_normals() * (solid.vertices - torch.tensor([0.0, 0, 3]))).sum(1)
    assert (outward[solid.faces.unique()] > 0).all()


def test_face_colors_and_material_colors(tmp_path: Path) -> None:
    shape = trimesh.creation.box()
    shape.visual.face_colors = [255, 128, 0, 255]
    shape.export(tmp_path / "x.ply")
    colors = read_mesh(tmp_path / "x.ply").mesh.colors
    assert colors is not None
    torch.testing.assert_close(colors, torch.tensor([1, 128 / 255, 0]).expand_as(colors))
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 55, 0, 255])
    shape.visual = trimesh.visual.TextureVisuals(material=material)
    shape.export(tmp_path / "x.glb")
    colors = read_mesh(tmp_path / "x.glb").mesh.colors
    assert colors is not None
    torch.testing.assert_close(colors[0], torch.tensor([1, 0.502, 0]), rtol=0, atol=3e-3)  # linear 55/255


def test_vertex_colors_of_a_glb_are_linear_with_and_without_a_material(tmp_path: Path) -> None:
    shape = trimesh.creation.box()
    shape.visual = trimesh.visual.ColorVisuals(shape, vertex_colors=np.full((8, 4), 128, np.uint8))
    shape.export(tmp_path / "x.glb")
    colors = read_mesh(tmp_path / "x.glb").mesh.colors
    assert colors is not None
    torch.testing.assert_close(colors, torch.full((8, 3), 0.7366), rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.glb", b"glTF not", "must be a valid glb file"),
        ("x.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "must have triangles; it has none"),
        ("x.obj", b"v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "finite float32 positions"),
        ("x.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "x.obj must"),
        ("x.ply", b"ply\nformat", "must be a valid ply file"),
        ("x.stl", b"", "x.stl must"),
        ("x.fbx", b"", r"must end in \.glb, \.gltf, \.obj, \.ply, \.stl"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_mesh(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.glb"):
        read_mesh(tmp_path / "none.glb")
