"""Where the host waits for the GPU: once per stage at most, never inside a model. On a pretended device everywhere,
and on the real one with torch's own check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.pipelines.test_image_to_3d import picture
from tests.support.pretend_cuda import OnCuda, PretendedDevice, pretend_cuda
from tests.support.scenes import sphere_voxels
from trellis import ImageTo3D, SparseTensor

pytestmark = pytest.mark.usefixtures("untrained_is_bundled")
MACHINE = PretendedDevice()


@pytest.fixture
def machine() -> Iterator[PretendedDevice]:
    with pretend_cuda(MACHINE):
        yield MACHINE


@pytest.fixture(scope="module")
def pipe() -> ImageTo3D:
    with pretend_cuda(MACHINE):
        return ImageTo3D.from_pretrained(device="cuda", dtype=torch.float32)


def forwards(pipe: Any, device: str, batch: int) -> dict[str, Callable[[], Any]]:
    """Every model of a pipeline, with inputs on the device."""

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device)

    coords = sphere_voxels(64, batch=batch, radius=0.1)
    slat = SparseTensor.from_coords(coords, torch.randn(len(coords), 8), 64, batch).to(device)
    models = {role: pipe.store.use(role).__enter__() for role in pipe.store.paths}
    flow, slat_flow = models["sparse_structure_flow_model"], models["slat_flow_model"]
    t = torch.full((batch,), 500.0).to(device)
    cond = made(batch, 7, flow.config.cond_channels)
    x, z = (made(batch, flow.config.in_channels, *(flow.config.resolution,) * 3) for _ in range(2))
    return {
        "image encoder": lambda: pipe.conditioner(x.new_zeros(1, 3, 28, 28)),
        "structure flow": lambda: flow(x, t, cond),
        "structure decoder": lambda: models["sparse_structure_decoder"](z),
        "latent flow": lambda: slat_flow(slat, t, cond),
        "gaussian decoder": lambda: models["slat_decoder_gs"](slat),
        "radiance decoder": lambda: models["slat_decoder_rf"](slat),
        "mesh decoder": lambda: models["slat_decoder_mesh"].features(slat),
    }


@pytest.mark.parametrize("batch", [1, 2])
def test_no_model_waits_once_the_maps_of_its_grid_exist(machine: PretendedDevice, pipe: ImageTo3D, batch: int) -> None:
    with torch.inference_mode():
        for name, forward in forwards(pipe, "cuda", batch).items():
            forward()
            with machine.counting() as events:
                forward()
            assert events == [], name


@pytest.mark.gpu
def test_no_model_waits_on_the_gpu() -> None:
    pipe = ImageTo3D.from_pretrained(device="cuda")
    with torch.inference_mode():
        for name, forward in forwards(pipe, "cuda", 2).items():
            forward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                forward()
            except RuntimeError as error:
                raise AssertionError(f"{name}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")


# docs/design.md, "Where the host waits for the GPU"
WAITS = {
    "reads back _to_copy of 8 bytes, in trellis/pipelines/stages.py": 1,  # how many voxels each object has
    "sized by data: trellis_kernels::coarsen, in trellis_kernels/operator.py": 1,
    "sized by data: trellis_kernels::window_partition, in trellis_kernels/operator.py": 2,  # straight and shifted
    "sized by data: trellis_kernels::surface_topology, in trellis_kernels/operator.py": 1,
    "waits: synchronize, in trellis/pipelines/measure.py": 8,  # the clock of each stage
}


@pytest.mark.parametrize("steps", [1, 3])
def test_generating_waits_at_stage_boundaries_only(machine: PretendedDevice, pipe: ImageTo3D, steps: int) -> None:
    with machine.counting() as events:
        asset = pipe(picture(), seed=1, steps=steps)
    assert Counter(event.rpartition(":")[0] for event in events) == WAITS
    assert isinstance(asset.gaussians.xyz, OnCuda)
    assert isinstance(asset.mesh.vertices, OnCuda)


@pytest.mark.parametrize("mode", ["stochastic", "multidiffusion"])
def test_more_views_do_not_wait_more_often(machine: PretendedDevice, pipe: ImageTo3D, mode: Any) -> None:
    with machine.counting() as events:
        pipe.from_views([picture(), picture(1)], mode=mode, steps=2, formats=[])
    assert len([event for event in events if "synchronize" not in event]) == 2  # voxels, coarser grid


def test_a_gpu_starts_from_the_same_noise(machine: PretendedDevice, pipe: ImageTo3D) -> None:
    """The pretended device computes with the CPU's kernels: whatever differs was drawn or decided elsewhere."""
    there = pipe(picture(), seed=7, steps=2)
    here = ImageTo3D.from_pretrained(dtype=torch.float32)(picture(), seed=7, steps=2)
    assert there.slat.feats.device.type == "cuda"
    assert torch.equal(there.slat.coords.cpu(), here.slat.coords)
    assert torch.equal(there.slat.feats.cpu(), here.slat.feats)
    assert torch.equal(there.gaussians.xyz.cpu(), here.gaussians.xyz)
    assert torch.equal(there.mesh.vertices.cpu(), here.mesh.vertices)


@pytest.mark.gpu
def test_the_gpu_starts_from_the_same_noise() -> None:
    starts = []
    for device in ("cpu", "cuda"):
        pipe, seen = ImageTo3D.from_pretrained(device=device, dtype=torch.float32), []
        pipe(picture(), seed=7, steps=1, formats=[], callback=lambda p, seen=seen: seen.append(p.estimate))
        starts.append(next(estimate for estimate in seen if estimate is not None).cpu())
    torch.testing.assert_close(*starts, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("does", "event"),
    [
        (lambda x: x.sum().item(), "reads back _local_scalar_dense"),
        (lambda x: x.tolist(), "reads back _to_copy"),
        (lambda x: bool((x > 0).any()), "reads back _local_scalar_dense"),
        (lambda x: x.cpu(), "reads back _to_copy"),
        (lambda x: x.nonzero(), "sized by data: nonzero"),
        (lambda x: x[x > 0], "sized by data: index with a mask"),
        (lambda x: x[[0, 1]], "uploads index with an index on the host"),
        (lambda x: x[torch.tensor([0, 1])], "uploads index with an index on the host"),
        (lambda x: x.masked_select(x > 0), "sized by data: masked_select"),
        (lambda x: torch.unique(x), "sized by data: _unique2"),
        (lambda x: x.repeat_interleave(x.long()), "sized by data: repeat_interleave.Tensor"),
        (lambda x: x.long().bincount(), "sized by data: bincount"),
        (lambda x: torch.tensor([1.0], device="cuda") + x, "uploads _to_copy of 4 bytes"),
        (lambda x: x.new_tensor([1.0]), "uploads _to_copy of 4 bytes"),
        (lambda x: x.copy_(torch.ones(4)), "uploads copy_ of 16 bytes"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_the_pretended_device_notices(
    machine: PretendedDevice, does: Callable[[Any], Any], event: str, inference: bool
) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(4, device="cuda")
        with machine.counting() as events:
            does(x)
    assert len(events) == 1
    assert events[0].startswith(event)


def test_the_pretended_device_lets_pass_what_does_not_wait(machine: PretendedDevice) -> None:
    before = machine.allocated
    with machine.counting() as events:
        x = torch.arange(6, device="cuda").repeat_interleave(2)
        x = x[2:, None] + torch.tensor(3) + torch.ones(5).to("cuda", non_blocking=True)
        x[0] = 5
    assert events == []
    assert machine.allocated - before == 5 * 10 * 4
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        x + torch.ones(5)
    del x
    assert machine.allocated == before
