"""The steps `features`, `structure_latents` and `latents`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image

from tests.support.efficientnet import original_state
from trellis.checkpoints import CheckpointError, build_model, save_model
from trellis.conditioning.efficientnet import EfficientNetLite0, folded
from trellis.conditioning.image import DinoV2
from trellis.nn.sparse import SparseTensor
from trellis.preparation import features, latents
from trellis.preparation.arrays import is_whole, read_arrays, read_picture, read_views, read_voxels, write_arrays
from trellis.preparation.features import feature_step, features_path
from trellis.preparation.job import Job, Settings
from trellis.preparation.latents import latent_statistics, latent_step, structure_latent_step
from trellis.preparation.metadata import write_metadata
from trellis.preparation.scene import Part, normalised
from trellis.preparation.views import render_step, voxelize_step
from trellis.renderers.camera import Cameras

SHA = "ab" * 32
RESOLUTION = 16


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    network = EfficientNetLite0()
    network.load_state_dict(folded(original_state()))
    return network


@pytest.fixture(autouse=True)
def _small_encoders(monkeypatch: pytest.MonkeyPatch, network: EfficientNetLite0) -> None:
    torch.manual_seed(0)
    dino = DinoV2(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=56)
    models = {"efficientnet_lite0": network, "dinov2_tiny": dino}
    monkeypatch.setattr(features, "encoder", lambda name, kind: models[name])
    latents._model.cache_clear()


def job(root: Path, **settings: Any) -> Job:
    values = {"feature_model": "efficientnet_lite0", "voxel_resolution": RESOLUTION, "resolution": 64, "views": 14}
    return Job(root, SHA, {}, Settings(**values | {"depth": True, "ssaa": 1} | settings))


def box(low: tuple[float, float, float], high: tuple[float, float, float], color: tuple[float, ...]) -> Part:
    mesh = trimesh.creation.box(bounds=[low, high])
    vertices, faces = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces).int()
    return Part(vertices=vertices, faces=faces, color=(*color, 1.0))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red box at -x beside a blue one at +x, with a green lid; renders, depths and voxels."""
    root = tmp_path_factory.mktemp("prepared")
    parts = [box((-1, -0.6, -0.7), (0, 0.6, 0.5), (1, 0, 0)), box((0, -0.6, -0.7), (1, 0.6, 0.5), (0, 0, 1))]
    task = job(root)
    task.__dict__["scene"] = normalised([*parts, box((-1, -0.6, 0.5), (1, 0.6, 0.7), (0, 1, 0))])
    render_step(task)
    voxelize_step(task)
    return root


def copy_of(prepared: Path, root: Path) -> Path:
    for path in prepared.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(prepared)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return root


def stored(root: Path, model: str = "efficientnet_lite0") -> tuple[np.ndarray, np.ndarray]:
    indices, tokens = read_arrays(features_path(root, model, SHA), "indices", "patchtokens")
    assert (indices.dtype, tokens.dtype) == (np.uint8, np.float16)
    return indices.astype(int), tokens.astype(np.float32)


@pytest.mark.parametrize("depth", [True, False])
def test_voxels_have_the_colors_of_what_is_there(prepared: Path, tmp_path: Path, depth: bool) -> None:
    root = copy_of(prepared, tmp_path)
    if not depth:
        (root / "renders" / SHA / "depths.npz").unlink()
    assert feature_step(job(root)) == {}
    indices, tokens = stored(root)
    assert tokens.shape == (len(read_voxels(root / "voxels" / f"{SHA}.ply", RESOLUTION)), 67)
    assert np.isfinite(tokens).all()
    assert tokens.any(1).all()  # also of voxels between the boxes, which no view sees
    x, z = indices[:, 0], indices[:, 2]
    outside = (z > 4) & (z < 9) & ((x < 6) | (x > 9))  # of the sides, away from where the boxes touch
    red, blue, lid = outside & (x < 8), outside & (x > 7), z >= z.max()
    share = 0.95 if depth else 0.6
    for chosen, channel in ((red, 0), (blue, 2), (lid, 1)):
        assert chosen.sum() > 10
        assert (tokens[chosen][:, :3].argmax(1) == channel).mean() > share
    if depth:  # nothing that is hidden shines through
        assert np.median(tokens[red][:, 2]) < 0.1
        assert np.median(tokens[blue][:, 0]) < 0.1


