"""`trellis prepare`: sources, steps, resuming, failures; with a small folder of objects."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.preparation import dying
from trellis.cli import app
from trellis.preparation import runner
from trellis.preparation.job import Job, Settings
from trellis.preparation.metadata import read_metadata
from trellis.preparation.scene import Part, Variant, load_scene, normalised, vary
from trellis.preparation.sources import find_objects, split_of, with_variants

CUBE = [(x, y, z) for x in (0, 1) for y in (0, 2) for z in (0, 3)]
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def write_box(path: Path, material: str = "", color: str = "0.2 0.4 0.6") -> Path:
    """A box of 1 x 2 x 3, y up, as OBJ; with `material`, an MTL of that name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"mtllib {material}", "usemtl one"] if material else []
    lines += [f"v {x} {y} {z}" for x, y, z in CUBE]
    lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1"]
    lines += ["f " + " ".join(f"{v + 1}/{i + 1}" for i, v in enumerate(quad)) for quad in QUADS]
    path.write_text("\n".join(lines) + "\n")
    if material and "/" not in material:
        (path.parent / material).write_text(f"newmtl one\nKd {color}\n")
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["prepare", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


SMALL = ["--views", "3", "--resolution", "16", "--ssaa", "1", "--cond-views", "2", "--cond-resolution", "16"]


def test_a_folder_becomes_the_official_layout(tmp_path: Path) -> None:
    write_box(tmp_path / "in" / "blue_box.obj", "box.mtl")
    (tmp_path / "in" / "broken.obj").write_text("f 1 2 3\n")
    data = tmp_path / "data"
    run(str(tmp_path / "in"), "-o", str(data), *SMALL, "--variants", "2", "--depth", "--voxel-resolution", "8")
    rows = read_metadata(data)
    good = [row for row in rows.values() if row["name"] == "blue box"]
    assert len(good) == 3
    assert {row["variant"] for row in good} == {"0", "1", "2"}
    assert {row["split"] for row in good} == {split_of("blue box")}
    for row in good:
        renders = data / "renders" / row["sha256"]
        described = json.loads((renders / "transforms.json").read_text())
        assert [frame["file_path"] for frame in described["frames"]] == ["000.png", "001.png", "002.png"]
        assert Image.open(renders / "000.png").size == (16, 16)
        assert Image.open(renders / "000.png").mode == "RGBA"
        assert np.load(renders / "depths.npz")["depths"].shape == (3, 16, 16)
        assert (renders / "mesh.ply").exists()
        assert len(list((data / "renders_cond" / row["sha256"]).glob("*.png"))) == 2
        assert int(row["num_voxels"]) > 0
        assert all(row[column] == "True" for column in ("rendered", "cond_rendered", "voxelized"))
    failures = [json.loads(line) for line in (data / "failures" / "inspect.jsonl").read_text().splitlines()]
    assert len(failures) == 1
    assert "broken.obj" in failures[0]["error"]


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_box(tmp_path / "in" / "box.obj")
    data = tmp_path / "data"
    run(str(tmp_path / "in"), "-o", str(data), *SMALL)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}

    def never(task: runner.Task) -> runner.Outcome:
        raise AssertionError(f"nothing was left to do; got {task}")

    monkeypatch.setattr(runner, "run_task", never)
    assert "0 objects" in run("-o", str(data))
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    for name in "abc":
        write_box(tmp_path / "in" / f"{name}.obj", f"{name}.mtl", f"0.{ord(name) % 10} 0.5 0.5")
    data = tmp_path / "data"
    run(str(tmp_path / "in"), "-o", str(data), *SMALL, "--limit", "1")
    assert len(list((data / "voxels").glob("*.ply"))) == 1
    run("-o", str(data))
    assert len(list((data / "voxels").glob("*.ply"))) == 3
    assert all(row["voxelized"] == "True" for row in read_metadata(data).values())


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write_box(tmp_path / "in" / "box.obj")
    run(str(tmp_path / "in"), "-o", str(tmp_path / "data"), *SMALL)
    arguments = ["prepare", str(tmp_path / "in"), "-o", str(tmp_path / "data"), "--views", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "was prepared with views=3; got 4" in result.output


def test_processes_do_the_same_and_survive_a_dead_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_box(tmp_path / "in" / f"{name}.obj", f"{name}.mtl", f"0.{ord(name) % 10} 0.5 0.5")
    data = tmp_path / "data"
    run(str(tmp_path / "in"), "-o", str(data), *SMALL, "--steps", "voxelize")
    rows = read_metadata(data)
    settings = Settings.load(data)
    victim = sorted(rows)[0]
    tasks = [runner.Task(Job(data, sha, row, settings), ("render",)) for sha, row in sorted(rows.items())]
    (data / "victim").write_text(victim)
    monkeypatch.setattr(runner, "run_task", dying.run_task)
    outcomes = {outcome.sha256: outcome for outcome in runner._in_processes(tasks, 2)}
    assert outcomes[victim].failures == {"render": "the worker process died"}
    assert all(not outcome.failures for sha, outcome in outcomes.items() if sha != victim)


def test_a_box_is_normalised_and_turned_up(tmp_path: Path) -> None:
    scene = load_scene(write_box(tmp_path / "box.obj", "box.mtl"))
    low, high = scene.vertices.amin(0), scene.vertices.amax(0)
    # y up in the file (1 x 2 x 3) is z up here (1 x 3 x 2), the largest side 1
    torch.testing.assert_close(high - low, torch.tensor([1.0, 3.0, 2.0]) / 3)
    torch.testing.assert_close(high, -low)
    assert scene.parts[0].color == pytest.approx((0.2, 0.4, 0.6, 1.0), abs=1 / 255)


def test_a_texture_is_kept_with_its_place(tmp_path: Path) -> None:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "t.png")
    path = write_box(tmp_path / "box.obj", "box.mtl")
    (tmp_path / "box.mtl").write_text("newmtl one\nKd 0.5 0.5 0.5\nmap_Kd t.png\nd 0.25\n")
    part = load_scene(path).parts[0]
    assert part.texture is not None
    assert part.texture.shape == (4, 4, 4)
    assert part.color == (1.0, 1.0, 1.0, 0.25)


