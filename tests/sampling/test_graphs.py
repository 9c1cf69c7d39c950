"""CUDA graphs: what is copied, recorded and replayed, on a pretended device; the recording itself on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.pipelines.test_image_to_3d import picture
from tests.support.pretend_cuda import pretend_cuda
from trellis import ImageTo3D
from trellis.pipelines.stages import Cancelled, Progress
from trellis.sampling import graphs
from trellis.sampling.graphs import GraphedFlow


class Pair(NamedTuple):
    key: Tensor
    value: Tensor


class Toy:
    torso_dtype = torch.float32

    def __init__(self) -> None:
        self.weight = torch.full((3,), 2.0, device="cuda")

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        key, value = cond if isinstance(cond, Pair) else (cond, cond)
        return x * self.weight + t[:, None] + key.sum() - value.mean()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A pretended device, and how often something was recorded on it; a replay computes it again, into its place."""
    made: list[int] = []

    def record(function: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
        output = function()
        made.append(pool)

        def replay() -> None:
            output.copy_(function())

        return replay, output

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    with pretend_cuda():
        yield made


def test_a_graph_is_recorded_once_per_kind_of_input_and_gives_what_the_model_gives(recordings: list[int]) -> None:
    model = Toy()
    graphed = GraphedFlow(model)
    kinds = [torch.ones(2, 3, device="cuda"), Pair(*torch.rand(2, 4).to("cuda"))]
    for batch in (1, 2):
        for cond in kinds:
            for step in range(3):
                x = torch.randn(batch, 3).to("cuda")
                t = torch.full((batch,), float(step), device="cuda")
                assert torch.equal(graphed(x, t, cond).cpu(), model(x, t, cond).cpu())
    assert recordings == [7] * 4
    assert graphed.weight is model.weight


def test_results_and_inputs_are_not_aliased(recordings: list[int]) -> None:
    graphed, t, cond = GraphedFlow(Toy()), torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    x = torch.ones(1, 3, device="cuda")
    first = graphed(x, t, cond)
    x += 1  # the same tensor with other values
    second = graphed(x, t, cond)
    assert first.tolist() == [[2.0] * 3]
    assert second.tolist() == [[4.0] * 3]
    del cond
    assert graphed(x, t, torch.ones(1, device="cuda")).tolist() == [[4.0] * 3]
    assert graphed(x, t, Pair(torch.ones(1, device="cuda"), t)).tolist() == [[5.0] * 3]


def test_a_tensor_of_the_host_is_refused() -> None:
    class Nothing:
        torso_dtype = torch.float32

    with pytest.raises(ValueError, match="x must be on a CUDA device to be used with CUDA graphs; got cpu"):
        GraphedFlow(Nothing())(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1))


def structure_of(pipe: ImageTo3D, seed: int) -> Tensor:
    """Where the structure flow ends."""
    seen: list[Tensor] = []

    def watch(progress: Progress) -> bool:
        if progress.stage == "structure_flow":
            seen.append(progress.estimate)
        return len(seen) < 2

    with pytest.raises(Cancelled):
        pipe(picture(seed), seed=seed, steps=2, callback=watch)
    return seen[-1].cpu()


def test_a_pipeline_replays_its_structure_flow(recordings: list[int]) -> None:
    pipe = ImageTo3D.from_pretrained(device="cuda", dtype=torch.float32, cuda_graphs=True)
    graphed = structure_of(pipe, 1)
    made = len(recordings)
    assert 1 <= made <= 2  # with guidance and without
    again = structure_of(pipe, 2)
    assert len(recordings) == made
    pipe.store.cuda_graphs = False
    pipe.store.place()
    assert torch.equal(graphed, structure_of(pipe, 1))
    assert torch.equal(again, structure_of(pipe, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cuda_graphs needs a CUDA device; got cpu"),
        ({"memory": "8GB"}, "cuda_graphs needs the models to stay where they are"),
        ({"low_memory": True}, "cuda_graphs needs the models to stay where they are"),
    ],
)
def test_what_graphs_do_not_go_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTo3D.from_pretrained(cuda_graphs=True, **options)


@pytest.mark.gpu
def test_graphs_on_the_gpu_change_nothing() -> None:
    plain = ImageTo3D.from_pretrained(device="cuda")
    graphed = ImageTo3D.from_pretrained(device="cuda", cuda_graphs=True)
    for seed in (1, 2):
        expected = plain(picture(seed), seed=seed, steps=4, formats=[])
        actual = graphed(picture(seed), seed=seed, steps=4, formats=[])
        assert torch.equal(actual.slat.coords, expected.slat.coords)
        torch.testing.assert_close(actual.slat.feats, expected.slat.feats, rtol=1e-2, atol=1e-2)
