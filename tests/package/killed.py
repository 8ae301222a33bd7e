"""A training that is killed again and again; run by test_training.py.

    python tests/package/killed.py FOLDER

Trains into FOLDER/whole undisturbed, and into FOLDER/killed with kill -9, at random
moments and while half a checkpoint is written; prints how often.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401 - once, before the forks
import torch
from torch import nn

from sdbook.training import RunConfig, optimise

STEPS = 60


class Numbers(torch.utils.data.Dataset):
    """Sixteen inputs with what a linear map makes of them."""

    x = torch.linspace(-1, 1, 16)[:, None]

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return self.x[i], 3 * self.x[i] + 1


def loss_of(module, batch, generator, rows):
    x, y = batch
    noise = torch.randn(len(x) * rows.step, 1, generator=generator)[rows]
    time.sleep(0.002)
    return (module(x) - y - 0.1 * noise).square().mean(), {}


def run(folder: Path) -> None:
    torch.manual_seed(0)
    config = RunConfig(
        output_dir=str(folder), batch_size=3, gradient_accumulation_steps=2,
        max_steps=STEPS, warmup_steps=5, checkpoint_every=2, log_every=3, ema_decay=0.9,
    )  # fmt: skip
    module = nn.Sequential(nn.Linear(1, 300), nn.Linear(300, 300), nn.Linear(300, 1))
    optimise(config, module, Numbers(), loss_of)


def stop_half_way(state, file) -> None:
    """In place of `torch.save`: half a file, and then it hangs."""
    file.write(b"half a checkpoint")
    file.flush()
    time.sleep(60)


def child(folder: Path, hang: bool) -> int:
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        sys.stderr = open(os.devnull, "w")
        if hang:
            torch.save = stop_half_way
        run(folder)
        os._exit(0)
    return process


def newest(folder: Path) -> str:
    return max((file.name for file in folder.glob("checkpoints/step-*.pt")), default="")


def writing(folder: Path, before: str) -> bool:
    return any(folder.glob("checkpoints/.*.tmp"))


def moved(folder: Path, before: str) -> bool:
    return newest(folder) > before


def wait_and_kill(process: int, ready, moment: float) -> bool:
    """Kill a process a moment after `ready()`; False if it had ended before."""
    while not ready():
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def main(folder: Path) -> None:
    os.waitpid(child(folder / "whole", hang=False), 0)
    killed, chance = folder / "killed", random.Random(0)
    kills = {"anywhere": 0, "inside a checkpoint": 0}
    for turn in range(6):
        before, hang = newest(killed), turn % 3 == 2
        process, moment = child(killed, hang), chance.random() * 0.1
        ready = partial(writing if hang else moved, killed, before)
        if not wait_and_kill(process, ready, moment):
            break
        kills["inside a checkpoint" if hang else "anywhere"] += 1
    os.waitpid(child(killed, hang=False), 0)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
