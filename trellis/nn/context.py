"""`Context`: conditioning as the cross-attentions of a model read it, computed once and used at every sampling step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trellis.nn.attention import KeyValue
from trellis.nn.segments import Segments

if TYPE_CHECKING:
    from trellis.nn.block import ModulatedBlock


@dataclass(frozen=True, eq=False)
class Context:
    """Keys and values of U conditions for each block, and which of the conditions each sequence of a batch attends to.

    They depend on the condition alone, not on the time: a sampler that keeps them saves two projections of all
    conditioning tokens per block and step. Build with `of`.

    Args:
        blocks: for each block, ``key [U, L, H, D]`` and ``value [U, L, H, D]``.
        rows: the condition of each of the B sequences: a slice where they follow one another, else ``[B]`` int64.
        segments: the B sequences of L tokens.
    """

    blocks: tuple[KeyValue, ...]
    rows: slice | Tensor
    segments: Segments

    @classmethod
    def of(cls, blocks: Iterable[ModulatedBlock], tokens: Tensor) -> Context:
        """From conditioning tokens ``[U, L, Cc]`` in the dtype of the blocks; U sequences, one for each condition."""
        count, length, _ = tokens.shape
        flat = tokens.flatten(0, 1)
        projected = (block.cross_attn.key_value(flat) for block in blocks)
        split = (KeyValue(*(part.contiguous().unflatten(0, (count, length)) for part in parts)) for parts in projected)
        return cls(tuple(split), slice(0, count), Segments.uniform(count, length, tokens.device))

    def select(self, conditions: Sequence[int]) -> Context:
        """For a batch whose sequence b attends to condition ``conditions[b]``; nothing is copied yet."""
        device = self.blocks[0].key.device
        rows = rows_of(conditions, device)
        return replace(self, rows=rows, segments=Segments.uniform(len(conditions), self.segments.lengths[0], device))

    def __len__(self) -> int:
        """How many sequences attend to it."""
        return len(self.segments)

    def __iter__(self) -> Iterator[KeyValue]:
        """Each block's ``key [B L, H, D]`` and ``value [B L, H, D]``."""
        for block in self.blocks:
            yield KeyValue(*(part[self.rows].flatten(0, 1) for part in block))


def rows_of(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index of rows: a slice, which copies nothing, where they follow one another."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers).to(device, non_blocking=True)
