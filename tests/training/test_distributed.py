import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.tiny import Balls, Flow, flow_config
from trellis import load_model
from trellis.training import checkpoint
from trellis.training.distributed import Processes, check_parallel
from trellis.training.log import read_log
from trellis.training.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two gloo processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "tests.training.two_processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of one process, whose passes are what the two processes do."""
    folder = tmp_path_factory.mktemp("one")
    train(flow_config(max_steps=20, batch_split=2), [], folder, dataset=Balls(latents=True), objective=Flow())
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_equal_one_over_20_steps(one: Path, two: Path, parallel: str) -> None:
    ours, theirs = read_log(two / parallel), read_log(one)
    assert [line["step"] for line in ours] == list(range(20))
    for key in ("loss", "mse", "grad_norm"):
        a = torch.tensor([line[key] for line in ours], dtype=torch.float64)
        b = torch.tensor([line[key] for line in theirs], dtype=torch.float64)
        assert float(((a - b) / b).abs().max()) < 1e-5, key


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_checkpoints_of_two_processes_are_ordinary_models(one: Path, two: Path, parallel: str) -> None:
    assert checkpoint.saved_steps(two / parallel) == [10, 12, 20]
    for stem in ("denoiser_step0000020", "denoiser_ema0.9_step0000020"):
        # Compared by what they compute: a key's bias changes nothing, so Adam makes of it what rounding says.
        x, cond = torch.linspace(-1, 1, 128).view(1, 2, 4, 4, 4), torch.linspace(-1, 1, 36).view(1, 3, 12)
        ours, theirs = (
            load_model(run / "ckpts" / stem)(x, torch.tensor([500.0]), cond) for run in (two / parallel, one)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_process_has_nothing_to_agree_on() -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    alone.wait()
    alone.check_equal(torch.ones(3))
    assert alone.agree(2) == 2
    assert alone.first


def test_impossible_ways_to_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel must be one of ddp, fsdp2; got 'zero'"):
        check_parallel("zero", "fp32")
    with pytest.raises(ValueError, match="fsdp2 trains float32 weights: precision must be fp32 or amp; got fp16"):
        check_parallel("fsdp2", "fp16")
