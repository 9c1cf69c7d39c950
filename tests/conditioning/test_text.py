from pathlib import Path

import pytest
import torch

from tests.support.clip import tiny_clip
from trellis.conditioning.text import ClipText


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_sentences_become_77_tokens_each(folder: Path) -> None:
    clip = ClipText.from_pretrained(folder, local_files_only=True)
    tokens = clip.encode(["a chair", "", "x " * 200])
    assert tokens.shape == (3, 77, 32)
    assert tokens.dtype == torch.float32
    assert clip.channels == 32
    torch.testing.assert_close(tokens[:1], clip.encode(["a chair"]))
    assert not torch.equal(tokens[0], tokens[1])


def test_token_ids_are_padded_and_cut(folder: Path) -> None:
    clip = ClipText.from_pretrained(folder, local_files_only=True)
    seen: list[torch.Tensor] = []
    clip.model.register_forward_pre_hook(lambda *args: seen.append(args[2]["input_ids"]), with_kwargs=True)
    clip.encode(["ch", "x " * 200])
    ids = seen[0]
    start, end, ch, x = 54, 55, 53, 49
    assert ids[0, :4].tolist() == [start, ch, end, end]
    assert ids[1].tolist() == [start] + [x] * 75 + [end]


def test_the_last_norm_is_part_of_the_result(folder: Path) -> None:
    clip = ClipText.from_pretrained(folder, local_files_only=True)
    before = clip.encode(["a"])
    clip.model.text_model.final_layer_norm.weight.mul_(2)
    clip.model.text_model.final_layer_norm.bias.mul_(2)
    torch.testing.assert_close(clip.encode(["a"]), 2 * before)


def test_bad_prompts_are_named(folder: Path) -> None:
    clip = ClipText.from_pretrained(folder, local_files_only=True)
    with pytest.raises(TypeError, match="prompts must be a list of strings; got 'a chair'"):
        clip.encode("a chair")
    with pytest.raises(ValueError, match="non-empty"):
        clip.encode([])
