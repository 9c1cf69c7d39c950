import math
from pathlib import Path

import pytest
import torch

from tests.support.golden import golden
from trellis.representations.gaussian_ply import PROPERTIES, Y_DOWN, load_ply, save_ply
from trellis.representations.gaussians import GaussianConfig, Gaussians
from trellis.representations.rotation import matrix_to_quat, quat_to_matrix

RAW = ("xyz", "features_dc", "scaling", "rotation", "opacity")


def random_gaussians(count: int, config: GaussianConfig | None = None) -> Gaussians:
    return Gaussians(
        xyz=torch.rand(count, 3),
        features_dc=torch.randn(count, 1, 3),
        scaling=torch.randn(count, 3),
        rotation=0.5 * torch.randn(count, 4),
        opacity=torch.randn(count, 1),
        config=config or GaussianConfig(),
    )


def golden_gaussians() -> Gaussians:
    item = golden("gaussian_ply")
    return Gaussians(**{name: item[f"in._{name}"] for name in RAW})


def split(file: bytes) -> tuple[bytes, torch.Tensor]:
    end = file.index(b"end_header\n") + len(b"end_header\n")
    return file[:end], torch.frombuffer(bytearray(file[end:]), dtype=torch.float32).view(-1, len(PROPERTIES))


@pytest.mark.parametrize(("name", "transform"), [("ply_default", Y_DOWN), ("ply_none", None)])
def test_ply_is_the_official_one(name: str, transform: object, tmp_path: Path) -> None:
    save_ply(golden_gaussians(), tmp_path / "x.ply", transform)  # type: ignore[arg-type]
    header, rows = split((tmp_path / "x.ply").read_bytes())
    expected_header, expected = split(bytes(golden("gaussian_ply")[f"out.{name}"].tolist()))
    assert header == expected_header
    turned = (rows[:, -4:] * expected[:, -4:]).sum(-1, keepdim=True).sign()  # a quaternion and its negative are equal
    rows[:, -4:] *= turned
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-7)


