"""What a run writes down: log.jsonl, sheets of pictures, TensorBoard or wandb."""

import json
import math
import time
from pathlib import Path

import numpy as np

from ..files import naming, write_atomically
from .settings import RunConfig


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
            data = path.read_bytes() if path.exists() else b""
            lines = data.decode("utf-8", "replace").splitlines()
            kept = [line for line in lines if -1 < step_of(line) <= first]
            text = "".join(line + "\n" for line in kept)
            write_atomically(path, lambda file: file.write_text(text, "utf-8"))

    def write(self, line: dict) -> None:
        """Append one line. What is no number is null: JSON knows no NaN."""
        if self.writes:
            known = {
                name: value if math.isfinite(value) else None
                for name, value in line.items()
            }
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(known) + "\n")


class Meter:
    """Means of what was measured in the last steps, and a count of failed ones.

    `in_a_row` are the steps left out since the last good one, `lost` those since the
    last whose loss was a number: such weights are of no use. `unclear` says so of the
    weights that were validated last.
    """

    def __init__(self):
        self.in_a_row, self.lost, self.unclear, self.loss = 0, 0, False, math.nan
        self.start_again()

    def start_again(self) -> None:
        self.sums, self.counts, self.skipped, self.steps = {}, {}, 0, 0
        self.started = time.perf_counter()

    def state_dict(self) -> dict:
        """The sums of the line that is not finished."""
        names = ("sums", "counts", "skipped", "in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.sums = {name: float(total) for name, total in state["sums"].items()}
        self.counts = {name: int(state["counts"][name]) for name in self.sums}
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])

    def add(self, numbers: dict[str, float]) -> None:
        """Count one step; what is no number is left out."""
        self.in_a_row, self.lost, self.unclear = 0, 0, False
        self.steps += 1
        self.loss = numbers.get("loss", math.nan)
        for name, value in numbers.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.counts[name] = self.counts.get(name, 0) + 1

    def skip(self, loss: float) -> None:
        """Count a step that was left out, its loss or its gradient being no number."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.lost, self.unclear = 0 if math.isfinite(loss) else self.lost + 1, False

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
        found = validate(run.averaged)
        run.meter.unclear = any(map(math.isnan, found.values()))
        line |= found
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
