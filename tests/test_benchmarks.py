"""What the benchmarks prepare for other libraries and problems, checked where no GPU is needed for it."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.full_scale import seed
from benchmarks.peers import convolution_matrix, scalar_splatter
from benchmarks.plain_flow import flow_gflop, plain_structure_flow
from benchmarks.report import supervise
from benchmarks.scenes import flexgemm_shell, object_voxels
from tests.support.gaussians import Scene, assert_images_agree, decoded_scene, random_scene
from tests.support.scenes import sphere_voxels
from tests.support.sparse_maps import neighbors_of
from trellis.models.structure_flow import FlowConfig, StructureFlow
from trellis_kernels import rasterize_gaussians, submanifold_conv, window_partition

FLOW = {"resolution": 4, "in_channels": 3, "model_channels": 32, "cond_channels": 16, "out_channels": 3,
        "num_blocks": 2, "num_heads": 2, "patch_size": 2}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_the_sparse_matrix_of_a_neighbor_map_gives_the_convolution() -> None:
    neighbors = neighbors_of(sphere_voxels(8))
    feats, weight = torch.randn(len(neighbors), 5), torch.randn(7, 27, 5)
    offsets, columns = convolution_matrix(neighbors)
    rows, taps = neighbors.shape
    matrix = torch.sparse_csr_tensor(
        offsets, columns, torch.ones(len(columns)), size=(rows, taps * rows), check_invariants=True
    )
    products = (feats @ weight.permute(2, 1, 0).flatten(1)).view(rows * taps, -1)
    torch.testing.assert_close(matrix @ products, submanifold_conv(feats, neighbors, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scene", [random_scene(300, size=0.2), random_scene(500), decoded_scene(3000)])
def test_the_scalar_splatter_draws_the_same_picture(scene: Scene) -> None:
    arguments = scene.arguments(70, 50)
    expected = rasterize_gaussians(*arguments).colors[0]
    assert_images_agree(scalar_splatter(tight=True)(*arguments), expected)
    usual = scalar_splatter(tight=False)(*arguments)
    assert (usual - expected).abs().max() < 0.03  # alphas below e^-4.5 outside its boxes
    assert (usual - expected).abs().mean() < 1e-3


@pytest.mark.parametrize("flags", [{}, {"share_mod": True, "qk_rms_norm": True, "qk_rms_norm_cross": True}])
def test_the_flow_in_plain_torch_is_the_same_flow(flags: dict[str, bool]) -> None:
    model = seed(StructureFlow(FlowConfig(**FLOW, **flags)))
    x, t, cond = torch.randn(2, 3, 4, 4, 4), torch.tensor([500.0, 20.0]), torch.randn(2, 5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(plain_structure_flow(model, x, t, cond), model(x, t, cond), rtol=1e-4, atol=1e-4)


def test_operations_of_the_released_structure_flow() -> None:
    """5.23 TFLOP per forward, of which 138 GFLOP are the keys and values of the conditioning."""
    config = FlowConfig(**FLOW | {"model_channels": 1024, "cond_channels": 1024, "num_blocks": 24, "num_heads": 16})
    assert flow_gflop(4096, config, 1374) == pytest.approx(5227 - 138, rel=0.001)


def test_scenes_have_the_sizes_they_are_named_for() -> None:
    assert [len(flexgemm_shell(r)) for r in (64, 128)] == [15_192, 64_160]
    coords = object_voxels()
    _, offsets = window_partition(coords, 8, 4)
    sizes = len(coords), len((coords // coords.new_tensor([1, 2, 2, 2])).unique(dim=0)), len(offsets) - 1
    assert (sizes, int(offsets.diff().max())) == ((19_192, 5_632, 332), 89)


ON_A_PRETENDED_GPU = """
import pytest
from benchmarks import device
device.on_gpu = lambda: True
device._rounds = lambda run, rounds: [0.25, 0.5, 0.125][:rounds]
device.peak_memory = lambda run: 12.0

@pytest.mark.benchmark(timer=device.TIMER)
def test_row(benchmark):
    calls = []
    device.measure(benchmark, lambda: calls.append(1), rounds=1, gflop=3.0, dtype="tf32")
    assert len(calls) == 1  # to warm up; the rounds are the events'
"""


def test_durations_of_cuda_events_reach_the_record(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(ON_A_PRETENDED_GPU)
    path = tmp_path / "rows.jsonl"
    step = supervise("some", [str(tmp_path), "-p", "no:cacheprovider"], path, time.monotonic() + 60)
    assert step.status == "passed", step
    (row,) = [entry["row"] for entry in record.read(path).values()]
    stats = {key: row["stats"][key] for key in ("min", "median", "max", "rounds")}
    assert stats == {"min": 0.125, "median": 0.25, "max": 0.5, "rounds": 3}
    assert row["extra_info"] == {"peak MiB": 12.0, "dtype": "tf32", "GFLOP/s": 12.0}
