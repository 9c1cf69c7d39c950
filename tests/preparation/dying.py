"""A step that kills its process, for test_prepare: workers are spawned, so it must be importable."""

from __future__ import annotations

import os

from trellis.preparation import runner

_run_task = runner.run_task


def run_task(task: runner.Task) -> runner.Outcome:
    if task.job.sha256 == (task.job.root / "victim").read_text():
        os._exit(9)
    return _run_task(task)
