"""Which objects of prepared folders a dataset is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trellis.preparation.metadata import done, read_metadata


@dataclass(frozen=True)
class Object:
    """One object: where it is, its id, how many voxels it has (1 if unknown), and its captions."""

    root: Path
    sha256: str
    num_voxels: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Which objects take part.

    Args:
        min_aesthetic_score: lowest score; objects without one take part.
        max_num_voxels: most voxels.
        split: train, test, or all.
        variants: whether changed copies take part.
    """

    min_aesthetic_score: float = 0.0
    max_num_voxels: int = 32768
    split: str = "all"
    variants: bool = True

    arguments: ClassVar[tuple[str, ...]] = ("min_aesthetic_score", "max_num_voxels", "split", "variants")

    @classmethod
    def build(cls, args: Mapping[str, Any]) -> Choice:
        choice = cls(**{name: args[name] for name in cls.arguments if name in args})
        if choice.split not in ("train", "test", "all"):
            raise ValueError(f"split must be train, test or all; got {choice.split!r}")
        return choice

    def takes(self, row: Mapping[str, str]) -> bool:
        """Whether the object of a line of metadata.csv takes part."""
        return (
            (self.split == "all" or row.get("split", "train") == self.split)
            and (self.variants or row.get("variant", "0") in ("", "0"))
            and float(row.get("aesthetic_score") or "inf") >= self.min_aesthetic_score
            and int(float(row.get("num_voxels") or 1)) <= self.max_num_voxels
        )


def find(roots: Sequence[Path], choice: Choice, columns: Sequence[str]) -> list[Object]:
    """The objects of all roots that take part and have all that is needed, by id.

    Args:
        roots: prepared folders.
        choice: which objects.
        columns: of metadata.csv that must be true.

    Raises:
        ValueError: there is none; it says how many lack what.
    """
    found, lacking, seen = [], dict.fromkeys(columns, 0), 0
    for root in roots:
        for sha, row in sorted(read_metadata(root).items()):
            if not choice.takes(row):
                continue
            seen += 1
            missing = [column for column in columns if not done(row.get(column, ""))]
            for column in missing:
                lacking[column] += 1
            if not missing:
                voxels = int(float(row.get("num_voxels") or 1))
                found.append(Object(root, sha, max(1, voxels), _captions(row)))
    if not found:
        reasons = ", ".join(f"{count} lack {column}" for column, count in lacking.items() if count)
        places = ", ".join(map(str, roots)) or "no folder"
        raise ValueError(f"no object in {places} can be used: {seen} fit the filters; {reasons or 'none are there'}")
    return found


def _captions(row: Mapping[str, str]) -> tuple[str, ...]:
    text = row.get("captions", "")
    try:
        captions = json.loads(text) if text else []
    except ValueError as error:
        raise ValueError(f"captions of {row.get('sha256')} must be a JSON list; got {text[:80]!r}") from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions of {row.get('sha256')} must be a JSON list of strings; got {text[:80]!r}")
    return tuple(captions)
