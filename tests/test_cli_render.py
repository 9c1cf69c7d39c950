from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.renderers.test_gaussians import ball
from tests.renderers.test_radiance_field import voxel
from tests.support.solids import box
from tests.test_cli import trellis
from trellis.renderers.turntable import snapshot_cameras, turntable_cameras


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As `trellis generate --formats glb,ply,rf` writes it."""
    made = tmp_path / "made"
    ball((0, 0, 0.2), (1, 0, 0), 0.1).save(made / "gaussians.ply")
    box((0.4, 0.3, 0.5)).save(made / "mesh.glb")
    voxel().save(made / "radiance_field.safetensors")
    return made


def render(*arguments: object) -> Any:
    return trellis("render", *arguments, "--resolution", 24, "--ssaa", 1)


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def words(result: Any) -> str:
    return " ".join(result.output.split())


def test_every_kind_of_file_makes_a_sheet(folder: Path, tmp_path: Path) -> None:
    solid = box((0.4, 0.3, 0.5))
    for suffix in ("obj", "stl", "ply"):
        solid.save(tmp_path / f"mesh.{suffix}")
    paths = [*folder.iterdir(), *(tmp_path / f"mesh.{suffix}" for suffix in ("obj", "stl", "ply"))]
    sheets = {}
    for path in paths:
        out = tmp_path / "sheets" / f"{path.name}.png"
        result = render(path, "-o", out, "--background", "#ff8000")
        assert result.exit_code == 0, result.output
        assert out.name in words(result)
        sheets[path.name] = sheet = opened(out)
        assert sheet.shape == (24, 4 * 24, 3)
        assert (sheet[0, 0] == [255, 128, 0]).all()
        assert (sheet[8:16, 8:16] != sheet[0, 0]).any(), path.name
    assert np.abs(sheets["mesh.obj"].astype(int) - sheets["mesh.ply"]).max() <= 3  # y up and z up, the same object
    assert "mesh of 12 faces" in words(render(tmp_path / "mesh.ply", "-o", tmp_path / "x.png"))
    assert "1 Gaussians" in words(render(folder / "gaussians.ply", "-o", tmp_path / "x.png"))
    assert "radiance field of 1 voxels" in words(
        render(folder / "radiance_field.safetensors", "-o", tmp_path / "x.png")
    )


def test_a_generated_folder_shows_its_representations_side_by_side(folder: Path, tmp_path: Path) -> None:
    result = render(folder, "-o", tmp_path / "x.png", "--views", 3, "--background", "white")
    assert result.exit_code == 0, result.output
    grid = opened(tmp_path / "x.png")
    assert grid.shape == (3 * 24, 3 * 24, 3)
    for path in folder.iterdir():
        assert render(path, "-o", tmp_path / f"{path.suffix}.png", "--views", 3, "--background", "white").exit_code == 0
    columns = [opened(tmp_path / f"{suffix}.png") for suffix in (".glb", ".ply", ".safetensors")]
    expected = np.concatenate([np.concatenate(np.split(column, 3, 1), 0) for column in columns], 1)
    assert np.array_equal(grid, expected)


def test_turn_is_a_video_of_the_official_path(folder: Path, tmp_path: Path) -> None:
    result = render(folder / "mesh.glb", folder / "gaussians.ply", "-o", tmp_path / "turn.mp4", "--frames", 5)
    assert result.exit_code == 0, result.output
    capture = cv2.VideoCapture(str(tmp_path / "turn.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 48
    assert capture.get(cv2.CAP_PROP_FRAME_HEIGHT) == 24
    assert trellis("render", "--help").output.count("300")


def test_turn_as_a_gif(folder: Path, tmp_path: Path) -> None:
    result = render(folder / "mesh.glb", "-o", tmp_path / "turn.gif", "--frames", 4, "--fps", 10)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "turn.gif") as picture:
        assert (picture.n_frames, picture.size, picture.info["duration"]) == (4, (24, 24), 100)


def test_fits_meshes_of_any_size_into_the_picture(folder: Path, tmp_path: Path, caplog: Any) -> None:
    small, large = box((0.5, 1.0, 0.25)), box((100.0, 200.0, 50.0), (900.0, -30.0, 5.0))
    small.save(tmp_path / "small.ply")
    large.save(tmp_path / "large.ply")
    for name, options in (("small", []), ("large", ["--fit"]), ("large", [])):
        out = tmp_path / f"{name}{len(options)}.png"
        assert render(tmp_path / f"{name}.ply", "-o", out, *options).exit_code == 0
    assert np.array_equal(opened(tmp_path / "small0.png"), opened(tmp_path / "large1.png"))
    assert not opened(tmp_path / "large0.png").any()
    (record,) = caplog.records
    assert "large.ply reaches out of the picture, from [850.0, -130.0, -20.0] to [950.0" in record.message


@pytest.mark.parametrize("what", ["normal", "depth", "alpha"])
def test_shows_more_than_colors(folder: Path, tmp_path: Path, what: str) -> None:
    result = render(folder / "mesh.glb", "-o", tmp_path / "x.png", "--what", what)
    assert result.exit_code == 0, result.output
    pixels = opened(tmp_path / "x.png").reshape(-1, 3)
    gray = (pixels == pixels[:, :1]).all()
    assert gray == (what != "normal")


def test_random_backgrounds_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--background", "random", "--views", 16, "--seed", seed)
        assert render(folder / "mesh.glb", "-o", tmp_path / f"{name}.png", *options).exit_code == 0
    a, b, c = (opened(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert set(a[::24, ::24, 0].flatten().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made/mesh.glb", "-o", "x.webm"], "--output must end in .mp4, .gif, .png; got 'x.webm'"),
        (["made/mesh.glb", "-o", "x.png", "--what", "heat"], "--what must be color, normal, depth, alpha; got 'heat'"),
        (
            ["made/mesh.glb", "-o", "x.png", "--background", "pink"],
            "--background must be black, white, random or #rrggbb",
        ),
        (["made/mesh.glb", "-o", "x.png", "--resolution", "0"], "--resolution must be in [1, 8192]; got 0"),
        (["made/mesh.glb", "-o", "x.png", "--ssaa", "99"], "--ssaa must be in [1, 16] here; got 99"),
        (["made/mesh.glb", "-o", "x.mp4", "--frames", "0"], "--frames must be in [1, 100000]; got 0"),
        (["made/mesh.glb", "-o", "x.png", "--device", "toaster"], "toaster"),
        (["made/gaussians.ply", "-o", "x.png", "--what", "normal"], "only meshes have normals"),
        (["none.glb", "-o", "x.png"], "no file at none.glb"),
        (["empty", "-o", "x.png"], "no asset in the folder empty: it has none of mesh.glb"),
        (["broken.ply", "-o", "x.png"], "broken.ply must be a valid ply file"),
        (["made/mesh.txt", "-o", "x.png"], "must be a file that ends in .glb, .gltf, .obj, .ply, .stl or .safetensors"),
    ],
)
def test_says_in_one_line_what_was_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    root = folder.parent
    monkeypatch.chdir(root)
    (root / "empty").mkdir()
    (root / "broken.ply").write_bytes(b"ply\nnonsense")
    (root / "made/mesh.txt").touch()
    before = set(root.rglob("*"))
    result = trellis("render", *arguments)
    assert result.exit_code == 1
    assert message in words(result)
    assert "Traceback" not in result.output
    assert set(root.rglob("*")) == before


def test_missing_output_is_a_usage_error(folder: Path) -> None:
    assert trellis("render", folder).exit_code == 2


def test_a_failure_in_the_middle_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trellis.renderers import turntable

    out = folder.parent / "x.mp4"
    out.write_bytes(b"old")

    def broken(*arguments: object) -> Any:
        raise RuntimeError("the power went out")

    shown: list[Any] = []
    real = turntable.show
    monkeypatch.setattr(turntable, "show", lambda *a: (shown.append(1), real(*a))[1] if len(shown) < 1 else broken())
    result = render(folder / "mesh.glb", "-o", out, "--frames", 20)
    assert result.exit_code == 1
    assert "the power went out" in words(result)
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["made", "x.mp4"]


def test_views_and_turn_are_the_official_ones() -> None:
    assert len(snapshot_cameras()) == 4
    yaw = torch.deg2rad(torch.tensor([0.0, 90, 180, 270]) - 16)
    torch.testing.assert_close(snapshot_cameras().centers[:, 0], 10 * yaw.sin() * np.cos(np.deg2rad(20)))
    assert len(turntable_cameras()) == 300
