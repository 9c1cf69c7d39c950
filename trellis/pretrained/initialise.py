"""Makes an untrained pipeline from a seed: the official classes at a small size, for tests and to start from.

    python -m trellis.pretrained.initialise FOLDER

The bundled model has its file layout. An untrained structure decoder would call half of the
grid occupied, so the bias of its last layer is set to a quantile of its own logits (2 to 5 % occupancy) and stored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis.atomic import atomic_path
from trellis.checkpoints import build_model, save_model
from trellis.conditioning.image import DinoV2
from trellis.models.config import Model
from trellis.pipelines.settings import SamplerParams
from trellis.pipelines.stages import Condition
from trellis.sampling import euler

SEED = 2412_01506  # the paper's arXiv number
OCCUPANCY = 0.03
NOTICE = "This small model is untrained: it shows every stage, but its shapes are random until it is trained."

IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 224,
    "num_register_tokens": 4,
}
_FLOW = {"in_channels": 8, "out_channels": 8, "cond_channels": 96, "num_heads": 4, "mlp_ratio": 4, "pe_mode": "ape"}
_FLOW |= {"qk_rms_norm": True, "use_fp16": True}
_TRUNK: dict[str, Any] = {
    "resolution": 32,
    "model_channels": 128,
    "latent_channels": 8,
    "num_blocks": 4,
    "num_heads": 4,
    "mlp_ratio": 4,
}
_TRUNK |= {"attn_mode": "swin", "window_size": 8, "use_fp16": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparse_structure_flow_model": (
        "ss_flow_nano",
        "SparseStructureFlowModel",
        {"resolution": 8, "model_channels": 160, "num_blocks": 5, "patch_size": 1, **_FLOW},
    ),
    "sparse_structure_decoder": (
        "ss_dec_nano",
        "SparseStructureDecoder",
        {
            "out_channels": 1,
            "latent_channels": 8,
            "num_res_blocks": 1,
            "num_res_blocks_middle": 1,
            "channels": [64, 32, 16],
            "use_fp16": True,
        },
    ),
    "slat_flow_model": (
        "slat_flow_nano",
        "SLatFlowModel",
        {
            "resolution": 32,
            "model_channels": 128,
            "num_blocks": 4,
            "patch_size": 2,
            "num_io_res_blocks": 2,
            "io_block_channels": [48],
            **_FLOW,
        },
    ),
    "slat_decoder_gs": (
        "slat_dec_gs_nano",
        "SLatGaussianDecoder",
        {
            **_TRUNK,
            "representation_config": {
                "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
                "perturb_offset": True,
                "voxel_size": 1.5,
                "num_gaussians": 16,
                "2d_filter_kernel_size": 0.1,
                "3d_filter_kernel_size": 0.0018,
                "scaling_bias": 0.008,
                "opacity_bias": 0.1,
                "scaling_activation": "softplus",
            },
        },
    ),
    "slat_decoder_rf": (
        "slat_dec_rf_nano",
        "SLatRadianceFieldDecoder",
        {**_TRUNK, "representation_config": {"rank": 8, "dim": 8}},
    ),
    "slat_decoder_mesh": (
        "slat_dec_mesh_nano",
        "SLatMeshDecoder",
        # Its group norms have 32 groups at an eighth of the width, so the width is a multiple of 256.
        {**_TRUNK, "model_channels": 256, "num_blocks": 2, "representation_config": {"use_color": True}},
    ),
}


def initialise(folder: Path) -> None:
    """Write the folder: pipeline.json, and every model in the official format."""
    generator = torch.Generator().manual_seed(SEED)
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    models = {role: seeded(name, args, generator) for role, (_, name, args) in MODELS.items()}
    calibrate(models["sparse_structure_flow_model"], models["sparse_structure_decoder"], generator)
    with torch.no_grad():  # unit variance would make splats of a tenth of the object's size
        models["slat_decoder_gs"].get_parameter("out_layer.weight").mul_(0.3)
    for role, (stem, _, _) in MODELS.items():
        model = models[role]
        model.set_torso_dtype(torch.float16)
        save_model(model, folder / "ckpts" / stem)
    encoder = DinoV2(**IMAGE_ENCODER)
    _randomise_(encoder, generator)
    encoder.save(folder / "ckpts" / "image_encoder_nano")
    with atomic_path(folder / "pipeline.json") as temporary:
        temporary.write_text(json.dumps(_description(), indent=4) + "\n")


def _description() -> dict[str, Any]:
    sampler = {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
    }
    return {
        "name": "TrellisImageTo3DPipeline",
        "args": {
            "models": {role: f"ckpts/{stem}" for role, (stem, _, _) in MODELS.items()},
            "sparse_structure_sampler": sampler,
            "slat_sampler": sampler,
            "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},
            "image_cond_model": {"name": "DinoV2", "args": IMAGE_ENCODER, "path": "ckpts/image_encoder_nano"},
            "notice": NOTICE,
        },
    }


def seeded(name: str, args: dict[str, Any], generator: torch.Generator) -> Model:
    """A model with random weights, in evaluation mode, its torso float32."""
    model = build_model(name, args | {"use_fp16": False})
    _randomise_(model, generator)
    return model.eval()


def _randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain everywhere, also where training would start from zero, so that every stage has an effect."""
    for key, parameter in model.named_parameters():
        if key.endswith("gamma") or (parameter.ndim == 1 and key.endswith("weight")):
            nn.init.ones_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            bound = (3 / parameter[0].numel()) ** 0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def calibrate(flow: Model, decoder: Model, generator: torch.Generator) -> None:
    """Set the decoder's last bias so that sampled structures occupy `OCCUPANCY` of the grid."""
    params = SamplerParams(steps=4, guidance=0.0, rescale_t=3.0)
    with torch.inference_mode():
        config: Any = flow.config
        tokens = torch.randn(4, 8, config.cond_channels, generator=generator)
        velocity = Condition(tokens, torch.zeros_like(tokens)).velocity(flow, params)
        noise = torch.randn(4, config.in_channels, *(config.resolution,) * 3, generator=generator)
        *_, last = euler(velocity, noise, params.steps, params.rescale_t)
        logits: Tensor = decoder(last.x)
    with torch.no_grad():
        decoder.get_parameter("out_layer.2.bias").sub_(
            torch.quantile(logits.flatten()[:: max(1, logits.numel() // 2**20)], 1 - OCCUPANCY)
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m trellis.pretrained.initialise FOLDER")
    initialise(Path(sys.argv[1]))
