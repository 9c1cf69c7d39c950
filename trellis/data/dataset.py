"""`PreparedDataset`: objects, and the parts that a sample of each consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from trellis.data.objects import Object


class Part(Protocol):
    """One kind of data of an object: how it is read and how a batch of it looks."""

    arguments: ClassVar[tuple[str, ...]]
    """Names of the dataset's arguments that it takes."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of metadata.csv that must be true for an object to have it."""

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Part:
        """From the arguments of a dataset, of which it takes its own."""

    def load(self, item: Object, generator: torch.Generator) -> dict[str, Any]:
        """Tensors, strings and numbers of one sample."""

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same of a batch."""


class PreparedDataset:
    """A map-style dataset without randomness of its own.

    Args:
        objects: one sample each.
        parts: what a sample consists of.
        sparse: whether samples are of different size.
    """

    def __init__(self, objects: Sequence[Object], parts: Sequence[Part], sparse: bool = True) -> None:
        self.objects, self.parts, self.sparse = list(objects), tuple(parts), sparse

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def ids(self) -> list[str]:
        """sha256 of each sample's object."""
        return [item.sha256 for item in self.objects]

    def num_voxels(self, index: int) -> int:
        """How heavy a sample is, for balancing; 1 where all are dense grids of one size."""
        return self.objects[index].num_voxels if self.sparse else 1

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample; everything random is drawn from `generator`.

        Raises:
            ValueError, OSError: a file is missing or damaged.
        """
        sample: dict[str, Any] = {}
        for part in self.parts:
            sample |= part.load(self.objects[index], generator)
        return sample

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of samples; see each part for its entries."""
        batch: dict[str, Any] = {}
        for part in self.parts:
            batch |= part.collate(items)
        return batch
