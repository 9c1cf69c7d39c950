"""Files that are damaged, hostile or far too large, disks that are full: skipped with the reason, or handled."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from typer.testing import CliRunner

from tests.preparation.test_prepare import SMALL, catalog, run, write_box
from trellis.cli import app
from trellis.preparation import runner
from trellis.preparation.counting import stated_size
from trellis.preparation.job import Job, Settings
from trellis.preparation.metadata import read_metadata
from trellis.preparation.runner import prepare
from trellis.preparation.scene import load_scene
from trellis.preparation.sources import find_objects

MANY = 10_000_000


def glb(description: dict, binary: bytes = b"") -> bytes:
    text = json.dumps(description).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary if binary else b""
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def triangle(uri: str | None = None, count: int = 3, nodes: int = 1) -> dict:
    """A glTF of one mesh, whose buffer is a file or, without `uri`, not there: zeros."""
    accessor = {"componentType": 5126, "count": count, "type": "VEC3"}
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(nodes))}],
        "nodes": [{"mesh": 0}] * nodes,
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [accessor],
    }
    if uri is not None:
        accessor["bufferView"] = 0
        scene["bufferViews"] = [{"buffer": 0, "byteLength": 36}]
        scene["buffers"] = [{"uri": uri, "byteLength": 36}]
    return scene


POINTS = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0)


@pytest.mark.parametrize("suffix", [".glb", ".gltf", ".obj", ".ply", ".stl"])
def test_ten_million_faces_are_refused_before_they_are_parsed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"huge{suffix}"
    if suffix == ".obj":
        path.write_bytes(b"v 0 0 0\n" + b"f 1 1 1\n" * MANY)
    elif suffix == ".ply":
        path.write_bytes(b"ply\nformat binary_little_endian 1.0\nelement vertex 3\nelement face 10000000\nend_header\n")
    elif suffix == ".stl":
        with path.open("wb") as file:
            file.write(b"\0" * 80 + struct.pack("<I", MANY))
            file.truncate(84 + 50 * MANY)  # a hole: it takes no room
    else:
        description = triangle(count=3 * MANY // 100, nodes=100)
        path.write_bytes(glb(description) if suffix == ".glb" else json.dumps(description).encode())
    start = time.process_time()
    with pytest.raises(ValueError, match="must have at most 5000000 faces"):
        load_scene(path)
    assert time.process_time() - start < 5


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.obj").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match="must have at most 1073741824 bytes"):
        load_scene(tmp_path / "huge.obj")


@pytest.mark.parametrize("suffix", [".glb", ".gltf", ".obj", ".ply", ".stl"])
def test_what_a_file_states_is_what_it_has(tmp_path: Path, suffix: str) -> None:
    trimesh.creation.icosphere(subdivisions=1).export(tmp_path / f"ball{suffix}")
    size = stated_size(tmp_path / f"ball{suffix}")
    assert size.faces == 80
    assert size.vertices in (42, 240)


def test_ascii_stl_is_counted_and_damage_is_left_to_the_parser(tmp_path: Path) -> None:
    (tmp_path / "a.stl").write_text(trimesh.exchange.stl.export_stl_ascii(trimesh.creation.box()))
    assert stated_size(tmp_path / "a.stl").faces == 12
    for suffix, data in ((".glb", b"glTF"), (".gltf", b"[]"), (".ply", b""), (".stl", b""), (".obj", b"")):
        (tmp_path / f"b{suffix}").write_bytes(data)
        assert stated_size(tmp_path / f"b{suffix}") == (0, 0)


@pytest.mark.parametrize("material", ["none.mtl", "..", ".", "x" * 5000, "a\0b"])
def test_an_obj_without_its_materials_is_white_or_gray(tmp_path: Path, material: str) -> None:
    path = write_box(tmp_path / "in" / "box.obj")
    path.write_bytes(f"mtllib {material}\nusemtl one\n".encode() + path.read_bytes())
    (row,) = find_objects(str(tmp_path / "in"), tmp_path / "data")
    scene = Job(tmp_path / "data", row["sha256"], row, Settings()).scene
    assert len({tuple(part.color) for part in scene.parts}) == 1
    red, green, blue, alpha = scene.parts[0].color
    assert red == green == blue
    assert alpha == 1


@pytest.mark.parametrize("picture", ["none.png", "../secret.png", "broken.png", "text.png"])
def test_an_obj_without_its_picture_is_seen_by_its_color(tmp_path: Path, picture: str) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "secret.png")
    path = write_box(tmp_path / "in" / "box.obj", "box.mtl")
    (tmp_path / "in" / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    (tmp_path / "in" / "box.mtl").write_text(f"newmtl one\nKd 0.2 0.4 0.6\nmap_Kd {picture}\n")
    part = load_scene(path).parts[0]
    assert part.texture is None
    assert part.color == pytest.approx((0.2, 0.4, 0.6, 1.0), abs=1 / 255)


@pytest.mark.parametrize(
    "uri", ["../secret.bin", "/etc/hostname", "none.bin", "http://127.0.0.1:1/x.bin", "file:///etc"]
)
@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
def test_gltf_reads_no_file_elsewhere(tmp_path: Path, suffix: str, uri: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(POINTS)
    (tmp_path / "in" / "beside.bin").write_bytes(POINTS)
    path = tmp_path / "in" / f"x{suffix}"
    path.write_bytes(glb(triangle(uri)) if suffix == ".glb" else json.dumps(triangle(uri)).encode())
    with pytest.raises(ValueError, match=f"must be a valid {suffix[1:]} file"):
        load_scene(path)
    if suffix == ".gltf":
        path.write_text(json.dumps(triangle("beside.bin")))
        assert len(load_scene(path).faces) == 1


def test_a_damaged_glb_never_ends_the_process(tmp_path: Path) -> None:
    good = trimesh.creation.box().export(file_type="glb")
    path = tmp_path / "x.glb"
    for cut in range(0, len(good), len(good) // 12):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"x\.glb must"):
            load_scene(path)
    for place in range(20, len(good), len(good) // 40):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x5A]) + good[place + 1 :])
        with contextlib.suppress(ValueError):  # or it is still an object
            load_scene(path)


def test_one_bad_object_never_stops_a_run(tmp_path: Path) -> None:
    source, data = tmp_path / "in", tmp_path / "data"
    write_box(source / "good.obj", "good.mtl")
    (source / "empty.obj").write_bytes(b"")
    (source / "point.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    (source / "line.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (source / "nan.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\nnan 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    )
    (source / "cut.glb").write_bytes(trimesh.creation.box().export(file_type="glb")[:200])
    (source / "lost.gltf").write_text(json.dumps(triangle("../../secret.bin")))
    (source / "gone.stl").symlink_to(tmp_path / "nowhere")
    run(str(source), "-o", str(data), *SMALL, "--voxel-resolution", "8")
    rows = {row["name"]: row for row in read_metadata(data).values()}
    assert rows["good"]["voxelized"] == rows["good"]["rendered"] == "True"
    failures = [json.loads(line)["error"] for line in (data / "failures" / "inspect.jsonl").read_text().splitlines()]
    for name in ("empty.obj", "nan.ply", "cut.glb", "lost.gltf"):
        assert sum(name in error for error in failures) == 1, name
    assert any("must have an extent" in error for error in failures)
    assert "gone" not in rows
    # Triangles without an area are no failure of the loader: whatever the steps make of them, the run went on.
    assert rows["line"]["kept"] == "True"


def test_an_object_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_box(tmp_path / "in" / f"{name}.obj")
    (tmp_path / "in" / "b.obj").write_text((tmp_path / "in" / "a.obj").read_text() + "# another\n")
    read = Path.open

    def refused(path: Path, *arguments: object, **named: object) -> object:
        if path.name == "b.obj":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refused)
    (row,) = find_objects(str(tmp_path / "in"), tmp_path / "data")
    assert row["name"] == "a"
    assert "b.obj: PermissionError" in (tmp_path / "data" / "failures" / "find.jsonl").read_text()


def test_a_damaged_catalog_costs_only_what_is_damaged(tmp_path: Path) -> None:
    source = tmp_path / "in"
    box = write_box(source / "box.obj").read_text()
    (source / "box.obj").unlink()
    (source / "A.sh3f").write_bytes(b"PK no zip")
    catalog(source / "B.sh3f", **{"a/box.obj": box})  # has no catalog
    text = "name#1=One\nmodel#1=/one.obj\nname#2=Two\nmodel#2=/two.obj\nname#3=Three\nmodel#3=/three.obj\n"
    text += "modelRotation#3=1 0 x\n"
    files = {"PluginFurnitureCatalog.properties": text, "one.obj": box, "two.obj": "#2\n" + box, "three.obj": box}
    catalog(source / "C.sh3f", **files)
    data = (source / "C.sh3f").read_bytes()
    place = data.index(b"#2\nv")
    (source / "C.sh3f").write_bytes(data[:place] + b"#9" + data[place + 2 :])  # its checksum is wrong now
    (row,) = find_objects(str(source), tmp_path / "data")
    assert row["name"] == "One"
    noted = (tmp_path / "data" / "failures" / "find.jsonl").read_text()
    for words in ("A.sh3f: BadZipFile", "B.sh3f: KeyError", "C.sh3f two.obj: BadZipFile", "C.sh3f Three: ValueError"):
        assert words in noted
    assert not list((tmp_path / "data").rglob("two.obj"))


def test_a_catalog_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.preparation.sources._LARGEST_CATALOG", 1 << 20)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "Bomb.sh3f", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("PluginFurnitureCatalog.properties", b"\0" * (1 << 21))
    with pytest.raises(ValueError, match="must unpack to at most 1048576 bytes"):
        find_objects(str(tmp_path / "in"), tmp_path / "data")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A prepared folder of three boxes, to which nothing was done yet."""
    for name in "abc":
        write_box(tmp_path / "in" / f"{name}.obj", f"{name}.mtl", f"0.{ord(name) % 10} 0.5 0.5")
    run(str(tmp_path / "in"), "-o", str(tmp_path / "data"), *SMALL, "--limit", "0")
    return tmp_path / "data"


