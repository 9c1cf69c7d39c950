import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from trellis.checkpoints import CheckpointError
from trellis.conditioning.dinov2_keys import from_original, to_original
from trellis.conditioning.image import HUB_IDS, MEAN, STD, DinoV2

ARGS = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}


def network() -> DinoV2:
    module = DinoV2(**ARGS)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3 if parameter.ndim == 1 else 0.08, generator=generator)
    return module


def dinov2(state: dict[str, Tensor], images: Tensor, heads: int, patch: int) -> Tensor:
    """DINOv2 with registers in plain torch, from its original keys: tokens before the final norm."""

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    def norm(x: Tensor, key: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{key}.weight"] + state[f"{key}.bias"]

    batch, _, height, width = images.shape
    images = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    patches = images.unflatten(3, (width // patch, patch)).unflatten(2, (height // patch, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 3 * patch * patch)  # rows, then columns
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(batch, -1, -1), x], 1) + state["pos_embed"]
    x = torch.cat([x[:, :1], state["register_tokens"].expand(batch, -1, -1), x[:, 1:]], 1)
    depth = sum(key.endswith("ls1.gamma") for key in state)
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj") * state[f"{block}.ls1.gamma"]
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
    return x


def test_agrees_with_an_independent_forward_pass() -> None:
    module, images = network(), torch.rand(2, 3, 56, 56)
    tokens = dinov2(to_original(module.model.state_dict()), images, heads=2, patch=14)
    expected = F.layer_norm(tokens, (128,), eps=1e-5)
    actual = module(images)
    assert actual.shape == (2, 1 + 4 + 16, 128) == (2, module.tokens, module.channels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_the_final_norm_has_no_effect() -> None:
    module, images = network(), torch.rand(1, 3, 56, 56)
    before = module(images)
    module.model.layernorm.weight.mul_(3)
    torch.testing.assert_close(module(images), before, rtol=0, atol=0)


def test_the_epsilon_of_the_last_normalisation_is_1e_5() -> None:
    module = network()
    for parameter in module.parameters():
        parameter.mul_(1e-3)  # tokens of a variance near the epsilons
    images = torch.rand(1, 3, 56, 56)
    tokens = dinov2(to_original(module.model.state_dict()), images, heads=2, patch=14)
    torch.testing.assert_close(module(images), F.layer_norm(tokens, (128,), eps=1e-5), rtol=1e-3, atol=1e-5)


def test_full_size_has_1374_tokens_of_1024() -> None:
    with torch.device("meta"):
        module = DinoV2()
        images = torch.empty(1, 3, 518, 518)
    assert module.tokens == 1374
    assert sum(parameter.numel() for parameter in module.parameters()) == 304_372_736
    embedded = module.model.embeddings(images)
    assert embedded.shape == (1, 1374, 1024)
    assert module.model.config.layer_norm_eps == 1e-6


def test_encode_resizes_with_lanczos_and_normalises() -> None:
    module = network()
    image = Image.effect_noise((80, 60), 80).convert("RGB")
    resized = image.resize((56, 56), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(1, 56, 56, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(module.encode([image]), module(pixels / 255))
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ValueError, match="non-empty list"):
        module.encode([])


def test_half_precision_weights_give_float32_tokens() -> None:
    module, images = network(), torch.rand(1, 3, 56, 56)
    expected = module(images)
    actual = module.to(torch.bfloat16)(images)
    assert actual.dtype == torch.float32
    assert float((actual - expected).norm() / expected.norm()) < 0.05


def test_other_sizes_interpolate_the_position_embedding_with_antialiasing() -> None:
    module, images = network(), torch.rand(1, 3, 42, 70)
    state = to_original(module.model.state_dict())
    grid = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(3, 5), mode="bicubic", antialias=True, align_corners=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    expected = F.layer_norm(dinov2(state, images, heads=2, patch=14), (128,), eps=1e-5)
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_checkpoints_load(tmp_path: Path, suffix: str) -> None:
    module, images = network(), torch.rand(1, 3, 56, 56)
    original = to_original(module.model.state_dict())
    path = tmp_path / f"dinov2_reg4{suffix}"
    torch.save(original, path) if suffix == ".pth" else save_file(original, path)
    loaded = DinoV2.from_pretrained(path)
    assert loaded.args == module.args
    torch.testing.assert_close(loaded(images), module(images), rtol=0, atol=0)


def test_renaming_keys_and_back_is_the_identity() -> None:
    state = network().model.state_dict()
    original = to_original(state)
    assert original["blocks.2.attn.qkv.weight"].shape == (384, 128)
    assert set(original) >= {"cls_token", "register_tokens", "pos_embed", "mask_token", "patch_embed.proj.weight"}
    again = from_original(original)
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("register_tokens"), "register_tokens is missing"),
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"encoder.layer.1.attention.attention"),
        (lambda s: s.update({"head.weight": torch.zeros(2)}), r"head.weight of shape \[2\] is not part"),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.zeros(7)}), "layer.0.layer_scale1.lambda1"),
        (lambda s: s.update({"norm.bias": torch.full((128,), torch.nan)}), "norm.bias has values that are not finite"),
    ],
)
def test_a_wrong_original_checkpoint_is_named(tmp_path: Path, change: object, message: str) -> None:
    state = to_original(network().model.state_dict())
    change(state)  # type: ignore[operator]
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message):
        DinoV2.from_pretrained(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"cls_token": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match=r"code\.pth: cannot be read as weights"):
        DinoV2.from_pretrained(tmp_path / "code.pth")


def test_a_transformers_folder_loads(tmp_path: Path) -> None:
    module, images = network(), torch.rand(1, 3, 56, 56)
    module.model.save_pretrained(tmp_path)
    loaded = DinoV2.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.args == module.args
    torch.testing.assert_close(loaded(images), module(images), rtol=0, atol=0)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.0.norm1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.norm1\.weight is missing"):
        DinoV2.from_pretrained(tmp_path, local_files_only=True)


def test_official_names_map_to_the_hub() -> None:
    assert HUB_IDS["dinov2_vitl14_reg"] == "facebook/dinov2-with-registers-large"
    with pytest.raises(CheckpointError, match="cannot load Dinov2WithRegistersModel from facebook/dinov2-with-reg"):
        DinoV2.from_pretrained("dinov2_vitg14_reg", local_files_only=True)


def test_bad_numbers_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size 14; got 60"):
        DinoV2(**ARGS | {"image_size": 60})
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 2 heads; got 129"):
        DinoV2(**ARGS | {"hidden_size": 129})
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\].*multiples of 14; got \[1, 3, 50, 56\]"):
        network()(torch.rand(1, 3, 50, 56))