@pytest.mark.parametrize("named", ["../secret.mtl", "/etc/hostname"])
def test_files_outside_of_the_folder_are_not_read(tmp_path: Path, named: str) -> None:
    (tmp_path / "secret.mtl").write_text("newmtl one\nKd 0.9 0.1 0.1\n")
    path = write_box(tmp_path / "in" / "box.obj", named)
    assert load_scene(path).parts[0].color[:3] != pytest.approx((0.9, 0.1, 0.1), abs=0.01)


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        ([(0, 0, 0)] * 3, [(0, 1, 2)], "must have an extent"),
        ([(0, 0, 0), (1, 0, 0), (0, 1, 0)], [], "must have triangles"),
    ],
)
def test_nothing_to_see_is_refused(vertices: list, faces: list, message: str) -> None:
    part = Part(torch.tensor(vertices, dtype=torch.float32), torch.tensor(faces, dtype=torch.int32).view(-1, 3))
    with pytest.raises(ValueError, match=message):
        normalised([part] if faces else [])


def test_positions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match="finite"):
        load_scene(tmp_path / "a.obj")


def test_variants_are_repeatable_and_turn_by_quarters(tmp_path: Path) -> None:
    write_box(tmp_path / "box.obj")
    rows = find_objects(str(tmp_path), tmp_path / "data")
    assert with_variants(rows, 3, 1) == with_variants(rows, 3, 1)
    assert with_variants(rows, 3, 1) != with_variants(rows, 3, 2)
    scene = load_scene(tmp_path / "box.obj")
    again = vary(scene, Variant(turns=4))
    torch.testing.assert_close(again.vertices, scene.vertices)
    once = vary(scene, Variant(turns=1))
    torch.testing.assert_close(once.vertices, torch.stack([-scene.vertices[:, 1], *scene.vertices[:, ::2].T], 1))
    mirrored = vary(scene, Variant(mirror=True))
    assert torch.equal(mirrored.faces, scene.faces.flip(1))


