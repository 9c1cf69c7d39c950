import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trellis import ImageTo3D, SparseTensor
from trellis.checkpoints import CheckpointError
from trellis.pipelines.settings import SamplerParams
from trellis.pipelines.stages import Cancelled, Progress

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")
PHOTO = Path(__file__).parents[2] / "examples" / "coffee.png"


def picture(seed: int = 0) -> np.ndarray:
    """An object cut out by its alpha channel: a bright disc."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96] - 48
    rgba = generator.integers(60, 255, (96, 96, 4), dtype=np.uint8)
    rgba[..., 3] = np.where(x**2 + y**2 < 900, 255, 0)
    return rgba


@pytest.fixture(scope="module")
def pipe() -> ImageTo3D:
    return ImageTo3D.from_pretrained(dtype=torch.float32)


@pytest.fixture(scope="module")
def asset(pipe: ImageTo3D) -> Any:
    return pipe(picture(), seed=1, steps=2)


def test_every_representation_comes_out(asset: Any) -> None:
    slat = asset.slat
    assert slat.coords.dtype == torch.int32
    assert slat.coords.shape[1] == 4
    assert int(slat.coords[:, 0].abs().max()) == 0
    assert slat.feats.shape == (len(slat.coords), 8)
    assert len(asset.gaussians) > 0
    assert len(asset.radiance_field.positions) == len(slat.coords)
    assert len(asset.mesh.faces) > 0


def test_occupancy_of_the_untrained_model_is_calibrated(asset: Any) -> None:
    share = len(asset.slat.coords) / asset.slat.grid.require_resolution() ** 3
    assert 0.01 < share < 0.08


def test_results_can_be_optimised(asset: Any) -> None:
    for tensor in (asset.slat.feats, asset.slat.coords, asset.gaussians.xyz, asset.mesh.vertices):
        assert not tensor.is_inference()
    leaf = asset.gaussians.features_dc.clone().requires_grad_()
    leaf.square().sum().backward()
    assert leaf.grad is not None


def test_same_seed_same_asset_and_no_global_state(pipe: ImageTo3D, asset: Any) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again, other = pipe([picture(), picture(3)], seed=1, steps=2, formats=["gaussians"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again.slat.coords, asset.slat.coords)
    assert torch.equal(again.slat.feats, asset.slat.feats)
    assert torch.equal(again.gaussians.xyz, asset.gaussians.xyz)
    assert other.mesh is None
    different = pipe(picture(), seed=2, steps=2, formats=[])
    assert not torch.equal(different.slat.coords[:50], asset.slat.coords[:50])


def test_images_may_go_through_the_networks_together(pipe: ImageTo3D) -> None:
    images = [picture(), picture(3), picture(4)]
    apart = pipe(images, seed=[1, 2, 3], steps=2, formats=["gaussians"])
    together = pipe(images, seed=[1, 2, 3], steps=2, formats=["gaussians"], batch_size=3)
    for one, other in zip(apart, together, strict=True):
        same = len(one.slat.coords) == len(other.slat.coords) and torch.equal(one.slat.coords, other.slat.coords)
        assert same  # no logit of these is within rounding of zero
        torch.testing.assert_close(one.slat.feats, other.slat.feats, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["stochastic", "multidiffusion"])
def test_several_views_make_one_object(pipe: ImageTo3D, mode: Any) -> None:
    asset = pipe.from_views([picture(), picture(1)], mode=mode, steps=2, formats=["gaussians"])
    assert asset.meta["mode"] == mode
    assert asset.meta["views"] == 2
    assert asset.meta["background"] == ["alpha", "alpha"]


def test_equal_views_are_the_single_image(pipe: ImageTo3D, asset: Any) -> None:
    """Independent truth: both modes reduce to the plain sampler when the views agree."""
    for mode in ("stochastic", "multidiffusion"):
        views = pipe.from_views([picture(), picture()], mode=mode, seed=1, steps=2, formats=[])
        assert torch.equal(views.slat.coords, asset.slat.coords)
        torch.testing.assert_close(views.slat.feats, asset.slat.feats, rtol=1e-4, atol=1e-4)


def test_callback_sees_every_stage_and_can_cancel(pipe: ImageTo3D, asset: Any) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.stage, progress.step, progress.steps))

    pipe(picture(), seed=1, steps=2, formats=["gaussians"], callback=watch)
    assert seen == [
        ("preprocess", 0, 1),
        ("image_encoder", 0, 1),
        ("structure_flow", 0, 2),
        ("structure_flow", 1, 2),
        ("structure_decoder", 0, 1),
        ("latent_flow", 0, 2),
        ("latent_flow", 1, 2),
        ("gaussians_decoder", 0, 1),
    ]
    with pytest.raises(Cancelled, match="cancelled in stage 'latent_flow' after step 1 of 2"):
        pipe(picture(), seed=1, steps=2, callback=lambda progress: progress.stage != "latent_flow")
    again = pipe(picture(), seed=1, steps=2, formats=[])
    assert torch.equal(again.slat.feats, asset.slat.feats)


def test_low_memory_gives_the_same_asset(asset: Any) -> None:
    frugal = ImageTo3D.from_pretrained(dtype=torch.float32, low_memory=True)
    assert frugal.store._loaded == {}
    again = frugal(picture(), seed=1, steps=2, formats=["gaussians"])
    assert frugal.store._loaded == {}
    assert torch.equal(again.gaussians.xyz, asset.gaussians.xyz)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(asset: Any, dtype: torch.dtype) -> None:
    half = ImageTo3D.from_pretrained(dtype=dtype)(picture(), seed=1, steps=2, formats=["gaussians"])
    ours = {tuple(row) for row in half.slat.coords.tolist()}
    theirs = {tuple(row) for row in asset.slat.coords.tolist()}
    assert len(ours & theirs) / len(ours | theirs) > 0.8


def test_to_returns_the_pipeline(pipe: ImageTo3D) -> None:
    assert pipe.to("cpu") is pipe


def test_report_says_what_was_made(asset: Any, tmp_path: Path) -> None:
    asset.save(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seed"] == 1
    assert report["voxels"] == len(asset.slat.coords)
    assert {"structure_flow", "latent_flow", "mesh_decoder"} <= set(report["stages"])
    assert all(stage["seconds"] >= 0 and stage["peak_rss_mb"] > 0 for stage in report["stages"].values())
    assert {"components", "watertight", "manifold"} <= set(report["mesh"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe(picture(), formats=["voxels"]), "formats must be among .*; got 'voxels'"),
        (lambda pipe: pipe(picture(), steps=0), r"steps must be in \[1, 10000\]; got 0"),
        (lambda pipe: SamplerParams(temperature=-1), r"temperature must be in \[0, 10\]; got -1"),
        (lambda pipe: pipe(picture(), seed=-1), r"seed must be an integer in \[0, 2\^63\); got -1"),
        (lambda pipe: pipe([picture()], seed=[1, 2]), "seed must be one integer or 1 of them; got 2"),
        (lambda pipe: pipe([]), "got an empty list"),
        (lambda pipe: pipe(picture(), steps=1, max_voxels=5), "more than max_voxels=5"),
        (lambda pipe: pipe.from_views([picture()], mode="mean"), "mode must be 'stochastic' or 'multidiffusion'"),
    ],
)
def test_names_the_argument_that_does_not_fit(pipe: ImageTo3D, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_without_noise_the_seed_tells_nothing(pipe: ImageTo3D) -> None:
    def made(temperature: float, seed: int) -> SparseTensor:
        params = SamplerParams(steps=2, temperature=temperature)
        return pipe(picture(), seed=seed, structure=params, latent=params, formats=[]).slat

    first, second = made(0.0, 1), made(0.0, 2)
    assert torch.equal(first.coords, second.coords)
    assert torch.equal(first.feats, second.feats)
    first, second = made(1.0, 1), made(1.0, 2)
    assert not torch.equal(first.coords, second.coords)
    assert pipe(picture(), structure=SamplerParams(temperature=0.5), steps=1, formats=[]).report["structure"][
        "temperature"
    ] == pytest.approx(0.5)


def test_an_empty_structure_suggests_another_seed() -> None:
    pipe = ImageTo3D.from_pretrained(dtype=torch.float32)
    with pipe.store.use("sparse_structure_decoder") as decoder, torch.no_grad():
        decoder.out_layer[2].bias -= 1e4
    with pytest.raises(ValueError, match="came out empty: no voxel is occupied; try another seed"):
        pipe(picture(), steps=1)


def test_saving_what_is_not_there_says_so(pipe: ImageTo3D, tmp_path: Path) -> None:
    bare = pipe(picture(), steps=1, formats=[])
    with pytest.raises(ValueError, match=r"saving .glb needs mesh"):
        bare.save(tmp_path / "x.glb")
    with pytest.raises(ValueError, match=r"path must end in .glb"):
        bare.save(tmp_path / "x.doc")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy(tmp_path: Path, untrained: Path) -> Path:
    shutil.copytree(untrained, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    description = json.loads((folder / "pipeline.json").read_text())
    change(description["args"])
    (folder / "pipeline.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["models"].update(slat_flow_model="../evil"), "must be relative and stay inside"),
        (lambda a: a["models"].update(slat_flow_model="/etc/passwd"), "must be relative and stay inside"),
        (lambda a: a["models"].update(slat_flow_model=7), "slat_flow_model must be a string; got 7"),
        (lambda a: a["models"].pop("slat_flow_model"), "slat_flow_model is missing"),
        (lambda a: a["models"].update(slat_flow_model="ckpts/none"), "slat_flow_model is at 'ckpts/none', which does"),
        (lambda a: a["slat_sampler"].update(name="Heun"), "name must be one of .*; got 'Heun'"),
        (lambda a: a["slat_sampler"]["params"].update(steps="25"), "slat_sampler steps: must be a number; got '25'"),
        (lambda a: a["slat_sampler"]["params"].update(speed=2), "unknown parameter 'speed'"),
        (lambda a: a["slat_normalization"].update(mean=[0.0]), "mean and std must be equally long; got 1 and 8"),
        (lambda a: a["image_cond_model"].update(path="../../x"), "must be relative and stay inside"),
        (lambda a: a["image_cond_model"].update(name="os.system"), "os.system"),
    ],
)
def test_names_what_is_wrong_in_pipeline_json(copy: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        ImageTo3D.from_pretrained(copy)


def test_a_pipeline_of_another_class_is_refused(copy: Path) -> None:
    (copy / "pipeline.json").write_text('{"name": "StableDiffusionPipeline", "args": {}}')
    with pytest.raises(CheckpointError, match="name must be 'TrellisImageTo3DPipeline'; got 'StableDiffusionPipeline'"):
        ImageTo3D.from_pretrained(copy)


def test_a_missing_pipeline_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no pipeline at .*pipeline\.json does not exist"):
        ImageTo3D.from_pretrained(tmp_path)
