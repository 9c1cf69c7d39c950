import pytest
import torch

from tests.models.golden_models import golden_model, sparse_input
from tests.support.golden import Golden
from trellis.models.gaussian_decoder import GaussianDecoder
from trellis.representations.gaussians import Gaussians
from trellis.representations.rotation import quat_to_matrix


@pytest.mark.parametrize("name", ["slat_flow_img", "slat_flow_noskip", "slat_flow_flat", "slat_flow_small"])
def test_latent_flow_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    with torch.inference_mode():
        velocity = model(sparse_input(item), item["in.t"], item["in.cond"])
    assert torch.equal(velocity.coords, item["in.coords"])
    item.check("out.feats", velocity.feats)


@pytest.mark.parametrize("name", ["slat_encoder", "slat_encoder_small"])
def test_latent_encoder_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    with torch.inference_mode():
        mean, logvar = model(sparse_input(item))
    item.check("out.mean", mean.feats)
    item.check("out.logvar", logvar.feats)


@pytest.mark.parametrize("name", ["slat_dec_gs", "slat_dec_gs_small"])
def test_gaussian_decoder_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    assert isinstance(model, GaussianDecoder)
    with torch.inference_mode():
        item.check("out.offset_perturbation", model.offset_perturbation)
        item.check("out.hidden", model.features(sparse_input(item)).feats)
        decoded = model(sparse_input(item))
    assert len(decoded) == int(item["in.coords"][-1, 0]) + 1
    for sample, gaussians in enumerate(decoded):
        _check_gaussians(item, f"out.{sample}", gaussians)


def _check_gaussians(item: Golden, prefix: str, gaussians: Gaussians) -> None:
    raw = {"xyz": gaussians.xyz, "features_dc": gaussians.features_dc, "scaling": gaussians.scaling}
    raw |= {"rotation": gaussians.rotation, "opacity": gaussians.opacity}
    for name, value in raw.items():
        item.check(f"{prefix}.raw_{name}", value)
    item.check(f"{prefix}.get_xyz", gaussians.means)
    item.check(f"{prefix}.get_scaling", gaussians.scales)
    item.check(f"{prefix}.get_rotation", gaussians.quats)
    item.check(f"{prefix}.get_opacity", gaussians.opacities[:, None])
    half = quat_to_matrix(gaussians.quats) * gaussians.scales[:, None]
    upper = torch.triu_indices(3, 3)
    item.check(f"{prefix}.covariance6", (half @ half.mT)[:, upper[0], upper[1]])


@pytest.mark.parametrize("name", ["slat_dec_rf", "slat_dec_rf_small"])
def test_radiance_decoder_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    with torch.inference_mode():
        item.check("out.hidden", model.features(sparse_input(item)).feats)
        decoded = model(sparse_input(item))
    for sample, field in enumerate(decoded):
        item.check(f"out.{sample}.position", field.positions)
        item.check(f"out.{sample}.trivec", field.trivec)
        item.check(f"out.{sample}.density", field.density)
        item.check(f"out.{sample}.features_dc", field.features_dc)
        assert field.depth == int(item[f"out.{sample}.depth"][0])


@pytest.mark.parametrize("name", ["slat_dec_mesh", "slat_dec_mesh_wide"])
def test_mesh_decoder_network_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    with torch.inference_mode():
        features = model.features(sparse_input(item, model.config.resolution))
    item.check("out.coords", features.coords)
    item.check("out.feats", features.feats, max_abs=2e-5)


def test_mesh_decoder_extracts_the_official_meshes() -> None:
    item, model = golden_model("slat_dec_mesh")
    with torch.inference_mode():
        meshes = model(sparse_input(item, model.config.resolution))
    for sample, mesh in enumerate(meshes):
        assert [len(mesh.vertices), len(mesh.faces)] == item[f"out.{sample}.num"].tolist()
        stored = item[f"out.{sample}.vertices"]
        distance, nearest = torch.cdist(stored.double(), mesh.vertices.double()).min(dim=1)
        assert float(distance.max()) <= 5e-5
        attributes = torch.cat([mesh.colors, mesh.normals], dim=1)[nearest]
        assert float((attributes - item[f"out.{sample}.vertex_attrs"]).abs().max()) <= 2e-4
