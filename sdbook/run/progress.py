"""While a run goes on: its progress bar, and the note that Ctrl-C leaves."""

import signal
import threading
import time
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm


class StopNote:
    """While open, Ctrl-C and SIGTERM only set `.written`; the second one interrupts."""

    def __enter__(self):
        self.written, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.write)
        return self

    def write(self, number, frame) -> None:
        if self.written:
            raise KeyboardInterrupt
        self.written = True

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def is_written(self, accelerator) -> bool:
        """Has any of the processes such a note?"""
        if accelerator.num_processes == 1:
            return self.written
        note = torch.tensor([float(self.written)], device=accelerator.device)
        return bool(accelerator.reduce(note, "sum") > 0)

    def interrupt(self, step: int) -> None:
        """Do what was asked for: KeyboardInterrupt, which says how to go on."""
        raise KeyboardInterrupt(
            f"after step {step}; the same command goes on from there"
        )


def leave_signals_to_main(worker: int) -> None:
    """A process that prepares data ends when the main one tells it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def progress(run) -> Iterator[int]:
    """The steps that a `Run` has to make, with a bar: loss, rate, speed, time left."""
    started = time.perf_counter()
    bar = tqdm(
        range(run.first, run.config.max_steps), initial=run.first,
        total=run.config.max_steps, disable=not run.main,
    )  # fmt: skip
    for made, step in enumerate(bar, start=1):
        yield step
        bar.set_postfix(
            loss=f"{run.meter.loss:.4g}",
            lr=f"{run.learning_rate(step):.2g}",
            pictures=f"{made * run.pictures / (time.perf_counter() - started):.3g}/s",
            refresh=False,
        )
