"""The README's tables, from a report.

    python -m benchmarks.table benchmarks/results/nvidia-h100-80gb-hbm3.json

rewrites the part of README.md between the marks of the report's kind of device. One line per problem that has a peer:
ours and the fastest peer, with the peak memory each added. The plain-PyTorch reference counts as the peer only where
there is no other. On a CPU, which others disturb, a time is the least of the rounds; on a GPU it is the median.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import problems, validate
from trellis.atomic import atomic_path

README = Path(__file__).parents[1] / "README.md"
MARKS = {
    "cpu": ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"),
    "cuda": ("<!-- gpu benchmarks: begin -->", "<!-- gpu benchmarks: end -->"),
}
DETAILS = re.compile(r"codes|order|128\^3|shuffled|one thread|window_partition")  # left to the full output
WHICH_TIME = {"cpu": ("min", "least time of a few rounds"), "cuda": ("median", "median of the rounds")}


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    wrong = validate(report)
    if wrong:
        raise SystemExit("\n".join(wrong))
    write_into(README, report)


def write_into(readme: Path, report: dict[str, Any]) -> None:
    """Replace the part of `readme` between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = MARKS[report["device"]["kind"]]
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme} must contain {begin} and {end}")
    with atomic_path(readme) as path:
        path.write_text(f"{before}{begin}\n{table(report)}{end}{after}")


def table(report: dict[str, Any]) -> str:
    """Markdown: problem, ours, best other, ratio, and on a GPU ours as a part of what the device can do."""
    kind = report["device"]["kind"]
    gpu, (time, which) = kind == "cuda", WHICH_TIME[kind]
    more = (" of matmul | of copy |", "---|---|") if gpu else ("", "")
    lines = [f"| problem | ours | the fastest other | ratio |{more[0]}", f"|---|---|---|---|{more[1]}"]
    for problem, rows in problems(report).items():
        ours = next((row for row in rows if row["role"] == "ours"), None)
        others = [row for row in rows if row["role"] == "peer"] or [row for row in rows if row["role"] == "reference"]
        if ours is None or (not others and not gpu) or DETAILS.search(problem):
            continue
        best = min(others, key=lambda row: row[time], default=None)
        theirs = f"{best['implementation']}: {_cell(best, time)}" if best else "none"
        ratio = f"{best[time] / ours[time]:.1f}x" if best else ""
        parts = f" {_percent(ours['of matmul'])} | {_percent(ours['of copy'])} |" if gpu else ""
        lines.append(f"| {problem} | {_cell(ours, time)} | {theirs} | {ratio} |{parts}")
    return "\n".join([*lines, "", f"{_where(report)}; {which}, peak memory added.", ""])


def _where(report: dict[str, Any]) -> str:
    device, versions, date = report["device"], report["versions"], report["created"][:10]
    commit = (report["commit"]["id"] or "unknown")[:10] + (" with changes" if report["commit"]["dirty"] else "")
    rest = f"torch {versions['torch']}, commit {commit}, {date}"
    if device["kind"] == "cpu":
        return f"{device['name']}, {device['threads']} threads, {rest}"
    rates = report["rates"]
    reached = [f"copy {rates['copy'] / 1000:.2f} TB/s"] if rates["copy"] else []
    reached += [f"matmul {name} {rate / 1000:.0f} TFLOP/s" for name, rate in rates["matmul"].items()]
    return f"{device['name']}, driver {device['driver']}, {rest}; in the same run: {', '.join(reached) or 'no rates'}"


def _cell(row: dict[str, Any], time: str) -> str:
    milliseconds, peak = row[time] * 1e3, row["peak MiB"]
    text = f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
    return text if peak is None else f"{text}, {peak:.0f} MiB"


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.0f} %"


if __name__ == "__main__":
    main()
