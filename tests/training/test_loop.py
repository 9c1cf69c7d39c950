import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.tiny import Balls, Flow, Reconstruction, flow_config, vae_config
from trellis import load_model
from trellis.training import checkpoint
from trellis.training.batches import Plan, Reader, balanced_groups, samples_of_step
from trellis.training.config import ConfigError
from trellis.training.log import read_log
from trellis.training.loop import Options, train

ROOT = Path(__file__).parents[2]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run)]


def test_a_structure_vae_learns_and_its_checkpoints_load_as_models(tmp_path: Path) -> None:
    state = train(vae_config(max_steps=30, i_save=20), [], tmp_path, dataset=Balls(), objective=Reconstruction())
    curve = losses(tmp_path)
    assert state.step == len(curve) == 30
    assert curve[-1] < 0.4 * curve[0]
    assert checkpoint.saved_steps(tmp_path) == [20, 30]
    names = {path.name for path in (tmp_path / "ckpts").iterdir()}
    assert {f"{r}{e}_step0000030.{s}" for r in ("encoder", "decoder") for e in ("", "_ema0.9") for s in
            ("json", "safetensors")} <= names  # fmt: skip
    decoder = load_model(tmp_path / "ckpts/decoder_step0000030")
    latent = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoder(latent), state.models["decoder"](latent))
    average = load_model(tmp_path / "ckpts/decoder_ema0.9_step0000030")
    assert not torch.equal(average(latent), decoder(latent))


def test_a_structure_flow_learns(tmp_path: Path) -> None:
    config = flow_config(max_steps=100, i_save=100, lr_scheduler={"name": "cosine", "args": {"warmup": 5}})
    train(config, [], tmp_path, dataset=Balls(latents=True), objective=Flow())
    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_a_run_stopped_and_resumed_is_the_run_uninterrupted_to_the_last_bit(tmp_path: Path) -> None:
    config = vae_config(batch_split=2)
    whole = train(config, [], tmp_path / "whole", dataset=Balls(), objective=Reconstruction())
    reasons = iter([None] * 6 + ["enough"])
    part = train(
        config, [], tmp_path / "parts", dataset=Balls(), objective=Reconstruction(), stop=lambda: next(reasons)
    )
    assert (part.step, part.stopped) == (7, "enough")
    options = Options(resume=True)
    again = train(config, [], tmp_path / "parts", options, dataset=Balls(), objective=Reconstruction())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(again.weights.master, whole.weights.master)
    assert torch.equal(again.weights.averages[0.9], whole.weights.averages[0.9])


def test_a_frozen_model_stays_while_the_other_learns_also_after_a_stop(tmp_path: Path) -> None:
    first = train(vae_config(max_steps=5), [], tmp_path / "first", dataset=Balls(), objective=Reconstruction())
    before = {role: first.weights.state(role) for role in ("encoder", "decoder")}
    config = vae_config(max_steps=8, frozen=["encoder"])
    options = Options(load=str(tmp_path / "first"), steps=4)
    train(config, [], tmp_path / "run", options, dataset=Balls(), objective=Reconstruction())
    shutil.rmtree(tmp_path / "first")
    train(config, [], tmp_path / "run", Options(resume=True), dataset=Balls(), objective=Reconstruction())
    for name in ("encoder_step0000008", "encoder_ema0.9_step0000008"):
        kept = load_model(tmp_path / "run/ckpts" / name).state_dict()
        assert all(torch.equal(kept[key], value) for key, value in before["encoder"].items())
    decoder = load_model(tmp_path / "run/ckpts/decoder_step0000008").state_dict()
    assert not any(torch.equal(decoder[key], value) for key, value in before["decoder"].items() if value.ndim > 1)


