"""How much memory a call needs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


def peak_rss(fn: Callable[[], Any]) -> float:
    """Peak resident memory that ``fn()`` adds to the process, in MiB; its result counts, and is freed.

    The kernel keeps the high-water mark (Linux, VmHWM), so no peak is missed. Pages that nothing has
    written to do not count. Run `fn` once before, so that imports and thread pools are not attributed to it.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the call could reuse freed pages that still count as resident
    (_PROCESS / "clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _high_water_mark()
    fn()
    return (_high_water_mark() - before) / 1024


def _high_water_mark() -> int:
    """KiB."""
    status = (_PROCESS / "status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
