from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The golden gate table: how far each item of tests/golden is from the official numbers."""
    from tests.support.golden import MEASURED

    if MEASURED:
        terminalreporter.section("golden values: largest difference from the official code")
        terminalreporter.line(f"{'item':28}{'outputs':>8}{'relative rms':>15}{'max abs':>12}")
    for name in sorted({item for item, _ in MEASURED}):
        rows = [value for (item, _), value in MEASURED.items() if item == name]
        rms, largest = max(row[0] for row in rows), max(row[1] for row in rows)
        terminalreporter.line(f"{name:28}{len(rows):8}{rms:15.2e}{largest:12.2e}")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """The same random numbers every run, and NaN in uninitialised memory so that a gap in an output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set of the CPU kernels that this machine has."""
    from trellis_kernels import _cpu

    native = _cpu.instruction_set()
    try:
        _cpu.set_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _cpu.set_instruction_set(native)
