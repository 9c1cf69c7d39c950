"""Whose work a prepared folder holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trellis.atomic import atomic_path


def attribution_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Markdown: the names of the objects by license and author.

    Args:
        rows: of metadata.csv, with name, creator and license.
    """
    authors: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        creator, name = row.get("creator") or "unknown author", row.get("name") or str(row["sha256"])[:12]
        authors[str(row.get("license") or "unknown license")][str(creator)].add(str(name))
    lines = []
    for license_name in sorted(authors):
        lines += [f"### {license_name}", ""]
        for creator in sorted(authors[license_name]):
            lines.append(f"- {creator}: {', '.join(sorted(authors[license_name][creator]))}")
        lines.append("")
    return lines


def write_attribution(root: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `root`/ATTRIBUTION.md; whoever passes on the folder or a model trained on it owes it to the authors."""
    lines = ["# Whose work is in this folder", "", *attribution_lines(rows)]
    with atomic_path(root / "ATTRIBUTION.md") as path:
        path.write_text("\n".join(lines), encoding="utf-8")