def test_official_ply_is_read_as_the_official_code_does(tmp_path: Path) -> None:
    item = golden("gaussian_ply")
    (tmp_path / "x.ply").write_bytes(bytes(item["out.ply_none"].tolist()))
    loaded = load_ply(tmp_path / "x.ply", transform=None)
    for name in RAW:
        torch.testing.assert_close(getattr(loaded, name), item[f"out.reload_none._{name}"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("transform", [None, Y_DOWN])
@pytest.mark.parametrize(
    "config", [GaussianConfig(), GaussianConfig(scaling_activation="exp", aabb=(-1, -2, -3, 2, 4, 6))]
)
def test_loading_undoes_saving(transform: object, config: GaussianConfig, tmp_path: Path) -> None:
    gaussians = random_gaussians(50, config)
    save_ply(gaussians, tmp_path / "x.ply", transform)  # type: ignore[arg-type]
    loaded = load_ply(tmp_path / "x.ply", transform, config)  # type: ignore[arg-type]
    for name in ("xyz", "features_dc", "scaling", "opacity"):
        torch.testing.assert_close(getattr(loaded, name), getattr(gaussians, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quat_to_matrix(loaded.quats), quat_to_matrix(gaussians.quats), rtol=0, atol=2e-6)


def test_default_transform_turns_up_into_minus_y(tmp_path: Path) -> None:
    one = torch.zeros(1, 3)
    top = Gaussians(one + torch.tensor([0.5, 0.5, 1]), one[None], one, torch.zeros(1, 4), torch.zeros(1, 1))
    top.save(tmp_path / "x.ply")
    _, rows = split((tmp_path / "x.ply").read_bytes())
    torch.testing.assert_close(rows[0, :3], torch.tensor([0.0, -0.5, 0.0]))


def test_extreme_opacities_stay_finite(tmp_path: Path) -> None:
    gaussians = random_gaussians(2)
    gaussians.opacity[:, 0] = torch.tensor([100.0, -200.0])
    save_ply(gaussians, tmp_path / "x.ply")
    torch.testing.assert_close(load_ply(tmp_path / "x.ply").opacity, gaussians.opacity)


def test_raw_values_are_activated_as_documented() -> None:
    zero = torch.zeros(1, 3)
    gaussians = Gaussians(zero + 0.75, zero[None], zero, torch.zeros(1, 4), torch.zeros(1, 1))
    torch.testing.assert_close(gaussians.means, zero + 0.25)
    torch.testing.assert_close(gaussians.scales, zero + math.sqrt(0.004**2 + 0.0009**2))
    torch.testing.assert_close(gaussians.opacities, torch.tensor([0.1]))
    torch.testing.assert_close(gaussians.quats, torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(gaussians.colors, zero + 0.5)


@pytest.mark.parametrize("name", ["slat_dec_gs", "slat_dec_gs_small"])
def test_activated_values_are_the_official_ones(name: str) -> None:
    item = golden(name)
    for sample in ("0", "1"):
        if f"out.{sample}.raw_xyz" not in item.tensors:
            continue
        gaussians = Gaussians(**{raw: item[f"out.{sample}.raw_{raw}"] for raw in RAW})
        expected = {
            "means": item[f"out.{sample}.get_xyz"],
            "scales": item[f"out.{sample}.get_scaling"],
            "quats": item[f"out.{sample}.get_rotation"],
            "opacities": item[f"out.{sample}.get_opacity"][:, 0],
        }
        for attribute, value in expected.items():
            torch.testing.assert_close(getattr(gaussians, attribute), value, rtol=1e-6, atol=1e-6)


def header(**changes: str) -> str:
    lines = {"format": "format binary_little_endian 1.0", "count": "element vertex 2", "more": ""} | changes
    names = changes.get("names", " ".join(PROPERTIES)).split()
    text = [lines["format"], lines["count"], *(f"property float {name}" for name in names), lines["more"]]
    return "\n".join(["ply", *filter(None, text), "end_header", ""])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("pnm\n", "does not begin with 'ply'"),
        ("ply\n" + "comment x\n" * 10000, "header of at most"),
        (header(format="format ascii 1.0"), "binary_little_endian 1.0; got ascii"),
        (header(count="element vertex 1000000000000"), "1000000000000 vertices of 68 bytes; it has 136 bytes"),
        (header(count="element vertex -1"), "vertex element and its count"),
        (header(count="element face 2"), "vertex element and its count"),
        (header(count="element vertex " + "9" * 40), "vertex element and its count"),
        (header(names="x y z"), "missing: f_dc_0"),
        (header(more="property float f_rest_0"), "degree 0 only"),
        (header(more="property float x"), "once"),
        (header(more="property list uchar int vertex_indices"), "valid PLY header"),
        (header(more="property quad a"), "plain PLY types"),
        (header(more="nonsense"), "valid PLY header"),
        (header(count="comment none"), "valid PLY header"),
    ],
)
def test_says_what_is_wrong_with_a_file(head: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.ply").write_bytes(head.encode() + bytes(2 * 68))
    with pytest.raises(ValueError, match=message):
        load_ply(tmp_path / "x.ply")


def test_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    gaussians = random_gaussians(3)
    gaussians.features_dc[1] = math.nan
    save_ply(gaussians, tmp_path / "x.ply")
    with pytest.raises(ValueError, match="finite values; features_dc"):
        load_ply(tmp_path / "x.ply")


def test_reads_properties_in_any_order_and_passes_over_others(tmp_path: Path) -> None:
    gaussians = random_gaussians(2)
    save_ply(gaussians, tmp_path / "x.ply", None)
    _, rows = split((tmp_path / "x.ply").read_bytes())
    order = torch.arange(len(PROPERTIES)).flip(0)
    names = [PROPERTIES[i] for i in order] + ["extra"]
    data = torch.cat([rows[:, order], torch.zeros(2, 1)], 1).contiguous().numpy().tobytes()
    (tmp_path / "y.ply").write_bytes(header(names=" ".join(names)).encode() + data)
    torch.testing.assert_close(load_ply(tmp_path / "y.ply", None).scaling, load_ply(tmp_path / "x.ply", None).scaling)


def test_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.ply").write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_ply(random_gaussians(1), tmp_path / "x.ply")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ply"]
    assert (tmp_path / "x.ply").read_text() == "before"


def test_save_goes_by_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.ply; got .*x\.obj"):
        random_gaussians(1).save(tmp_path / "x.obj")


def test_names_a_tensor_of_the_wrong_shape_or_dtype() -> None:
    zero = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rotation must be \[G, 4\] with G=2; got \[2, 3\]"):
        Gaussians(zero, zero[:, None], zero, zero, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"scaling_activation must be 'softplus' or 'exp'; got 'relu'"):
        GaussianConfig(scaling_activation="relu")  # type: ignore[arg-type]


def test_rotations_are_the_official_ones() -> None:
    item = golden("cameras_backproject")
    item.check("out.quat_to_matrix", quat_to_matrix(item["in.quat"]))
    item.check("out.matrix_to_quat", matrix_to_quat(item["out.quat_to_matrix"]))


def test_matrix_to_quat_is_exact_for_half_turns() -> None:
    turns = torch.stack([torch.diag(torch.tensor(axis)) for axis in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1])])
    torch.testing.assert_close(matrix_to_quat(turns), torch.eye(4)[1:])
