"""`trellis evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from trellis.commands.console import failed, progress_bars
from trellis.evaluation.evaluate import METHODS, MODEL_METHODS, Evaluation, evaluate
from trellis.evaluation.metrics import NAMES
from trellis.evaluation.sheet import contact_sheet
from trellis.evaluation.stages import Models


@dataclass(frozen=True)
class Request:
    """The options of `trellis evaluate`, unchecked."""

    data: Path
    output: Path
    model: str | None
    limit: int | None
    only: str
    sheet: bool
    seed: int
    steps: int | None
    structure_encoder: str
    latent_model: str
    verbose: bool


def run(request: Request) -> int:
    """Measure, show the table, write the sheet; 0 unless the run itself failed."""
    console, errors = Console(), Console(stderr=True)
    methods = [name.strip() for name in request.only.split(",") if name.strip()] or list(METHODS)
    models = Models(request.model, request.seed, request.steps, request.structure_encoder, request.latent_model)
    try:
        if request.limit is not None and request.limit < 1:
            raise ValueError(f"--limit must be at least 1; got {request.limit}")
        evaluation = Evaluation(request.data, request.output, models, request.limit, request.sheet)
        if any(name in MODEL_METHODS for name in methods):
            with console.status("loading models"):
                _ = models.pipeline
        with progress_bars(console) as bars:
            tasks: dict[str, Any] = {}

            def progress(method: str, count: int, total: int) -> None:
                if method not in tasks:
                    tasks[method] = bars.add_task(method.replace("_", " "), total=total)
                bars.update(tasks[method], completed=count)

            result = evaluate(evaluation, methods, progress)
        console.print(_table(result))
        if request.sheet:
            _sheet(evaluation, console)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return failed(errors, str(request.data), error, request.verbose)
    console.print(f"{request.output / 'evaluation.json'}")
    return 0


def _table(result: dict[str, Any]) -> Table:
    headers = (name.replace("fscore_0", "F@").replace("chamfer", "CD") for name in NAMES)
    table = Table(Column(no_wrap=True), *headers, "n", box=SIMPLE)
    for method, entry in result.items():
        if method in ("settings", "retrieval"):
            continue
        cells = ["" if entry[name] is None else f"{entry[name]:.{2 if name == 'psnr' else 3}f}" for name in NAMES]
        table.add_row(method.replace("_", " "), *cells, str(entry["n"]))
    return table


def _sheet(evaluation: Evaluation, console: Console) -> None:
    shown = [job for job in evaluation.held_out if job.sha256 in evaluation.shown and evaluation.tiles(job).is_file()]
    rows = [(str(job.row.get("name", "")), evaluation.tiles(job)) for job in shown]
    if not rows:
        console.print("no contact sheet: image_to_3d was not measured with --sheet", style="yellow")
        return
    contact_sheet(rows, evaluation.out / "contact_sheet.png")
    console.print(str(evaluation.out / "contact_sheet.png"))
