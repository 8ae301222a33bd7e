"""What a run writes down: log.jsonl, sheets of pictures, TensorBoard or wandb."""

import json
import math
import time
from pathlib import Path

import numpy as np

from ..files import write_atomically
from .settings import RunConfig

TEN_BAD_STEPS = (
    "the loss or its gradient was no number in ten steps running, the last of them "
    "step {step}; try a lower learning_rate, more warmup_steps, mixed_precision bf16 "
    "or no in place of fp16, and look for broken pictures. The last checkpoint is "
    "whole: the same command goes on from there"
)


def step_of(line: str) -> int:
    """The step of a line of the log; -1 for one that is none, cut off or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if type(step) is int else -1


class Log:
    """Lines of a JSON file; only the process that `writes` touches it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def cut(self, first: int) -> None:
        """Remove the lines of steps after `first`, which will be made again."""
        if self.writes:
            path = self.path
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if -1 < step_of(line) <= first]
            text = "".join(line + "\n" for line in kept)
            write_atomically(path, lambda file: file.write_text(text))

    def write(self, line: dict) -> None:
        """Append one line."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Meter:
    """Means of what was measured in the last steps, and a count of failed ones."""

    def __init__(self):
        self.in_a_row, self.loss = 0, math.nan
        self.start_again()

    def start_again(self) -> None:
        self.sums, self.counts, self.skipped, self.steps = {}, {}, 0, 0
        self.started = time.perf_counter()

    def state_dict(self) -> dict:
        """The sums of the line that is not finished."""
        names = ("sums", "counts", "skipped", "in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def add(self, numbers: dict[str, float]) -> None:
        """Count one step; what is no number is left out."""
        self.in_a_row, self.steps = 0, self.steps + 1
        self.loss = numbers.get("loss", math.nan)
        for name, value in numbers.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.counts[name] = self.counts.get(name, 0) + 1

    def skip(self, step: int) -> None:
        """Count a step that was left out; ValueError after ten in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == 10:
            raise ValueError(TEN_BAD_STEPS.format(step=step))

    def means(self, pictures: int) -> dict[str, int | float]:
        """The means since the last call, and how fast steps of `pictures` went."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        means |= {"skipped": self.skipped} if self.skipped else {}
        seconds = time.perf_counter() - self.started
        means["seconds"] = round(seconds, 2)
        means["pictures_per_second"] = round(self.steps * pictures / seconds, 2)
        self.start_again()
        return means


def is_due(done: int, every: int, config: RunConfig) -> bool:
    """Is it time, after `done` steps, for what comes every so often and at the end?"""
    return every > 0 and (done % every == 0 or done == config.max_steps)


def open_tracker(run) -> None:
    """TensorBoard or wandb, which go on where a `Run`'s log does."""
    name = {"wandb": "sdbook"}.get(run.config.log_with, "tensorboard")
    later = {"tensorboard": {"purge_step": run.first}}
    run.accelerator.init_trackers(name, init_kwargs=later)


def report(run, done: int, validate=None, sample=None) -> None:
    """Write what is due after `done` steps of a `Run`; mostly nothing."""
    config, line = run.config, {}
    if not run.main:
        return
    if is_due(done, config.log_every, config):
        line = run.meter.means(run.pictures)
    if validate and is_due(done, config.validate_every, config):
        line |= validate(run.averaged)
    if line:
        line = {"lr": run.learning_rate(done - 1), **line}
        run.log.write({"step": done, **line})
        run.accelerator.log(line, step=done)
    if sample and is_due(done, config.sample_every, config):
        picture = sample(run.averaged)
        path = Path(config.output_dir) / "samples" / f"step-{done:08d}.png"
        write_atomically(path, lambda file: picture.save(file, "PNG"))
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({"samples": pixels}, step=done, **layout)
