"""Which problems run, and in which order.

The default problems take about a minute per room on a CPU; `--full` adds those marked `full`. Problems marked `gpu`
need one. `priority(n)` orders them: 0 first, 5 without a mark.
"""

from collections.abc import Generator

import pytest
import torch

from benchmarks.device import TIMER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the large problems (minutes, gigabytes)")


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
    return min((mark.args[0] for mark in item.iter_markers("priority")), default=5)
