"""Where nvcc is, and for which GPUs to compile. Used by setup.py and by the build backend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # without a GPU to ask: every current generation
WHEELS = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
WHEEL_VERSION = "13.0.*"  # one compiler release for all of them
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


@dataclass(frozen=True)
class Toolchain:
    """A CUDA compiler.

    Args:
        nvcc: its path.
        libraries: directories of CUDA's libraries that nvcc does not know itself.
        includes: directories of CUDA's headers, likewise.
        version: e.g. "13.0".
    """

    nvcc: str
    libraries: tuple[str, ...]
    includes: tuple[str, ...]
    version: str

    def architectures(self) -> tuple[int, ...]:
        """TRELLIS_CUDA_ARCHITECTURES ("80;90") if set, else those of the visible GPUs, else all this nvcc knows."""
        known = [int(text) for text in re.findall(r"compute_(\d+)\b", _output(self.nvcc, "--list-gpu-arch"))]
        chosen = os.environ.get("TRELLIS_CUDA_ARCHITECTURES")
        if chosen is not None:
            wanted = [int(text) for text in re.split(r"[;,\s]+", chosen.strip()) if text.isdigit()]
            if not wanted or not set(wanted) <= set(known):
                raise SystemExit(
                    f'TRELLIS_CUDA_ARCHITECTURES must be numbers like "80;90" among {known}; got {chosen!r}'
                )
            return tuple(sorted(set(wanted)))
        return tuple(sorted(visible_architectures() & set(known))) or tuple(a for a in ARCHITECTURES if a in known)

    def compile_command(
        self, source: str, target: str, include: list[str], architectures: tuple[int, ...]
    ) -> list[str]:
        """Machine code for each architecture, and PTX of the newest, which later GPUs compile themselves."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        newest = max(architectures)
        directories = [f"-I{path}" for path in [*include, *self.includes]]
        ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
        depends = ["-MMD", "-MF", target.removesuffix(".o") + ".d"]
        return [
            self.nvcc,
            *FLAGS,
            *codes,
            ptx,
            *depends,
            "-lineinfo",
            "--threads",
            "0",
            *directories,
            "-c",
            source,
            "-o",
            target,
        ]

    def link_command(self, objects: list[str], target: str) -> list[str]:
        """With the CUDA runtime inside: it shares the context torch made, and needs none of torch's libraries."""
        directories = [f"-L{path}" for path in self.libraries]
        return [self.nvcc, "-shared", "-cudart", "static", *directories, *objects, "-o", target]


def find() -> Toolchain | None:
    """From CUDA_HOME, PATH, or the pip wheels of `WHEELS`; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc:
        return _toolchain(nvcc, [], [])
    for folder in sys.path:  # an isolated build has its requirements in a folder of its own there
        root = Path(folder, "nvidia", "cu13")
        if (root / "bin/nvcc").is_file():
            return _toolchain(str(root / "bin/nvcc"), [root / "lib"], [root / "include", root / "include/cccl"])
    return None


def visible_architectures() -> set[int]:
    """Compute capabilities of the GPUs nvidia-smi lists, as nvcc writes them."""
    smi = shutil.which("nvidia-smi")
    text = _output(smi, "--query-gpu=compute_cap", "--format=csv,noheader") if smi else ""
    return {10 * int(major) + int(minor) for major, minor in re.findall(r"(\d+)\.(\d+)", text)}


def _toolchain(nvcc: str, libraries: list[Path], includes: list[Path]) -> Toolchain:
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if not release:
        raise SystemExit(f"{nvcc} does not say which CUDA release it is; remove it from PATH or CUDA_HOME")
    return Toolchain(nvcc, _existing(libraries), _existing(includes), release[1])


def _existing(folders: list[Path]) -> tuple[str, ...]:
    return tuple(str(path) for path in folders if path.is_dir())


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
