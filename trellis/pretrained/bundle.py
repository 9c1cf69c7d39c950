"""Puts trained models together into a folder that both pipelines load.

    python -m trellis.pretrained.bundle RUN... -o FOLDER [options]

Every RUN is a folder of `trellis train`, or RUN@STEP, or RUN@STEP:RATE for the weights averaged with that rate. What
each holds is seen from its configuration; models that are only needed for training, the encoders, are left out. The
folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trellis.checkpoints import CheckpointError, canonical_name, load_model, save_model
from trellis.conditioning import load_conditioner
from trellis.models.config import Model
from trellis.pipelines.image_to_3d import ImageTo3D
from trellis.pipelines.settings import PipelineSettings, SamplerParams
from trellis.pipelines.store import TEXT_FILE
from trellis.pipelines.text_to_3d import TextTo3D
from trellis.pretrained.card import attribution, model_card
from trellis.training.checkpoint import Names, saved_steps
from trellis.training.config import LoopConfig, TrainingConfig, load_config

LIMIT = 25_000_000  # bytes of the whole folder
ROLES = {
    "SparseStructureFlowModel": ("sparse_structure_flow_model", "ss_flow_nano"),
    "SparseStructureDecoder": ("sparse_structure_decoder", "ss_dec_nano"),
    "SLatFlowModel": ("slat_flow_model", "slat_flow_nano"),
    "SLatGaussianDecoder": ("slat_decoder_gs", "slat_dec_gs_nano"),
    "SLatRadianceFieldDecoder": ("slat_decoder_rf", "slat_dec_rf_nano"),
    "SLatMeshDecoder": ("slat_decoder_mesh", "slat_dec_mesh_nano"),
}
IMAGE_ENCODER_STEM = "ckpts/image_encoder_nano"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """One model of a run.

    Args:
        run: its folder.
        step: of the checkpoint.
        stem: of the checkpoint's files.
        config: of the run.
    """

    run: Path
    step: int
    stem: Path
    config: TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a bundle has besides trained models.

    Args:
        structure: sampler of the structure flow.
        latent: sampler of the latent flow.
        image_encoder: a name that `load_conditioner` knows; one that can be saved goes into the folder.
        text_encoder: likewise, by its name only; "": no text pipeline.
        ema: decay rate of the averaged weights to take; 0: the weights themselves; None: the run's highest rate.
        limit: bytes that the folder may have.
        notice: one line for whoever uses the model.
        about: Markdown for the model card: what it was trained on and what it cannot do.
        evaluation: evaluation.json to ship.
        data: prepared folder it was trained on, whose authors are named.
    """

    structure: SamplerParams
    latent: SamplerParams
    image_encoder: str = "efficientnet_lite0"
    text_encoder: str = "minilm"
    ema: float | None = None
    limit: int = LIMIT
    notice: str | None = None
    about: Path | None = None
    evaluation: Path | None = None
    data: Path | None = None


