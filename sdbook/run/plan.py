"""What a run is going to do, said before its first step."""

from torch import nn
from torch.utils.data import Dataset

from .checkpoints import find_checkpoint
from .processes import (
    count_steps,
    is_main_process,
    pictures_per_step,
    this_process,
)
from .settings import RunConfig


def say_plan(config: RunConfig, *facts, **more) -> None:
    """Print the plan, once."""
    if is_main_process():
        print(describe_plan(config, *facts, **more), flush=True)


def readable(size: int) -> str:
    """A number of bytes as people say it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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
        "data": f"{config.dataset_path}: {shown:,} pictures to train on, {held:,} "
        f"held out, {rejected:,} rejected, {config.image_size} pixels a side",
        "model": f"{count:,} parameters to train",
        "steps": f"{config.max_steps:,} of {pictures:,} pictures ({epochs:.1f} epochs)",
        "batch": f"{config.batch_size} at once × {config.gradient_accumulation_steps} "
        f"added up × {world} processes = {pictures}",
        "memory": f"about {readable(sum(memory.values()))} a process: "
        f"{readable(memory['weights'])} for the weights and what moves them, "
        f"{readable(memory['batch'])} for a batch",
        "output": f"{config.output_dir}: checkpoints/ (one in "
        f"{config.checkpoint_every:,} steps, {config.keep_checkpoints} kept), "
        "log.jsonl, the finished model",
        **(also or {}),
        "start": f"goes on from {path}" if path else "from step 0",
    }
    return "\n".join(f"{name:8}{text}" for name, text in lines.items())