def test_features_are_those_of_a_plain_gather(prepared: Path, tmp_path: Path, network: EfficientNetLite0) -> None:
    """Mean over all views of `grid_sample` at the projections, as the official script has it."""
    root = copy_of(prepared, tmp_path)
    (root / "renders" / SHA / "depths.npz").unlink()
    feature_step(job(root))
    indices, tokens = stored(root)
    paths, cameras = read_views(root / "renders" / SHA)
    points = torch.tensor((indices + 0.5) / RESOLUTION - 0.5, dtype=torch.float32)
    total = torch.zeros(len(points), 67)
    for path, camera in zip(paths, cameras, strict=True):
        pixels = np.asarray(Image.open(path).resize((224, 224), Image.Resampling.LANCZOS), np.float32) / 255
        picture = torch.from_numpy(pixels[..., :3] * pixels[..., 3:]).permute(2, 0, 1)[None]
        _, fine, coarse = network.stages(picture, 3)
        coarse = F.interpolate(coarse, (56, 56), mode="bilinear")
        grid = torch.cat([4 * F.avg_pool2d(picture, 4) - 2, fine / 8, coarse / 8], 1)
        uv, _ = camera.project(points)
        total += F.grid_sample(grid, uv.reshape(1, 1, -1, 2) * 2 - 1, align_corners=False)[0, :, 0].T
    expected = total / len(paths)
    torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-2, atol=1e-2)


