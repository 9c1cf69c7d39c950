"""The datasets on a small prepared folder."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.prepared import FEATURES, LATENTS, STRUCTURE, prepared_root, voxels_of
from trellis.data import DATASETS, PreparedDataset, build_dataset
from trellis.data.cache import Cache
from trellis.preparation.metadata import read_metadata, write_metadata
from trellis.renderers.camera import Cameras

R = 16
PLY = b"""ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
3 0 1 2
"""
FLOW = {"latent_model": LATENTS, "resolution": R}
ARGS: dict[str, dict[str, Any]] = {
    "SparseStructure": {"resolution": R},
    "SparseFeat2Render": {"model": FEATURES, "resolution": R, "image_size": 20},
    "SLat2Render": {**FLOW, "image_size": 20},
    "Slat2RenderGeo": {**FLOW, "image_size": 20},
    "SparseStructureLatent": {"latent_model": STRUCTURE},
    "SLat": FLOW,
    "TextConditionedSparseStructureLatent": {"latent_model": STRUCTURE},
    "ImageConditionedSparseStructureLatent": {"latent_model": STRUCTURE, "image_size": 28},
    "TextConditionedSLat": FLOW,
    "ImageConditionedSLat": {**FLOW, "image_size": 28},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("prepared"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(dataset: PreparedDataset, seed: int = 0) -> dict[str, Any]:
    return dataset.collate([dataset.load(index, seeded(seed)) for index in range(len(dataset))])


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_gives_the_same_sample_for_the_same_generator(root: Path, name: str) -> None:
    dataset = build_dataset(name, ARGS[name], [root])
    assert len(dataset) == 3
    one, same = (dataset.load(1, seeded(5)) for _ in range(2))
    assert one.keys() == same.keys()
    for key, value in one.items():
        assert torch.equal(value, same[key]) if isinstance(value, torch.Tensor) else value == same[key]
    batch_of(dataset)


def test_the_official_configurations_are_accepted() -> None:
    path = Path(__file__).parent / "official_training_configs.json"
    for name, config in json.loads(path.read_text()).items():
        with pytest.raises(ValueError, match="no object in no folder can be used"):  # the arguments are fine
            build_dataset(config["dataset"]["name"], config["dataset"]["args"], [])
        assert config["dataset"]["name"] in DATASETS, name


def test_occupancy_is_that_of_the_voxel_file(root: Path) -> None:
    dataset = build_dataset("SparseStructure", {"resolution": R, "cache": True}, [root])
    for _ in range(2):  # read, then from memory
        grid = dataset.load(0, seeded())["ss"]
        assert torch.equal(grid[0].nonzero(), torch.from_numpy(voxels_of(root, dataset.ids[0], R)).long())


def test_crops_are_pieces_of_the_grid(root: Path) -> None:
    whole = build_dataset("SparseStructure", {"resolution": R}, [root]).load(0, seeded())["ss"][0]
    padded = torch.nn.functional.pad(whole, (8,) * 6)
    pieces = padded.unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1).flatten(0, 2).flatten(1)
    dataset = build_dataset("SparseStructure", {"resolution": R, "crop": 8}, [root])
    for seed in range(5):
        crop = dataset.load(0, seeded(seed))["ss"]
        assert crop.shape == (1, 8, 8, 8)
        assert crop.any()
        assert (pieces == crop.flatten()).all(1).any()


def test_augmented_grids_are_quarter_turns_and_mirrors(root: Path) -> None:
    whole = build_dataset("SparseStructure", {"resolution": R}, [root]).load(1, seeded())["ss"][0]
    eight = [torch.rot90(g, k, (0, 1)) for g in (whole, whole.flip(0)) for k in range(4)]
    dataset = build_dataset("SparseStructure", {"resolution": R, "augment": True}, [root])
    grids = [dataset.load(1, seeded(seed))["ss"][0] for seed in range(12)]
    assert all(any(torch.equal(grid, one) for one in eight) for grid in grids)
    assert len({grid.numpy().tobytes() for grid in grids}) > 1


def test_renders_come_with_their_cameras(root: Path) -> None:
    dataset = build_dataset("SparseFeat2Render", {**ARGS["SparseFeat2Render"], "image_size": 24}, [root])
    sample = dataset.load(0, seeded(3))
    folder = root / "renders" / dataset.ids[0]
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    cameras = Cameras.from_blender(torch.tensor([f["transform_matrix"] for f in frames]), frames[0]["camera_angle_x"])
    which = [i for i in range(4) if torch.allclose(cameras.extrinsics[i], sample["extrinsics"], atol=1e-5)]
    assert len(which) == 1
    picture = np.asarray(Image.open(folder / frames[which[0]]["file_path"]), np.float32) / 255
    torch.testing.assert_close(sample["image"].permute(1, 2, 0).numpy(), picture[..., :3])
    torch.testing.assert_close(sample["alpha"].numpy(), picture[..., 3])


def test_several_views_are_different_ones(root: Path) -> None:
    dataset = build_dataset("SLat2Render", {**ARGS["SLat2Render"], "views": 3}, [root])
    batch = batch_of(dataset)
    assert batch["image"].shape == (3, 3, 3, 20, 20)
    assert batch["extrinsics"].shape == (3, 3, 4, 4)
    assert len(torch.unique(batch["extrinsics"][0].flatten(1), dim=0)) == 3
    with pytest.raises(ValueError, match="must have 9 views; it has 4"):
        build_dataset("SLat2Render", {**ARGS["SLat2Render"], "views": 9}, [root]).load(0, seeded())


def test_latents_are_normalised_and_batched_in_order(root: Path) -> None:
    statistics = {"mean": [0.5] * 8, "std": [2.0] * 8}
    batch = batch_of(build_dataset("SLat", {**FLOW, "normalization": statistics, "cache": False}, [root]))
    x = batch["x_0"]
    assert len(x) == 3
    file = np.load(root / "latents" / LATENTS / f"{0:064x}.npz")
    count = len(file["coords"])
    assert torch.equal(x.coords[:count, 1:], torch.from_numpy(file["coords"]).int())
    torch.testing.assert_close(x.feats[:count], torch.from_numpy((file["feats"] - 0.5) / 2))
    assert batch["normalization"].tolist() == [statistics["mean"], statistics["std"]]
    assert "normalization" not in batch_of(build_dataset("SLat", {**FLOW, "cache": False}, [root]))


def test_the_conditioning_picture_is_cropped_to_the_object(root: Path) -> None:
    dataset = build_dataset(
        "ImageConditionedSparseStructureLatent", {"latent_model": STRUCTURE, "image_size": 56}, [root]
    )
    image = dataset.load(0, seeded())["cond"]
    assert image.shape == (3, 56, 56)
    rows, columns = (image.sum(0) > 0.3).nonzero().unbind(1)
    extent = max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) / 56
    assert 1 / 1.2 - 0.12 < extent < 1 / 1.2 + 0.12  # a pixel of the small picture is 0.08


def test_kept_tokens_replace_pictures_and_captions(root: Path) -> None:
    args = {"latent_model": STRUCTURE, "cond_model": [FEATURES, "minilm"], "cond_weights": [1, 1], "cache": True}
    dataset = build_dataset("ImageConditionedSparseStructureLatent", args, [root])
    files = [np.load(root / "conditions" / name / f"{0:064x}.npz")["tokens"] for name in (FEATURES, "minilm")]
    kept = torch.from_numpy(np.concatenate(files)).float()
    drawn = {int((kept == dataset.load(0, seeded(seed))["cond"]).flatten(1).all(1).nonzero()) for seed in range(40)}
    assert drawn == set(range(5))
    never = build_dataset("ImageConditionedSparseStructureLatent", {**args, "cond_weights": [1, 0]}, [root])
    assert all((kept[:3] == never.load(0, seeded(s))["cond"]).flatten(1).all(1).any() for s in range(10))


def test_structure_latents_come_with_the_occupancy_if_asked_for(root: Path) -> None:
    args = {"latent_model": STRUCTURE, "image_size": 28}
    plain = batch_of(build_dataset("ImageConditionedSparseStructureLatent", {**args, "occupancy": False}, [root]))
    assert "ss" not in plain
    both = build_dataset("ImageConditionedSparseStructureLatent", {**args, "occupancy": True, "resolution": R}, [root])
    grids = batch_of(build_dataset("SparseStructure", {"resolution": R}, [root]))["ss"]
    batch = batch_of(both)
    assert torch.equal(batch["ss"], grids)
    assert torch.equal(batch["x_0"], plain["x_0"])
    with pytest.raises(ValueError, match="dataset SLat has no argument 'occupancy'"):
        build_dataset("SLat", {**FLOW, "occupancy": True}, [root])


def test_a_caption_is_one_of_the_objects(root: Path) -> None:
    dataset = build_dataset("TextConditionedSLat", FLOW, [root])
    assert {dataset.load(1, seeded(seed))["cond"] for seed in range(20)} == {"box 1", "a box, number 1"}


def test_objects_are_chosen_by_split_voxels_and_score(tmp_path: Path) -> None:
    root = prepared_root(tmp_path / "data")
    assert len(build_dataset("SparseStructure", {"resolution": R, "split": "train"}, [root])) == 2
    assert build_dataset("SparseStructure", {"resolution": R, "split": "test"}, [root]).ids == [f"{2:064x}"]
    assert len(build_dataset("SparseStructure", {"resolution": R}, [root, root])) == 6
    rows = read_metadata(root)
    most = max(int(row["num_voxels"]) for row in rows.values())
    assert len(build_dataset("SparseStructure", {"resolution": R, "max_num_voxels": most - 1}, [root])) == 2
    rows[f"{0:064x}"]["aesthetic_score"] = "4.0"
    rows[f"{1:064x}"]["voxelized"] = "False"
    write_metadata(root, rows.values())
    kept = build_dataset("SparseStructure", {"resolution": R, "min_aesthetic_score": 4.5}, [root])
    assert kept.ids == [f"{2:064x}"]
    rows[f"{2:064x}"]["voxelized"] = ""
    write_metadata(root, rows.values())
    with pytest.raises(ValueError, match="1 fit the filters; 1 lack voxelized"):
        build_dataset("SparseStructure", {"resolution": R, "split": "test"}, [root])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Nothing", {}, "dataset must be one of SparseStructure"),
        ("SparseStructure", {"resolutoin": 64}, "has no argument 'resolutoin'; known are .*resolution"),
        ("SparseStructure", {"resolution": R, "crop": 17}, r"crop must be in \[1, 16\]"),
        ("SparseStructure", {"split": "dev"}, "split must be train, test or all"),
        ("SLat", {}, "needs the argument 'latent_model'"),
        ("SLat2Render", FLOW, "needs the argument 'image_size'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(root: Path, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataset(name, args, [root])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"coords": np.zeros((2, 3), np.uint8)}, "must be an .npz with coords, feats"),
        ({"coords": np.zeros((2, 3), np.uint8), "feats": np.zeros((3, 8))}, "with N > 0"),
        ({"coords": np.full((2, 3), R, np.uint8), "feats": np.zeros((2, 8))}, r"must have coords in \[0, 16\)"),
        ({"coords": np.zeros((2, 3), np.uint8), "feats": np.array([{}, {}], object)}, "must be an .npz"),
        ({"coords": np.zeros((2, 3), np.uint8), "feats": np.zeros((2, 8))}, "must have each voxel once"),
        ({"coords": np.eye(3, dtype=np.uint8)[:2], "feats": np.full((2, 8), np.nan)}, "must have finite numbers"),
        ({"coords": np.eye(3)[:2], "feats": np.zeros((2, 8))}, "must have coords in"),
    ],
)
def test_damaged_latents_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    root = prepared_root(tmp_path / "data", objects=1)
    np.savez(root / "latents" / LATENTS / f"{0:064x}.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        build_dataset("SLat", FLOW, [root]).load(0, seeded())


def test_lines_that_cannot_be_understood_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = prepared_root(tmp_path / "data")
    rows = read_metadata(root)
    rows[f"{0:064x}"] |= {"captions": "[1]"}
    rows[f"{1:064x}"] |= {"num_voxels": "many"}
    rows["../x"] = rows[f"{2:064x}"] | {"sha256": "../x"}
    write_metadata(root, rows.values())
    assert build_dataset("SparseStructure", {"resolution": R}, [root]).ids == [f"{2:064x}"]
    for reason in ("must be a JSON list of strings; got '[1]'", "could not convert", "an id must be letters"):
        assert reason in caplog.text


def test_objects_without_captions_are_left_out_where_they_are_needed(tmp_path: Path) -> None:
    root = prepared_root(tmp_path / "data")
    rows = read_metadata(root)
    rows[f"{0:064x}"]["captions"] = "[]"
    write_metadata(root, rows.values())
    assert len(build_dataset("TextConditionedSLat", FLOW, [root])) == 2
    assert len(build_dataset("SLat", FLOW, [root])) == 3


@pytest.mark.parametrize("name", ["SparseStructure", "Slat2RenderGeo", "SparseFeat2Render", "SLat"])
def test_what_is_kept_in_memory_is_what_was_read(tmp_path: Path, name: str) -> None:
    root = prepared_root(tmp_path / "data", objects=1)
    plain, kept = (build_dataset(name, {**ARGS[name], "cache": cache}, [root]) for cache in (False, True))
    first = [kept.load(0, seeded(seed)) for seed in range(20)]  # until every view was drawn
    once = [plain.load(0, seeded(seed)) for seed in range(20)]
    for folder in ("voxels", "features", "latents"):
        shutil.rmtree(root / folder)
    for picture in (root / "renders").rglob("*.png"):
        picture.unlink()
    again = [kept.load(0, seeded(seed)) for seed in range(20)]
    for samples in zip(first, once, again, strict=True):
        assert all(torch.equal(sample[key], value) for sample in samples for key, value in samples[0].items())
    with pytest.raises((OSError, ValueError)):
        plain.load(0, seeded())


def test_the_cache_ends_at_its_limit_and_stays_behind() -> None:
    cache, read = Cache(True, limit=100), []

    def tensor(size: int) -> tuple[torch.Tensor, ...]:
        read.append(size)
        return (torch.zeros(size, dtype=torch.uint8),)

    for size in (60, 60, 70, 40, 70, 40):
        assert len(cache.get(size, lambda size=size: tensor(size))[0]) == size
    assert read == [60, 70, 40, 70]
    assert cache.size == 100
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.enabled, copy.limit, copy.size) == (True, 100, 0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("renders/{}/transforms.json", b"[]", "must describe rendered views"),
        ("renders/{}/transforms.json", b'{"frames": []}', "must"),
        ("renders/{}/mesh.ply", b"ply", "must be a PLY file of triangles"),
        ("renders/{}/mesh.ply", PLY.replace(b"3 0 1 2", b"3 0 1 3"), "triangles of these"),
        ("renders/{}/mesh.ply", PLY.replace(b"1 0 0", b"nan 0 0"), "must have finite vertices"),
        ("renders/{}/mesh.ply", PLY.replace(b"face 1", b"face 0").replace(b"3 0 1 2", b""), "triangles"),
        ("renders/{}/000.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be read"),
    ],
)
def test_damaged_renders_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    root = prepared_root(tmp_path / "data", objects=1)
    (root / file.format(f"{0:064x}")).write_bytes(content)
    dataset = build_dataset("Slat2RenderGeo", {**ARGS["Slat2RenderGeo"], "views": 4}, [root])
    with pytest.raises(ValueError, match=message):
        dataset.load(0, seeded())


def test_a_mesh_is_that_of_its_file(tmp_path: Path) -> None:
    root = prepared_root(tmp_path / "data", objects=1)
    (root / "renders" / f"{0:064x}" / "mesh.ply").write_bytes(PLY)
    dataset = build_dataset("Slat2RenderGeo", ARGS["Slat2RenderGeo"], [root])
    ((vertices, faces),) = batch_of(dataset)["mesh"]
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert (faces.tolist(), faces.dtype) == ([[0, 1, 2]], torch.int32)


def test_wrong_statistics_are_refused(root: Path) -> None:
    dataset = build_dataset("SLat", {**FLOW, "normalization": {"mean": [0.0], "std": [1.0]}}, [root])
    with pytest.raises(ValueError, match="normalization must have 8 means and positive stds"):
        dataset.load(0, seeded())
