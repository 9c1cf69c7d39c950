"""`trellis render`."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape

from trellis.commands.console import chosen_device, failed, progress_bars

if TYPE_CHECKING:
    import numpy as np

    from trellis.renderers.show import Shown

SUFFIXES = (".mp4", ".gif", ".png")
_COLUMNS = 4  # views beside each other on the sheet of one asset: at most this many
_MOST = 100_000  # frames or views
_REACH = 0.75  # beyond this a turn does not show an object: it is made for [-0.5, 0.5]
_LARGEST = 8192  # pixels per side, samples included: the largest that the kernels are tested with
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of `trellis render`, unchecked."""

    assets: list[Path]
    output: Path
    frames: int
    views: int
    resolution: int
    ssaa: int | None
    background: str
    what: str
    fit: bool
    fps: int
    seed: int
    device: str
    verbose: bool

    def check(self) -> None:
        """Raise ValueError naming the first option that is out of range."""
        from trellis.renderers.show import WHATS

        if self.output.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--output must end in {', '.join(SUFFIXES)}; got {self.output.name!r}")
        if self.what not in WHATS:
            raise ValueError(f"--what must be {', '.join(WHATS)}; got {self.what!r}")
        limits = {"frames": _MOST, "views": _MOST, "resolution": _LARGEST, "fps": 240}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"--{name} must be in [1, {most}]; got {getattr(self, name)}")
        if self.ssaa is not None and not 1 <= self.ssaa <= _LARGEST // self.resolution:
            raise ValueError(f"--ssaa must be in [1, {_LARGEST // self.resolution}] here; got {self.ssaa}")

    def background_color(self) -> Literal["random"] | tuple[float, ...]:
        """Raises ValueError if it is no color."""
        named = {"black": "#000000", "white": "#ffffff"}
        text = named.get(self.background, self.background)
        if text == "random":
            return "random"
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
            raise ValueError(f"--background must be black, white, random or #rrggbb; got {self.background!r}")
        return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def run(request: Request) -> int:
    """Do it; the exit code: 0, or 1 if anything failed (one line on the error stream says what)."""
    console, errors = Console(), Console(stderr=True)
    current = "cannot start"
    try:
        request.check()
        background = request.background_color()
        device = chosen_device(request.device)
        shown: list[Shown] = []
        for path, file in _files(request.assets):
            current = str(path)
            with console.status(f"reading {escape(file.name)}"):
                shown.append(_moved(_placed(_read(file), file, request.fit), device))
        current = str(request.output)
        with _rendered(request, shown, background, console) as rows:
            _write(request, rows, len(shown))
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        return failed(errors, current, error, request.verbose)
    kinds = ", ".join(_kind(one) for one in shown)
    console.print(f"{escape(str(request.output))} [dim]{kinds}[/]", soft_wrap=True)
    return 0


def _files(assets: list[Path]) -> Iterator[tuple[Path, Path]]:
    from trellis.representations.reading import files_of

    for path in assets:
        for file in files_of(path):
            yield path, file


def _read(file: Path) -> Shown:
    from trellis.representations.reading import read_representation

    return read_representation(file)


def _placed(shown: Shown, file: Path, fit: bool) -> Shown:
    """A mesh of another program may lie anywhere and be of any size."""
    from trellis.representations.mesh_reading import ReadMesh

    if not isinstance(shown, ReadMesh):
        return shown
    low, high = shown.mesh.vertices.aminmax(dim=0)
    if fit:
        side = float((high - low).max()) or 1.0
        vertices = (shown.mesh.vertices - (low + high) / 2) / side
        return shown._replace(mesh=dataclasses.replace(shown.mesh, vertices=vertices))
    if max(-float(low.min()), float(high.max())) > _REACH:
        logger.warning("%s reaches out of the picture, from %s to %s: see --fit", file, low.tolist(), high.tolist())
    return shown


def _moved(shown: Any, device: str) -> Shown:
    from trellis.representations.mesh_reading import ReadMesh

    if isinstance(shown, ReadMesh):
        return ReadMesh(shown.mesh.to(device), None if shown.texture is None else shown.texture.to(device))
    return shown.to(device)


def _kind(shown: Shown) -> str:
    from trellis.representations.gaussians import Gaussians
    from trellis.representations.radiance_field import RadianceField

    if isinstance(shown, Gaussians):
        return f"{len(shown)} Gaussians"
    if isinstance(shown, RadianceField):
        return f"radiance field of {len(shown)} voxels"
    mesh = shown[0] if isinstance(shown, tuple) else shown
    return f"mesh of {len(mesh.faces)} faces"


@contextmanager
def _rendered(
    request: Request, shown: list[Shown], background: Any, console: Console
) -> Iterator[Iterable[np.ndarray]]:
    """The pictures, one per camera, with a bar that follows them."""
    import torch

    from trellis.renderers.turntable import snapshot_cameras, turntable_cameras, view_rows

    sheet = request.output.suffix.lower() == ".png"
    cameras = snapshot_cameras(request.views) if sheet else turntable_cameras(request.frames)
    generator = torch.Generator().manual_seed(request.seed)
    what: Any = request.what
    rows = view_rows(shown, cameras, request.resolution, background, request.ssaa, what, generator)
    with progress_bars(console) as bars:
        yield bars.track(rows, total=len(cameras), description=escape(request.output.name))


def _write(request: Request, rows: Iterable[np.ndarray], assets: int) -> None:
    from trellis.renderers.turntable import save_sheet
    from trellis.renderers.video import save_gif, save_video

    suffix = request.output.suffix.lower()
    if suffix == ".mp4":
        save_video(rows, request.output, request.fps)
    elif suffix == ".gif":
        save_gif(rows, request.output, request.fps)
    else:
        save_sheet(rows, request.output, 1 if assets > 1 else min(request.views, _COLUMNS))
