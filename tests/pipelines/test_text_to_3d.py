import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.clip import tiny_clip
from trellis import TextTo3D
from trellis.checkpoints import CheckpointError, build_model, save_model
from trellis.compat import TrellisTextTo3DPipeline
from trellis.pretrained.initialise import MODELS

FLOWS = ("sparse_structure_flow_model", "slat_flow_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, untrained: Path) -> Path:
    """Untrained decoders with flows that take text tokens of width 32, and a tiny CLIP."""
    path = tmp_path_factory.mktemp("text")
    shutil.copytree(untrained, path, dirs_exist_ok=True)
    tiny_clip(path / "clip")
    torch.manual_seed(0)
    for role in FLOWS:
        stem, name, args = MODELS[role]
        model = build_model(name, args | {"cond_channels": 32, "use_fp16": False, "num_blocks": 1})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        save_model(model, path / "ckpts" / stem)
    description = json.loads((path / "pipeline.json").read_text())
    description["name"] = "TrellisTextTo3DPipeline"
    del description["args"]["image_cond_model"]
    description["args"]["text_cond_model"] = str(path / "clip")
    (path / "pipeline.json").write_text(json.dumps(description))
    return path


def test_a_sentence_becomes_an_asset(folder: Path) -> None:
    pipe = TextTo3D.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    asset = pipe("a chair", seed=3, steps=2, formats=["gaussians"])
    assert asset.meta["prompt"] == "a chair"
    assert len(asset.gaussians) > 0
    first, second = pipe(["a chair", "a bat"], seed=3, steps=2, formats=[])
    assert torch.equal(first.slat.feats, asset.slat.feats)
    assert first.slat.feats.shape != second.slat.feats.shape or not torch.equal(first.slat.feats, second.slat.feats)
    with pytest.raises(ValueError, match="prompt must be a sentence"):
        pipe(" ")


def test_official_names_run_the_same_pipeline(folder: Path) -> None:
    options = {"sparse_structure_sampler_params": {"steps": 2}, "slat_sampler_params": {"steps": 2}}
    official = TrellisTextTo3DPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    outputs = official.run("a chair", seed=3, formats=["gaussian"], **options)
    ours = TextTo3D.from_pretrained(folder, dtype=torch.float32)("a chair", seed=3, steps=2, formats=["gaussians"])
    assert torch.equal(outputs["gaussian"][0].xyz, ours.gaussians.xyz)


def test_an_image_pipeline_is_not_a_text_pipeline(untrained: Path) -> None:
    with pytest.raises(CheckpointError, match="name must be 'TrellisTextTo3DPipeline'"):
        TextTo3D.from_pretrained(untrained)
