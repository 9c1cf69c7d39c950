import math

import pytest
import torch

from tests.training.objectives.scene import RESOLUTION, TRUNK, box, cameras, pictures, voxels
from trellis.checkpoints import build_model
from trellis.renderers.mesh import render_mesh
from trellis.representations.mesh import Mesh
from trellis.training.batches import seeded
from trellis.training.objectives import build_objective
from trellis.training.objectives.mesh import MeshDecoding
from trellis.training.objectives.radiance_field import RadianceFieldDecoding
from trellis.training.objectives.surfaces import Truth, chamfer_distance, sample_points, towards
from trellis_kernels import ExtractedMesh
from trellis_kernels.mesh_extraction import ExtractionTerms


def decoder(name: str, **args: object) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return build_model(name, {**TRUNK, "model_channels": 64, "num_blocks": 1, **args})


def optimise(objective: object, model: torch.nn.Module, batch: dict, steps: int, lr: float) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    curve = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 6)
        terms = objective({"decoder": model}, batch, seeded(step))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        curve.append({name: float(term.detach()) for name, term in terms.items()})
    return curve


def test_a_radiance_field_decoder_overfits_one_object() -> None:
    objective = build_objective("SLatVaeRadianceFieldDecoderTrainer", {"lambda_lpips": 0.0})
    model = decoder("SLatRadianceFieldDecoder", representation_config={"rank": 4, "dim": 4})
    curve = optimise(objective, model, {"latents": voxels(4), **pictures(24)}, 40, 1e-2)
    assert curve[-1]["psnr"] > 16
    assert curve[-1]["psnr"] > curve[0]["psnr"] + 5
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert set(curve[0]) == {"loss", "l1", "ssim", "psnr"}
    with pytest.raises(ValueError, match="ssaa must be at least 1; got 0"):
        RadianceFieldDecoding(lambda_lpips=0, ssaa=0)


def mesh_batch(objects: int = 1, size: int = 32) -> dict:
    mesh = box()
    return {"latents": voxels(4, objects), "mesh": [(mesh.vertices, mesh.faces)] * objects, **pictures(size, objects)}


def test_a_mesh_decoder_overfits_one_object() -> None:
    # The distances weigh much more than officially: with the pictures alone so few steps may end without a surface.
    args = {"lambda_lpips": 0.0, "lambda_chamfer": 1.0, "chamfer_points": 512, "lambda_tsdf": 1000.0}
    objective = build_objective("SLatVaeMeshDecoderTrainer", args)
    model = decoder("ElasticSLatMeshDecoder", model_channels=256, representation_config={"use_color": True})
    curve = optimise(objective, model, mesh_batch(size=24), 12, 1e-3)
    first, last = curve[0], curve[-1]
    assert last["extracted"] == 1.0
    for name, share in (("mask", 0.7), ("depth", 0.8), ("color", 0.85), ("chamfer", 0.75), ("tsdf", 0.3)):
        assert last[name] < share * first[name], (name, first, last)


def test_the_terms_of_a_mesh_add_up_and_every_parameter_gets_a_gradient() -> None:
    objective = MeshDecoding(lambda_lpips=0.0, depth_loss_type="l1")
    model = decoder("SLatMeshDecoder", model_channels=256, representation_config={"use_color": True})
    batch = {**mesh_batch(2, 16)}
    batch["normal_map"] = torch.rand(2, 2, 3, 16, 16, generator=seeded(0))
    terms = objective({"decoder": model}, batch, seeded(0))
    expected = terms["mask"] + 10 * terms["depth"] + terms["normal"] + terms["regularity"] + 0.01 * terms["tsdf"]
    expected = expected + 0.1 * (terms["color"] + terms["normal_map"])
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="depth_loss_type must be l1 or smooth_l1; got 'l2'"):
        MeshDecoding(depth_loss_type="l2")


def test_what_has_no_surface_counts_with_its_regularity_and_distances() -> None:
    model = decoder("SLatMeshDecoder", model_channels=256, representation_config={"use_color": False})
    with torch.no_grad():
        model.out_layer.bias[:8] += 100.0  # everywhere outside
    terms = MeshDecoding(lambda_lpips=0.0)({"decoder": model}, mesh_batch(size=16), seeded(0))
    assert terms["extracted"] == 0
    torch.testing.assert_close(terms["loss"], terms["regularity"] + 0.01 * terms["tsdf"])
    terms["tsdf"].backward()
    assert float(model.out_layer.bias.grad[:8].min()) > 0  # a step lowers the distances: a surface comes back


def test_normals_of_the_truth_face_the_camera() -> None:
    inverted = Mesh(box().vertices, box().faces.flip(1))
    for mesh in (box(), inverted):
        truth = Truth.of(mesh, cameras(2), 32, 1)
        seen = render_mesh(box(), cameras(2), 32, ssaa=1, near=1.0, far=3.0).normals
        inside = truth.mask[:, None] > 0.99
        expected = towards(seen, cameras(2))
        torch.testing.assert_close(torch.where(inside, truth.normals, 0), torch.where(inside, expected, 0))


