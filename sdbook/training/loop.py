"""The loop of every training: order, steps, averages, stopping and going on.

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..run.checkpoints import (
    SettingsRecord,
    check_end,
    content_of,
    find_start,
    keep_state,
    skip_step,
)
from ..run.folder import owns_output_dir
from ..run.logs import Log, Meter, is_due, open_tracker, report
from ..run.memory import keep_all, recompute_blocks
from ..run.processes import (
    count_steps,
    make_accelerator,
    mean_of_all,
    pictures_per_step,
)
from ..run.progress import StopNote, leave_signals_to_main, progress
from ..run.settings import RunConfig

__all__ = [
    "step_generator", "StepSampler", "learning_rate_at", "EMA", "Run", "take_step",
    "as_it_is", "step_loader", "optimise",
]


def step_generator(seed: int, step: int, device="cpu") -> torch.Generator:
    """A random generator that depends on the step alone, so resuming is exact."""
    words = np.random.SeedSequence((seed, step)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


class StepSampler(Sampler):
    """Lists of picture numbers, one for each step from `first` to `last`.

    Every epoch is shuffled anew by (seed, epoch) alone, so step 700 sees the same
    pictures whether or not the run was stopped before it. `batch_size` counts the
    pictures of a whole step. Process `rank` of `world` gets its share of them, as
    `parts` lists, one after the other. Raises ValueError for a batch that does not
    split evenly.
    """

    def __init__(self, size, batch_size, seed, first, last, rank=0, world=1, parts=1):
        if batch_size % (world * parts):
            raise ValueError(
                f"batch_size {batch_size} does not split over {world} processes with "
                f"{parts} parts each; give a multiple of {world * parts}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first, self.last, self.parts = first, last, parts
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for step in range(self.first, self.last):
            picks = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(
                        self.size
                    )
                picks.append(int(order[place % self.size]))
            for part in range(self.parts):
                start = part * self.world + self.rank
                yield picks[start :: self.world * self.parts]


def learning_rate_at(step: int, config: RunConfig) -> float:
    """The factor on the learning rate: a line up, then what `lr_scheduler` says.

    Counts optimiser steps, however many processes or parts make one.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(
        1, config.max_steps - config.warmup_steps
    )
    progress = min(1.0, progress)
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.lr_scheduler]


class EMA:
    """An exponential moving average of a module's weights, `shadow`.

    Early on the average is short (decay ≤ (1 + step) / (10 + step)), so that it
    forgets the random start.
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

    `config` is the one that was given, with its epochs counted in steps; `first` is
    the step that it starts with; `averaged` are the weights to draw with.
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
        if getattr(config, "gradient_checkpointing", False):
            recompute_blocks(module)
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        compiled = torch.compile(module) if config.compile else module
        self.wrapped, self.optimiser = accelerator.prepare(compiled, optimiser)

        self.meter = Meter()
        self.log = Log(Path(config.output_dir) / "log.jsonl", self.main)
        self.stateful = {"model": module, "optimiser": optimiser, "meter": self.meter}
        if self.ema:
            self.stateful["ema"] = self.averaged
        if accelerator.scaler:
            self.stateful["scaler"] = accelerator.scaler
        if self.main:
            self.stateful["settings"] = SettingsRecord(
                config, processes=self.world, pictures=len(dataset),
                content=content_of(dataset),
            )  # fmt: skip
        self.first = find_start(self)
        open_tracker(self)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.learning_rate * learning_rate_at(step, self.config)

    def save(self, step: int) -> None:
        """Write a checkpoint of what is so after `step` steps, if it is of use."""
        keep_state(self, step)

    def finish(self) -> nn.Module:
        """Undo what training put around the module; the (averaged) weights.

        Raises ValueError if they have become of no use.
        """
        check_end(self)
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        keep_all(self.module)
        self.accelerator.end_training()
        return self.averaged


def take_step(run: Run, step: int, loss_of: Callable, batches) -> None:
    """Move the weights once, by the mean gradient of `batches`.

    A step whose loss or gradient is no number moves nothing and is counted.
    """
    config, measured = run.config, []
    parts = config.gradient_accumulation_steps
    for group in run.optimiser.param_groups:
        group["lr"] = run.learning_rate(step)
    for part, batch in enumerate(batches):
        rows = slice(part * run.world + run.rank, None, parts * run.world)
        generator = step_generator(config.seed, step, device=run.device)
        alone = run.accelerator.no_sync(run.wrapped) if part < parts - 1 else None
        with alone or nullcontext():
            with run.accelerator.autocast():
                loss, numbers = loss_of(run.wrapped, batch, generator, rows)
            run.accelerator.backward(loss / parts)
        measured.append({"loss": loss, **numbers})
    weights = run.wrapped.parameters()
    norm = run.accelerator.clip_grad_norm_(weights, config.max_grad_norm)
    means = mean_of_all(run.accelerator, measured) | {"grad_norm": float(norm)}
    finite = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
    if finite or run.accelerator.scaler:  # fp16's scaler leaves bad steps out itself
        run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if not finite:
        skip_step(run, step, means["loss"])
        return
    run.meter.add(means)
    if run.ema:
        run.ema.update(run.module, step)


def as_it_is(batch):
    """The collation of a dataset that already gives whole batches."""
    return batch


def step_loader(run: Run, dataset: Dataset, collate=None) -> DataLoader:
    """This process's batches, from the first step to the last."""
    config, parts = run.config, run.config.gradient_accumulation_steps
    workers = {"num_workers": config.num_workers}
    workers["worker_init_fn"] = leave_signals_to_main
    if hasattr(dataset, "steps"):  # a stream deals its pictures out itself
        batches = dataset.steps(
            config.batch_size, config.seed, run.first * parts,
            config.max_steps * parts, run.rank, run.world,
        )  # fmt: skip
        collate = collate or default_collate
        return DataLoader(batches, batch_size=None, collate_fn=collate, **workers)
    sampler = StepSampler(
        len(dataset), run.pictures, config.seed, run.first, config.max_steps,
        run.rank, run.world, parts,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate,
        persistent_workers=config.num_workers > 0, **workers,
    )  # fmt: skip


@owns_output_dir
def optimise(
    config: RunConfig,
    module: nn.Module,
    dataset: Dataset,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    collate: Callable | None = None,
    sample: Callable[[nn.Module], Image.Image] | None = None,
) -> nn.Module:
    """Train `module` for `config.max_steps` and return its (averaged) weights.

    `loss_of(module, batch, generator, rows)` gives the loss and numbers to log. All
    chance in it comes from the generator, which is the same for all parts of a step:
    `rows`, a slice, are the pictures of the step that this batch has.
    `validate(module)` gives numbers every `validate_every` steps, `sample(module)` a
    picture every `sample_every`; both get the averaged weights. Numbers go to
    `output_dir/log.jsonl`, checkpoints to `output_dir/checkpoints`. Ctrl-C writes one
    and raises KeyboardInterrupt. One process at a time may train in `output_dir`.
    """
    run = Run(config, module, dataset)
    with StopNote() as note:
        batches = iter(step_loader(run, dataset, collate))
        for step in progress(run):
            ours = islice(batches, config.gradient_accumulation_steps)
            take_step(run, step, loss_of, ours)
            report(run, step + 1, validate, sample)
            stop = note.is_written(run.accelerator)
            if stop or is_due(step + 1, config.checkpoint_every, run.config):
                run.save(step + 1)
            if stop:
                raise KeyboardInterrupt(
                    f"after step {step + 1}; the same command goes on from step "
                    f"{run.saved}"
                )
    return run.finish()
