"""Which objects of prepared folders a dataset is made of."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trellis.data.shards import ID, ShardPlace, open_shards, shard_files
from trellis.preparation.arrays import Place
from trellis.preparation.metadata import Row, done, read_metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Object:
    """One object: where it is, its id, how many voxels it has (1 if unknown), and its captions."""

    root: Place
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
        """Whether the object of a line of metadata.csv takes part.

        Raises:
            ValueError: the line has no number where one belongs.
        """
        return (
            (self.split == "all" or row.get("split", "train") == self.split)
            and (self.variants or row.get("variant", "0") in ("", "0"))
            and float(row.get("aesthetic_score") or "inf") >= self.min_aesthetic_score
            and _voxels(row) <= self.max_num_voxels
        )


def find(roots: Sequence[Path], choice: Choice, columns: Sequence[str]) -> list[Object]:
    """The objects of all roots that take part and have all that is needed, root by root, by id.

    A line that cannot be understood is reported and left out.

    Args:
        roots: prepared folders, or folders of shards.
        choice: which objects.
        columns: of metadata.csv that must be true; of captions: there must be some.

    Raises:
        ValueError: there is none; it says how many lack what.
    """
    found, lacking, seen = [], dict.fromkeys(columns, 0), 0
    for place, sha, row in ((place, *line) for root in roots for place, rows in [_opened(root)] for line in rows):
        try:
            _checked_id(sha)
            if not choice.takes(row):
                continue
            item = Object(place, sha, _voxels(row), _captions(row))
        except (ValueError, OverflowError) as error:
            logger.warning("object %.80r of %s is left out: %s", sha, place, error)
            continue
        seen += 1
        missing = [name for name in lacking if not (item.captions if name == "captions" else done(row.get(name)))]
        for column in missing:
            lacking[column] += 1
        if not missing:
            found.append(item)
    if not found:
        reasons = ", ".join(f"{count} lack {column}" for column, count in lacking.items() if count)
        places = ", ".join(map(str, roots)) or "no folder"
        raise ValueError(f"no object in {places} can be used: {seen} fit the filters; {reasons or 'none are there'}")
    return found


def _opened(root: Path) -> tuple[Place, list[tuple[str, Row]]]:
    """Where the objects of a root lie, and their lines by id."""
    if not (root / "metadata.csv").exists() and shard_files(root):
        shards = open_shards(root)
        return ShardPlace(shards), sorted(shards.rows.items())
    return root, sorted(read_metadata(root).items())


def _checked_id(sha: str) -> None:
    if not ID.fullmatch(sha):  # it becomes part of paths
        raise ValueError("an id must be letters, digits, _ and -")


def _voxels(row: Mapping[str, str]) -> int:
    return max(1, int(float(row.get("num_voxels") or 1)))


def _captions(row: Mapping[str, str]) -> tuple[str, ...]:
    text = row.get("captions", "")
    try:
        captions = json.loads(text) if text else []
    except ValueError as error:
        raise ValueError(f"captions must be a JSON list of strings; got {text[:80]!r}") from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a JSON list of strings; got {text[:80]!r}")
    return tuple(captions)
