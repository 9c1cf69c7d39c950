"""Started by `torchrun` in test_distributed.py: the same runs as there, on two processes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from tests.training.tiny import Balls, Flow, flow_config
from trellis.training.loop import Options, train


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = Balls(latents=True)
    torch.distributed.init_process_group("gloo")
    for parallel in ("ddp", "fsdp2"):
        config = flow_config(max_steps=20, i_save=10, i_ddpcheck=7)
        run = folder / parallel
        # The second process alone is told to stop: both do, and both resume.
        calls = iter([None] * 11 + ["enough"] * 9)
        second = torch.distributed.get_rank() == 1
        state = train(
            config, [], run, Options(parallel=parallel), dataset=data, objective=Flow(),
            stop=partial(next, calls) if second else None,
        )  # fmt: skip
        assert state.step == 12, state.step
        assert state.stopped in ("enough", "another process was stopped")
        state = train(config, [], run, Options(parallel=parallel, resume=True), dataset=data, objective=Flow())
        assert state.step == 20
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
