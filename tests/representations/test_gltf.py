import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import trellis
from tests.support.solids import box, joined, torus
from trellis.representations import gltf
from trellis.representations.gltf import srgb_to_linear
from trellis.representations.mesh import Mesh

ROOT = Path(__file__).parents[2]
COMPONENTS = {5126: "<f4", 5125: "<u4", 5123: "<u2"}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """Document and buffer of a GLB file, its frame checked against the specification."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    chunks, at = [], 12
    while at < len(data):
        size, kind = struct.unpack_from("<I4s", data, at)
        assert size % 4 == 0
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 8 + size
    assert [kind for kind, _ in chunks] == [b"JSON", b"BIN\0"]
    return json.loads(chunks[0][1]), chunks[1][1]


def accessor(document: dict[str, Any], buffer: bytes, number: int) -> np.ndarray:
    entry = document["accessors"][number]
    view = document["bufferViews"][entry["bufferView"]]
    dtype, width = np.dtype(COMPONENTS[entry["componentType"]]), WIDTHS[entry["type"]]
    assert view["byteOffset"] % 4 == 0
    assert view["byteLength"] == entry["count"] * width * dtype.itemsize
    if view["target"] == 34962:
        assert view["byteStride"] == width * dtype.itemsize
        assert view["byteStride"] % 4 == 0
    return np.frombuffer(buffer, dtype, entry["count"] * width, view["byteOffset"]).reshape(-1, width)


def y_up(rows: torch.Tensor) -> np.ndarray:
    return torch.stack([rows[:, 0], rows[:, 2], -rows[:, 1]], 1).numpy()


@pytest.mark.parametrize("mesh", [box((0.3, 0.5, 0.9), (0.1, 0, 0)), torus(5, 3)], ids=["box", "torus"])
def test_file_says_what_the_mesh_is(mesh: Mesh, tmp_path: Path) -> None:
    mesh.save(tmp_path / "x.glb")
    document, buffer = parse(tmp_path / "x.glb")
    assert document["asset"] == {"version": "2.0", "generator": f"trellis {trellis.__version__}"}
    assert document["buffers"] == [{"byteLength": len(buffer)}]
    assert document["scenes"][document["scene"]] == {"nodes": [0]}
    (primitive,) = document["meshes"][document["nodes"][0]["mesh"]]["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "COLOR_0"}
    material = document["materials"][primitive["material"]]
    assert material == {
        "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1},
        "doubleSided": False,
    }

    positions = accessor(document, buffer, primitive["attributes"]["POSITION"])
    np.testing.assert_array_equal(positions, y_up(mesh.vertices))
    entry = document["accessors"][primitive["attributes"]["POSITION"]]
    assert np.array_equal(np.float32(entry["min"]), positions.min(0))
    assert np.array_equal(np.float32(entry["max"]), positions.max(0))
    normals = accessor(document, buffer, primitive["attributes"]["NORMAL"])
    np.testing.assert_allclose(normals, y_up(mesh.vertex_normals()), atol=1e-6)
    indices = accessor(document, buffer, primitive["indices"])
    assert indices.dtype == np.dtype("<u4")
    np.testing.assert_array_equal(indices.reshape(-1, 3), mesh.faces.numpy())
    assert document["bufferViews"][document["accessors"][primitive["indices"]]["bufferView"]]["target"] == 34963

    assert mesh.colors is not None
    number = primitive["attributes"]["COLOR_0"]
    assert document["accessors"][number]["normalized"] is True
    colors = accessor(document, buffer, number)
    assert (colors[:, 3] == 65535).all()
    np.testing.assert_allclose(colors[:, :3] / 65535, srgb_to_linear(mesh.colors.double().numpy()), atol=0.51 / 65535)


def test_colors_are_linear(tmp_path: Path) -> None:
    """The values of IEC 61966-2-1, and every sRGB byte is told apart after the round trip."""
    known = {0.0: 0.0, 0.04045: 0.0031308, 0.5: 0.21404114, 0.73535698: 0.5, 1.0: 1.0}
    np.testing.assert_allclose(srgb_to_linear(np.array(list(known))), list(known.values()), atol=1e-6)
    gray = (torch.arange(256, dtype=torch.float64) / 255)[:, None].expand(256, 3)
    faces = torch.arange(254)[:, None] + torch.arange(3)
    Mesh(torch.rand(256, 3), faces, colors=gray).save(tmp_path / "x.glb")
    document, buffer = parse(tmp_path / "x.glb")
    linear = accessor(document, buffer, 2)[:, 0] / 65535
    back = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.rint(back * 255).astype(int).tolist() == list(range(256))


def test_no_colors_no_attribute(tmp_path: Path) -> None:
    joined(box()).save(tmp_path / "x.glb")
    document, _ = parse(tmp_path / "x.glb")
    assert set(document["meshes"][0]["primitives"][0]["attributes"]) == {"POSITION", "NORMAL"}


def test_trimesh_reads_it_upright_with_every_vertex(tmp_path: Path) -> None:
    mesh = box((0.2, 0.4, 0.8), center=(0.05, -0.2, 0.1))
    mesh.save(tmp_path / "x.glb")
    loaded = trimesh.load(tmp_path / "x.glb", process=False, force="mesh")
    assert isinstance(loaded, trimesh.Trimesh)
    assert len(loaded.vertices) == 8
    assert loaded.is_watertight
    assert loaded.volume == pytest.approx(0.2 * 0.4 * 0.8)  # positive: the turn keeps the orientation
    np.testing.assert_allclose(loaded.extents, [0.2, 0.8, 0.4], atol=1e-6)  # our z is their y
    np.testing.assert_allclose(loaded.bounds.mean(0), [0.05, 0.1, 0.2], atol=1e-6)  # our front, -y, is their +z
    assert mesh.colors is not None
    # trimesh lets go of vertex colors where there is a material, unless told to skip materials.
    plain = trimesh.load(tmp_path / "x.glb", process=False, force="mesh", skip_materials=True)
    np.testing.assert_array_equal(plain.visual.vertex_colors[:, :3], mesh.colors.numpy() * 255)


def test_refuses_what_exceeds_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gltf, "_LARGEST", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes; it needs 1"):
        box().save(tmp_path / "x.glb")
    assert list(tmp_path.iterdir()) == []


VALIDATE = """
const validator = require('gltf-validator'), fs = require('fs');
(async () => {
  const reports = [];
  for (const file of process.argv.slice(1))
    reports.push(await validator.validateBytes(new Uint8Array(fs.readFileSync(file))));
  console.log(JSON.stringify(reports));
})();
"""


def test_khronos_validator_finds_nothing(tmp_path: Path) -> None:
    """Needs node, and `npm install gltf-validator` in the root of the repository or a folder above it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    found = subprocess.run(
        [node, "-e", "require.resolve('gltf-validator')"], cwd=ROOT, capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip("gltf-validator is not installed: npm install gltf-validator")
    meshes = {"box": box(), "plain": joined(box(), torus()), "odd": torus(7, 5)}
    for name, mesh in meshes.items():
        mesh.save(tmp_path / f"{name}.glb")
    files = [str(tmp_path / f"{name}.glb") for name in meshes]
    run = subprocess.run([node, "-e", VALIDATE, *files], cwd=ROOT, capture_output=True, text=True, check=True)
    reports = json.loads(run.stdout)
    assert [report["issues"]["messages"] for report in reports] == [[]] * len(meshes)
    assert [report["info"]["totalVertexCount"] for report in reports] == [len(m.vertices) for m in meshes.values()]
