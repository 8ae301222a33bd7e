"""What a run is going to do, said before its first step."""

import warnings

from torch import nn
from torch.utils.data import Dataset

from ..counts import counted, readable
from .checkpoints import find_checkpoint
from .processes import (
    count_steps,
    is_main_process,
    pictures_per_step,
    this_process,
)
from .settings import RunConfig


def say_plan(config: RunConfig, dataset: Dataset, *facts, **more) -> None:
    """Print the plan, once, and warn of far too few pictures."""
    if is_main_process():
        print(describe_plan(config, dataset, *facts, **more), flush=True)
        warn_of_few(config, dataset, more.get("shown") or len(dataset))


def say_epochs(epochs: float) -> str:
    """How much of the data a run sees, as people say it."""
    if epochs < 1:
        return f"{100 * epochs:.3g} % of all pictures are seen"
    times = "once" if f"{epochs:.1f}" == "1.0" else f"{epochs:,.1f} times"
    return f"every picture is seen {times}"


def warn_of_few(config: RunConfig, dataset: Dataset, shown: int) -> None:
    """Warn of far too few pictures for what is trained; scenes are as many as asked."""
    if shown < config.enough and not dataset.drawn:
        warnings.warn(
            f"{counted(shown, 'picture')} to train on: far too few, the model will "
            "know them by heart and little else. Give thousands, or let a finished "
            "model learn from these with `sdbook train-lora`",
            stacklevel=2,
        )


def describe_plan(
    config: RunConfig, dataset: Dataset, model: nn.Module, memory: dict,
    shown: int | None = None, held: int = 0, also: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """What a run is going to do, as text.

    It trains on `shown` of the pictures (all), and `held` are only validated on.
    `model` is what the optimiser moves; `also` are more lines, by their first word.
    """
    world = this_process().num_processes
    shown = len(dataset) if shown is None else shown
    config = count_steps(config, shown, world)
    pictures = pictures_per_step(config, world)
    rejected = len(dataset.problems)
    path = find_checkpoint(config)
    count = sum(weight.numel() for weight in model.parameters())
    epochs = config.max_steps * pictures / shown
    lines = {
        "data": f"{config.dataset_path}: {counted(shown, 'picture')} to train on, "
        f"{held:,} held out, {rejected:,} rejected, "
        f"{counted(config.image_size, 'pixel')} a side",
        "model": f"{counted(count, 'parameter')} to train",
        "steps": f"{config.max_steps:,} of {counted(pictures, 'picture')} "
        f"({say_epochs(epochs)})",
        "batch": f"{config.batch_size} at once × {config.gradient_accumulation_steps} "
        f"added up × {counted(world, 'process', 'processes')} = {pictures}",
        "memory": f"about {readable(sum(memory.values()))} a process: "
        f"{readable(memory['weights'])} for the weights and what moves them, "
        f"{readable(memory['batch'])} for a batch",
        "output": f"{config.output_dir}: checkpoints/ (one in "
        f"{counted(config.checkpoint_every, 'step')}, {config.keep_checkpoints} kept), "
        "log.jsonl, the finished model",
        **(also or {}),
        "start": f"goes on from {path}" if path else "from step 0",
    }
    return "\n".join(f"{name:8}{text}" for name, text in lines.items())
