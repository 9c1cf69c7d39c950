import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trellis.representations.radiance_field import FORMAT, TENSORS, RadianceField


def random_field(count: int = 5, dtype: torch.dtype = torch.float32, **changes: object) -> RadianceField:
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    cells = torch.randint(64, (count, 3), generator=generator)
    values = {
        "positions": ((cells + 0.5) / 64).to(dtype),
        "depth": 6,
        "trivec": normal(count, 4, 3, 8),
        "density": normal(count, 4),
        "features_dc": normal(count, 4, 1, 3),
        "resolution": 64,
    }
    return RadianceField(**values | changes)  # type: ignore[arg-type]


METADATA = {"format": FORMAT, "depth": "6", "resolution": "64", "aabb": "[-0.5, -0.5, -0.5, 1, 1, 1]"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 7])
def test_loading_undoes_saving(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    field = random_field(count, dtype, aabb=(-1.0, -2.0, -3.0, 2.0, 4.0, 6.5), resolution=100)
    field.save(tmp_path / "deep" / "x.safetensors")
    loaded = RadianceField.load(tmp_path / "deep" / "x.safetensors")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(field, name))
        assert getattr(loaded, name).dtype == dtype
    assert (loaded.depth, loaded.resolution, loaded.aabb) == (field.depth, field.resolution, field.aabb)
    assert len(loaded) == count


def test_saves_views_and_tensors_with_a_gradient(tmp_path: Path) -> None:
    field = random_field()
    view = field.trivec.requires_grad_().mT.contiguous().mT
    dataclasses.replace(field, trivec=view).save(tmp_path / "x.safetensors")
    assert torch.equal(RadianceField.load(tmp_path / "x.safetensors").trivec, field.trivec)


def test_what_is_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    random_field().save(path)
    loaded = RadianceField.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.density, random_field().density)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": None}, "keys must be density, features_dc, positions, trivec; got features_dc"),
        ({"more": torch.zeros(1)}, "keys must be .* got density, features_dc, more"),
        ({"density": torch.zeros(5, 3)}, r"density must be \[N, R\] with N=5, R=4; got \[5, 3\]"),
        ({"features_dc": torch.zeros(5, 4, 3)}, r"features_dc must be \[N, R, 1, 3\]"),
        ({"positions": torch.zeros(5, 3, dtype=torch.int32)}, "positions must be F16 or BF16 or F32 or F64; got I32"),
        ({"positions": torch.full((5, 3), math.nan)}, "positions has values that are not finite"),
    ],
)
def test_says_what_is_wrong_with_the_tensors(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {name: getattr(random_field(), name) for name in TENSORS} | change
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(ValueError, match=rf"x\.safetensors must be a radiance field: {message}"):
        RadianceField.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "metadata 'format' must be 'trellis.radiance_field.1'; got 'other'"),
        ({"depth": "5"}, r"depth must be floor\(log2\(64\)\); got 5"),
        ({"depth": "6.0"}, "metadata 'depth' must be an integer; got '6.0'"),
        ({"depth": "true"}, "metadata 'depth' must be an integer"),
        ({"resolution": "9" * 400}, r"resolution must be in \[1, 1024\]"),
        ({"resolution": "[" * 900}, "metadata 'resolution' must be an integer"),
        ({"aabb": "[0, 0, 0, 1, 1]"}, "aabb must be an origin and three positive sizes"),
        ({"aabb": "[0, 0, 0, 1, 1, 0]"}, "aabb must be an origin and three positive sizes"),
        ({"aabb": "[0, 0, 0, 1, 1, 1e999]"}, "all finite"),
        ({"aabb": "[0, 0, 0, 1, 1, NaN]"}, "all finite"),
        ({"aabb": f"[0, 0, 0, 1, 1, {'9' * 400}]"}, "int too large"),
        ({"aabb": "{}"}, "metadata 'aabb' must be six numbers; got '{}'"),
        ({"aabb": None}, "metadata 'aabb' must be six numbers; got ''"),
    ],
)
def test_says_what_is_wrong_with_the_metadata(change: dict[str, str | None], message: str, tmp_path: Path) -> None:
    tensors = {name: getattr(random_field(), name) for name in TENSORS}
    metadata = {name: text for name, text in (METADATA | change).items() if text is not None}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"x\.safetensors must be a radiance field: .*{message}"):
        RadianceField.load(tmp_path / "x.safetensors")


def test_a_file_that_claims_more_than_it_has_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    huge = 1 << 40
    header = {
        "__metadata__": METADATA,
        "positions": {"dtype": "F32", "shape": [huge, 3], "data_offsets": [0, 12 * huge]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(100))
    with pytest.raises(ValueError, match="must be a radiance field"):
        RadianceField.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", (1 << 62).to_bytes(8, "little")])
def test_refuses_what_is_not_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors must be a radiance field"):
        RadianceField.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        RadianceField.load(tmp_path / "y.safetensors")


def test_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_field(3).save(tmp_path / "x.safetensors")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        random_field(4).save(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert len(RadianceField.load(tmp_path / "x.safetensors")) == 3


def test_names_the_argument_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"density must be \[N, R\] with N=5, R=4; got \[4, 4\]"):
        random_field(density=torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"resolution must be in \[1, 1024\]; got 2048"):
        random_field(resolution=2048)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors; got 'x\.ply'"):
        random_field().save(tmp_path / "x.ply")


def test_to_moves_and_converts_the_tensors_only() -> None:
    field = random_field().to(torch.float64)
    assert {getattr(field, name).dtype for name in TENSORS} == {torch.float64}
    assert (field.depth, field.resolution) == (6, 64)
