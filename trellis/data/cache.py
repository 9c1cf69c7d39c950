"""`Cache`: what was read once, in memory, up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

LIMIT = 4 << 30  # bytes of one kind of data


class Cache:
    """Keeps tensors until they fill the limit; what comes later is read anew each time.

    Copies of it in other processes start empty.

    Args:
        enabled: false: nothing is kept.
        limit: bytes.
    """

    def __init__(self, enabled: bool = False, limit: int = LIMIT) -> None:
        self.enabled, self.limit, self.size = enabled, limit, 0
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}

    def get(self, key: Hashable, read: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors of `key`, from memory or by calling `read`; they are not to be changed."""
        if key in self._kept:
            return self._kept[key]
        tensors = read()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.enabled and self.size + size <= self.limit:
            self._kept[key] = tensors
            self.size += size
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "limit": self.limit, "size": 0, "_kept": {}}