def test_distances_of_the_true_surface_along_the_line_of_sight_have_no_error() -> None:
    """A wall across the view: the distance of a point along the line of sight is its height over the wall."""
    from trellis.renderers.camera import Cameras
    from trellis.training.objectives.surfaces import truncated_distance_error

    camera = Cameras.look_at((0.0, -2.0, 0.0))
    points = torch.rand(200, 3, generator=seeded(0)) - 0.5
    points[:, 1] = 0.1 * points[:, 1]
    limit = 3 / 32
    depths = torch.full((1, 8, 8), 2.0)  # the wall is the plane y = 0
    sdf = (-points[:, 1]).clamp(-limit, limit)
    zero = torch.zeros(())
    mesh = ExtractedMesh(points, torch.zeros(1, 3).long(), points, ExtractionTerms(zero, zero, zero, points, sdf))
    assert float(truncated_distance_error(mesh, depths, camera, 32)) == pytest.approx(0, abs=1e-10)
    off = mesh._replace(terms=mesh.terms._replace(grid_sdf=sdf + 0.01))
    assert float(truncated_distance_error(off, depths, camera, 32)) == pytest.approx(1e-4, rel=1e-3)


def test_points_lie_evenly_on_the_surface_and_their_distance_is_that_of_the_shapes() -> None:
    square = Mesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2], [0, 2, 3]]))
    points = sample_points(square, 20_000, seeded(0))
    assert float(points[:, 2].abs().max()) == 0
    torch.testing.assert_close(points.mean(0)[:2], torch.tensor([0.5, 0.5]), rtol=0, atol=0.01)
    assert float(((points[:, 0] < 0.5) & (points[:, 1] < 0.25)).float().mean()) == pytest.approx(0.125, abs=0.01)
    shifted = points[:1000] + torch.tensor([0, 0, 0.25])
    assert float(chamfer_distance(points[:1000], shifted)) == pytest.approx(0.5, rel=1e-5)
    vertices = square.vertices.clone().requires_grad_()
    chamfer_distance(sample_points(Mesh(vertices, square.faces), 100, seeded(0)), shifted).backward()
    assert vertices.grad is not None
    assert math.isfinite(float(vertices.grad.abs().sum()))
    assert RESOLUTION == 8


def test_derivatives_on_the_surface_are_those_of_finite_differences() -> None:
    from trellis.renderers.camera import Cameras
    from trellis.training.objectives.surfaces import truncated_distance_error

    targets = torch.rand(7, 3, generator=seeded(0), dtype=torch.float64)
    points = torch.rand(5, 3, generator=seeded(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: chamfer_distance(p, targets), points)
    faces = torch.tensor([[0, 1, 2], [2, 3, 4]])
    assert torch.autograd.gradcheck(lambda p: sample_points(Mesh(p, faces), 6, seeded(2)), points)

    camera = Cameras.look_at((0.0, -2.0, 0.0))
    double = Cameras(camera.extrinsics.double(), camera.intrinsics.double(), camera.near, camera.far)
    depths = 2 + 0.05 * torch.rand(1, 6, 6, generator=seeded(3), dtype=torch.float64)
    grid = 0.2 * (torch.rand(9, 3, generator=seeded(4), dtype=torch.float64) - 0.5)
    sdf = (0.1 * torch.rand(9, generator=seeded(5), dtype=torch.float64)).requires_grad_()
    zero, triangle = torch.zeros(()), torch.zeros(1, 3).long()

    def error(positions: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        terms = ExtractionTerms(zero, zero, zero, positions, distances)
        return truncated_distance_error(ExtractedMesh(positions, triangle, positions, terms), depths, double, 16)

    assert torch.autograd.gradcheck(error, (grid.requires_grad_(), sdf))


def test_the_log_of_a_mesh_names_its_perceptual_distance() -> None:
    class Distance:
        term = "perceptual_pretend"

        def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (images - targets).square().mean()

    objective = MeshDecoding(lambda_ssim=0.0, lambda_lpips=0.0)
    model = decoder("SLatMeshDecoder", model_channels=256, representation_config={"use_color": True})
    plain = objective({"decoder": model}, mesh_batch(size=16), seeded(0))
    objective.compare.perceptual, objective.compare.lambda_lpips = Distance(), 0.5
    terms = objective({"decoder": model}, mesh_batch(size=16), seeded(0))
    assert set(terms) - set(plain) == {"normal_perceptual_pretend", "color_perceptual_pretend"}
    for name in ("normal", "color"):
        torch.testing.assert_close(terms[name], plain[name] + 0.5 * terms[f"{name}_perceptual_pretend"])
