import math

import pytest
import torch

from trellis.evaluation.metrics import (
    NAMES,
    Shape,
    mean_scores,
    nearest_distances,
    occupancy_iou,
    picture_scores,
    score,
    surface_scores,
)


def test_iou_counts_common_voxels() -> None:
    first = torch.tensor([[0, 0, 0], [1, 0, 0], [31, 2, 3]])
    second = torch.tensor([[0, 0, 0], [0, 1, 0], [31, 2, 3], [31, 2, 3]]).int()
    assert occupancy_iou(first, second) == 0.5
    assert occupancy_iou(first, first) == 1
    assert occupancy_iou(first, first[:0]) == 0
    assert occupancy_iou(first[:0], first[:0]) == 1


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 300), (300, 7)])
def test_distances_are_those_of_brute_force(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.evaluation.metrics._AT_ONCE", 100)
    points, targets = torch.rand(n, 3), torch.rand(m, 3)
    table = (points[:, None].double() - targets[None].double()).square().sum(-1).sqrt().float()
    there, back = nearest_distances(points, targets)
    torch.testing.assert_close(there, table.amin(1))
    torch.testing.assert_close(back, table.amin(0))


def test_surfaces_that_are_shifted() -> None:
    """Of two planes at a distance d, all points are d away: F is a step at d, and the Chamfer distance is d."""
    plane = torch.cartesian_prod(torch.linspace(0, 1, 40), torch.linspace(0, 1, 40), torch.zeros(1))
    scores = surface_scores(plane, plane + torch.tensor([0, 0, 0.015]))
    assert scores["chamfer"] == pytest.approx(0.015, rel=1e-4)
    assert (scores["fscore_0.01"], scores["fscore_0.02"], scores["fscore_0.05"]) == (0, 1, 1)
    half = surface_scores(plane[: len(plane) // 2], plane)  # precision 1, recall a half and the rim
    recall = float((plane[:, 0] <= plane[len(plane) // 2 - 1, 0] + 0.02).double().mean())
    assert half["fscore_0.02"] == pytest.approx(2 * recall / (1 + recall), rel=1e-6)
    back = (plane[:, 0] - plane[len(plane) // 2 - 1, 0]).clamp(min=0).mean()  # the other way all distances are 0
    assert half["chamfer"] == pytest.approx(float(back) / 2, rel=1e-4)


def test_a_surface_that_is_not_there_is_the_worst() -> None:
    none, some = torch.zeros(0, 3), torch.rand(5, 3)
    for pair in ((none, some), (some, none)):
        assert surface_scores(*pair) == {"chamfer": 1.0, "fscore_0.01": 0.0, "fscore_0.02": 0.0, "fscore_0.05": 0.0}


def test_pictures_are_scored_view_by_view() -> None:
    truth = torch.rand(2, 3, 16, 16) * 0.5
    assert picture_scores(truth, truth) == {"psnr": 100.0, "ssim": pytest.approx(1.0, abs=1e-5)}
    changed = truth + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    expected = (-20 * math.log10(0.1) - 20 * math.log10(0.2)) / 2
    assert picture_scores(changed, truth)["psnr"] == pytest.approx(expected, rel=1e-5)
    assert picture_scores(truth + 5, truth)["psnr"] == picture_scores(torch.ones_like(truth), truth)["psnr"]


def test_what_is_not_there_has_no_score() -> None:
    truth = Shape(torch.zeros(1, 3).int(), torch.rand(9, 3), torch.rand(1, 3, 16, 16))
    scores = score(Shape(voxels=truth.voxels), truth)
    assert set(scores) == set(NAMES)
    assert scores["iou"] == 1
    assert all(value is None for name, value in scores.items() if name != "iou")
    assert None not in score(truth, truth).values()


def test_means_go_over_those_who_have_it() -> None:
    means = mean_scores([{"iou": 1.0, "psnr": None}, {"iou": 0.5, "psnr": 20.0, "name": "x"}])
    assert means["iou"] == 0.75
    assert means["psnr"] == 20
    assert means["ssim"] is None
