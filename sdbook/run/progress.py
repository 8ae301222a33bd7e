"""While a run goes on: its progress bar, and the note that Ctrl-C leaves."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from .processes import any_process


def exchange_handlers(handlers: dict) -> dict:
    """Let these functions answer signals, in the main thread; gives those before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, handler or signal.SIG_DFL)
        for number, handler in handlers.items()
    }


@contextmanager
def sigterm_as_ctrl_c():
    """Inside, SIGTERM, with which clusters end a job, interrupts as Ctrl-C does."""
    before = exchange_handlers({signal.SIGTERM: signal.default_int_handler})
    try:
        yield
    finally:
        exchange_handlers(before)


class StopNote:
    """While open, Ctrl-C and SIGTERM only set `.written`; the second one interrupts."""

    def __enter__(self):
        self.written = False
        both = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self.write)
        self.before = exchange_handlers(both)
        return self

    def write(self, number, frame) -> None:
        if self.written:
            raise KeyboardInterrupt
        self.written = True

    def __exit__(self, *error) -> None:
        exchange_handlers(self.before)

    def is_written(self, accelerator) -> bool:
        """Has any of the processes such a note?"""
        return any_process(accelerator, self.written)


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
