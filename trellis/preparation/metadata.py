"""metadata.csv: one line per object; steps write `<step>_<rank>.csv`, which are merged into it."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trellis.atomic import atomic_path

Row = dict[str, Any]
_FIELD_LIMIT = 1 << 24


def read_metadata(root: Path) -> dict[str, Row]:
    """The lines of `root`/metadata.csv by sha256; values are strings, empty where a line has none.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no table with a column sha256.
    """
    return _read(root / "metadata.csv")


def write_metadata(root: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `root`/metadata.csv, and metadata.parquet where pyarrow is installed."""
    table = [dict(row) for row in rows]
    _write(root / "metadata.csv", table)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # an extra; the csv holds the same
        return
    columns = _columns(table)
    arrays = {column: [str(row.get(column, "")) for row in table] for column in columns}
    with atomic_path(root / "metadata.parquet") as path:
        pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def write_records(root: Path, step: str, rank: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep what a step found out as `root`/`<step>_<rank>.csv`, whole."""
    if rows:
        _write(root / f"{step}_{rank}.csv", [{"sha256": sha, **row} for sha, row in rows.items()])


def merge_records(root: Path, steps: Iterable[str]) -> int:
    """Merge all `<step>_<rank>.csv` into metadata.csv and move them to merged_records/.

    Returns:
        How many files were merged.
    """
    rows = read_metadata(root)
    files = sorted(
        file for step in steps for file in root.glob(f"{step}_*.csv") if file.stem[len(step) + 1 :].isdigit()
    )
    for file in files:
        for sha, row in _read(file).items():
            if sha in rows:
                rows[sha].update(row)
    if files:
        write_metadata(root, rows.values())
        (root / "merged_records").mkdir(exist_ok=True)
        for file in files:
            file.replace(root / "merged_records" / f"{time.time_ns()}_{file.name}")
    return len(files)


def note_failure(root: Path, step: str, sha256: str, error: str) -> None:
    """Append a line to `root`/failures/`<step>`.jsonl."""
    path = root / "failures" / f"{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"sha256": sha256, "step": step, "error": error, "when": time.strftime("%Y-%m-%dT%H:%M:%S")})
    # One write to a file opened for appending: lines of several processes do not mix.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (line + "\n").encode())
    finally:
        os.close(file)


def done(value: Any) -> bool:
    """Whether a column that says that a step is done says so."""
    return str(value).lower() in ("true", "1", "1.0")


def _read(path: Path) -> dict[str, Row]:
    csv.field_size_limit(_FIELD_LIMIT)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "sha256" not in (reader.fieldnames or ()):
                raise ValueError("it has no column sha256")
            rows = {}
            for line in reader:
                row = {key: value or "" for key, value in line.items() if key is not None}
                rows[row["sha256"]] = row
            return rows
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} must be a table with a column sha256: {error}") from error


def _columns(table: list[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in table for column in row))


def _write(path: Path, table: list[Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(table) or ["sha256"], restval="")
        writer.writeheader()
        writer.writerows(table)
