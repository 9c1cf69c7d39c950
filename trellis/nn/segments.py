"""`Segments`: how many sequences of which lengths lie end to end along the first axis of a packed tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """B packed sequences. Build with `of`, `uniform` or `from_index`.

    Args:
        lengths: B lengths, on the host: reading them never waits for the GPU.
        offsets: ``[B + 1]`` int32. Where each sequence starts, and the total (flash-attention's `cu_seqlens`).
        index: ``[N]`` int64. Which sequence each row belongs to.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    index: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """From the lengths. Nothing here makes the host wait for a GPU."""
        if len(set(lengths)) == 1:
            return cls.uniform(len(lengths), lengths[0], device)
        with torch.inference_mode(False):  # segments outlive the inference that first needed them
            offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
            sequences = torch.arange(len(lengths), device=device)
            index = sequences.repeat_interleave(offsets.diff(), output_size=sum(lengths))
        return cls(tuple(lengths), offsets, index)

    @classmethod
    def uniform(cls, count: int, length: int, device: torch.device | str = "cpu") -> Segments:
        """A dense batch: `count` sequences of one length. Made on the device, without a copy from the host."""
        with torch.inference_mode(False):
            offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
            index = torch.arange(count, device=device).repeat_interleave(length)
        return cls((length,) * count, offsets, index)

    @classmethod
    def from_index(cls, index: Tensor, count: int) -> Segments:
        """From the non-decreasing sequence number of each row, all below `count`.

        With more than one sequence it reads the lengths back to the host, once.
        """
        if count == 1:
            return cls.uniform(1, index.shape[0], index.device)
        with torch.inference_mode(False):
            # Copied first: what is derived from a tensor made in inference mode would be one, too.
            index = index.clone().long()
            boundaries = torch.arange(count + 1, device=index.device)
            offsets = torch.searchsorted(index, boundaries, out_int32=True)
        return cls(tuple(offsets.diff().tolist()), offsets, index)

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, sequence: int) -> slice:
        """Rows of one sequence."""
        start = sum(self.lengths[:sequence])
        return slice(start, start + self.lengths[sequence])

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.lengths, self.offsets.to(device), self.index.to(device))
