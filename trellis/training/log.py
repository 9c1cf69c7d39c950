"""What a run writes down: ``log.txt``, one JSON object per step, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trellis.atomic import atomic_path


class RunLog:
    """Appends to ``RUN/log.txt`` and ``RUN/tb_logs``.

    Args:
        run: folder of the run.
        first: the first step that will be written; lines of it and later ones, of an interrupted run, are dropped.
        tensorboard: also write TensorBoard files; they need the package `tensorboard`.
    """

    def __init__(self, run: Path, first: int, *, tensorboard: bool) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.txt"
        if self.path.exists():
            _keep_before(self.path, first)
        self.file: IO[str] = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tb_logs"), purge_step=first, flush_secs=30)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of log.txt, on the disk at once."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Curves of TensorBoard."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def images(self, step: int, pictures: Mapping[str, Any]) -> None:
        """Pictures of TensorBoard: name -> ``[3, H, W]`` float in [0, 1]."""
        if self.board is not None:
            for name, picture in pictures.items():
                self.board.add_image(name, picture, step)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The steps of ``RUN/log.txt``; a last line cut off by a crash is left out."""
    lines = []
    for text in (run / "log.txt").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _keep_before(path: Path, first: int) -> None:
    lines = [line for line in read_log(path.parent) if line["step"] < first]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
