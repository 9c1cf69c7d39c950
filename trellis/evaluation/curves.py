"""Training curves as a picture, from the logs of runs.

python -m trellis.evaluation.curves RUN... -o curves.png [--terms loss psnr]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from trellis.atomic import atomic_path

WIDTH, HEIGHT = 420, 260
COLORS = ("#1f6fb4", "#d1603d", "#3b8f5a", "#7a5aa6", "#a8862b")
POINTS = 200  # a curve has at most so many, each the median of its share of the steps


def read_terms(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Term -> steps and values, as ``RUN/log.txt`` has them.

    Raises:
        ValueError: the run has no log, or it has no line that is whole.
    """
    path = run / "log.txt"
    if not path.is_file():
        raise ValueError(f"{run} is no run of trellis train: it has no log.txt")
    terms: dict[str, list[tuple[int, float]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                terms.setdefault(name, []).append((line["step"], float(value)))
    if not terms:
        raise ValueError(f"{path} has no steps")
    return terms


def smoothed(points: Sequence[tuple[int, float]], count: int = POINTS) -> list[tuple[float, float]]:
    """Medians of consecutive shares of the points, at the middle of their steps."""
    size = max(1, -(-len(points) // count))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        ((group[0][0] + group[-1][0]) / 2, sorted(value for _, value in group)[len(group) // 2]) for group in groups
    ]


def draw_curves(runs: Sequence[Path], path: Path, terms: Sequence[str] = ("loss",), columns: int = 3) -> None:
    """Write a PNG with a panel per run; the values' axis is logarithmic where all are positive.

    Args:
        runs: folders of `trellis train`.
        path: to write.
        terms: which values of the log; those that a run has not are left out.
        columns: panels beside each other.

    Raises:
        ValueError: a run has no log, or none of the terms.
    """
    columns = min(columns, len(runs))
    rows = -(-len(runs) // columns)
    picture = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for index, run in enumerate(runs):
        found = read_terms(run)
        curves = {name: smoothed(found[name]) for name in terms if name in found}
        if not curves:
            raise ValueError(f"{run} has none of {', '.join(terms)}; it has {', '.join(found)}")
        _panel(draw, index % columns * WIDTH, index // columns * HEIGHT, run.name, curves)
    with atomic_path(path) as temporary:
        picture.save(temporary, optimize=True)


def _panel(
    draw: ImageDraw.ImageDraw, left: int, top: int, title: str, curves: dict[str, list[tuple[float, float]]]
) -> None:
    box = left + 62, top + 34, left + WIDTH - 16, top + HEIGHT - 30
    values = [value for points in curves.values() for _, value in points]
    logarithmic = min(values) > 0

    def height(value: float) -> float:
        return math.log10(value) if logarithmic else value

    low, high = height(min(values)), height(max(values))
    spread = (high - low) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    last = max(step for points in curves.values() for step, _ in points) or 1.0

    def at(step: float, value: float) -> tuple[float, float]:
        share = (height(value) - low) / (high - low)
        return box[0] + step / last * (box[2] - box[0]), box[3] - share * (box[3] - box[1])

    draw.text((box[0], top + 10), title, fill="black", font_size=15)
    for index in range(4):
        tick = low + (high - low) * (index + 0.5) / 4
        value = 10**tick if logarithmic else tick
        y = at(0, value)[1]
        draw.line([(box[0], y), (box[2], y)], fill="#dddddd")
        draw.text((box[0] - 6, y), f"{value:.3g}", fill="#555555", anchor="rm", font_size=12)
    for share in (0.0, 0.5, 1.0):
        x = box[0] + share * (box[2] - box[0])
        draw.text((x, box[3] + 6), f"{share * last:,.0f}", fill="#555555", anchor="mt", font_size=12)
    for index, (name, points) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        path = [at(*point) for point in points]
        draw.line([*path, path[-1]], fill=color, width=2)
        draw.text((box[2] - 4, box[1] + 4 + 16 * index), name, fill=color, anchor="rt", font_size=13)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trellis.evaluation.curves", description=(__doc__ or "").strip())
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--terms", nargs="+", default=["loss"])
    options = parser.parse_args()
    draw_curves(options.runs, options.output, options.terms)


if __name__ == "__main__":
    main()
