"""`trellis doctor`: the first thing to ask when something does not work."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def run() -> int:
    """Print the report; 1 if CPU kernels are missing, or there is a GPU and its kernels do not run on it; else 0."""
    import torch

    import trellis
    import trellis_kernels
    from trellis.pipelines.store import BUNDLED

    console = Console()
    native, healthy = _native()
    gpus = _gpus()
    compiled, runs = _cuda_kernels()
    facts = {
        "trellis": trellis.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, {torch.get_num_threads()} threads",
        "CPU kernels": native,
        "CUDA kernels": compiled,
        "triton": _version("triton") or "not installed: run `pip install 'trellis[gpu]'` to use a GPU",
        "nvcc": shutil.which("nvcc") or "not found",
        "GPU": "\n".join(gpus) or "none that torch can use",
        "NVIDIA driver": _driver(),
        "background removal": _background(),
        "video": _video(),
        "bundled model": str(BUNDLED) if (BUNDLED / "pipeline.json").is_file() else "missing",
        "cached models": ", ".join(_cached()) or "none",
    }
    report = Table(show_header=False, box=None, pad_edge=False)
    for name, fact in facts.items():
        report.add_row(name, escape(fact))
    console.print(report)

    table = Table("operator", "cpu", "cuda", "other devices", title="kernels", title_justify="left")
    for name, operator in sorted(trellis_kernels.OPERATORS.items()):
        cells = [
            operator.kernels[device].rpartition(".")[2] if device in operator.kernels else "none"
            for device in ("cpu", "cuda")
        ]
        table.add_row(name.removeprefix("trellis_kernels::"), *cells, "reference")
    console.print(table)
    without = [name for name, operator in sorted(trellis_kernels.OPERATORS.items()) if "cuda" not in operator.kernels]
    if without:
        names = ", ".join(name.removeprefix("trellis_kernels::") for name in without)
        console.print(f"without a kernel on a GPU: {names}", soft_wrap=True)
    else:
        console.print("every operator has a kernel on a GPU")
    return 0 if healthy and (runs or not gpus) else 1


def _native() -> tuple[str, bool]:
    try:
        from trellis_kernels import _cpu
    except ImportError as error:
        return f"missing ({error}): run `pip install -e .` in the project", False
    return f"compiled, using {_cpu.instruction_set()}", True


def _cuda_kernels() -> tuple[str, bool]:
    """What `_cuda` was compiled for, and whether every GPU here can run it."""
    import torch

    from trellis_kernels import cuda_device

    try:
        module = importlib.import_module("trellis_kernels._cuda")
    except ImportError as error:
        how = "with nvcc in PATH or CUDA_HOME, run `pip install -e .` in the project"
        return f"not compiled ({error}): {how}", False
    built = ", ".join(f"sm_{architecture}" for architecture in module.architectures)
    text = f"compiled for {built}; newer GPUs translate compute_{module.architectures[-1]}"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device = cuda_device.Properties(torch.cuda.get_device_name(index), (major, minor), 0, 0)
        try:
            cuda_device.require_code_for(device, module.architectures)
        except RuntimeError as error:
            return str(error), False
    return text, True


def _gpus() -> list[str]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.1f} GiB"
        found.append(f"cuda:{index} {device.name} (sm_{device.major}{device.minor}, {memory})")
    return found


def _driver() -> str:
    """The version of the NVIDIA driver, which `nvidia-smi` comes with."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "not found"
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 else f"nvidia-smi fails: {lines[0].strip() or done.stderr.strip()}"


def _background() -> str:
    from trellis.conditioning.background import rembg_is_ready

    return "rembg" if rembg_is_ready() else "OpenCV GrabCut (better: the extra [background] and its model)"


def _video() -> str:
    if _has("imageio_ffmpeg"):
        return "H.264 through imageio-ffmpeg"
    if shutil.which("ffmpeg"):
        return "H.264 through ffmpeg on PATH"
    return "MPEG-4 through OpenCV (install the extra [video] for H.264)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _cached() -> list[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    words = ("trellis", "dinov2", "clip")
    return sorted(
        f"{r.repo_id} ({r.size_on_disk_str})" for r in repositories if any(w in r.repo_id.lower() for w in words)
    )
