"""The emulation of CUDA itself: correct kernels compute, and each kind of mistake is reported (csrc/emulation)."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.backends import ROOT, emulated, gpu_kernels_on_host
from trellis_kernels import cuda_device, hilbert_codes

Run = Callable[[str], str]
FLAGS = ["-std=c++20", "-O1", "-g", "-x", "c++", "-DTRELLIS_EMULATED"]
INCLUDE = ["-Icsrc/include", "-Icsrc/cuda", "-Icsrc/emulation"]
SOURCES = ["tests/support/emulation_cases.cu", "csrc/emulation/fiber.cpp", "csrc/emulation/scheduler.cpp"]


def compiled(folder: Path, *flags: str) -> Run:
    program = folder / "cases"
    subprocess.run(["g++", *FLAGS, *INCLUDE, *flags, *SOURCES, "-o", str(program)], cwd=ROOT, check=True)

    def run(case: str) -> str:
        done = subprocess.run([program, case], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return compiled(tmp_path_factory.mktemp("cases"))


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_emulated_kernels_compute(emulate: Run) -> None:
    assert numbers(emulate("block_sum")) == [sum(range(96)), sum(range(96, 192))]
    assert numbers(emulate("rotate")) == [*range(1, 96), 0]
    assert numbers(emulate("grid_position")) == [100 * block + thread for block in range(12) for thread in range(24)]
    assert numbers(emulate("warp_votes")) == [1] * 96
    assert numbers(emulate("block_votes")) == [1] * 96
    assert numbers(emulate("histogram")) == [24] * 4
    assert numbers(emulate("empty_grid")) == [0]


def test_emulated_threads_interleave_so_that_missing_synchronisation_shows(emulate: Run) -> None:
    assert numbers(emulate("rotate_without_barrier")) != [*range(1, 96), 0]
    assert numbers(emulate("lost_updates"))[0] < 96


def test_emulated_deadlocks_are_reported_not_hung(emulate: Run) -> None:
    text = emulate("barrier_not_reached")
    assert "runtime_error: CUDA kernel barrier_not_reached, block (0, 0, 0): deadlock: 56 threads" in text
    assert "wait at the barrier emulation_cases.cu:" in text
    assert text.endswith("40 have finished\n")
    assert emulate("two_barriers").count("48 threads") == 2
    assert "93 threads (first (0, 0, 0)) wait at the warp operation" in emulate("lane_missing")
    assert "calls a warp operation whose mask leaves it out" in emulate("lane_not_in_mask")


def test_emulated_shared_memory_is_checked(emulate: Run) -> None:
    assert "index 8 is outside shared array tile, extent 8 (CUDA kernel shared_overrun" in emulate("shared_overrun")
    assert set(numbers(emulate("shared_unset"))) == {-1}  # as floats, NaN


def test_emulated_device_checks_are_value_errors(emulate: Run) -> None:
    assert "invalid_argument: values must be below 5 (CUDA kernel bad_value, block (0, 0, 0)" in emulate("bad_value")
    assert "a block of 1025 threads; it must have 1 to 1024" in emulate("block_too_large")


def test_emulation_runs_under_the_sanitizers(tmp_path: Path) -> None:
    run = compiled(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    assert numbers(run("block_sum")) == [sum(range(96)), sum(range(96, 192))]
    assert "deadlock" in run("lane_missing")
    assert "heap-buffer-overflow" in run("tensor_overrun")


def test_a_gpu_kernel_refuses_host_tensors() -> None:
    coords = torch.zeros(3, 4, dtype=torch.int32)
    from trellis_kernels.operator import use_kernels_of

    with use_kernels_of("cuda"), pytest.raises(ValueError, match=r"needs tensors on a CUDA device; got one on cpu"):
        hilbert_codes(coords)


def test_emulated_bindings_check_their_tensors() -> None:
    coords, codes = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"Tensor\[int32, 2-d, contiguous, on the CPU\]"):
        emulated().curve_codes(coords.long(), True, True, 4, codes, 0)
    with pytest.raises(ValueError, match=r"codes must be \[N\] for coords \[N, 4\]"):
        emulated().curve_codes(coords, True, True, 4, codes[:2], 0)
    with gpu_kernels_on_host(), pytest.raises(ValueError, match=r"coords must be in .*CUDA kernel encode_voxels"):
        hilbert_codes(coords - 1)


def test_a_binary_without_code_for_the_device_says_so() -> None:
    def device(major: int, minor: int) -> cuda_device.Properties:
        return cuda_device.Properties("a GPU", (major, minor), 1, 0)

    cuda_device.require_code_for(device(9, 0), (80, 90))
    cuda_device.require_code_for(device(8, 6), (80, 90))  # machine code of 8.0 runs on 8.6
    cuda_device.require_code_for(device(12, 0), (80, 90))  # from the PTX of 9.0
    for capability, built in (((7, 5), (80, 90)), ((8, 0), (86, 90)), ((8, 9), (90,))):
        with pytest.raises(RuntimeError, match=r"no code for a GPU .*TRELLIS_CUDA_ARCHITECTURES="):
            cuda_device.require_code_for(device(*capability), built)


@pytest.mark.gpu
def test_native_module_has_code_for_this_gpu() -> None:
    codes = hilbert_codes(torch.zeros(3, 4, dtype=torch.int32, device="cuda"))
    assert codes.tolist() == [0, 0, 0]