def test_the_official_model_ignores_depths(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    feature_step(job(root, feature_model="dinov2_tiny"))
    _, with_depths = stored(root, "dinov2_tiny")
    assert with_depths.shape[1] == 64
    features_path(root, "dinov2_tiny", SHA).unlink()
    (root / "renders" / SHA / "depths.npz").unlink()
    feature_step(job(root, feature_model="dinov2_tiny"))
    np.testing.assert_array_equal(stored(root, "dinov2_tiny")[1], with_depths)


def test_patch_features_are_the_tokens_before_the_norm() -> None:
    dino = DinoV2(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56)
    images = torch.rand(2, 3, 28, 56)
    grid = dino.patch_features(images)
    assert grid.shape == (2, 2, 4, 64)
    normed = F.layer_norm(grid.flatten(1, 2), (64,), eps=1e-5)
    torch.testing.assert_close(dino(images)[:, 5:], normed)


def test_what_is_whole_is_kept_and_what_is_damaged_made_again(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    path = features_path(root, "efficientnet_lite0", SHA)
    path.parent.mkdir(parents=True)
    write_arrays(path, indices=np.zeros((1, 3), np.uint8), patchtokens=np.zeros((1, 67), np.float16))
    feature_step(job(root))
    assert len(stored(root)[0]) == 1
    path.write_bytes(path.read_bytes()[:100])
    feature_step(job(root))
    assert len(stored(root)[0]) > 100


def test_the_visible_surface_needs_depths_and_no_network(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(features, "encoder")
    root = copy_of(prepared, tmp_path)
    feature_step(job(root, feature_model="visible_surface"))
    indices, tokens = read_arrays(features_path(root, "visible_surface", SHA), "indices", "patchtokens")
    assert (len(tokens), tokens.shape[1], tokens.dtype) == (len(indices), 17, np.float16)
    assert 0.6 < (tokens[:, 16] > 0).mean() < 0.9  # the inner box is hidden
    features_path(root, "visible_surface", SHA).unlink()
    (root / "renders" / SHA / "depths.npz").unlink()
    with pytest.raises(ValueError, match=r"depths\.npz must be an \.npz with depths"):
        feature_step(job(root, feature_model="visible_surface"))


def test_missing_and_damaged_inputs_are_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.ply must be a PLY file of points"):
        feature_step(job(tmp_path))
    root = copy_of(prepared, tmp_path)
    folder = root / "renders" / SHA
    write_arrays(folder / "depths.npz", depths=np.zeros((3, 4, 4), np.float16))
    with pytest.raises(ValueError, match=r"depths\.npz must hold depths \[14, H, W\] of its views; got \[3, 4, 4\]"):
        feature_step(job(root))
    (folder / "003.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"003\.png cannot be read"):
        feature_step(job(root))
    (folder / "transforms.json").write_text('{"frames": [{"file_path": "000.png"}]}')
    with pytest.raises(
        ValueError, match=r"transforms\.json must describe rendered views: KeyError\('transform_matrix'\)"
    ):
        feature_step(job(root))
    frame = {"file_path": "../x.png", "transform_matrix": torch.eye(4).tolist(), "camera_angle_x": 0.7}
    (folder / "transforms.json").write_text(json.dumps({"frames": [frame]}))
    with pytest.raises(ValueError, match="must name pictures beside it"):
        feature_step(job(root))
    trimesh.PointCloud([[0.0, 0.0, 0.7]]).export(tmp_path / "far.ply")
    with pytest.raises(ValueError, match="must hold points inside the unit cube"):
        read_voxels(tmp_path / "far.ply", 8)


def test_what_is_written_is_read_back(prepared: Path, tmp_path: Path) -> None:
    coords = torch.randint(0, 64, (50, 3), dtype=torch.int32)
    for dtype in (np.float32, np.float64):
        points = ((coords.numpy() + 0.5) / 64 - 0.5).astype(dtype)
        trimesh.PointCloud(points).export(tmp_path / "voxels.ply")
        assert torch.equal(read_voxels(tmp_path / "voxels.ply", 64), coords)
    paths, cameras = read_views(prepared / "renders" / SHA)
    assert [path.name for path in paths] == [f"{i:03}.png" for i in range(14)]
    assert isinstance(cameras, Cameras)
    torch.testing.assert_close(cameras.centers.norm(dim=1), torch.full((14,), 2.0))
    torch.testing.assert_close(cameras.intrinsics[:, 0, 0], torch.full((14,), 0.5 / math.tan(math.radians(20))))
    assert read_picture(paths[0]).mode == "RGBA"
    assert not is_whole(tmp_path / "none.npz", "x")


@pytest.fixture
def encoders(tmp_path: Path) -> dict[str, str]:
    """Untrained encoders on disk, of 16^3 and of 67 channels."""
    torch.manual_seed(0)
    structure = {"in_channels": 1, "latent_channels": 8, "num_res_blocks": 1, "channels": [8, 16], "use_fp16": True}
    trunk = {"resolution": RESOLUTION, "in_channels": 67, "model_channels": 32, "latent_channels": 8, "num_blocks": 1}
    trunk |= {"num_heads": 2, "attn_mode": "swin", "window_size": 4, "use_fp16": True}
    stems = {}
    for setting, name, args in (
        ("structure_encoder", "SparseStructureEncoder", structure),
        ("latent_encoder", "SLatEncoder", trunk),
    ):
        model = build_model(name, args)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        stems[setting] = str(tmp_path / "models" / setting)
        save_model(model, stems[setting])
    return stems


def test_latents_are_the_encoders_means(prepared: Path, tmp_path: Path, encoders: dict[str, str]) -> None:
    root = copy_of(prepared, tmp_path / "data")
    task = job(root, **encoders)
    feature_step(task)
    assert structure_latent_step(task) == latent_step(task) == {}
    (mean,) = read_arrays(root / "ss_latents" / "structure_encoder" / f"{SHA}.npz", "mean")
    assert (mean.shape, mean.dtype) == ((8, 8, 8, 8), np.float32)
    occupied = torch.zeros(1, 1, RESOLUTION, RESOLUTION, RESOLUTION)
    for x, y, z in read_voxels(root / "voxels" / f"{SHA}.ply", RESOLUTION).tolist():
        occupied[0, 0, x, y, z] = 1
    with torch.inference_mode():
        expected, _ = latents.load_model(encoders["structure_encoder"], dtype=torch.float32)(occupied)
    torch.testing.assert_close(torch.from_numpy(mean), expected[0].clone())
    path = root / "latents" / "efficientnet_lite0_latent_encoder" / f"{SHA}.npz"
    feats, coords = read_arrays(path, "feats", "coords")
    indices, tokens = stored(root)
    assert (feats.shape, feats.dtype, coords.dtype) == ((len(indices), 8), np.float32, np.uint8)
    np.testing.assert_array_equal(coords, indices)
    rows = torch.tensor(np.pad(indices, ((0, 0), (1, 0)))).int()
    with torch.inference_mode():
        x = SparseTensor.from_coords(rows, torch.from_numpy(tokens), RESOLUTION)
        mean_of, _ = latents.load_model(encoders["latent_encoder"], dtype=torch.float32)(x)
    torch.testing.assert_close(torch.from_numpy(feats), mean_of.feats.clone())
    before = path.stat().st_mtime_ns
    latent_step(task)
    assert path.stat().st_mtime_ns == before


def test_encoders_that_do_not_fit_are_named(prepared: Path, tmp_path: Path, encoders: dict[str, str]) -> None:
    root = copy_of(prepared, tmp_path / "data")
    with pytest.raises(ValueError, match="the settings must name a structure_encoder"):
        structure_latent_step(job(root))
    with pytest.raises(CheckpointError, match="no model at"):
        latent_step(job(root, latent_encoder=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"latent_encoder must be a LatentEncoder; .* is a StructureEncoder"):
        latent_step(job(root, latent_encoder=encoders["structure_encoder"]))
    with pytest.raises(ValueError, match=r"must be an \.npz with indices, patchtokens"):
        latent_step(job(root, **encoders))
    path = features_path(root, "efficientnet_lite0", SHA)
    path.parent.mkdir(parents=True)
    write_arrays(path, indices=np.zeros((2, 3), np.uint8), patchtokens=np.zeros((2, 5), np.float16))
    with pytest.raises(ValueError, match=r"must have 67 channels; got \[2, 5\]"):
        latent_step(job(root, **encoders))
    write_arrays(path, indices=np.zeros((1, 3), np.uint8), patchtokens=np.full((1, 67), np.inf, np.float16))
    with pytest.raises(ValueError, match="latents must be finite"):
        latent_step(job(root, **encoders))


def test_statistics_weigh_objects_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    objects = {sha: generator.normal(i, 1 + i, (20 * (i + 1), 8)) for i, sha in enumerate(("a", "b", "c"))}
    folder = tmp_path / "latents" / "model"
    folder.mkdir(parents=True)
    for sha, feats in objects.items():
        write_arrays(folder / f"{sha}.npz", feats=feats.astype(np.float32), coords=np.zeros((len(feats), 3), np.uint8))
    found = latent_statistics(tmp_path, "model", ["a", "b", "x"])
    both = [objects["a"], objects["b"]]
    mean = sum(x.mean(0) for x in both) / 2
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["std"], np.sqrt(sum((x**2).mean(0) for x in both) / 2 - mean**2), rtol=1e-5)
    assert latent_statistics(tmp_path, "model", limit=1) == latent_statistics(tmp_path, "model", ["a"])
    write_metadata(tmp_path, [{"sha256": "a", "split": "train"}, {"sha256": "b"}, {"sha256": "c", "split": "test"}])
    monkeypatch.setattr("sys.argv", ["latents", str(tmp_path), "model"])
    latents.main()
    assert json.loads((folder / "normalization.json").read_text()) == found
    with pytest.raises(ValueError, match="must have latents"):
        latent_statistics(tmp_path, "model", ["x"])
