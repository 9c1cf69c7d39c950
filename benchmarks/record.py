"""Rows of a benchmark run, kept one by one as they finish, so that a crash or a time limit loses none.

Each line of the file is a JSON object: ``{"id", "outcome": "started"}`` when a row begins, and ``{"id", "outcome":
"passed" | "failed" | "skipped", "reason", "row"}`` when it ends, ``row`` being pytest-benchmark's own record of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE_LOST = 86  # exit status: after an error the GPU answers this process no more
NO_TIME = "did not fit the time budget"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line about each row, by its id; a line cut off by a crash is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["id"]] = entry
    return found


class Recorder:
    """A pytest plugin that writes the file, skips what is in it already, and starts nothing after the deadline."""

    def __init__(self, path: str | None, minutes: float | None) -> None:
        self._path = Path(path) if path else None
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._done = set(read(self._path)) if self._path else set()
        self._ended: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._done])
        items[:] = [item for item in items if item.nodeid not in self._done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self._deadline:
            pytest.skip(NO_TIME)
        self._write({"id": item.nodeid, "outcome": "started"})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if report.outcome != "passed":
            self._ended[item.nodeid] = report.outcome, _reason(report)
        if report.when == "teardown":
            outcome, reason = self._ended.pop(item.nodeid, ("passed", ""))
            stats = getattr(getattr(item, "funcargs", {}).get("benchmark"), "stats", None)
            row = stats.as_dict(include_data=False) if stats and outcome == "passed" else None
            self._write({"id": item.nodeid, "outcome": outcome, "reason": reason, "row": row})
            if outcome == "failed" and not _device_answers():
                pytest.exit("the GPU does not answer after an error", returncode=DEVICE_LOST)
        return report

    def _write(self, entry: dict[str, Any]) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(entry, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:500]


def _device_answers() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return False
    return True
