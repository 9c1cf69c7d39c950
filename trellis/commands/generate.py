"""`trellis generate`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from trellis.commands.console import chosen_device, failed, progress_bars

FILES = {
    "glb": "mesh.glb",
    "obj": "mesh.obj",
    "stl": "mesh.stl",
    "ply": "gaussians.ply",
    "png": "preview.png",
    "rf": "radiance_field.safetensors",
    "mp4": "turntable.mp4",
}
_REPRESENTATION = {
    "glb": "mesh",
    "obj": "mesh",
    "stl": "mesh",
    "ply": "gaussians",
    "png": "gaussians",
    "mp4": "gaussians",
    "rf": "radiance_field",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of `trellis generate`, unchecked."""

    photos: list[Path]
    texts: list[str]
    output: Path
    model: str | None
    seed: int
    steps: int | None
    guidance: float | None
    formats: tuple[str, ...]
    device: str
    dtype: str
    video: bool
    one_object: bool
    mode: str
    max_voxels: int
    max_pixels: int | None
    low_memory: bool
    memory: str | None
    verbose: bool

    @property
    def single_file(self) -> bool:
        return self.output.suffix.lower().lstrip(".") in {*FILES, "safetensors"}

    def wanted(self) -> tuple[str, ...]:
        """The formats to write.

        Raises:
            ValueError: one is unknown, a single file is asked for several objects, or an option is only for photos.
        """
        if self.texts and (self.one_object or self.max_pixels is not None):
            raise ValueError(f"{'--one-object' if self.one_object else '--max-pixels'} is for photos, not for --text")
        if self.single_file:
            count = len(self.photos or self.texts)
            if count > 1 and not self.one_object:
                what = "photos" if self.photos else "sentences"
                raise ValueError(f"--output {self.output} is one file, but there are {count} {what}")
            suffix = self.output.suffix.lower().lstrip(".")
            return ("rf" if suffix == "safetensors" else suffix,)
        unknown = [name for name in self.formats if name not in FILES]
        if unknown or not self.formats:
            raise ValueError(f"--formats must be among {', '.join(FILES)}; got {unknown[0] if unknown else 'none'!r}")
        return (*self.formats, "mp4") if self.video and "mp4" not in self.formats else self.formats


def run(request: Request) -> int:
    """Do it; the exit code: 0, or 1 if anything failed (each failure is one line on the error stream)."""
    console, errors = Console(), Console(stderr=True)
    try:
        wanted = request.wanted()
        with console.status("loading models"):
            pipe = _load(request)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return failed(errors, "cannot start", error, request.verbose)
    if pipe.notice:
        console.print(escape(pipe.notice), style="yellow")
    jobs: list[list[Any]] = [[each] for each in (request.photos or request.texts)]
    if request.one_object:
        jobs = [list(request.photos)]
    folders = _folders([_name(job[0]) for job in jobs], request.output)
    failures = 0
    for job, folder in zip(jobs, folders, strict=True):
        title = job[0].name if isinstance(job[0], Path) else job[0]
        title = title if len(job) == 1 else f"{title} and {len(job) - 1} more"
        try:
            with _progress(console, title) as callback:
                asset = _generate(pipe, request, job, wanted, callback)
            _write(asset, request, folder, wanted, console)
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            failures += 1
            failed(errors, title, error, request.verbose)
    if failures and len(jobs) > 1:
        errors.print(f"{failures} of {len(jobs)} failed")
    return 1 if failures else 0


def _load(request: Request) -> Any:
    import torch

    from trellis import ImageTo3D, TextTo3D

    device = chosen_device(request.device)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if request.dtype == "auto":
        dtype = torch.float32 if torch.device(device).type == "cpu" else None
    elif request.dtype in names:
        dtype = names[request.dtype]
    else:
        raise ValueError(f"--dtype must be auto, {', '.join(names)}; got {request.dtype!r}")
    logger.info("device %s, torso %s", device, dtype or "as stored")
    if request.memory is not None and torch.device(device).type == "cpu":
        raise ValueError("--memory limits a GPU and this would run on the CPU; --low-memory saves host memory")
    return (TextTo3D if request.texts else ImageTo3D).from_pretrained(
        request.model, device=device, dtype=dtype, low_memory=request.low_memory, memory=request.memory
    )


def _generate(pipe: Any, request: Request, inputs: list[Any], wanted: tuple[str, ...], callback: Any) -> Any:
    options = {
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "formats": list(dict.fromkeys(_REPRESENTATION[name] for name in wanted)),
        "max_voxels": request.max_voxels,
        "callback": callback,
    }
    if request.texts:
        return pipe(inputs[0], **options)
    options["max_pixels"] = request.max_pixels
    if request.one_object:
        return pipe.from_views(inputs, mode=request.mode, **options)
    return pipe(inputs[0], **options)


def _write(asset: Any, request: Request, folder: Path, wanted: tuple[str, ...], console: Console) -> None:
    if request.single_file:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        asset.save(request.output)
        written = [request.output]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / FILES[name] for name in wanted] + [folder / "report.json"]
        for path in written:
            with console.status(f"writing {path.name}"):
                asset.save(path)
    seconds = sum(stage["seconds"] for stage in asset.timings.values())
    names = ", ".join(path.name for path in written)
    console.print(
        f"{escape(str(written[0].parent))}/ [dim]{names} · {asset.slat.coords.shape[0]} voxels · {seconds:.1f} s[/]"
    )


def _name(source: Path | str) -> str:
    """A folder's name: the photo's, or the sentence in lower case with dashes."""
    if isinstance(source, Path):
        return source.stem
    return re.sub(r"\W+", "-", source.lower()).strip("-")[:60] or "text"


def _folders(names: list[str], output: Path) -> list[Path]:
    """One folder per object; equal names are numbered."""
    seen: dict[str, int] = {}
    folders = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        folders.append(output / (name if count == 1 else f"{name}-{count}"))
    return folders


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Any]:
    with progress_bars(console) as bars:
        tasks: dict[str, Any] = {}

        def callback(progress: Any) -> None:
            name = progress.stage.replace("_", " ")
            if name not in tasks:
                tasks[name] = bars.add_task(f"{escape(title)}: {name}", total=progress.steps)
            bars.update(tasks[name], completed=progress.step + 1)

        yield callback
