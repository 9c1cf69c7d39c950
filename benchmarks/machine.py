"""What a run's numbers depend on: machine, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ["torch", "triton", "numpy", "pytest-benchmark", "cupy-cuda13x", "cupy-cuda12x", "flash-attn", "spconv"]


def facts() -> dict[str, Any]:
    """The parts of a report that are known before anything has run."""
    return {"device": device_facts(), "machine": machine_facts(), "versions": versions()}


def device_facts() -> dict[str, Any]:
    """The device that the benchmarks run on."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return {"name": cpu_name(), "kind": "cpu", "threads": threads, "capability": None, "driver": None,
                "multiprocessors": None, "memory GiB": _host_memory()}  # fmt: skip
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "kind": "cuda",
        "threads": torch.get_num_threads(),
        "capability": f"{found.major}.{found.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "multiprocessors": found.multi_processor_count,
        "memory GiB": round(found.total_memory / 2**30, 1),
    }


def machine_facts() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory GiB": _host_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Of what is installed; None where it is not. "cuda" is the one torch was built with."""
    found: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    compiler = re.search(r"release ([\d.]+)", output("nvcc", "--version") or "")
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": compiler.group(1) if compiler else None,
    }


def commit(given: str | None = None) -> dict[str, Any]:
    """``{"id", "dirty"}``; None where git does not know (a copy of the tree without its history)."""
    found = output("git", "rev-parse", "HEAD")
    if found is None:
        return {"id": given, "dirty": None}
    return {"id": found, "dirty": bool(output("git", "status", "--porcelain"))}


def slug(name: str) -> str:
    """A file name for a device: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def output(*command: str) -> str | None:
    """What a program prints, without the white space around; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _host_memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