def test_a_full_disk_ends_the_run_with_what_was_done(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = sorted(read_metadata(three))[1]
    real = runner.step_function

    def step(name: str) -> Callable[[Job], dict]:
        def run_step(job: Job) -> dict:
            if job.sha256 == victim:
                raise OSError(errno.ENOSPC, "No space left on device", "somewhere.png")
            return real(name)(job)

        return run_step

    with monkeypatch.context() as patched:
        patched.setattr(runner, "step_function", step)
        result = CliRunner().invoke(app, ["prepare", "-o", str(three), "--steps", "voxelize"])
    assert result.exit_code == 1
    assert "nothing can be written any more" in " ".join(result.output.split())
    assert "No space left on device" in " ".join(result.output.split())
    assert [row.get("voxelized") for _, row in sorted(read_metadata(three).items())].count("True") <= 1
    assert not (three / "failures" / "voxelize.jsonl").exists()
    run("-o", str(three), "--steps", "voxelize")
    assert [row["voxelized"] for row in read_metadata(three).values()] == ["True"] * 3


def test_files_cut_short_are_not_left_behind(three: Path) -> None:
    """The system refuses to write files of more than 300 bytes: a voxel file breaks off in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="large"):
            prepare(three, ["voxelize"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((three / "voxels").glob("*"))
    assert not list((three / "voxels").glob(".*"))
    assert prepare(three, ["voxelize"]).done == 3


def test_a_pool_that_refuses_a_task_does_not_lose_it(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies between two submissions: the pool is broken before the second is in flight."""
    pools: list[object] = []

    class Pool(contextlib.nullcontext):
        def __init__(self, *arguments: object) -> None:
            super().__init__(self)
            pools.append(self)
            self.submitted = 0

        def submit(self, function: Callable[[runner.Task], runner.Outcome], task: runner.Task) -> Future:
            self.submitted += 1
            if len(pools) == 1 and self.submitted == 2:
                raise BrokenProcessPool
            future: Future = Future()
            future.set_result(function(task))
            return future

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    assert prepare(three, ["voxelize"], jobs=2) == runner.Summary(3, 3, 0)
    assert len(pools) == 3  # the broken one, that of the others, and one for what was in flight


def test_transparency_of_either_spelling(tmp_path: Path) -> None:
    for line, opacity in (("d 0.25", 0.25), ("Tr 0.25", 0.75), ("d -halo 0.5", 0.5), ("d many", 1.0), ("d 7", 1.0)):
        path = write_box(tmp_path / "box.obj", "box.mtl")
        (tmp_path / "box.mtl").write_text(f"newmtl one\nKd 0.2 0.4 0.6\n{line}\n")
        assert load_scene(path).parts[0].color[3] == pytest.approx(opacity), line


def test_texture_coordinates_that_are_not_finite_are_zero(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "t.png")
    path = write_box(tmp_path / "box.obj", "box.mtl")
    (tmp_path / "box.mtl").write_text("newmtl one\nmap_Kd t.png\n")
    path.write_text(path.read_text().replace("vt 1 1", "vt nan inf"))
    uv = load_scene(path).parts[0].uv
    assert uv is not None
    assert torch.isfinite(uv).all()
