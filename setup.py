"""Compiles the native modules. Needs a C++20 compiler and pybind11; never torch.

``_cpu`` is built always, ``_cuda`` when csrc/cuda holds sources and nvcc is found. A source whose name ends in an
instruction set (``gemm_avx512.cpp``) is compiled for it and is reached at run time only where the CPU has it
(csrc/include/cpu_features.h); everything else is compiled for the baseline, so a wheel runs on older machines.
"""

from __future__ import annotations

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
X86 = platform.machine().lower() in {"x86_64", "amd64"}


def nvcc() -> str | None:
    """Path of the CUDA compiler, from CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


class BuildNative(build_ext):
    """Compiles the sources of each extension side by side, and only those that changed."""

    def build_extension(self, ext: Extension) -> None:
        headers = max(path.stat().st_mtime for path in Path("csrc").rglob("*.h"))
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda source: self._compile(ext, source, headers), ext.sources))
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, output, extra_postargs=["-fopenmp"], target_lang="c++")

    def _compile(self, ext: Extension, source: str, headers: float) -> str:
        target = Path(self.build_temp, source).with_suffix(".o")
        if target.exists() and target.stat().st_mtime > max(headers, Path(source).stat().st_mtime):
            return str(target)
        flags = [
            flag for suffix, flags in INSTRUCTION_SETS.items() if Path(source).stem.endswith(suffix) for flag in flags
        ]
        (built,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs + self.compiler.include_dirs,
            extra_postargs=CPU_FLAGS + (flags if X86 else []),
        )
        return built


def extensions() -> list[Extension]:
    import pybind11

    include = ["csrc/include", "csrc/cpu", pybind11.get_include()]
    cpu = Extension("trellis_kernels._cpu", sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), include, language="c++")
    if any(Path("csrc/cuda").glob("*.cu")) and nvcc():
        raise SystemExit("csrc/cuda has sources but setup.py has no rule for them yet: add it with the first kernel")
    return [cpu]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