def bundle(runs: Sequence[str | Path], folder: Path, options: Options) -> int:
    """Write the folder.

    Args:
        runs: folders of `trellis train`, or folder@step, or folder@step:rate.
        folder: to write; a bundle that is there is replaced.
        options: the rest.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: a run has no checkpoint, a role is there twice or missing, or two parts do not fit together.
        FileExistsError: `folder` is there and is no bundle.
        ValueError: it would be larger than the limit; the largest parts are named.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "pipeline.json").is_file():
        raise FileExistsError(f"{folder} is not empty and is no bundle: it has no pipeline.json")
    found = find_models(runs, options.ema)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        _fill(building, found, options)
        sizes = {path: path.stat().st_size for path in building.rglob("*") if path.is_file()}
        total = sum(sizes.values())
        if total > options.limit:
            largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
            names = ", ".join(f"{path.name} {sizes[path] / 1e6:.1f} MB" for path in largest)
            raise ValueError(f"the bundle has {total} bytes and may have {options.limit}; its largest files: {names}")
        if folder.exists():
            shutil.rmtree(folder)
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("%s: %.1f MB", folder, total / 1e6)
    return total


def find_models(runs: Sequence[str | Path], ema: float | None = None) -> dict[str, Trained]:
    """Role in a pipeline -> the run's newest checkpoint of it, or that of the step asked for.

    A rate after the step goes before `ema`.

    Raises:
        CheckpointError: see `bundle`.
    """
    found: dict[str, Trained] = {}
    for given in map(str, runs):
        asked = re.fullmatch(r"(.+)@(\d+)(?::([\d.]+))?", given)
        name, wanted, own = asked.groups() if asked else (given, "", None)
        run, rate = Path(name), ema if own is None else float(own)
        if not (run / "config.json").is_file():
            raise CheckpointError(f"{run} is no run of trellis train: it has no config.json")
        config, steps = load_config(run / "config.json"), saved_steps(run)
        if not steps or (wanted and int(wanted) not in steps):
            raise CheckpointError(f"{run} has no complete checkpoint{' of step ' * bool(wanted)}{wanted}")
        step = int(wanted) if wanted else steps[-1]
        for model_role, model in config.models.items():
            if canonical_name(model.name) not in ROLES or model_role in config.trainer.args.get("frozen", ()):
                continue
            role = ROLES[canonical_name(model.name)][0]
            if role in found:
                raise CheckpointError(f"{role} is in two runs: {found[role].run} and {run}")
            found[role] = Trained(run, step, Names(run, step).model(model_role, _rate(config, rate)), config)
    missing = [role for role, _ in ROLES.values() if role not in found and not role.startswith("slat_decoder")]
    if missing:
        raise CheckpointError(f"no run has a {missing[0]}; found are {', '.join(found) or 'none'}")
    return found


def normalization(config: TrainingConfig) -> dict[str, list[float]]:
    """The mean and scale of the latents that a latent flow was trained on.

    Raises:
        CheckpointError: the run's dataset does not say.
    """
    value = config.dataset.args.get("normalization")
    if not isinstance(value, Mapping) or not {"mean", "std"} <= set(value):
        raise CheckpointError("the latent flow's dataset must have a normalization {mean, std}")
    return {"mean": list(value["mean"]), "std": list(value["std"])}


def _fill(folder: Path, found: Mapping[str, Trained], options: Options) -> None:
    models: dict[str, Model] = {}
    stems: dict[str, str] = {}
    for role, stem in ROLES.values():
        if role in found:
            models[role] = load_model(found[role].stem, dtype=torch.float16)
            stems[role] = f"ckpts/{stem}"
            save_model(models[role], folder / stems[role])
    shared: dict[str, Any] = {
        "models": stems,
        "sparse_structure_sampler": _sampler(options.structure),
        "slat_sampler": _sampler(options.latent),
        "slat_normalization": normalization(found["slat_flow_model"].config),
    }
    if options.notice is not None:
        shared["notice"] = options.notice
    image = load_conditioner(options.image_encoder, root=None, kind="image")
    described: Any = options.image_encoder
    if hasattr(image, "save"):
        image.save(folder / IMAGE_ENCODER_STEM)
        described = {"name": type(image).__name__, "args": image.args, "path": IMAGE_ENCODER_STEM}
    channels = {"image": image.channels}
    _write_description(folder / "pipeline.json", ImageTo3D.official_name, {**shared, "image_cond_model": described})
    if options.text_encoder:
        channels["text"] = load_conditioner(options.text_encoder, root=None, kind="text").channels
        described = {**shared, "text_cond_model": options.text_encoder}
        _write_description(folder / TEXT_FILE, TextTo3D.official_name, described)
    _check(models, shared["slat_normalization"], channels)
    evaluation = None if options.evaluation is None else json.loads(options.evaluation.read_text())
    if options.evaluation is not None:
        shutil.copyfile(options.evaluation, folder / "evaluation.json")
    card = model_card(models, found, options, evaluation)
    (folder / "README.md").write_text(card, encoding="utf-8")
    text = attribution(options.data, options.image_encoder, options.text_encoder)
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
    if options.image_encoder == "efficientnet_lite0":
        license_file = Path(__file__).with_name("LICENSE-Apache-2.0.txt")
        shutil.copyfile(license_file, folder / license_file.name)


def _write_description(path: Path, name: str, args: dict[str, Any]) -> None:
    key = "image_cond_model" if "image_cond_model" in args else "text_cond_model"
    description = {"name": name, "args": args}
    PipelineSettings.from_json(description, name, key)  # reads it as the pipeline will
    path.write_text(json.dumps(description, indent=4) + "\n", encoding="utf-8")


def _check(models: Mapping[str, Any], normal: Mapping[str, list[float]], channels: Mapping[str, int]) -> None:
    """That parts of different runs were made for each other."""
    structure, latent = models["sparse_structure_flow_model"].config, models["slat_flow_model"].config
    for kind, width in channels.items():
        for role in ("sparse_structure_flow_model", "slat_flow_model"):
            takes = models[role].config.cond_channels
            if takes != width:
                raise CheckpointError(f"the {kind} encoder gives {width} channels; {role} takes {takes}")
    decoder = models["sparse_structure_decoder"].config
    if decoder.latent_channels != structure.in_channels:
        raise CheckpointError(
            f"the structure flow makes {structure.in_channels} channels; its decoder takes {decoder.latent_channels}"
        )
    resolution = structure.resolution * 2 ** (len(decoder.channels) - 1)
    wanted = {f"the resolution of {role}": model.config.resolution for role, model in models.items() if "slat" in role}
    for what, value in wanted.items():
        if value != resolution:
            raise CheckpointError(f"{what} must be that of the structure decoder, {resolution}; got {value}")
    latents = {role: model.config.latent_channels for role, model in models.items() if "slat_decoder" in role}
    for role, value in {"normalization": len(normal["mean"]), **latents}.items():
        if value != latent.in_channels:
            raise CheckpointError(f"{role} is for {value} channels; the latent flow makes {latent.in_channels}")


def _rate(config: TrainingConfig, ema: float | None) -> float | None:
    given = config.trainer.args.get("ema_rate", LoopConfig.ema_rate)
    rates = list(given) if isinstance(given, list | tuple) else [given]
    if ema is None:
        return max(rates) if rates else None
    if ema and ema not in rates:
        raise CheckpointError(f"no weights were averaged with the rate {ema}; there are {rates}")
    return ema or None


def _sampler(params: SamplerParams) -> dict[str, Any]:
    values: dict[str, Any] = {"steps": params.steps, "cfg_strength": params.guidance}
    values |= {"cfg_interval": list(params.interval), "rescale_t": params.rescale_t}
    if params.temperature != 1:  # which the official code does not know
        values["temperature"] = params.temperature
    return {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": params.sigma_min},
        "params": values,
    }


def _parsed() -> tuple[list[str], Path, Options]:
    parser = argparse.ArgumentParser(prog="python -m trellis.pretrained.bundle", description=(__doc__ or "").strip())
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of `trellis train`, or RUN@STEP[:RATE]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    for stage in ("structure", "latent"):
        parser.add_argument(f"--{stage}-steps", type=int, default=12)
        parser.add_argument(f"--{stage}-guidance", type=float, default=3.0)
        parser.add_argument(f"--{stage}-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
        parser.add_argument(f"--{stage}-rescale-t", type=float, default=1.0)
        parser.add_argument(f"--{stage}-temperature", type=float, default=1.0)
    parser.add_argument("--image-encoder", default="efficientnet_lite0")
    parser.add_argument("--text-encoder", default="minilm", help='"" for no text pipeline')
    parser.add_argument("--ema", type=float, help="rate of the averaged weights to take; 0: not averaged")
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes of the folder")
    parser.add_argument("--notice", help="one line for whoever uses the model")
    parser.add_argument("--about", type=Path, help="Markdown for the model card")
    parser.add_argument("--evaluation", type=Path, help="evaluation.json")
    parser.add_argument("--data", type=Path, help="prepared folder whose authors are to be named")
    values = vars(parser.parse_args())
    samplers: dict[str, Any] = {
        stage: SamplerParams(
            steps=values.pop(f"{stage}_steps"),
            guidance=values.pop(f"{stage}_guidance"),
            interval=tuple(values.pop(f"{stage}_interval")),
            rescale_t=values.pop(f"{stage}_rescale_t"),
            temperature=values.pop(f"{stage}_temperature"),
        )
        for stage in ("structure", "latent")
    }
    runs, output = values.pop("runs"), values.pop("output")
    return runs, output, Options(**samplers, **values)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bundle(*_parsed())


if __name__ == "__main__":
    main()
