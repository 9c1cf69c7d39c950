"""Compiles the native modules. Needs a C++20 compiler and pybind11; never torch.

``_cpu`` is built always, ``_cuda`` where nvcc is found (csrc/toolchain). A source whose name ends in an instruction set
(``gemm_avx512.cpp``) is compiled for it and is reached at run time only where the CPU has it
(csrc/include/cpu_features.h); everything else is compiled for the baseline, so a wheel runs on older machines.

``python setup.py build_emulated [--sanitize]`` builds the CUDA sources for the host, for tests: build/emulated/.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "toolchain"))
import cuda_toolchain

CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno",
             "-MMD"]  # fmt: skip
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
X86 = platform.machine().lower() in {"x86_64", "amd64"}
EMULATED_FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
                  "-ffp-contract=off", "-MMD", "-x", "c++", "-DTRELLIS_EMULATED",
                  "-DTRELLIS_ARCHITECTURES=0"]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compile_changed(sources: list[str], folder: str, compile_one: Callable[[str, str], None]) -> list[str]:
    """Objects of the sources, those older than what they are made of compiled side by side."""
    jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1

    def one(source: str) -> str:
        target = Path(folder, source).with_suffix(".o")
        if not is_current(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            compile_one(source, str(target))
        return str(target)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, sources))


def is_current(target: Path) -> bool:
    """Whether an object is newer than its source and every header it includes, which the compiler lists beside it."""
    listing = target.with_suffix(".d")
    if not target.exists() or not listing.exists():
        return False
    names = listing.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(Path(name).exists() and Path(name).stat().st_mtime < target.stat().st_mtime for name in names)


class BuildNative(build_ext):
    """Compiles the sources of each extension side by side, and only those that changed."""

    def build_extension(self, ext: Extension) -> None:
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        toolchain, architectures = getattr(ext, "cuda", (None, ()))
        folder = str(Path(self.build_temp, "_".join(map(str, architectures))))  # objects know their architectures
        started = time.monotonic()

        def compile_one(source: str, target: str) -> None:
            if source.endswith(".cu"):
                _run(toolchain.compile_command(source, target, ext.include_dirs, architectures))
            else:
                self._compile_host(ext, source, folder)

        objects = compile_changed(ext.sources, folder, compile_one)
        if toolchain is None:
            self.compiler.link_shared_object(objects, output, extra_postargs=["-fopenmp"], target_lang="c++")
            return
        _run(toolchain.link_command(objects, output))
        size = Path(output).stat().st_size / 2**20
        seconds = time.monotonic() - started
        names = ";".join(map(str, architectures))
        print(f"csrc/cuda: nvcc {toolchain.version} for {names}, {seconds:.0f} s, {size:.1f} MiB")  # noqa: T201

    def _compile_host(self, ext: Extension, source: str, folder: str) -> None:
        flags = [
            flag for suffix, flags in INSTRUCTION_SETS.items() if Path(source).stem.endswith(suffix) for flag in flags
        ]
        self.compiler.compile(
            [source],
            output_dir=folder,
            include_dirs=ext.include_dirs + self.compiler.include_dirs,
            macros=ext.define_macros,
            extra_postargs=CPU_FLAGS + (flags if X86 else []),
        )


class BuildEmulated(Command):
    """The CUDA sources as a host module, for tests."""

    user_options: ClassVar = [("sanitize", None, "with AddressSanitizer and UBSan")]
    boolean_options: ClassVar = ["sanitize"]

    def initialize_options(self) -> None:
        self.sanitize = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        import pybind11

        folder = "build/emulated_sanitized" if self.sanitize else "build/emulated"
        flags = EMULATED_FLAGS + (SANITIZERS if self.sanitize else [])
        include = ["csrc/include", "csrc/cuda", "csrc/emulation", pybind11.get_include(), sysconfig.get_path("include")]
        directories = [f"-I{path}" for path in include]
        compiler = os.environ.get("CXX", "g++")
        objects = compile_changed(
            cuda_sources() + sorted(map(str, Path("csrc/emulation").glob("*.cpp"))),
            folder,
            lambda source, target: _run([compiler, *flags, *directories, "-c", source, "-o", target]),
        )
        target = Path(folder, "_cuda_emulated" + sysconfig.get_config_var("EXT_SUFFIX"))
        if not target.exists() or any(Path(name).stat().st_mtime > target.stat().st_mtime for name in objects):
            partial = target.with_suffix(f".{os.getpid()}")
            _run([compiler, "-shared", *(SANITIZERS if self.sanitize else []), *objects, "-o", str(partial)])
            partial.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def cuda_sources() -> list[str]:
    return sorted(str(path) for suffix in ("*.cu", "*.cpp") for path in Path("csrc/cuda").glob(suffix))


def extensions() -> list[Extension]:
    import pybind11

    include = ["csrc/include", "csrc/cpu", pybind11.get_include()]
    found = [
        Extension("trellis_kernels._cpu", sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), include, language="c++")
    ]
    toolchain = cuda_toolchain.find()
    if toolchain is not None:
        architectures = toolchain.architectures()
        macros = [("TRELLIS_ARCHITECTURES", ",".join(map(str, architectures)))]
        include = ["csrc/include", "csrc/cuda", pybind11.get_include()]
        cuda = Extension("trellis_kernels._cuda", cuda_sources(), include, macros, language="c++")
        cuda.cuda = toolchain, architectures
        found.append(cuda)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "build_emulated": BuildEmulated})
