import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.prepared import FEATURES, STRUCTURE, prepared_root
from tests.training.tiny import FLOW
from trellis.cli import app
from trellis.commands.train import Interruption
from trellis.training import checkpoint
from trellis.training.log import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    args = {**FLOW, "in_channels": 8, "out_channels": 8, "cond_channels": 6}
    trainer = {"max_steps": 4000, "batch_size": 2, "ema_rate": 0.9, "i_save": 1000}
    path = tmp_path / "flow.json"
    path.write_text(
        json.dumps(
            {
                "models": {"denoiser": {"name": "SparseStructureFlowModel", "args": args}},
                "dataset": {
                    "name": "ImageConditionedSparseStructureLatent",
                    "args": {"latent_model": STRUCTURE, "cond_model": FEATURES, "split": "train"},
                },
                "trainer": {"name": "ImageConditionedFlowMatchingCFGTrainer", "args": trainer},
            }
        )
    )
    return path


def trellis(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_train_writes_a_run_and_goes_on_with_it(data: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = trellis(config, "--data", data, "-o", run, "--steps", 3, "--device", "cpu", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "step 3" in result.output
    assert {path.name for path in run.iterdir()} == {"ckpts", "config.json", "log.txt", "command.txt"}
    again = trellis(config, "--data", data, "-o", run, "--steps", 5)
    assert again.exit_code == 1
    assert "has a checkpoint of step 3" in again.output
    again = trellis(config, "--data", data, "-o", run, "--steps", 5, "--resume", "--precision", "bf16")
    assert again.exit_code == 0, again.output
    assert [line["step"] for line in read_log(run)] == [0, 1, 2, 3, 4]
    late = trellis(config, "--data", data, "-o", run, "--resume", "--time-limit", 0)
    assert late.exit_code == 0
    assert "step 6, stopped: time limit; go on with --resume" in late.output.replace("\n", " ")


def test_a_signal_saves_and_stops(data: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def send() -> None:
        while not (run / "log.txt").exists() or len(read_log(run)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # the command listens since before it wrote its log

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    result = trellis(config, "--data", data, "-o", run)
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert "stopped: SIGTERM" in result.output.replace("\n", " ")
    sender.join()
    assert checkpoint.saved_steps(run) == [len(read_log(run))]


def test_the_first_signal_is_a_wish_and_the_second_an_order() -> None:
    interruption, before = Interruption(), signal.getsignal(signal.SIGINT)
    with interruption.listening():
        assert interruption.reason() is None
        signal.raise_signal(signal.SIGINT)
        assert interruption.reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("trainer", "args", "lr"), "trainer.args has no 'lr'; known are batch_size"),
        (("dataset", "args", "path"), "has no argument 'path'; known are"),
        (("models", "denoiser", "args", "width"), "has no argument 'width'; it accepts"),
        (("trainer", "extra"), "trainer has no key 'extra'; known are name, args"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(
    data: Path, config: Path, tmp_path: Path, change: tuple[str, ...], message: str
) -> None:
    content = json.loads(config.read_text())
    inner = content
    for name in change[:-1]:
        inner = inner[name]
    inner[change[-1]] = 1
    config.write_text(json.dumps(content))
    result = trellis(config, "--data", data, "-o", tmp_path / "run")
    assert result.exit_code == 1
    assert message in result.output.replace("\n", "")
    assert not (tmp_path / "run").exists()
