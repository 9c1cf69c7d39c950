import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trellis.evaluation import curves
from trellis.evaluation.curves import draw_curves, read_terms, smoothed


def write_log(run: Path, values: list[float], term: str = "loss") -> Path:
    run.mkdir()
    lines = [json.dumps({"step": step, term: value, "lr": None}) for step, value in enumerate(values)]
    (run / "log.txt").write_text("\n".join(lines) + '\n{"step": 9')  # cut off
    return run


def test_logs_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    assert read_terms(write_log(tmp_path / "run", [3.0, 2.0])) == {"loss": [(0, 3.0), (1, 2.0)]}
    with pytest.raises(ValueError, match=r"it has no log\.txt"):
        read_terms(tmp_path)


def test_smoothing_takes_medians() -> None:
    assert smoothed([(0, 1.0), (1, 9.0), (2, 2.0), (3, 5.0)], 2) == [(0.5, 9.0), (2.5, 5.0)]
    assert smoothed([(0, 1.0), (1, 100.0), (2, 2.0)], 1) == [(1.0, 2.0)]
    assert len(smoothed([(step, 1.0) for step in range(1001)])) <= curves.POINTS


def test_a_falling_loss_falls_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_log(tmp_path / name, [2.0**-i for i in range(50)]) for name in ("one", "two")]
    arguments = ["curves", *map(str, runs), "-o", str(tmp_path / "x.png"), "--terms", "loss", "psnr"]
    monkeypatch.setattr(sys, "argv", arguments)
    curves.main()
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    assert picture.shape == (curves.HEIGHT, 2 * curves.WIDTH, 3)
    blue = (np.abs(picture - [0x1F, 0x6F, 0xB4]).sum(-1) < 12) & (np.arange(curves.HEIGHT) > 60)[:, None]
    left = blue[:, : curves.WIDTH]
    columns = np.flatnonzero(left.any(0))
    heights = [np.flatnonzero(left[:, column]).mean() for column in columns]
    assert np.corrcoef(columns, heights)[0, 1] > 0.99  # a straight line down, as the axis is logarithmic
    assert blue[:, curves.WIDTH :].any()


def test_constant_and_negative_values_can_be_drawn(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / "one", [-1.0, 2.0]), write_log(tmp_path / "two", [1.0])]
    draw_curves(runs, tmp_path / "x.png", columns=1)
    assert Image.open(tmp_path / "x.png").height == 2 * curves.HEIGHT
    with pytest.raises(ValueError, match="has none of psnr; it has loss"):
        draw_curves(runs, tmp_path / "x.png", ["psnr"])