def test_a_hue_keeps_gray_and_a_third_of_a_turn_moves_red_to_green() -> None:
    part = Part(torch.eye(3), torch.tensor([[0, 1, 2]], dtype=torch.int32), (1.0, 0.0, 0.0, 0.5))
    changed = vary(normalised([part]), Variant(hue=1 / 3)).parts[0].color
    assert changed == pytest.approx((0.0, 1.0, 0.0, 0.5), abs=1e-6)
    gray = Part(part.vertices, part.faces, (0.3, 0.3, 0.3, 1.0))
    assert vary(normalised([gray]), Variant(hue=0.2)).parts[0].color == pytest.approx((0.3, 0.3, 0.3, 1.0), abs=1e-6)


def catalog(path: Path, **files: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)


def test_a_sweet_home_catalog_is_read(tmp_path: Path) -> None:
    text = (
        "license=CC0\nname#1=Iron Chair\ntags#1=Scopia, Seat\ncategory#1=Office\nmodel#1=/a/box.obj\n"
        "modelRotation#1=0 0 1 0 1 0 -1 0 0\nname#2=Gone\nmodel#2=/a/none.obj\nname#3=Out\nmodel#3=/../out.obj\n"
    )
    source = tmp_path / "in"
    box = write_box(source / "box.obj").read_text()
    (source / "box.obj").unlink()
    catalog(source / "Some.sh3f", **{"PluginFurnitureCatalog.properties": text, "a/box.obj": box})
    (row,) = find_objects(str(source), tmp_path / "data")
    assert (row["name"], row["license"], row["category"]) == ("Iron Chair", "CC0", "Office")
    assert json.loads(row["captions"])[:2] == ["iron chair", "an iron chair"]
    assert "iron chair, seat" in json.loads(row["captions"])
    scene = Job(tmp_path / "data", row["sha256"], row, Settings()).scene
    extent = scene.vertices.amax(0) - scene.vertices.amin(0)
    torch.testing.assert_close(extent, torch.tensor([3.0, 1.0, 2.0]) / 3)  # x and z of the file changed places


def test_a_catalog_that_writes_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    catalog(tmp_path / "in" / "Bad.sh3f", **{"PluginFurnitureCatalog.properties": "", "../evil.obj": "v 0 0 0"})
    with pytest.raises(ValueError, match="inside its folder"):
        find_objects(str(tmp_path / "in"), tmp_path / "data")
    assert not list(tmp_path.rglob("evil.obj"))


def test_records_of_several_machines_are_merged(tmp_path: Path) -> None:
    for name in "abcd":
        write_box(tmp_path / "in" / f"{name}.obj", f"{name}.mtl", f"0.{ord(name) % 10} 0.5 0.5")
    data = tmp_path / "data"
    run(str(tmp_path / "in"), "-o", str(data), *SMALL, "--steps", "voxelize", "--limit", "0")
    for rank in ("0", "1"):
        run("-o", str(data), "--steps", "voxelize", "--rank", rank, "--world-size", "2")
        if rank == "0":
            assert len(list((data / "voxels").glob("*.ply"))) == 2
    run("-o", str(data), "--steps", "voxelize")
    assert [row["voxelized"] for row in read_metadata(data).values()] == ["True"] * 4
    assert len(list((data / "merged_records").glob("*.csv"))) >= 2


def test_the_table_has_no_column_twice(tmp_path: Path) -> None:
    write_box(tmp_path / "in" / "box.obj")
    run(str(tmp_path / "in"), "-o", str(tmp_path / "data"), *SMALL, "--steps", "voxelize")
    header = next(csv.reader((tmp_path / "data" / "metadata.csv").open()))
    assert len(header) == len(set(header))
