"""`trellis evaluate` on a small prepared folder with an untrained pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from tests.support.prepared import LATENTS, prepared_root
from tests.support.runs import tiny_bundle
from trellis.checkpoints import save_model
from trellis.cli import app
from trellis.evaluation import sheet, truth
from trellis.evaluation.baselines import mean_shape, nearest_by_pixels, nearest_by_tokens, voxel_surface
from trellis.evaluation.evaluate import METHODS, Evaluation, evaluate, summary
from trellis.evaluation.metrics import NAMES, score
from trellis.evaluation.stages import Models, Nothing, nothing
from trellis.evaluation.truth import fixed_cameras, objects, surface_points, true_shape
from trellis.preparation.arrays import read_arrays, write_arrays
from trellis.preparation.conditions import tokens_path
from trellis.pretrained.initialise import seeded
from trellis.representations.mesh import Mesh

RESOLUTION = 32
# Of a box in the file: y up, so that x, y, z of ours are x, -z, y.
CORNERS = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
QUADS = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Fewer and smaller pictures, fewer points."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (truth, sys_modules("stages")):
            patch.setattr(module, "RESOLUTION", 32)
            patch.setattr(module, "VIEWS", 3)
            patch.setattr(module, "fixed_cameras", lambda count=3: fixed_cameras(3))
        patch.setattr(truth, "SSAA", 1)
        patch.setattr(truth.surface_points, "__defaults__", (500,))
        patch.setattr(sheet, "TILE", 24)
        yield


def sys_modules(name: str) -> Any:
    import importlib

    return importlib.import_module(f"trellis.evaluation.{name}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four boxes with their files; the last is held out and is nearest in shape, and in pictures, to the third."""
    root = prepared_root(tmp_path_factory.mktemp("data"), objects=4, resolution=RESOLUTION)
    (root / "raw").mkdir()
    for index in range(4):
        red, blue = 0.2 + 0.6 * index / 4, 0.8 - 0.6 * index / 4
        lines = ["mtllib box.mtl".replace("box", str(index)), "usemtl one"]
        lines += [f"v {x} {1.5 * y} {(1 + 0.3 * index) * z}" for x, y, z in CORNERS]
        lines += ["f " + " ".join(map(str, quad)) for quad in QUADS]
        (root / "raw" / f"{index}.obj").write_text("\n".join(lines) + "\n")
        (root / "raw" / f"{index}.mtl").write_text(f"newmtl one\nKd {red} 0.4 {blue}\n")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline, and an encoder of its structures beside it."""
    folder = tiny_bundle(tmp_path_factory.mktemp("model"))
    args = {"in_channels": 1, "latent_channels": 8, "num_res_blocks": 1, "channels": [8, 16, 16], "use_fp16": False}
    save_model(seeded("SparseStructureEncoder", args, torch.Generator().manual_seed(1)), folder / "encoder")
    return folder


def trellis(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def out(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "results"
    options = ("--model", model, "--structure-encoder", model / "encoder", "--sheet", "--seed", 1)
    result = trellis(data, "-o", folder, *options)
    assert result.exit_code == 0, result.output
    return folder


def test_everything_is_measured(out: Path, model: Path, data: Path) -> None:
    found = json.loads((out / "evaluation.json").read_text())
    assert found["settings"]["held_out"] == 1
    assert found["settings"]["training"] == 3
    assert found["settings"]["seed"] == 1
    for method in ("image_to_3d", "text_to_3d", "retrieval", "mean_shape"):
        assert found[method]["n"] == 1
        assert found[method]["failed"] == 0
        for name in NAMES:
            assert np.isfinite(found[method][name])
    for method in ("slat_vae", "latent_flow"):
        assert found[method]["iou"] is None
        assert found[method]["psnr"] > 0
        assert 0 < found[method]["chamfer"] < 1
    assert {name for name in NAMES if found["structure_vae"][name] is not None} == {"iou"}
    assert found["retrieval"]["by"] in ("tokens", "pixels")
    assert found["retrieval"]["iou"] > 0.05  # another box
    lines = [json.loads(line) for line in (out / "objects.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {line["found"] for line in lines if line["method"] == "retrieval_pixels"} == {"box 2"}


def test_the_sheet_shows_input_results_and_truth(out: Path) -> None:
    (tiles,) = (out / "tiles").iterdir()
    row = np.asarray(Image.open(tiles)).reshape(24, 5, 24, 3).swapaxes(0, 1)
    assert (row[2] == 255).all()  # this pipeline has no radiance field
    for index in (0, 1, 3, 4):
        assert row[index].std() > 5
    assert (row[0][0, 0] == 255).all()  # nothing is behind the input
    center = row[4][12, 12].astype(int)
    assert center[0] > center[2]  # the last box is red rather than blue
    assert Image.open(out / "contact_sheet.png").width >= 5 * 24


def test_what_was_measured_is_not_measured_again(out: Path, data: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "again")
    log = tmp_path / "again" / "objects.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    marked = [line | {"iou": 0.125} if line["method"] == "image_to_3d" else line for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in marked if line["method"] != "mean_shape")
    log.write_text(text + '{"method": "mean_sh')  # killed while writing
    models = Models(str(model), 1, None, str(model / "encoder"))
    found = evaluate(Evaluation(data, tmp_path / "again", models), ["image_to_3d", "mean_shape"])
    assert found["image_to_3d"]["iou"] == 0.125
    before = json.loads((out / "evaluation.json").read_text())
    assert found["mean_shape"] == before["mean_shape"]
    assert found["slat_vae"] == before["slat_vae"]
    with pytest.raises(ValueError, match="holds an evaluation with seed=1; got 2: use another folder"):
        evaluate(Evaluation(data, tmp_path / "again", Models(str(model), 2, None, str(model / "encoder"))))


def test_other_weights_are_measured_again(out: Path, data: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "again")
    shutil.copytree(model, tmp_path / "model")
    log, settings = (tmp_path / "again" / name for name in ("objects.jsonl", "settings.json"))
    settings.write_text(settings.read_text().replace(str(model), str(tmp_path / "model")))
    lines = [json.loads(line) | {"iou": 0.125} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = Models(str(tmp_path / "model"), 1, None, str(tmp_path / "model" / "encoder"))
    found = evaluate(Evaluation(data, tmp_path / "again", models), ["image_to_3d", "mean_shape"])
    assert found["image_to_3d"]["iou"] == found["mean_shape"]["iou"] == 0.125
    path = next(tmp_path.glob("model/ckpts/*dec*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    models = Models(str(tmp_path / "model"), 1, None, str(tmp_path / "model" / "encoder"))
    found = evaluate(Evaluation(data, tmp_path / "again", models), ["image_to_3d", "mean_shape"])
    assert found["mean_shape"]["iou"] == 0.125  # no model was asked
    assert found["image_to_3d"]["iou"] != 0.125
    assert found["slat_vae"]["n"] == 0  # that of the old weights is not reported


def test_an_object_without_its_files_is_left_out(
    data: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(data, tmp_path / "data")
    job = objects(tmp_path / "data", "test")[0]
    (job.root / "renders_cond" / job.sha256 / "000.png").write_bytes(b"no picture")
    models = Models(str(model), 1, None, str(model / "encoder"))
    found = evaluate(Evaluation(tmp_path / "data", tmp_path / "out", models), ["image_to_3d", "structure_vae"])
    assert found["image_to_3d"]["n"] == 0
    assert found["structure_vae"]["n"] == 1
    assert "000.png cannot be read" in caplog.text


def test_baselines_need_no_model(data: Path, tmp_path: Path) -> None:
    result = trellis(data, "-o", tmp_path / "out", "--only", "mean_shape,retrieval", "--model", tmp_path / "nowhere")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["mean_shape"]["n"] == 1
    assert found["image_to_3d"] == {**dict.fromkeys(NAMES), "n": 0, "reason": "not measured"}


def test_what_cannot_be_measured_says_why(data: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "conditions")
    settings = json.loads((tmp_path / "data" / "preparation.json").read_text())
    text = json.dumps(settings | {"structure_encoder": "", "latent_encoder": ""})
    (tmp_path / "data" / "preparation.json").write_text(text)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "text_pipeline.json").unlink()
    evaluation = Evaluation(tmp_path / "data", tmp_path / "out", Models(str(tmp_path / "model")))
    methods = [name for name in METHODS if name not in ("mean_shape", "latent_flow", "image_to_3d")]
    found = evaluate(evaluation, methods)
    assert "must be an .npz with tokens" in found["retrieval_tokens"]["reason"]
    assert found["retrieval"]["by"] == "pixels"
    assert found["structure_vae"]["reason"].startswith("neither the prepared folder's settings nor --structure-encoder")
    assert found["slat_vae"]["reason"].startswith("neither the prepared folder's settings nor --latent-model")
    assert "TrellisTextTo3DPipeline" in found["text_to_3d"]["reason"]


def test_nothing_is_the_worst_result(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> None:
        raise Nothing("the object came out empty")

    monkeypatch.setattr(Models, "_made", made)
    found = evaluate(Evaluation(data, tmp_path / "out", Models(str(model)), sheet=True), ["image_to_3d"])
    entry = found["image_to_3d"]
    assert (entry["n"], entry["failed"], entry["iou"], entry["fscore_0.05"], entry["chamfer"]) == (1, 1, 0, 0, 1)
    job = objects(data, "test")[0]
    assert score(nothing(), true_shape(job, tmp_path / "shapes"))["psnr"] == entry["psnr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "beauty"], "methods must be among mean_shape, retrieval"),
        (["--limit", "0"], "--limit must be at least 1; got 0"),
        (["--model", "nowhere"], "no pipeline at nowhere"),
    ],
)
def test_says_in_one_line_what_was_wrong(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = trellis(data, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_objects_are_those_of_the_split(data: Path, tmp_path: Path) -> None:
    assert [job.row["name"] for job in objects(data, "test")] == ["box 3"]
    assert len(objects(data, "train")) == 3
    shutil.copytree(data, tmp_path / "data")
    text = (tmp_path / "data" / "metadata.csv").read_text().replace(",test,", ",train,")
    (tmp_path / "data" / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match="must have voxelised objects of the split test; it has none"):
        _ = Evaluation(tmp_path / "data", tmp_path / "out", Models()).held_out
    evaluation = Evaluation(data, tmp_path / "out", Models(), limit=1)
    assert len(evaluation.held_out) == 1


def test_truth_is_kept_and_agrees_with_the_voxels(data: Path, tmp_path: Path) -> None:
    job = objects(data, "test")[0]
    shape = true_shape(job, tmp_path)
    assert shape.points is not None
    assert shape.voxels is not None
    assert shape.images is not None
    assert shape.images.shape == (3, 3, 32, 32)
    near = torch.cdist(shape.points, (shape.voxels + 0.5) / RESOLUTION - 0.5).amin(1)
    assert near.max() < 1 / RESOLUTION
    assert shape.images[:, :, 0, 0].min() == 1
    points, images = read_arrays(tmp_path / f"{job.sha256}.npz", "points", "images")
    write_arrays(tmp_path / f"{job.sha256}.npz", points=points, images=images // 2)
    again = true_shape(job, tmp_path)
    assert again.images is not None
    assert again.images.max() < 0.51
    assert "scene" not in job.__dict__  # its textures are not kept


def test_points_of_a_mesh_without_area_are_none() -> None:
    flat = Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]))
    assert len(surface_points(flat)) == 0
    assert len(surface_points(Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)))) == 0


def test_retrieval_by_tokens_finds_the_same_picture(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (query,), training = objects(tmp_path / "data", "test"), objects(tmp_path / "data", "train")
    tokens = read_arrays(tokens_path(query.root, query.settings.image_encoder, query.sha256), "tokens")[0]
    path = tokens_path(query.root, query.settings.image_encoder, training[1].sha256)
    others = read_arrays(path, "tokens")[0]
    others[2] = tokens[0] + 0.1  # another picture of that object looks like the query
    write_arrays(path, tokens=others)
    assert nearest_by_tokens([query], training)[0] is training[1]
    assert nearest_by_pixels([query], training, tmp_path / "pixels")[0] is training[2]
    kept = tmp_path / "pixels" / f"{training[0].sha256}.npz"
    shown = query.root / "renders_cond" / query.sha256 / "000.png"
    shutil.copy(shown, query.root / "renders_cond" / training[0].sha256 / "001.png")
    kept.unlink()
    assert nearest_by_pixels([query], training, tmp_path / "pixels")[0] is training[0]


def test_the_mean_shape_is_what_most_objects_have(data: Path, tmp_path: Path) -> None:
    training = objects(data, "train")
    shape, threshold = mean_shape(training, tmp_path)
    assert shape.voxels is not None
    assert 0 < threshold <= 0.5
    scores = [score(shape, true_shape(job, tmp_path))["iou"] for job in training]
    assert np.mean(scores) > 0.3
    with pytest.raises(ValueError, match="needs training objects"):
        mean_shape([], tmp_path)


def test_voxels_have_their_outer_sides() -> None:
    lone = voxel_surface(torch.tensor([[0, 0, 0]]), 2, (1, 0, 0))
    assert (len(lone.vertices), len(lone.faces)) == (24, 12)
    torch.testing.assert_close(lone.vertices.amin(0), torch.full((3,), -0.5))
    torch.testing.assert_close(lone.vertices.amax(0), torch.zeros(3))
    corners = lone.vertices[lone.faces.long()]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outward = corners.mean(1) + 0.25
    assert ((normals * outward).sum(1) > 0).all()
    pair = voxel_surface(torch.tensor([[0, 0, 0], [0, 1, 0]]), 2, (1, 0, 0))
    assert len(pair.faces) == 20
    block = voxel_surface(torch.cartesian_prod(*[torch.arange(2)] * 3), 2, (1, 0, 0))
    assert len(block.faces) == 48


def test_the_stronger_retrieval_is_the_one_reported() -> None:
    rows = [
        {"method": "retrieval_tokens", "fscore_0.05": 0.5, "iou": 0.9},
        {"method": "retrieval_pixels", "fscore_0.05": 0.6, "iou": 0.1},
    ]
    found = summary(rows, {"slat_vae": "because"})
    assert (found["retrieval"]["by"], found["retrieval"]["iou"]) == ("pixels", 0.1)
    assert found["slat_vae"]["reason"] == "because"
    assert summary([], {})["retrieval"]["n"] == 0


def test_latents_are_those_of_the_settings(data: Path) -> None:
    assert objects(data, "test")[0].settings.latent_model == LATENTS
