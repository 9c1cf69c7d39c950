"""A pytest plugin that keeps the outcome of each test as it ends, so that a crash or a time limit loses none.

    python -m pytest -p benchmarks.record --record rows.jsonl --minutes 5 benchmarks --benchmark-only

Each line of the file is a JSON object, and the last one about an id holds: ``{"id", "outcome", "reason", "row"}``.
Outcomes are "collected", "started", and at the end "passed", "failed" or "skipped"; "row" is pytest-benchmark's own
record of a benchmark. Run again with the same file, it leaves out what has ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

DEVICE_LOST = 86  # exit status: after an error the GPU answers this process no more
NO_TIME = "did not fit the time budget"
ENDED = ("passed", "failed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="append outcomes to FILE, and leave out tests that have one")
    parser.addoption("--minutes", type=float, metavar="N", help="start no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        path, minutes = Path(config.getoption("--record")), config.getoption("--minutes")
        config.pluginmanager.register(Recorder(path, float("inf") if minutes is None else minutes))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line about each test, by its id; a line cut off by a crash is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["id"]] = entry
    return found


def append(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(entry, default=_name) + "\n" for entry in entries)
        file.flush()
        os.fsync(file.fileno())


class Recorder:
    """Writes the file, leaves out what has ended according to it, and starts nothing after the deadline."""

    def __init__(self, path: Path, minutes: float) -> None:
        self._path, self._deadline = path, time.monotonic() + 60 * minutes
        self._ended = {name for name, entry in read(path).items() if entry["outcome"] in ENDED}
        self._outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            append(self._path, [{"id": report.nodeid, "outcome": "failed", "reason": _reason(report)}])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._ended])
        items[:] = [item for item in items if item.nodeid not in self._ended]
        append(self._path, ({"id": item.nodeid, "outcome": "collected"} for item in items))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self._deadline:
            pytest.skip(NO_TIME)
        append(self._path, [{"id": item.nodeid, "outcome": "started"}])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        if report.outcome != "passed":
            self._outcomes[item.nodeid] = report.outcome, _reason(report)
        if report.when == "teardown":
            outcome, reason = self._outcomes.pop(item.nodeid, ("passed", ""))
            stats = getattr((getattr(item, "funcargs", None) or {}).get("benchmark"), "stats", None)
            row = stats.as_dict(include_data=False) if stats and outcome == "passed" else None
            append(self._path, [{"id": item.nodeid, "outcome": outcome, "reason": reason, "row": row}])
            if outcome == "failed" and not _device_answers():
                pytest.exit("the GPU answers this process no more", returncode=DEVICE_LOST)
        return report


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:500]


def _device_answers() -> bool:
    torch = sys.modules.get("torch")  # what has not imported it cannot have lost the GPU to it
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
