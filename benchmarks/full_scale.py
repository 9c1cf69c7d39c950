"""TRELLIS-image-large at full size on this machine: time per step and peak memory of each stage.

    python -m benchmarks.full_scale            # each stage alone, in a process of its own, then all resident
    python -m benchmarks.full_scale --voxels 12000 --stages latent_flow mesh_decoder

Weights are seeded random numbers in float32 at the official sizes: no weights are needed to measure time and memory.
Writes benchmarks/results/full_scale_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.scenes import sphere_voxels
from trellis.checkpoints import build_model
from trellis.conditioning.image import DinoV2
from trellis.nn.segments import Segments
from trellis.nn.sparse import SparseTensor, VoxelGrid
from trellis.pipelines.measure import StageMeter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "full_scale_cpu.json"
CHECKPOINTS = {
    "image_encoder": "dinov2_vitl14_reg",
    "structure_flow": "ss_flow_img_dit_L_16l8_fp16",
    "structure_decoder": "ss_dec_conv3d_16l8_fp16",
    "latent_flow": "slat_flow_img_dit_L_64l8p2_fp16",
    "gaussian_decoder": "slat_dec_gs_swin8_B_64l8gs32_fp16",
    "radiance_field_decoder": "slat_dec_rf_swin8_B_64l8r16_fp16",
    "mesh_decoder": "slat_dec_mesh_swin8_B_64l8m256c_fp16",
}
CONTEXT = (1, 1374, 1024)


def seeded_model(stage: str, device: torch.device | str = "cpu", half: bool = False) -> torch.nn.Module:
    """The official model of a stage with seeded random weights of a trained network's scale.

    Args:
        stage: of `CHECKPOINTS`.
        device: where it is made; the numbers depend on it.
        half: its torso in half precision, as the official checkpoint has it, else float32.
    """
    if stage == "image_encoder":
        return DinoV2().to(device)
    official = json.loads((ROOT / "tests" / "data" / "official_state_dicts.json").read_text())[CHECKPOINTS[stage]]
    with torch.device("meta"):
        model = build_model(
            official["class_in_official_json"], official["args"] | ({} if half else {"use_fp16": False})
        )
    return seed(model.to_empty(device=device))


def seed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random weights and buffers of a trained network's scale."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            torch.nn.init.ones_(parameter)
        else:
            spread = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.02
            torch.nn.init.uniform_(parameter, -spread, spread, generator=generator)
    for buffer in model.buffers():
        torch.nn.init.uniform_(buffer, -1, 1, generator=generator)
    return model.eval()


def voxels(count: int) -> SparseTensor:
    """About `count` voxels of a sphere's surface at 64^3."""
    candidates = [sphere_voxels(64, radius=0.3 + 0.02 * i, thickness=t) for i in range(9) for t in (0.8, 1.0, 1.2)]
    coords = min(candidates, key=lambda c: abs(len(c) - count))
    grid = VoxelGrid(coords, Segments.of([len(coords)]), 64)
    return SparseTensor(grid, torch.randn(len(coords), 8, generator=torch.Generator().manual_seed(0)))


def run_stage(stage: str, model: torch.nn.Module, slat: SparseTensor) -> str:
    """One step of a flow, or one decoding; what came out, in words."""
    timestep, context = torch.tensor([500.0]), torch.zeros(CONTEXT)
    if stage == "image_encoder":
        return f"{model(torch.zeros(1, 3, 518, 518)).shape[1]} tokens"
    if stage == "structure_flow":
        return str(list(model(torch.randn(1, 8, 16, 16, 16), timestep, context).shape))
    if stage == "structure_decoder":
        return str(list(model(torch.randn(1, 8, 16, 16, 16)).shape))
    if stage == "latent_flow":
        return f"{model(slat, timestep, context).feats.shape[0]} voxels"
    (decoded,) = model(slat)
    if stage == "mesh_decoder":
        return f"{len(decoded.vertices)} vertices, {len(decoded.faces)} faces"
    return f"{len(decoded)} Gaussians" if stage == "gaussian_decoder" else f"{len(decoded.positions)} leaves"


def measure(stages: list[str], count: int, repeats: int) -> dict[str, Any]:
    """Load the stages' models and run each; seconds are the least of `repeats` runs."""
    slat, results = voxels(count), {}
    with torch.inference_mode():
        models = {stage: seeded_model(stage) for stage in stages}
        for stage, model in models.items():
            meter, seconds = StageMeter(), []
            for _ in range(repeats):
                slat.grid.release()
                start = time.perf_counter()
                with meter.stage(stage, torch.device("cpu")):
                    what = run_stage(stage, model, slat)
                seconds.append(time.perf_counter() - start)
            peak = meter.stages[stage].get("peak_rss_mb", 0.0)
            results[stage] = {"seconds": round(min(seconds), 3), "peak_rss_gb": round(peak / 1024, 2), "out": what}
    return {"voxels": slat.coords.shape[0], "stages": results}


def _child(stages: list[str], options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.full_scale", "--child", "--voxels", str(options.voxels)]
    command += ["--repeats", str(options.repeats), "--stages", *stages]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.stages, options.voxels, options.repeats)) + "\n")
        return
    alone = {}
    for stage in options.stages:
        alone[stage] = _child([stage], options)
        sys.stderr.write(f"{stage} alone: {alone[stage]['stages'][stage]}\n")
    resident = _child(options.stages, options)
    report = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "voxels": resident["voxels"],
        "alone": {stage: result["stages"][stage] for stage, result in alone.items()},
        "all_resident": resident["stages"],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    for stage, row in report["alone"].items():
        together = report["all_resident"][stage]["peak_rss_gb"]
        sys.stdout.write(
            f"{stage:24}{row['seconds']:9.2f} s  alone {row['peak_rss_gb']:5.2f} GB  "
            f"all resident {together:5.2f} GB  {row['out']}\n"
        )


if __name__ == "__main__":
    main()
