"""Ahead-of-time compilation of Triton kernels for GPUs that are not here.

A room's test names a function that launches its kernels on host tensors the way a user would. `compile_launches` runs
it in a process of its own, once per architecture, with launching replaced by compiling; what comes back is what ptxas
made of exactly the configurations that ship: registers, shared memory, spills, tensor-core instructions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Compute capability -> multiprocessors and bytes of shared memory a block may have, of the A100, H100 and B200.
ARCHITECTURES = {80: (108, 166_912), 90: (132, 232_448), 100: (148, 232_448)}
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
MEASURED: list[Compiled] = []  # of this session, for the table that conftest.py prints


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one architecture.

    Args:
        kernel: its name.
        arch: 80, 90, 100.
        constants: the compile-time arguments.
        warps: per block.
        registers: per thread.
        spilled: bytes of local memory per thread.
        shared: bytes of shared memory per block.
        instructions: tensor-core instructions that occur in it.
    """

    kernel: str
    arch: int
    constants: str
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]

    @property
    def shared_limit(self) -> int:
        return ARCHITECTURES[self.arch][1]


def compile_launches(launches: str, architectures: Iterable[int] = tuple(ARCHITECTURES)) -> list[Compiled]:
    """Compile what ``launches``, "module:function", launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}

    def one(arch: int) -> list[Compiled]:
        command = [sys.executable, "-m", "tests.support.aot", launches, str(arch)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{launches} does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
        rows = json.loads(done.stdout.splitlines()[-1])
        return [Compiled(**row | {"instructions": tuple(row["instructions"])}) for row in rows]

    with ThreadPoolExecutor(2) as pool:
        found = [row for rows in pool.map(one, architectures) for row in rows]
    MEASURED.extend(found)
    return found


def check_limits(found: list[Compiled]) -> None:
    """What holds for every kernel: it fits the device and spills nothing."""
    assert found, "nothing was launched"
    for row in found:
        assert row.spilled == 0, f"{row.kernel} spills {row.spilled} bytes on sm_{row.arch}: {row.constants}"
        assert row.registers <= 255, row
        assert row.shared <= row.shared_limit, (
            f"{row.kernel} needs {row.shared} bytes of shared memory: {row.constants}"
        )


def _resources(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    """Registers per thread, and bytes of stack (which is where spills go)."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(usage[0]), int(usage[1])


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(launches: Callable[[], None], arch: int) -> list[Compiled]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tests.support.backends import gpu_kernels_on_host
    from trellis_kernels import cuda_device

    driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    rows: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=(1,), warmup=True, **kwargs)
        if compiled.hash not in rows:
            registers, spilled = _resources(compiled.asm["cubin"], cuobjdump)
            bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
            constants = {self.arg_names[i]: bound.get(self.arg_names[i]) for i in self.constexprs}
            dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in bound.values() if hasattr(a, "dtype")})
            metadata = compiled.metadata
            rows[compiled.hash] = Compiled(
                kernel=self.fn.__name__,
                arch=arch,
                constants=" ".join([*(f"{k}={v}" for k, v in constants.items()), *dtypes, f"s{metadata.num_stages}"]),
                warps=metadata.num_warps,
                registers=registers,
                spilled=spilled,
                shared=metadata.shared,
                instructions=tuple(sorted(set(TENSOR_CORE.findall(compiled.asm["ptx"])))),
            )
        return compiled

    JITFunction.run = compile_instead
    multiprocessors, shared = ARCHITECTURES[arch]
    device = cuda_device.Properties(f"stand-in for sm_{arch}", divmod(arch, 10), multiprocessors, shared)
    with gpu_kernels_on_host(device):
        launches()
    return list(rows.values())


if __name__ == "__main__":
    import importlib

    module, _, function = sys.argv[1].partition(":")
    table = _compile(getattr(importlib.import_module(module), function), int(sys.argv[2]))
    print(json.dumps([asdict(row) for row in table]))  # noqa: T201 - the answer to the parent process
