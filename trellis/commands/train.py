"""`trellis train`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from trellis.commands.console import chosen_device, failed, progress_bars

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of `trellis train`, unchecked."""

    config: str
    data: list[Path]
    output: Path
    steps: int | None
    load: str | None
    resume: bool
    device: str
    precision: str
    parallel: str
    threads: int | None
    workers: int
    minutes: float | None
    tensorboard: bool
    verbose: bool


class Interruption:
    """Turns SIGINT and SIGTERM into a wish to stop; the second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def reason(self) -> str | None:
        return None if self.received is None else signal.Signals(self.received).name

    @contextmanager
    def listening(self) -> Iterator[None]:
        former = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def run(request: Request) -> int:
    """Do it; the exit code: 0, 1 after an error, 128 + the signal if one ended it (its checkpoint is written)."""
    console, errors = Console(), Console(stderr=True)
    interruption = Interruption()
    try:
        with interruption.listening(), _progress(console, request.output.name) as progress:
            state = _train(request, progress, interruption.reason)
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        return failed(errors, request.config, error, request.verbose)
    where = f"{escape(str(request.output))}/ckpts"
    if not state.team.first:
        pass  # the first process says it
    elif state.stopped:
        console.print(f"{where} [dim]step {state.step}, stopped: {state.stopped}; go on with --resume[/]")
    else:
        console.print(f"{where} [dim]step {state.step}[/]")
    return 128 + interruption.received if interruption.received is not None else 0


def _train(request: Request, progress: Callable[[Any], None], stop: Callable[[], str | None]) -> Any:
    import torch

    from trellis.training.config import load_config
    from trellis.training.loop import Options, train

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    config = load_config(request.config)
    options = Options(
        steps=request.steps,
        device=chosen_device(request.device),
        precision=request.precision,
        parallel=request.parallel,
        workers=request.workers,
        resume=request.resume,
        load=request.load,
        minutes=request.minutes,
        tensorboard=request.tensorboard,
    )
    return train(config, request.data, request.output, options, progress=progress, stop=stop, command=sys.argv)


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[Any], None]]:
    with progress_bars(console) as bars:
        task = bars.add_task(escape(title), total=None)

        def callback(progress: Any) -> None:
            line = progress.line
            loss = "not finite" if line["loss"] is None else f"{line['loss']:.4g}"
            text = f"{escape(title)}: loss {loss}, {line['samples_per_second']:.3g} samples/s"
            bars.update(task, completed=progress.step, total=progress.steps, description=text)

        yield callback
