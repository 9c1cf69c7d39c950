from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.pipelines.test_image_to_3d import picture
from trellis import ImageTo3D
from trellis.compat import TrellisImageTo3DPipeline, postprocessing_utils, render_utils

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")
STEPS = {"sparse_structure_sampler_params": {"steps": 2, "cfg_strength": 5.0}, "slat_sampler_params": {"steps": 2}}


@pytest.fixture(scope="module")
def official(untrained: Path) -> TrellisImageTo3DPipeline:
    return TrellisImageTo3DPipeline.from_pretrained(str(untrained), dtype=torch.float32)


def test_an_official_script_runs(official: TrellisImageTo3DPipeline, tmp_path: Path) -> None:
    image = Image.fromarray(picture(), "RGBA")
    outputs = official.run(image, seed=1, **STEPS)
    assert set(outputs) == {"mesh", "gaussian", "radiance_field"}
    outputs["gaussian"][0].save_ply(tmp_path / "sample.ply")
    assert (tmp_path / "sample.ply").stat().st_size > 0
    frames = render_utils.render_video(outputs["gaussian"][0], num_frames=2, resolution=32)["color"]
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 2
    ours = ImageTo3D.from_pretrained(dtype=torch.float32)(image, seed=1, steps=2, formats=["gaussians"])
    assert torch.equal(outputs["gaussian"][0].xyz, ours.gaussians.xyz)


def test_several_samples_share_one_stream_of_noise(official: TrellisImageTo3DPipeline) -> None:
    outputs = official.run(picture(), num_samples=2, seed=1, formats=["gaussian"], **STEPS)
    first, second = outputs["gaussian"]
    assert len(first) != len(second) or not torch.equal(first.xyz, second.xyz)


def test_several_images(official: TrellisImageTo3DPipeline) -> None:
    outputs = official.run_multi_image([picture(), picture(1)], formats=["gaussian"], mode="multidiffusion", **STEPS)
    assert len(outputs["gaussian"]) == 1


def test_what_cannot_be_done_says_so(official: TrellisImageTo3DPipeline) -> None:
    with pytest.raises(NotImplementedError, match="cannot do yet"):
        postprocessing_utils.to_glb(None, None)
    with pytest.raises(ValueError, match="formats must be among gaussian, radiance_field, mesh; got 'voxel'"):
        official.run(picture(), formats=["voxel"])
    with pytest.raises(ValueError, match=r"sampler parameters must be among steps, .*; got 'speed'"):
        official.run(picture(), slat_sampler_params={"speed": 1})
