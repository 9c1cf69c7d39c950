import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any room's triton.py is imported

# A landing must not depend on luck: CI draws the same examples every time; `make fuzz` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="emulate CUDA under AddressSanitizer and UBSan")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support import backends

    backends.SANITIZE[0] = config.getoption("--sanitized", default=False)


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
    from tests.support import aot

    if aot.MEASURED:
        terminalreporter.section(
            "GPU kernels compiled ahead of time (registers, bytes spilled, bytes of shared memory)"
        )
        terminalreporter.line(
            f"{'kernel':34}{'arch':>5}{'warps':>6}{'regs':>5}{'spill':>6}{'shared':>8}  instruction, constants"
        )
    for row in sorted(aot.MEASURED, key=lambda r: (r.kernel, r.constants, r.arch)):
        terminalreporter.line(
            f"{row.kernel:34}{row.arch:5}{row.warps:6}{row.registers:5}{row.spilled:6}{row.shared:8}"
            f"  {','.join(row.instructions) or '-'}  {row.constants}"
        )


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """The same random numbers every run, and NaN in uninitialised memory so that a gap in an output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline made from a seed, so that tests do not depend on what the bundled one learned."""
    from trellis.pretrained.initialise import initialise

    folder = tmp_path_factory.mktemp("untrained")
    initialise(folder)
    return folder


@pytest.fixture(scope="module")
def untrained_is_bundled(untrained: Path) -> Iterator[None]:
    """For the tests of a module it is that folder which comes without a name."""
    from trellis.pipelines import store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BUNDLED", untrained)
        yield


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


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of tests/support/backends.py, in force during the test."""
    from tests.support.backends import running_on

    with running_on(request.param):
        yield request.param
