"""`trellis doctor`: the first thing to ask when something does not work."""

from __future__ import annotations

import importlib.util
import platform
import shutil

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def run() -> int:
    """Print the report; 1 if the native module is missing, else 0."""
    import torch

    import trellis
    import trellis_kernels
    from trellis.pipelines.store import BUNDLED

    console = Console()
    native, healthy = _native()
    facts = {
        "trellis": trellis.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CPU kernels": native,
        "CUDA kernels": "compiled" if _has("trellis_kernels._cuda") else "not compiled: no CUDA source yet",
        "nvcc": shutil.which("nvcc") or "not found",
        "devices": ", ".join(_devices()),
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
    return 0 if healthy else 1


def _native() -> tuple[str, bool]:
    try:
        from trellis_kernels import _cpu
    except ImportError as error:
        return f"missing ({error}): run `pip install -e .` in the project", False
    return f"compiled, using {_cpu.instruction_set()}", True


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return found


def _background() -> str:
    from trellis.conditioning.background import rembg_is_ready

    return "rembg" if rembg_is_ready() else "OpenCV GrabCut (better: the extra [background] and its model)"


def _video() -> str:
    if _has("imageio_ffmpeg"):
        return "H.264 through imageio-ffmpeg"
    if shutil.which("ffmpeg"):
        return "H.264 through ffmpeg on PATH"
    return "MPEG-4 through OpenCV (install the extra [video] for H.264)"


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
