"""The compiled CUDA module: what ptxas made of every kernel, and what the binary needs to run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import aot
from tests.support.backends import ROOT

sys.path.insert(0, str(ROOT / "csrc" / "toolchain"))
import cuda_toolchain

RESERVED = 1024  # bytes of shared memory that CUDA takes of each block from sm_90 on, counted by ptxas
MAY_SPILL: set[str] = set()


def binary() -> Path:
    found = importlib.util.find_spec("trellis_kernels._cuda")
    if found is None or found.origin is None:
        pytest.skip("trellis_kernels._cuda is not built here (no nvcc)")
    return Path(found.origin)


def resources(path: Path) -> list[aot.Compiled]:
    """Registers, stack and shared memory of each kernel, per architecture, from the machine code."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt", "-p"], input=text, capture_output=True, text=True, check=True).stdout
    rows, arch = [], 0
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        if found := re.match(r"\s*Function (.+):\s*$", line):
            name = found[1].replace("(anonymous namespace)::", "").removeprefix("trellis::cuda::")
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            rows.append(aot.Compiled(name, arch, "nvcc", 0, registers, stack, shared, ()))
    return rows


@pytest.mark.aot
def test_cuda_kernels_fit_the_gpu_and_spill_nothing() -> None:
    rows = [row for row in resources(binary()) if row.arch in aot.ARCHITECTURES]
    aot.MEASURED.extend(rows)
    assert rows
    for row in rows:
        assert row.registers <= 255
        assert row.shared <= 48 * 1024 + RESERVED, f"{row.kernel}: {row.shared} bytes of static shared memory"
        assert row.spilled == 0 or row.kernel in MAY_SPILL, f"{row.kernel} spills {row.spilled} bytes on sm_{row.arch}"


def test_the_cuda_module_needs_no_cuda_library_and_no_torch() -> None:
    needed = subprocess.run(["ldd", str(binary())], capture_output=True, text=True, check=True).stdout
    assert "not found" not in needed
    libraries = [
        line.partition("(")[0] for line in needed.splitlines()
    ]  # without the addresses, where "c10" may be too
    assert not re.search(r"torch|cudart|libcuda\b|c10", " ".join(libraries))


def test_architectures_come_from_the_environment_or_every_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "compute_80\ncompute_86\ncompute_89\ncompute_90\ncompute_90a\ncompute_100\n"
    monkeypatch.setattr(cuda_toolchain, "_output", lambda *command: listing)
    monkeypatch.setattr(cuda_toolchain, "visible_architectures", set)
    monkeypatch.delenv("TRELLIS_CUDA_ARCHITECTURES", raising=False)
    toolchain = cuda_toolchain.Toolchain("nvcc", (), (), "13.0")
    assert toolchain.architectures() == (80, 86, 89, 90, 100)  # this nvcc does not know 120
    monkeypatch.setattr(cuda_toolchain, "visible_architectures", lambda: {90})
    assert toolchain.architectures() == (90,)
    monkeypatch.setenv("TRELLIS_CUDA_ARCHITECTURES", "90;80")
    assert toolchain.architectures() == (80, 90)
    monkeypatch.setenv("TRELLIS_CUDA_ARCHITECTURES", "70")
    with pytest.raises(SystemExit, match=r'must be numbers like "80;90" among .*; got \'70\''):
        toolchain.architectures()


def test_code_for_every_architecture_and_ptx_of_the_newest_is_asked_for() -> None:
    toolchain = cuda_toolchain.Toolchain("nvcc", ("/lib",), ("/include",), "13.0")
    command = toolchain.compile_command("a.cu", "a.o", ["csrc/cuda"], (80, 90))
    assert [word for word in command if word.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert {"-Icsrc/cuda", "-I/include"} <= set(command)
    assert toolchain.link_command(["a.o"], "a.so") == [
        "nvcc",
        "-shared",
        "-cudart",
        "static",
        "-L/lib",
        "a.o",
        "-o",
        "a.so",
    ]


def test_a_compiler_is_required_where_there_is_a_gpu_and_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import backend

    monkeypatch.setattr(backend.cuda_toolchain, "find", lambda: None)
    monkeypatch.setattr(backend.cuda_toolchain, "visible_architectures", lambda: {90})
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_editable", lambda settings: ["one"])
    wheels = [f"{name}==13.0.*" for name in cuda_toolchain.WHEELS]
    assert backend.get_requires_for_build_editable() == ["one", *wheels]
    monkeypatch.setattr(backend.cuda_toolchain, "visible_architectures", set)
    assert backend.get_requires_for_build_editable() == ["one"]