def test_what_is_frozen_must_be_there_and_loaded(tmp_path: Path) -> None:
    for frozen, message in (
        (["denoiser"], "frozen has no role 'denoiser'; there are encoder, decoder"),
        (["encoder"], "frozen needs weights to start from for 'encoder'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(vae_config(frozen=frozen), [], tmp_path, dataset=Balls(), objective=Reconstruction())
    with pytest.raises(ConfigError, match="frozen must be a list of roles; got 'encoder'"):
        train(vae_config(frozen="encoder"), [], tmp_path, dataset=Balls(), objective=Reconstruction())


PROGRAM = """
import sys, time
from pathlib import Path
from tests.training.tiny import *
from trellis.training.loop import Options, train
def slowly(progress):
    if progress.step > 7 and sys.argv[2] == "slow":
        time.sleep(60)
train(flow_config(), [], Path(sys.argv[1]), Options(resume=True), dataset=Balls(latents=True), objective=Flow(),
      progress=slowly)
"""


def test_a_run_killed_with_signal_9_resumes_to_the_same_curve(tmp_path: Path) -> None:
    config = flow_config()
    whole = train(config, [], tmp_path / "whole", dataset=Balls(latents=True), objective=Flow())
    run = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(run), "slow"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 300
        while not (run / "log.txt").exists() or len(read_log(run)) < 8:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert checkpoint.saved_steps(run) == [5]  # steps 5, 6 and 7 are lost and done again
    state = train(config, [], run, Options(resume=True), dataset=Balls(latents=True), objective=Flow())
    assert losses(run) == losses(tmp_path / "whole")
    assert torch.equal(state.weights.master, whole.weights.master)


def test_a_half_written_checkpoint_is_not_one(tmp_path: Path) -> None:
    config = flow_config(max_steps=10)
    train(config, [], tmp_path, dataset=Balls(latents=True), objective=Flow())
    (tmp_path / "ckpts/misc_step0000010.json").unlink()
    assert checkpoint.saved_steps(tmp_path) == [5]
    before = losses(tmp_path)
    train(config, [], tmp_path, Options(resume=True), dataset=Balls(latents=True), objective=Flow())
    assert losses(tmp_path) == before


def test_a_folder_with_checkpoints_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    train(flow_config(max_steps=1), [], tmp_path, dataset=Balls(latents=True), objective=Flow())
    with pytest.raises(FileExistsError, match="has a checkpoint of step 1: resume it"):
        train(flow_config(max_steps=1), [], tmp_path, dataset=Balls(latents=True), objective=Flow())


def test_old_checkpoints_go_when_only_some_are_kept(tmp_path: Path) -> None:
    config = flow_config(max_steps=4, i_save=1, keep_checkpoints=1)
    train(config, [], tmp_path, dataset=Balls(latents=True), objective=Flow())
    assert checkpoint.saved_steps(tmp_path) == [3, 4]
    assert not list((tmp_path / "ckpts").glob("*step0000002*"))


def test_a_time_limit_saves_and_stops(tmp_path: Path) -> None:
    state = train(flow_config(), [], tmp_path, Options(minutes=0), dataset=Balls(latents=True), objective=Flow())
    assert (state.step, state.stopped) == (1, "time limit")
    assert checkpoint.saved_steps(tmp_path) == [1]
    assert json.loads((tmp_path / "config.json").read_text()) == flow_config().to_json()


def test_a_sample_that_cannot_be_read_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        state = train(vae_config(), [], tmp_path, dataset=Balls(5, broken=2), objective=Reconstruction())
    assert state.step == 12
    assert "sample 2 cannot be read, another is taken: this one is broken" in caplog.text


def test_each_epoch_passes_through_every_sample_once_in_another_order() -> None:
    order = [index for step in range(10) for index in samples_of_step(20, 4, 3, step)]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]
    with pytest.raises(ValueError, match="must have at least one sample"):
        samples_of_step(0, 4, 3, 0)


def test_groups_are_balanced_as_officially_and_none_is_empty() -> None:
    from tests.support.golden import golden

    info = golden("train_utils").info
    assert balanced_groups(info["loads"], 4) == info["groups"]
    with pytest.raises(ValueError, match="a sample for each of its 3 passes; it has 2"):
        balanced_groups([1, 2], 3)


def test_passes_are_the_same_whatever_process_has_them() -> None:
    data = Balls()
    whole = Plan(0, 8, 4, range(4)).passes(data, 3)
    halves = [Plan(0, 8, 4, mine).passes(data, 3) for mine in (range(2), range(2, 4))]
    assert whole == halves[0] + halves[1]
    with Reader(data, Plan(0, 4, 2, range(2)), 5, 7, workers=0) as reader:
        assert [step for step, batches in reader] == [5, 6]


def test_a_run_starts_from_another_or_from_a_model(tmp_path: Path) -> None:
    data, config = Balls(latents=True), flow_config(max_steps=2)
    first = train(config, [], tmp_path / "a", dataset=data, objective=Flow())
    still = flow_config(max_steps=1, optimizer={"name": "SGD", "args": {"lr": 0.0}})
    stem = tmp_path / "a/ckpts/denoiser_step0000002"
    for name, load in (("b", tmp_path / "a"), ("c", stem), ("d", f"denoiser={stem}")):
        state = train(still, [], tmp_path / name, Options(load=str(load)), dataset=data, objective=Flow())
        assert torch.equal(state.weights.master, first.weights.master)
    with pytest.raises(ValueError, match="no model has the role 'decoder'; there are denoiser"):
        train(still, [], tmp_path / "e", Options(load=f"decoder={stem}"), dataset=data, objective=Flow())
    with pytest.raises(ValueError, match="must be a run's folder or role=stem"):
        train(vae_config(), [], tmp_path / "e", Options(load=str(stem)), dataset=Balls(), objective=Reconstruction())
    load = f"encoder={stem}"
    with pytest.raises(ValueError, match="does not fit: "):
        train(vae_config(), [], tmp_path / "e", Options(load=load), dataset=Balls(), objective=Reconstruction())


class Fatal(Balls):
    """Its first reader dies."""

    def __init__(self, mark: Path) -> None:
        super().__init__(latents=True)
        self.mark = mark

    def load(self, index: int, generator: torch.Generator) -> dict:
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().load(index, generator)


def test_a_reader_that_is_killed_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(0, 4, 2, range(2))
    with Reader(Fatal(tmp_path / "dead"), plan, 0, 3, workers=1) as reader:
        seen = [batches for _, batches in reader]
    assert "a process that reads samples died" in caplog.text
    with Reader(Balls(latents=True), plan, 0, 3) as reader:
        for ours, (_, theirs) in zip(seen, reader, strict=True):
            assert all(torch.equal(a["x_0"], b["x_0"]) for a, b in zip(ours, theirs, strict=True))


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = checkpoint.write_misc, iter([True, False, True])

    def limited(names: checkpoint.Names, *content: dict) -> None:
        if next(full):
            raise OSError(28, "No space left on device")
        write(names, *content)

    monkeypatch.setattr(checkpoint, "write_misc", limited)
    with pytest.raises(OSError, match="No space left on device"):  # at the end nothing may be lost in silence
        train(flow_config(), [], tmp_path, dataset=Balls(latents=True), objective=Flow())
    assert "step 5 could not be saved, training goes on: " in caplog.text
    assert checkpoint.saved_steps(tmp_path) == [10]
    assert all("step0000010" in path.name for path in (tmp_path / "ckpts").iterdir())
