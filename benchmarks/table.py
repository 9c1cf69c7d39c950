"""The README's table, from a run of the benchmarks.

    pytest benchmarks --benchmark-only --benchmark-json=bench.json
    python -m benchmarks.table bench.json        # rewrites the part of README.md between the benchmark marks

One line per problem that has a peer: the least time of ours and of the fastest peer, with the peak memory each added.
The plain-PyTorch reference counts as the peer only where there is no other.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")
OURS = re.compile(r"trellis|ours\b|ours-")
DETAILS = re.compile(r"codes|order|128\^3|shuffled|one thread|window_partition")  # left to the full output

NO_PEER = re.compile(r"gradient\]|sgemm")  # another direction of ours; a rate of the machine


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n{table(run)}{MARKS[1]}{after}")


def table(run: dict[str, Any]) -> str:
    """Markdown: problem, ours, best other, ratio."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in run["benchmarks"]:
        groups[row["group"]].append(row)
    lines = ["| problem | ours | the fastest other | ratio |", "|---|---|---|---|"]
    for group, rows in groups.items():
        ours = [row for row in rows if OURS.search(row["name"])]
        others = [row for row in rows if row not in ours and not NO_PEER.search(row["name"])]
        others = [row for row in others if "reference" not in row["name"]] or others
        if ours and others and not DETAILS.search(group):
            mine, best = ours[0], min(others, key=_seconds)
            ratio = _seconds(best) / _seconds(mine)
            lines.append(f"| {group} | {_cell(mine)} | {_label(best)}: {_cell(best)} | {ratio:.1f}x |")
    cpu = run["machine_info"].get("cpu", {}).get("brand_raw", "unknown CPU")
    date, cores = run["datetime"][:10], run["machine_info"].get("cpu", {}).get("count", "?")
    return "\n".join(
        [*lines, "", f"{cpu}, {cores} threads, {date}; least time of a few rounds, peak memory added.", ""]
    )


def _seconds(row: dict[str, Any]) -> float:
    return row["stats"]["min"]


def _cell(row: dict[str, Any]) -> str:
    peak = next((value for key, value in row["extra_info"].items() if key.startswith("peak")), None)
    milliseconds = _seconds(row) * 1e3
    time = f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
    return time if peak is None else f"{time}, {peak:.0f} MiB"


def _label(row: dict[str, Any]) -> str:
    inside = re.search(r"\[(.*)\]", row["name"])
    words = (inside.group(1) if inside else row["name"]).split("-")
    unsaid = ("forward", "input", "weight", "sparse_pool", "upsample")
    known = [word for word in words if re.fullmatch(r"[a-z_]+", word) and word not in unsaid]
    return known[0].replace("_", " ") if known else row["name"]


if __name__ == "__main__":
    main()
