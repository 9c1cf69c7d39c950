"""How the time of Gaussian rasterisation grows with Gaussians and with pixels, on a CPU.

    python -m benchmarks.gaussians_curve                    # the tables, and docs/images/gaussians_curve.png
    python -m benchmarks.gaussians_curve --out /tmp/one.png

CPU time of one thread, the minimum of several calls: on a shared machine it is what repeats. Gaussians are those a
decoder makes (`decoded_scene`): below 300k some voxels of the same object, above it more Gaussians of the same size in
each voxel, most of them hidden.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from tests.support.gaussians import Scene, decoded_scene
from trellis_kernels import rasterize_gaussians

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "gaussians_curve.png"
GAUSSIANS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
RESOLUTIONS = (128, 256, 512, 1024)
STEPS = ("forward", "backward")
COLORS = ("#1f6feb", "#d1480e")
SECONDS = 1.5  # per point, at least three calls
Point = tuple[float, float, float]  # how many, seconds forward, seconds backward


def cloud(count: int) -> Scene:
    """As a decoder makes them: below 300k fewer voxels of the same object, above it more in each."""
    scene = decoded_scene(min(count, 300_000))
    repeats = -(-count // len(scene.means))
    generator = torch.Generator().manual_seed(1)
    many = [part.repeat(repeats, *[1] * (part.ndim - 1))[:count] for part in scene[:5]]
    jitter = torch.rand(count, 3, generator=generator) / 64 - 1 / 128
    return Scene(many[0] + jitter, *many[1:], *scene[5:])


def cpu_time(run: Callable[[], Any]) -> float:
    run()
    best, end, calls = math.inf, time.perf_counter() + SECONDS, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.process_time()
        run()
        best, calls = min(best, time.process_time() - start), calls + 1
    return best


def measured(scene: Scene, resolution: int) -> tuple[float, float]:
    arguments: Any = scene.arguments(resolution, resolution)
    forward = cpu_time(lambda: rasterize_gaussians(*arguments))
    leaves = scene._replace(**{name: getattr(scene, name).requires_grad_() for name in Scene._fields[:6]})
    arguments = leaves.arguments(resolution, resolution)
    image, seed = rasterize_gaussians(*arguments).colors, torch.rand(1, resolution, resolution, 3)
    backward = cpu_time(lambda: torch.autograd.grad(image, list(leaves[:6]), seed, retain_graph=True))
    for leaf in leaves[:6]:
        leaf.requires_grad_(False)
    return forward, backward


def table(points: Sequence[Point], what: str) -> str:
    lines = [
        f"| {what} | forward ms | backward ms | backward / forward | forward us per 1000 {what} |",
        "|---|---|---|---|---|",
    ]
    for count, forward, backward in points:
        cells = (
            f"{1e3 * forward:.1f}",
            f"{1e3 * backward:.1f}",
            f"{backward / forward:.1f}",
            f"{1e9 * forward / count:.0f}",
        )
        lines.append(f"| {count:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def panel(draw: ImageDraw.ImageDraw, left: int, points: Sequence[Point], title: str, squares: bool) -> None:
    """Both axes logarithmic; the gray line is what grows in proportion, through the last point forward."""
    box = left + 62, 40, left + 452, 350
    low, high = (
        math.floor(math.log10(min(p[1] for p in points)) + 3),
        math.ceil(math.log10(max(p[2] for p in points)) + 3),
    )
    first, last = math.log10(points[0][0]), math.log10(points[-1][0])

    def at(count: float, seconds: float) -> tuple[float, float]:
        x = (math.log10(count) - first) / (last - first)
        y = (math.log10(1e3 * seconds) - low) / (high - low)
        return box[0] + 15 + x * (box[2] - box[0] - 30), box[3] - y * (box[3] - box[1])

    draw.text((box[0], 14), title, fill="black", font_size=15)
    for power in range(low, high + 1):
        _, y = at(points[0][0], 10.0 ** (power - 3))
        draw.line([(box[0], y), (box[2], y)], fill="#dddddd")
        draw.text((box[0] - 6, y), f"{10.0**power:g} ms", fill="#555555", anchor="rm", font_size=12)
    count, seconds, _ = points[-1]
    start = max(points[0][0], count * 10 ** (low - 3) / seconds)
    draw.line([at(start, seconds * start / count), at(count, seconds)], fill="#999999", width=1)
    for step, color in enumerate(COLORS):
        path = [at(point[0], point[1 + step]) for point in points]
        draw.line(path, fill=color, width=3)
        for x, y in path:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        draw.text((box[0] + 24, box[1] + 8 + 18 * step), STEPS[step], fill=color, font_size=14)
    for point in points:
        label = f"{math.isqrt(int(point[0]))}^2" if squares else f"{point[0] / 1e3:.0f}k"
        draw.text((at(point[0], 1e-3)[0], box[3] + 6), label, fill="#555555", anchor="mt", font_size=12)


def picture(by_gaussians: Sequence[Point], by_pixels: Sequence[Point], path: Path) -> None:
    image = Image.new("RGB", (960, 385), "white")
    draw = ImageDraw.Draw(image)
    panel(draw, 0, by_gaussians, "Gaussians, at 512^2 (gray: in proportion)", squares=False)
    panel(draw, 480, by_pixels, "pixels, 300k Gaussians (gray: in proportion)", squares=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    by_gaussians = [(float(count), *measured(cloud(count), 512)) for count in GAUSSIANS]
    sys.stdout.write(table(by_gaussians, "Gaussians") + "\n\n")
    sys.stdout.flush()
    scene: Scene = cloud(300_000)
    by_pixels = [(float(side * side), *measured(scene, side)) for side in RESOLUTIONS]
    sys.stdout.write(table(by_pixels, "pixels") + "\n")
    picture(by_gaussians, by_pixels, options.out)


if __name__ == "__main__":
    main()
