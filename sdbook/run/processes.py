"""The processes of a run: devices, ranks, and what they count and average together."""

import atexit
import math
import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from .memory import keep_all, recompute_blocks
from .settings import RunConfig

# How many processes were started, as torchrun and accelerate say it, or MPI.
STARTED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def this_process():
    """Accelerate's state of this process: device, rank, how many there are.

    Whoever asks first makes it, so nobody asks accelerate itself. Raises ValueError
    where other processes were started than have found each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes > 1:  # they part at the end: another training may follow
        atexit.unregister(state.destroy_process_group)
        atexit.register(state.destroy_process_group)
    name = next((name for name in STARTED if os.environ.get(name)), None)
    started = os.environ[name] if name else "1"
    if started.isdecimal() and int(started) not in (1, state.num_processes):
        raise ValueError(
            f"{name} says that {started} processes were started, but this one knows "
            f"of {state.num_processes}: they would train one by one, in the same "
            "folder. Set ACCELERATE_USE_CPU=true to join processes on CPUs; of a "
            f"single process, take {name} out of the environment"
        )
    return state


def make_accelerator(config: RunConfig):
    """Accelerate's view of this process: device, precision, rank among others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    this_process()
    AcceleratorState._reset_state()  # an earlier run may have had another precision
    threads = torch.get_num_threads()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=config.output_dir,
    )
    torch.set_num_threads(threads)  # accelerate lowers them on some CPUs
    return accelerator


def is_main_process() -> bool:
    """Is this the process that writes files? With one process, it is."""
    return this_process().is_main_process


def any_process(accelerator, fact: bool) -> bool:
    """Is this so in any of the processes?"""
    if accelerator.num_processes == 1:
        return fact
    note = torch.tensor([float(fact)], device=accelerator.device)
    return bool(accelerator.reduce(note, "sum") > 0)


def pictures_per_step(config: RunConfig, processes: int) -> int:
    """How many pictures one optimiser step sees, over all processes."""
    return config.batch_size * config.gradient_accumulation_steps * processes


def count_steps(config: RunConfig, size: int, processes: int) -> RunConfig:
    """The config with `max_steps` that make `num_train_epochs` of `size` pictures."""
    if config.num_train_epochs is None:
        return config
    shown = config.num_train_epochs * size
    steps = math.ceil(shown / pictures_per_step(config, processes))
    return replace(config, max_steps=steps, num_train_epochs=None)


def wrap(accelerator, config: RunConfig, module: nn.Module, optimiser):
    """Module and optimiser, ready to run in all processes.

    With gradient_checkpointing blocks are computed twice, with `compile` by
    torch.compile; `unwrap` undoes both.
    """
    if getattr(config, "gradient_checkpointing", False):
        recompute_blocks(module)
    compiled = torch.compile(module) if config.compile else module
    return accelerator.prepare(compiled, optimiser)


def unwrap(accelerator, module: nn.Module, wrapped: nn.Module) -> None:
    """Undo what `wrap` put around a module, when the run has ended."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    keep_all(module)
    for tracker in accelerator.trackers:
        tracker.finish()


def mean_of_all(accelerator, measured: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each number over the micro-batches of a step and its processes.

    Of all but the loss, what is no number is left out.
    """
    names = list(measured[0])
    rows = [[torch.as_tensor(m[n]).detach().float() for n in names] for m in measured]
    table = torch.stack([torch.stack(row) for row in rows]).to(accelerator.device)
    table = accelerator.gather(table).double()
    means = dict(zip(names, table.nanmean(0).tolist(), strict=True))
    return means | {"loss": table[:, 0].mean().item()}
