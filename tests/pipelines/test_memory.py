"""Budgets of GPU memory: the plan by itself, the estimates beside the models, and pipelines on a pretended device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pipelines.test_image_to_3d import picture
from tests.support.pretend_cuda import PretendedDevice, pretend_cuda
from tests.support.scenes import sphere_voxels
from trellis import ImageTo3D, SparseTensor
from trellis.checkpoints import build_model
from trellis.pipelines.memory import (
    MARGIN,
    WORKSPACE,
    Stage,
    activation_bytes,
    context_bytes,
    parse_memory,
    plan,
    weight_bytes,
)

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")
MACHINE = PretendedDevice()
OFFICIAL = json.loads((Path(__file__).parents[1] / "data" / "official_state_dicts.json").read_text())
MB = 10**6


@pytest.fixture
def machine() -> Iterator[PretendedDevice]:
    with pretend_cuda(MACHINE):
        yield MACHINE


@pytest.mark.parametrize(
    ("value", "size"),
    [("16GB", 16 * 10**9), ("6 GiB", 6 << 30), ("1.5gb", 1_500_000_000), ("512MiB", 512 << 20), (7, 7), (None, None)],
)
def test_a_budget_is_read_in_the_usual_units(value: Any, size: int | None) -> None:
    assert parse_memory(value) == size


@pytest.mark.parametrize("value", ["16", "GB", "-1GB", "0GB", 0, -5, True, "8 TB", 1.5])
def test_what_is_no_budget_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="memory must be a size such as"):
        parse_memory(value)


def test_as_many_weights_stay_as_fit() -> None:
    stages = [Stage("a", 10, 1), Stage("b", 20, 2), Stage("c", 5, 30)]
    assert plan(stages, 65).resident == {"a", "b", "c"}
    assert plan(stages, 65).peak == 65
    assert plan(stages, 64).resident == {"b", "c"}
    assert plan(stages, 64).peak == 55
    assert plan(stages, 35).resident == {"c"}


def test_a_stage_that_cannot_fit_is_named_with_its_needs() -> None:
    stages = [Stage("small", 10 * MB, MB), Stage("slat_decoder_mesh", 180 * MB, 4_000 * MB)]
    message = (
        r"memory must be at least 4.18 GB for slat_decoder_mesh \(0.18 GB of weights and 4.00 GB to compute\); got 4.00"
    )
    with pytest.raises(ValueError, match=message):
        plan(stages, 4_000 * MB)
    assert plan(stages, 4_180 * MB).resident == {"slat_decoder_mesh"}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5), st.integers(1, 200))
def test_no_stage_of_a_plan_exceeds_the_budget_and_no_better_plan_exists(sizes: list[Any], budget: int) -> None:
    stages = [Stage(str(i), *size) for i, size in enumerate(sizes)]

    def peak(kept: Any) -> int:
        return max(sum(s.weights for s in kept) + s.activations + (0 if s in kept else s.weights) for s in stages)

    possible = [kept for n in range(len(stages) + 1) for kept in combinations(stages, n) if peak(kept) <= budget]
    if not possible:
        with pytest.raises(ValueError, match="memory must be at least"):
            plan(stages, budget)
        return
    found = plan(stages, budget)
    kept = [stage for stage in stages if stage.role in found.resident]
    assert found.peak == peak(kept) <= budget
    assert sum(s.weights for s in kept) == max(sum(s.weights for s in each) for each in possible)


def official(stem: str, **changes: Any) -> Any:
    """A model of the official width, with fewer blocks."""
    entry = OFFICIAL[stem]
    return build_model(entry["class_in_official_json"], entry["args"] | changes)


def measured(machine: PretendedDevice, model: Any, radius: float) -> tuple[int, int]:
    """Peak bytes beside the weights of a forward, guided in the flows; and the voxels it was for."""
    coords = sphere_voxels(64, radius=radius)
    with torch.inference_mode():
        model = model.to("cuda").eval()
        slat = SparseTensor.from_coords(coords, torch.zeros(len(coords), 8), 64).to("cuda")
        twice = torch.cat([coords, coords + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
        slat_twice = SparseTensor.from_coords(twice, torch.zeros(len(twice), 8), 64).to("cuda")
        inputs: tuple[Any, ...] = (slat,)
        config = model.config
        if hasattr(config, "cond_channels"):
            latent = torch.zeros(2, config.in_channels, *(config.resolution,) * 3, device="cuda")
            x = slat_twice if config.resolution == 64 else latent
            inputs = (x, torch.ones(2, device="cuda"), torch.zeros(2, 16, config.cond_channels, device="cuda"))
        elif not hasattr(config, "resolution"):
            inputs = (torch.zeros(1, config.latent_channels, 16, 16, 16, device="cuda"),)
        before = machine.allocated
        machine.peak = before
        model(*inputs)
        return machine.peak - before, len(coords)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("stem", "changes", "radius"),
    [
        ("ss_flow_txt_dit_B_16l8_fp16", {"num_blocks": 1, "resolution": 8}, 0.05),
        ("slat_flow_txt_dit_B_64l8p2_fp16", {"num_blocks": 1}, 0.09),
        ("slat_dec_gs_swin8_B_64l8gs32_fp16", {"num_blocks": 1}, 0.09),
        ("slat_dec_rf_swin8_B_64l8r16_fp16", {"num_blocks": 1}, 0.09),
        ("slat_dec_mesh_swin8_B_64l8m256c_fp16", {"num_blocks": 1}, 0.04),
        ("ss_dec_conv3d_16l8_fp16", {"channels": [64, 32, 32], "num_res_blocks": 1}, 0.05),
    ],
)
def test_estimates_cover_what_the_models_need(
    machine: PretendedDevice, stem: str, changes: dict[str, Any], radius: float, dtype: torch.dtype
) -> None:
    if stem.startswith("ss_dec") and dtype == torch.float16:
        pytest.skip("half-precision convolutions are slow on a CPU")
    model = official(stem, **changes)
    model.set_torso_dtype(dtype)
    peak, voxels = measured(machine, model, radius)
    estimate = (activation_bytes(model, voxels, 1) - context_bytes(model) - WORKSPACE) / MARGIN
    assert peak <= estimate <= 2.5 * peak, f"{peak / voxels:.0f} bytes per voxel, estimated {estimate / voxels:.0f}"


def needs(pipe: ImageTo3D) -> dict[str, int]:
    modules = pipe.store._modules()
    return {role: weight_bytes(m) + activation_bytes(m, 32_768, 1) for role, m in modules.items()}


def where(pipe: ImageTo3D) -> dict[str, str]:
    return {role: next(module.parameters()).device.type for role, module in pipe.store._modules().items()}


@pytest.fixture(scope="module")
def _pipe() -> ImageTo3D:
    with pretend_cuda(MACHINE):
        return ImageTo3D.from_pretrained(device="cuda", dtype=torch.float32, memory="10GB")


@pytest.fixture
def pipe(machine: PretendedDevice, _pipe: ImageTo3D) -> Iterator[ImageTo3D]:
    """Loaded with room for everything; `tighten` takes it away."""
    yield _pipe
    limit(_pipe, 10**10)


def limit(pipe: ImageTo3D, memory: int) -> frozenset[str]:
    pipe.store.memory = memory
    pipe.store.place()
    assert pipe.store.plan is not None
    return pipe.store.plan.resident


def tighten(pipe: ImageTo3D) -> tuple[int, frozenset[str]]:
    """A budget for which nearly every other model has to leave for the largest; and who stays."""
    budget = max(needs(pipe).values()) + 4 * MB
    return budget, limit(pipe, budget)


def test_a_tight_budget_streams_models_and_changes_nothing(machine: PretendedDevice, pipe: ImageTo3D) -> None:
    assert pipe.store.plan is not None
    assert pipe.store.plan.resident == set(needs(pipe))
    expected = pipe(picture(), seed=1, steps=1, formats=["gaussians", "mesh"])
    modules = pipe.store._modules()
    rest = machine.allocated - sum(map(weight_bytes, modules.values()))
    budget, resident = tighten(pipe)
    assert where(pipe) == {role: "cuda" if role in resident else "cpu" for role in modules}
    assert machine.allocated - rest == sum(weight_bytes(modules[role]) for role in resident)
    waiting = [role for role in modules if role not in resident]
    assert len(waiting) >= 3
    assert all(tensor.is_pinned() for role in waiting for tensor in modules[role].parameters())
    machine.uploaded.clear()
    machine.peak = 0
    with machine.counting() as events:
        asset = pipe(picture(), seed=1, steps=1, formats=["gaussians", "mesh"])
    assert torch.equal(asset.slat.feats.cpu(), expected.slat.feats.cpu())
    assert torch.equal(asset.gaussians.xyz.cpu(), expected.gaussians.xyz.cpu())
    assert torch.equal(asset.mesh.vertices.cpu(), expected.mesh.vertices.cpu())
    assert machine.peak - rest <= budget
    used = sum(weight_bytes(modules[role]) for role in waiting if role != "slat_decoder_rf")
    assert used <= sum(machine.uploaded) < used + 2 * MB  # each model once, and the inputs
    assert not [event for event in events if event.startswith("uploads")]  # from pinned memory: the host goes on
    assert where(pipe) == {role: "cuda" if role in resident else "cpu" for role in modules}


def test_a_model_goes_home_when_its_stage_fails(pipe: ImageTo3D) -> None:
    _, resident = tighten(pipe)
    before = where(pipe)

    def fail(role: str) -> None:
        with pipe.store.use(role) as model:
            assert next(model.parameters()).device.type == "cuda"
            raise KeyError(role)

    with pytest.raises(KeyError):
        fail(min(set(before) - resident))
    assert where(pipe) == before


def test_a_budget_too_small_says_what_would_fit(pipe: ImageTo3D) -> None:
    with pytest.raises(ValueError, match=r"memory must be at least 0\.\d+ GB for \w+ .*; got 0\.10 GB"):
        limit(pipe, 10**8)
    limit(pipe, 7 * 10**8)
    with pytest.raises(ValueError, match=r"got 0\.70 GB, with max_voxels=500000; max_voxels=\d+ would fit") as caught:
        pipe.store.prepare(500_000, 1)
    fits = int(str(caught.value).rpartition("max_voxels=")[2].split()[0])
    pipe.store.prepare(fits, 1)
    with pytest.raises(ValueError, match="would fit"):
        pipe(picture(), steps=1, max_voxels=fits + 1)


def test_a_budget_follows_the_pipeline_between_devices(pipe: ImageTo3D) -> None:
    tighten(pipe)
    assert set(where(pipe.to("cpu")).values()) == {"cpu"}
    assert pipe.store.plan is None
    assert set(where(pipe.to("cuda")).values()) == {"cpu", "cuda"}


def test_low_memory_and_memory_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="low_memory and memory exclude each other"):
        ImageTo3D.from_pretrained(low_memory=True, memory="8GB")


def test_official_models_fit_the_tiers() -> None:
    """All of the image pipeline in 8 GB at the largest object; 6 GB with the flows coming and going."""
    roles = {
        "sparse_structure_flow_model": "ss_flow_img_dit_L_16l8_fp16",
        "sparse_structure_decoder": "ss_dec_conv3d_16l8_fp16",
        "slat_flow_model": "slat_flow_img_dit_L_64l8p2_fp16",
        "slat_decoder_gs": "slat_dec_gs_swin8_B_64l8gs32_fp16",
        "slat_decoder_rf": "slat_dec_rf_swin8_B_64l8r16_fp16",
        "slat_decoder_mesh": "slat_dec_mesh_swin8_B_64l8m256c_fp16",
    }
    stages = [Stage("conditioner", 304_400_000 * 4, WORKSPACE + 80 * 1374 * 1024)]  # ViT-L/14 in float32
    with torch.device("meta"):
        for role, stem in roles.items():
            model = official(stem)
            stages.append(Stage(role, weight_bytes(model), activation_bytes(model, 32_768, 1)))
    everything = {stage.role for stage in stages}
    assert plan(stages, 16 * 10**9).resident == everything
    assert everything - plan(stages, 8 * 10**9).resident <= {"conditioner", *list(roles)[:3]}
    six = plan(stages, 6 * 10**9)
    assert six.peak <= 6 * 10**9
    assert six.resident


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, "1GB"])
def test_peaks_on_the_gpu_stay_within_the_budget(memory: str | None) -> None:
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    pipe = ImageTo3D.from_pretrained(device="cuda", memory=memory)
    asset = pipe(picture(), seed=1, steps=2)
    peak = max(stage["peak_cuda_mb"] for stage in asset.timings.values()) * 2**20 - base
    assert peak <= (parse_memory(memory) or sum(needs(pipe).values()))
