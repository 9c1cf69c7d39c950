import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from typer.testing import CliRunner, Result

import trellis_kernels
from tests.pipelines.test_image_to_3d import picture
from tests.support.runs import tiny_bundle
from trellis.cli import app

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")


def trellis(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(picture(), "RGBA").save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def test_generate_writes_a_folder_per_photo(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    Image.fromarray(picture(1), "RGBA").save(tmp_path / "other" / "disc.png")
    result = trellis("generate", photo, tmp_path / "other" / "disc.png", "-o", tmp_path / "out", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "untrained" in result.output
    for name in ("disc", "disc-2"):
        folder = tmp_path / "out" / name
        assert {p.name for p in folder.iterdir()} == {"mesh.glb", "gaussians.ply", "preview.png", "report.json"}
        assert len(trimesh.load(folder / "mesh.glb", force="mesh").faces) > 0
        assert (folder / "gaussians.ply").read_bytes().startswith(b"ply\nformat binary_little_endian")
        assert np.asarray(Image.open(folder / "preview.png")).std() > 0
        assert json.loads((folder / "report.json").read_text())["seed"] == 42


def test_generate_writes_one_file_when_asked(photo: Path, tmp_path: Path) -> None:
    result = trellis("generate", photo, "-o", tmp_path / "disc.glb", "--steps", 1, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disc.glb", "disc.png"]


def test_generate_takes_several_photos_of_one_object(photo: Path, tmp_path: Path) -> None:
    result = trellis(
        "generate", photo, photo, "--one-object", "-o", tmp_path / "out", "--steps", 1, "--formats", "ply,rf,obj,stl"
    )
    assert result.exit_code == 0, result.output
    written = {p.name for p in (tmp_path / "out" / "disc").iterdir()}
    assert written == {"gaussians.ply", "radiance_field.safetensors", "mesh.obj", "mesh.stl", "report.json"}


def test_one_bad_photo_does_not_stop_the_others(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    result = trellis(
        "generate", tmp_path / "empty.png", photo, "-o", tmp_path / "out", "--steps", 1, "--formats", "ply"
    )
    assert result.exit_code == 1
    assert "empty.png" in result.output
    assert "1 of 2 failed" in result.output
    assert (tmp_path / "out" / "disc" / "gaussians.ply").is_file()
    assert not (tmp_path / "out" / "empty").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "glb,fbx"], "--formats must be among glb, obj, stl, ply, png, rf, mp4; got 'fbx'"),
        (["--dtype", "int8"], "--dtype must be auto, float32, bfloat16, float16; got 'int8'"),
        (["--model", "nowhere"], "no pipeline at nowhere"),
        (["--device", "toaster"], "toaster"),
        (["--steps", "0"], "steps must be in [1, 10000]; got 0"),
    ],
)
def test_says_in_one_line_what_was_wrong(photo: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = trellis("generate", photo, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", "")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_generate_takes_sentences(tmp_path: Path) -> None:
    text_model = tiny_bundle(tmp_path / "model")
    sentences = ("--text", "A red chair!", "--text", "table")
    result = trellis("generate", *sentences, "--model", text_model, "-o", tmp_path / "out", "--formats", "ply")
    assert result.exit_code == 0, result.output
    for name, sentence in (("a-red-chair", "A red chair!"), ("table", "table")):
        folder = tmp_path / "out" / name
        assert {path.name for path in folder.iterdir()} == {"gaussians.ply", "report.json"}
        assert json.loads((folder / "report.json").read_text())["prompt"] == sentence
    result = trellis("generate", "--text", "a", "--one-object", "-o", tmp_path / "x")
    assert result.exit_code == 1
    assert "--one-object is for photos, not for --text" in result.output
    result = trellis("generate", *sentences, "-o", tmp_path / "x.glb")
    assert "is one file, but there are 2 sentences" in result.output.replace("\n", "")


def test_photos_and_sentences_exclude_each_other(photo: Path, tmp_path: Path) -> None:
    for arguments in ([], [photo, "--text", "a chair"]):
        result = trellis("generate", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert "give photos, or sentences with --text" in result.output


def test_missing_output_is_a_usage_error(photo: Path) -> None:
    assert trellis("generate", photo).exit_code == 2


def test_missing_photo_is_named(tmp_path: Path) -> None:
    result = trellis("generate", tmp_path / "none.png", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "none.png" in result.output


@pytest.mark.parametrize("command", [[], ["generate"], ["doctor"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = trellis(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_doctor_lists_every_operator() -> None:
    result = trellis("doctor")
    assert result.exit_code == 0, result.output
    for word in ("compiled", "submanifold_conv", "rasterize_gaussians", "reference", "bundled model", "[background]"):
        assert word in result.output


@pytest.mark.parametrize(
    ("capability", "built", "code", "words"),
    [
        ((9, 0), (80, 90), 0, "compiled for sm_80, sm_90; newer GPUs translate compute_90"),
        ((12, 0), (80, 90), 0, "sm_120, 16.0 GiB"),
        ((6, 1), (80, 90), 1, "was built for 80;90 and has no code for Toy (capability 6.1); rebuild it with"),
        ((9, 0), None, 1, "not compiled"),
        (None, None, 0, "none that torch can use"),
    ],
)
def test_doctor_says_whether_the_gpu_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    built: tuple[int, ...] | None,
    code: int,
    words: str,
) -> None:
    major, minor = capability or (0, 0)
    toy = SimpleNamespace(name="Toy", major=major, minor=minor, total_memory=16 << 30)
    module = None if built is None else SimpleNamespace(architectures=built)
    monkeypatch.setitem(sys.modules, "trellis_kernels._cuda", module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if capability is None else 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: toy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Toy")
    result = trellis("doctor")
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())


def test_doctor_lists_what_a_gpu_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = dict(trellis_kernels.OPERATORS)
    for operator in operators.values():
        monkeypatch.setattr(operator, "kernels", {"cpu": "x.cpu", "cuda": "x.triton"})
    assert "every operator has a kernel on a GPU" in trellis("doctor").output
    monkeypatch.setattr(operators["trellis_kernels::upsample"], "kernels", {"cpu": "x.cpu"})
    assert "without a kernel on a GPU: upsample" in trellis("doctor").output


def test_a_gpu_budget_on_a_cpu_is_refused(tmp_path: Path) -> None:
    result = trellis("generate", tmp_path / "x.png", "-o", tmp_path, "--device", "cpu", "--memory", "8GB")
    assert result.exit_code == 1
    assert "--memory limits a GPU and this would run on the CPU" in " ".join(result.output.split())
