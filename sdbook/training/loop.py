"""The loop of every training: order, steps, averages, stopping and going on.

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..run.checkpoints import check_end, find_start, keep_state, skip_step
from ..run.folder import owns_output_dir
from ..run.logs import Log, Meter, is_due, open_tracker, report
from ..run.processes import (
    count_steps,
    make_accelerator,
    mean_of_all,
    pictures_per_step,
    unwrap,
    wrap,
)
from ..run.progress import StopNote, leave_signals_to_main, progress
from ..run.settings import RunConfig

__all__ = [
    "step_generator", "shuffled", "StepSampler", "learning_rate_at", "EMA", "Run",
    "take_step", "optimise",
]


def step_generator(seed: int, step: int, device="cpu") -> torch.Generator:
    """A random generator that depends on the step alone, so resuming is exact."""
    words = np.random.SeedSequence((seed, step)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


@lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def shuffled(size: int, seed: int, epoch: int) -> Int[np.ndarray, "size"]:
    """The pictures' numbers in the order in which an epoch shows them."""
    return np.random.default_rng((seed, epoch)).permutation(size)


class StepSampler(Sampler):
    """Lists of picture numbers, one for each step from `first` to `last`.

    The order of an epoch depends on (seed, epoch) alone, so that going on is exact.
    `batch_size` counts the pictures of a whole step; process `rank` of `world` gets
    its share of them, in `micro_batches`. Raises ValueError for an uneven split.
    """

    def __init__(
        self, size, batch_size, seed, first, last, rank=0, world=1, micro_batches=1
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first, self.last, self.micro_batches = first, last, micro_batches
        self.rank, self.world, self.shares = rank, world, world * micro_batches
        if batch_size % self.shares:
            raise ValueError(
                f"batch_size {batch_size} does not split over {self.shares} shares "
                f"(processes × micro-batches: {world} × {micro_batches}); give a "
                f"multiple of {self.shares}"
            )

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            picks = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(place, self.size)
                picks.append(int(shuffled(self.size, self.seed, epoch)[place]))
            for start in range(self.rank, self.shares, self.world):
                yield picks[start :: self.shares]


def learning_rate_at(step: int, config: RunConfig) -> float:
    """The factor on the rate of an optimiser step: a line up, then `lr_scheduler`."""
    warmup, steps = config.warmup_steps, config.max_steps
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"constant": 1.0, "linear": 1 - done}
    falling["cosine"] = 0.5 * (1 + math.cos(math.pi * done))
    return falling[config.lr_scheduler]


class EMA:
    """An exponential moving average of a module's weights, `shadow`.

    Early on it is short, decay ≤ (1 + step) / (10 + step), and forgets the start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.shadow = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average a little towards the module's weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.shadow.parameters()), list(module.parameters()), 1 - decay
        )


class Run:
    """What one training moves, `module` and its average, and where it stands.

    It starts with step `first`; `averaged` are the weights to draw with.
    """

    def __init__(self, config: RunConfig, module: nn.Module, dataset: Dataset):
        self.accelerator = accelerator = make_accelerator(config)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.config = config = count_steps(config, len(dataset), self.world)
        self.pictures = pictures_per_step(config, self.world)

        self.module = module.to(self.device, memory_format=torch.channels_last)
        self.ema = EMA(module, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.shadow if self.ema else module
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.wrapped, self.optimiser = wrap(accelerator, config, module, optimiser)

        self.meter = Meter()
        self.log = Log(Path(config.output_dir) / "log.jsonl", self.main)
        self.stateful = {"model": module, "optimiser": optimiser, "meter": self.meter}
        if self.ema:
            self.stateful["ema"] = self.averaged
        self.first = find_start(self, dataset)
        open_tracker(self)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.learning_rate * learning_rate_at(step, self.config)


def take_step(run: Run, step: int, loss_of: Callable, batches) -> None:
    """Move the weights once, by the mean gradient of `batches`.

    A step whose loss or gradient is no number moves nothing and is counted.
    """
    config, measured = run.config, []
    count = config.gradient_accumulation_steps
    for group in run.optimiser.param_groups:
        group["lr"] = run.learning_rate(step)
    for number, batch in enumerate(batches):
        rows = slice(number * run.world + run.rank, None, count * run.world)
        generator = step_generator(config.seed, step, device=run.device)
        alone = run.accelerator.no_sync if number < count - 1 else nullcontext
        with alone(run.wrapped):
            with run.accelerator.autocast():
                loss, numbers = loss_of(run.wrapped, batch, generator, rows)
            run.accelerator.backward(loss / count)
        measured.append({"loss": loss, **numbers})
    weights = run.wrapped.parameters()
    norm = run.accelerator.clip_grad_norm_(weights, config.max_grad_norm)
    means = mean_of_all(run.accelerator, measured) | {"grad_norm": float(norm)}
    finite = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
    if finite or run.accelerator.scaler:  # fp16's scaler leaves bad steps out itself
        run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if not finite:
        return skip_step(run, step, means["loss"])
    run.meter.add(means)
    if run.ema:
        run.ema.update(run.module, step)


@owns_output_dir
def optimise(
    config: RunConfig, module: nn.Module, dataset: Dataset, loss_of: Callable,
    validate: Callable | None = None, collate: Callable | None = None,
    sample: Callable | None = None,
) -> nn.Module:  # fmt: skip
    """Train `module` for `config.max_steps` and return its (averaged) weights.

    `loss_of(module, batch, generator, rows)` gives the loss and a dict of numbers to
    log; its chance comes from the generator, the same for all micro-batches of a step,
    of whose pictures this one has the `rows`. Now and then `validate(module)` gives
    such a dict, and `sample(module)` an image, of the averaged weights. Ctrl-C writes
    a checkpoint and raises KeyboardInterrupt. Only one may train in `output_dir`.
    """
    run, count = Run(config, module, dataset), config.gradient_accumulation_steps
    config = run.config
    sampler = StepSampler(
        len(dataset), run.pictures, config.seed, run.first, config.max_steps,
        run.rank, run.world, count,
    )  # fmt: skip
    batches = iter(DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate,
        num_workers=config.num_workers, worker_init_fn=leave_signals_to_main,
    ))  # fmt: skip
    with StopNote() as note:
        for step in progress(run):
            take_step(run, step, loss_of, islice(batches, count))
            report(run, step + 1, validate, sample)
            stop = note.is_written(run.accelerator)
            if stop or is_due(step + 1, config.checkpoint_every, config):
                keep_state(run, step + 1)
            if stop:
                how = f"the same command goes on from step {run.saved}"
                raise KeyboardInterrupt(f"after step {step + 1}; {how}")
    check_end(run)
    unwrap(run.accelerator, run.module, run.wrapped)
    return run.averaged
