"""Whole models through the GPU's kernels, run on the host, beside the CPU's: what no room tests by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.backends import running_on
from trellis import SparseTensor
from trellis.checkpoints import build_model
from trellis.nn.conv import SubdivideBlock
from trellis_kernels import OPERATORS

SMALL = {"model_channels": 32, "num_blocks": 2, "num_heads": 2, "use_fp16": False}
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 2,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
FLOW = {"resolution": 4, "in_channels": 8, "out_channels": 8, "cond_channels": 16, "qk_rms_norm": True, **SMALL}
TRUNK = {"resolution": 8, "latent_channels": 8, "attn_mode": "swin", "window_size": 4, **SMALL}
MODELS: dict[str, dict[str, Any]] = {
    "SparseStructureFlowModel": {**FLOW, "patch_size": 1},
    "SLatFlowModel": {**FLOW, "resolution": 8, "patch_size": 2, "io_block_channels": [16]},
    "SLatGaussianDecoder": {**TRUNK, "representation_config": GAUSSIANS},
    "SLatMeshDecoder": {**TRUNK, "model_channels": 256, "num_heads": 4, "representation_config": {"use_color": True}},
}


def filled(name: str) -> Any:
    """A model whose layers all matter: nothing is zero as at the start of a training."""
    torch.manual_seed(0)
    # Of the mesh decoder, which cannot be narrow, the block that doubles the resolution.
    model = SubdivideBlock(32, 16, num_groups=8) if name == "SubdivideBlock" else build_model(name, MODELS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def inputs(name: str) -> tuple[Any, ...]:
    torch.manual_seed(1)
    corner = torch.cartesian_prod(*[torch.arange(3, dtype=torch.int32)] * 3)[:19]
    batch = (torch.arange(19) >= 12).int()[:, None]
    slat = SparseTensor.from_coords(
        torch.cat([batch, corner], dim=1), torch.randn(19, 32 if name == "SubdivideBlock" else 8), 8
    )
    if "Flow" not in name:
        return (slat,)
    x = slat if name.startswith("SLat") else torch.randn(2, 8, 4, 4, 4)
    return x, torch.tensor([900.0, 100.0]), torch.randn(2, 5, 16)


def outputs(name: str, model: Any, arguments: tuple[Any, ...]) -> Tensor:
    with torch.inference_mode():
        result = (model.features if hasattr(model, "features") else model)(*arguments)
    return result.feats if isinstance(result, SparseTensor) else result


@pytest.mark.parametrize("name", [*list(MODELS)[:-1], "SubdivideBlock"])
def test_models_agree_with_the_cpu_interpreter_and_emulated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in OPERATORS.values():
        if "cuda" not in operator.kernels:  # its room has only the CPU's so far
            monkeypatch.setitem(operator.kernels, "cuda", operator.kernels["cpu"])
    model, arguments = filled(name), inputs(name)
    expected = outputs(name, model, arguments)
    fresh = inputs(name)  # a grid without maps: the GPU's kernels make their own
    with running_on("interpreter"):
        actual = outputs(name, model, fresh)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(MODELS))
def test_models_agree_with_the_cpu_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    model, arguments = filled(name), inputs(name)
    expected = outputs(name, model, arguments)
    model.set_torso_dtype(dtype)
    actual = outputs(name, model.to("cuda"), tuple(value.to("cuda") for value in arguments))
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
