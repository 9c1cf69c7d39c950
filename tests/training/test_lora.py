import copy
from pathlib import Path

import pytest
import torch

from tests.training.tiny import Balls, Flow, flow_config
from trellis import load_model
from trellis.checkpoints import CheckpointError, build_model
from trellis.training.batches import seeded
from trellis.training.config import ConfigError
from trellis.training.log import read_log
from trellis.training.loop import Options, train
from trellis.training.lora import LoraConfig, add_adapters, load_adapters, merge_adapters, merged_state, save_adapters

CONFIG = LoraConfig(rank=3, alpha=6.0)
BATCH = torch.randn(2, 2, 4, 4, 4, generator=seeded(0)), torch.tensor([1.0, 500.0]), torch.ones(2, 3, 12)


def model() -> torch.nn.Module:
    described = flow_config().models["denoiser"]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        network = build_model(described.name, described.args)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(1))
    return network


def disturbed(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_up"):
                parameter += torch.randn(parameter.shape, generator=seeded(2))
    return network


def test_adapters_change_nothing_at_first_and_train_alone() -> None:
    plain = model()
    adapted = copy.deepcopy(plain)
    names = add_adapters(adapted, CONFIG)
    assert names == [f"blocks.{i}.{n}" for i in range(2) for n in
                     ("self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv",
                      "cross_attn.to_out")]  # fmt: skip
    assert torch.equal(adapted(*BATCH), plain(*BATCH))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in names for part in ("lora_down", "lora_up")}
    assert adapted.torso_dtype == torch.float32


def test_merged_weights_compute_what_the_adapters_do() -> None:
    adapted = model()
    add_adapters(adapted, CONFIG)
    disturbed(adapted)
    expected = adapted(*BATCH)
    assert not torch.allclose(expected, model()(*BATCH))
    plain = model()
    plain.load_state_dict(merged_state(adapted.state_dict(), CONFIG))
    torch.testing.assert_close(plain(*BATCH), expected)
    merged = merge_adapters(copy.deepcopy(adapted))
    torch.testing.assert_close(merged(*BATCH), expected)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    adapted = model()
    add_adapters(adapted, CONFIG)
    disturbed(adapted)
    save_adapters(adapted, CONFIG, tmp_path / "adapters")
    other = model()
    assert load_adapters(other, tmp_path / "adapters") == CONFIG
    assert torch.equal(other(*BATCH), adapted(*BATCH))
    wrong = build_model("SparseStructureFlowModel", {**flow_config().models["denoiser"].args, "num_blocks": 1})
    with pytest.raises(CheckpointError, match="not part of the model"):
        load_adapters(wrong, tmp_path / "adapters")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_with_adapters_resumes_and_writes_ordinary_models(tmp_path: Path, precision: str) -> None:
    data, objective = Balls(latents=True), Flow()
    train(flow_config(max_steps=3), [], tmp_path / "base", dataset=data, objective=objective)
    config = flow_config(lora={"rank": 2, "targets": ["*attn.to_out", "*mlp.mlp.0"]})
    start = Options(load=str(tmp_path / "base"), precision=precision)
    whole = train(config, [], tmp_path / "whole", start, dataset=data, objective=objective)
    part = Options(load=str(tmp_path / "base"), steps=7, precision=precision)
    train(config, [], tmp_path / "parts", part, dataset=data, objective=objective)
    again = Options(resume=True, precision=precision)
    resumed = train(config, [], tmp_path / "parts", again, dataset=data, objective=objective)
    assert torch.equal(resumed.weights.master, whole.weights.master)
    assert [line["loss"] for line in read_log(tmp_path / "parts")] == [
        line["loss"] for line in read_log(tmp_path / "whole")
    ]
    stem = tmp_path / "whole/ckpts/denoiser_step0000012"
    loaded = load_model(stem)
    near = {"rtol": 0.03, "atol": 0.03} if precision == "bf16" else {}
    torch.testing.assert_close(loaded(*BATCH), whole.models["denoiser"](*BATCH), **near)
    base = load_model(tmp_path / "base/ckpts/denoiser_step0000003")
    changed = {key for key, value in loaded.state_dict().items() if not torch.equal(value, base.state_dict()[key])}
    assert changed == {f"blocks.{i}.{n}.weight" for i in range(2) for n in
                       ("self_attn.to_out", "cross_attn.to_out", "mlp.mlp.0")}  # fmt: skip
    load_adapters(base, tmp_path / "whole/ckpts/denoiser_lora_step0000012")
    torch.testing.assert_close(base(*BATCH), loaded(*BATCH))


def test_impossible_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora has no 'r'; known are rank, alpha, targets"):
        LoraConfig.of({"r": 3})
    with pytest.raises(ConfigError, match="lora rank must be a positive integer; got 0"):
        LoraConfig.of({"rank": 0})
    with pytest.raises(ConfigError, match=r"lora targets \*conv must name linear layers of StructureFlow"):
        add_adapters(model(), LoraConfig(targets=("*conv",)))
    with pytest.raises(ConfigError, match="lora needs weights to start from"):
        train(flow_config(lora={}), [], tmp_path, dataset=Balls(latents=True), objective=Flow())
