"""Which part of a model computes in which precision, on a CPU and on CUDA: section 2.6 of the TRELLIS facts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pipelines.test_image_to_3d import picture
from tests.support.pretend_cuda import PretendedDevice, pretend_cuda
from tests.support.scenes import sphere_voxels
from trellis import ImageTo3D, SparseTensor
from trellis.nn.conv import SubmanifoldConv3d

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")
MACHINE = PretendedDevice()
HALF = {torch.float16}


@pytest.fixture(params=["cpu", "pretended cuda", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with pretend_cuda(MACHINE) if request.param == "pretended cuda" else nullcontext():
        yield request.param.rpartition(" ")[2]


def dtypes_in(model: Any, *inputs: Any) -> dict[str, set[torch.dtype]]:
    """Module -> dtypes of the tensors that go into it, for every module with parameters."""
    seen: dict[str, set[torch.dtype]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensors = [getattr(value, "feats", value) for value in args]
            seen.setdefault(name, set()).update(t.dtype for t in tensors[:1] if isinstance(t, Tensor))

        return hook

    kinds = (nn.Linear, nn.Conv3d, SubmanifoldConv3d)
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    with torch.inference_mode():
        (model.features if hasattr(model, "features") else model)(*inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_a_checkpoint_keeps_its_precision_on_every_device(device: str) -> None:
    pipe = ImageTo3D.from_pretrained(device=device)
    coords = sphere_voxels(64, radius=0.05)
    slat = SparseTensor.from_coords(coords, torch.randn(len(coords), 8), 64).to(device)
    t = torch.ones(1, device=device)
    for role in ("sparse_structure_flow_model", "slat_flow_model", "slat_decoder_gs", "slat_decoder_mesh"):
        with pipe.store.use(role) as model:
            assert model.config.use_fp16
            assert model.torso_dtype == torch.float16
            inputs: tuple[Any, ...] = (slat,)
            if "flow" in role:
                x = slat if role.startswith("slat") else torch.randn(1, 8, *(model.config.resolution,) * 3).to(device)
                inputs = (x, t, torch.randn(1, 5, model.config.cond_channels).to(device))
            seen = dtypes_in(model, *inputs)
        torso = {name for name in seen if name.split(".")[0] in model.torso}
        assert torso
        assert {name.split(".")[0] for name in set(seen) - torso} <= {"input_layer", "out_layer", "t_embedder"}
        assert all(seen[name] == HALF for name in torso), role
        assert all(seen[name] == {torch.float32} for name in set(seen) - torso), role
        kept = {name: p.dtype for name, p in model.named_parameters() if "norm" in name}
        assert set(kept.values()) <= {torch.float32}


def test_tokens_are_float32_whatever_the_torso(device: str) -> None:
    for dtype in (None, torch.float16):
        pipe = ImageTo3D.from_pretrained(device=device, dtype=dtype)
        assert {p.dtype for p in pipe.conditioner.parameters()} == {torch.float32}
        (tokens,) = pipe.encode([pipe_image()])
        assert tokens.dtype == torch.float32
        assert tokens.device.type == device


def pipe_image() -> Any:
    from trellis.conditioning.imaging import load_image, prepare_image

    return prepare_image(load_image(picture()))[0]


def test_noise_does_not_depend_on_device_or_precision(device: str) -> None:
    seen: list[Tensor] = []

    def first(progress: Any) -> bool:
        if progress.stage == "structure_flow":
            seen.append(progress.estimate)
        return progress.stage != "structure_flow"

    from trellis.pipelines.stages import Cancelled

    for place, dtype in (("cpu", torch.float32), (device, torch.float32), (device, None)):
        pipe = ImageTo3D.from_pretrained(device=place, dtype=dtype)
        with pytest.raises(Cancelled):
            pipe(picture(), seed=11, steps=1, callback=first)
    here, there, half = (estimate.float().cpu() for estimate in seen)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half, here, rtol=5e-2, atol=5e-2)
