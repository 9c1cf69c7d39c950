"""`evaluate`: all scores of a pipeline on the held-out objects of a prepared folder; resumable object by object."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trellis.atomic import atomic_path
from trellis.evaluation.baselines import mean_shape, nearest_by_pixels, nearest_by_tokens
from trellis.evaluation.metrics import NAMES, Shape, mean_scores, score
from trellis.evaluation.sheet import SHEET_OBJECTS, save_tiles
from trellis.evaluation.stages import Missing, Models, Nothing, Unavailable, asset_shape, nothing, reading
from trellis.evaluation.truth import objects, true_shape
from trellis.preparation.conditions import captions_of
from trellis.preparation.job import Job

MODEL_METHODS = ("structure_vae", "slat_vae", "latent_flow", "image_to_3d", "text_to_3d")
RETRIEVALS = ("retrieval_tokens", "retrieval_pixels")
METHODS = ("mean_shape", "retrieval", *MODEL_METHODS)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what is measured, on which objects, and where it is written.

    Args:
        data: prepared folder.
        out: results: objects.jsonl, evaluation.json, and what need not be made twice.
        models: what is measured.
        limit: at most so many objects, evenly chosen.
        sheet: also keep what the contact sheet shows.
    """

    data: Path
    out: Path
    models: Models
    limit: int | None = None
    sheet: bool = False

    @cached_property
    def held_out(self) -> list[Job]:
        """The objects, unchanged ones of the test split.

        Raises:
            ValueError: there are none.
        """
        found = objects(self.data, "test")
        if not found:
            raise ValueError(f"{self.data} must have voxelised objects of the split test; it has none")
        if self.limit is not None and self.limit < len(found):
            found = [found[index * len(found) // self.limit] for index in range(self.limit)]
        return found

    @cached_property
    def training(self) -> list[Job]:
        """The objects that retrieval chooses from."""
        return objects(self.data, "train", variants=True)

    @cached_property
    def mean(self) -> tuple[Shape, float]:
        """The mean shape and its threshold."""
        return mean_shape([job for job in self.training if not int(job.row.get("variant") or 0)], self.out / "shapes")

    @cached_property
    def by_tokens(self) -> dict[str, Job]:
        """Held-out object -> the training object that the image encoder finds most similar."""
        try:
            found = nearest_by_tokens(self.held_out, self.training)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return {job.sha256: near for job, near in zip(self.held_out, found, strict=True)}

    @cached_property
    def by_pixels(self) -> dict[str, Job]:
        """Held-out object -> the training object of the most similar small picture."""
        try:
            found = nearest_by_pixels(self.held_out, self.training, self.out / "pixels")
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return {job.sha256: near for job, near in zip(self.held_out, found, strict=True)}

    def truth(self, job: Job) -> Shape:
        """An object itself.

        Raises:
            Missing: its files are missing or damaged.
        """
        with reading():
            return true_shape(job, self.out / "shapes")

    def retrieved(self, method: str, job: Job) -> Job:
        """The training object that a retrieval finds."""
        return (self.by_tokens if method == "retrieval_tokens" else self.by_pixels)[job.sha256]

    def shape(self, method: str, job: Job) -> Shape:
        """What a method makes of an object.

        Raises:
            Nothing: it makes nothing of this one.
            Missing: a file of this one is missing.
            Unavailable: it cannot be measured at all.
        """
        if method == "mean_shape":
            return self.mean[0]
        if method in RETRIEVALS:
            return self.truth(self.retrieved(method, job))
        if method == "text_to_3d":
            return asset_shape(self.models.text_to_3d(job))
        if method == "image_to_3d":
            shown = job.sha256 in self.shown
            asset = self.models.image_to_3d(job, ("gaussians", "mesh", "radiance_field")[: 3 if shown else 2])
            if shown:
                save_tiles(asset, job, self.tiles(job))
            return asset_shape(asset)
        made: Shape = getattr(self.models, method)(job)
        return made

    @cached_property
    def shown(self) -> set[str]:
        """Which objects the contact sheet shows: evenly chosen."""
        count = min(SHEET_OBJECTS, len(self.held_out)) if self.sheet else 0
        return {self.held_out[index * len(self.held_out) // count].sha256 for index in range(count)}

    def tiles(self, job: Job) -> Path:
        """Where an object's row of the contact sheet is."""
        return self.out / "tiles" / f"{job.sha256}.png"

    def subjects(self, method: str) -> list[Job]:
        """The objects that a method can be asked for."""
        return [job for job in self.held_out if method != "text_to_3d" or captions_of(job.row)]

    def settings(self) -> dict[str, Any]:
        """What results depend on."""
        model = "bundled" if self.models.source is None else str(self.models.source)
        return {"data": str(self.data), **asdict(self.models), "source": model}

    def is_current(self, row: Mapping[str, Any]) -> bool:
        """Whether a result is of the weights that are there now."""
        return row["method"] not in MODEL_METHODS or row.get("weights") == self.models.weights


def evaluate(
    evaluation: Evaluation,
    methods: Sequence[str] = METHODS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure, and write ``objects.jsonl`` (a line per object and method) and ``evaluation.json`` (their means).

    What is in objects.jsonl already is not measured again, unless the pipeline's files have changed. Objects of which
    a file is missing or damaged are left out, with a warning.

    Args:
        evaluation: what and where.
        methods: of `METHODS`.
        progress: told the method, how many objects are done, and of how many.

    Returns:
        What evaluation.json holds.

    Raises:
        ValueError: a method is unknown, there are no held-out objects, or `out` holds an evaluation of other models.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods must be among {', '.join(METHODS)}; got {unknown[0] if unknown else 'none'!r}")
    _agree(evaluation)
    log = evaluation.out / "objects.jsonl"
    rows = {key: row for key, row in _read(log).items() if evaluation.is_current(row)}
    reasons = _read_reasons(evaluation.out)
    parts = [part for name in methods for part in (RETRIEVALS if name == "retrieval" else (name,))]
    for method in parts:
        reasons.pop(method, None)
        jobs = evaluation.subjects(method)
        for index, job in enumerate(jobs):
            drawn = method != "image_to_3d" or job.sha256 not in evaluation.shown or evaluation.tiles(job).is_file()
            row = rows.get((method, job.sha256))
            if row is None or not (drawn or "error" in row):
                try:
                    row = _measured(evaluation, method, job)
                except Unavailable as error:
                    reasons[method] = str(error)
                    logger.warning("%s is not measured: %s", method, error)
                    break
                except Missing as error:
                    logger.warning("%s leaves out %s: %s", method, job.sha256, error)
                    continue
                rows[method, job.sha256] = row
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if progress is not None:
                progress(method, index + 1, len(jobs))
    wanted = {job.sha256 for job in evaluation.held_out}
    result = summary([row for row in rows.values() if row["sha256"] in wanted], reasons)
    counts = {"held_out": len(wanted), "training": len(evaluation.training)}
    result["settings"] = evaluation.settings() | counts
    with atomic_path(evaluation.out / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    return result


def summary(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> dict[str, Any]:
    """Method -> means of its scores, the number of objects `n`, of those that came to nothing `failed`."""
    found: dict[str, Any] = {}
    for method in ("image_to_3d", "text_to_3d", "latent_flow", "slat_vae", "structure_vae", "mean_shape", *RETRIEVALS):
        mine = [row for row in rows if row["method"] == method]
        if mine:
            failed = sum("error" in row for row in mine)
            found[method] = {**mean_scores(mine), "n": len(mine), "failed": failed}
        else:
            found[method] = {**dict.fromkeys(NAMES), "n": 0, "reason": reasons.get(method, "not measured")}
    rivals = [name for name in RETRIEVALS if name in found and found[name]["n"]]
    best = max(rivals, key=lambda name: found[name]["fscore_0.05"]) if rivals else RETRIEVALS[0]
    found["retrieval"] = {**found[best], "by": best.removeprefix("retrieval_")}
    return found


def _measured(evaluation: Evaluation, method: str, job: Job) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "sha256": job.sha256, "name": job.row.get("name", "")}
    try:
        shape = evaluation.shape(method, job)
    except Nothing as error:
        logger.info("%s of %s: %s", method, job.sha256, error)
        shape = nothing()
        row["error"] = str(error)
    if method in MODEL_METHODS:
        row["weights"] = evaluation.models.weights
    if method in RETRIEVALS:
        row["found"] = str(evaluation.retrieved(method, job).row.get("name", ""))
    return row | score(shape, evaluation.truth(job))


def _agree(evaluation: Evaluation) -> None:
    """Results of other models in the same folder are not mixed with these."""
    path = evaluation.out / "settings.json"
    settings = json.loads(json.dumps(evaluation.settings()))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if old.get(name) != value:
                raise ValueError(
                    f"{evaluation.out} holds an evaluation with {name}={old.get(name)!r}; got {value!r}: "
                    "use another folder"
                )
    evaluation.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines by method and object; a last line that was cut off by a kill is dropped, from the file too."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if not path.is_file():
        return rows
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows[row["method"], row["sha256"]] = row
        except (ValueError, KeyError, TypeError):
            continue
        whole.append(line + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(whole), encoding="utf-8")
    return rows


def _read_reasons(out: Path) -> dict[str, str]:
    """Why methods of earlier runs could not be measured."""
    path = out / "evaluation.json"
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: entry["reason"] for name, entry in entries.items() if isinstance(entry, dict) and "reason" in entry}
