"""Which problems run, in which order, and where their results go.

The default problems take about a minute per room on a CPU; `--full` adds those marked `full`. Problems marked `gpu`
need one. `priority(n)` orders them: 0 first, 5 without a mark. `--record FILE` keeps each row as soon as it is there
(benchmarks/record.py), `--minutes` skips what does not fit.
"""

from collections.abc import Generator

import pytest
import torch

from benchmarks.device import TIMER
from benchmarks.record import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the large problems (minutes, gigabytes)")
    parser.addoption("--record", metavar="FILE", help="append each finished row to FILE, and leave out those in it")
    parser.addoption("--minutes", type=float, metavar="N", help="start no row later than this")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") or config.getoption("--minutes"):
        config.pluginmanager.register(Recorder(config.getoption("--record"), config.getoption("--minutes")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="a large problem; run with --full"))
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.benchmark(timer=TIMER))
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=_priority)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A row whose operator is not written for this device yet is not a failure: it was not run, and that is why."""
    try:
        yield
    except NotImplementedError as error:
        if " kernel; move the tensors" not in str(error):
            raise
        pytest.skip(str(error).partition(";")[0])


def _priority(item: pytest.Item) -> int:
    marks = [mark.args[0] for mark in item.iter_markers("priority")]
    return min(marks, default=5)
