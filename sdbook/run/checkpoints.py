"""Checkpoints of a run: written whole or not at all, found, checked, set aside."""

import json
import os
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .settings import RunConfig, facts_of


def save_checkpoint(folder: Path, step: int, stateful: dict, keep: int = 1) -> Path:
    """Write the state of all that is `stateful` as step-….pt, whole or not at all.

    Older ones beyond `keep` are removed afterwards. Raises OSError, naming the last
    whole one, when it cannot be written.
    """
    state = {name: thing.state_dict() for name, thing in stateful.items()}
    path = Path(folder) / f"step-{step:08d}.pt"

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(state | {"step": step}, file)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the second
        last = max(path.parent.glob("step-*.pt"), default=None)
        raise OSError(
            f"{path} could not be written ({error}); make room, and the same command "
            f"goes on from {last or 'zero'}"
        ) from error
    for old in sorted(path.parent.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def is_whole(path: Path) -> bool:
    """Does every piece of a checkpoint fit its check sum?"""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # each way of being torn raises another one
        return False


def read_checkpoint(path: Path, mapped: bool = False) -> dict:
    """What a checkpoint holds, or a view of the file; ValueError for a torn one."""
    if not is_whole(path):
        raise ValueError(
            f"{path} is no checkpoint that can be read, it may be cut off; copy it "
            "again, or set resume to another one, or to none to start from zero"
        )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def load_checkpoint(path: Path, stateful: dict) -> int:
    """Give all that is `stateful` its state back; returns the step to go on with.

    Raises ValueError for a file that is torn, or of another model.
    """
    state = read_checkpoint(path)
    compare(path, state["model"], stateful["model"].state_dict())
    # An average or a scaler begun only now has no state there.
    state = {"ema": state["model"], **state}
    for name, thing in stateful.items():
        if name in state:
            thing.load_state_dict(state[name])
    return state["step"]


def check_fits(path: Path | None, model: nn.Module) -> None:
    """Raise ValueError if a checkpoint is of a model with other weights than this.

    Reads no weights, so the model may live on the meta device.
    """
    if path is not None:
        theirs = read_checkpoint(path, mapped=True)["model"]
        compare(path, theirs, model.state_dict())


def compare(path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint's weights have our names and shapes."""
    for name in [*ours, *theirs]:
        there, here = (
            tuple(state[name].shape) if name in state else "missing"
            for state in (theirs, ours)
        )
        if there != here:
            raise ValueError(
                f"{path} is of another model ({name} is {there} there and {here} "
                "here); set the sizes (unet_preset, layers_per_block, rank and so on) "
                "as they were, or choose another output_dir, or set resume to none to "
                "start from zero"
            )


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `resume` means; None to start from zero.

    Of a folder it is the newest whole one, with a warning for each torn one. Raises
    ValueError if all are torn, FileNotFoundError for a path without any.
    """
    if config.resume == "none":
        return None
    run = Path(config.output_dir if config.resume == "auto" else config.resume)
    if run.is_file():
        return run
    found = sorted(run.glob("checkpoints/step-*.pt"), reverse=True)
    for path in found:
        if is_whole(path):
            return path
        warnings.warn(f"{path} is torn; trying the one before it", stacklevel=2)
    if found:
        raise ValueError(
            f"no checkpoint in {found[0].parent} is whole; copy them again, or set "
            "resume to none to start from zero"
        )
    if config.resume != "auto":
        raise FileNotFoundError(
            f"resume: there is no checkpoint at {run}; give a file step-….pt, the "
            "output_dir of a run, auto or none"
        )
    return None


def set_aside(folder: Path, first: int) -> None:
    """Move checkpoints of steps after `first`, made again or torn, to folder-old."""
    for path in sorted(folder.glob("step-*.pt")):
        if path.stem > f"step-{first:08d}":
            old = folder.with_name(folder.name + "-old")
            old.mkdir(exist_ok=True)
            path.replace(old / path.name)


class SettingsRecord:
    """The settings that decide what a step does, as a checkpoint holds them.

    `more` are facts of the same kind. Taking back others than these warns, naming
    each with its old and its new value.
    """

    def __init__(self, config: RunConfig, **more):
        without = {
            one.name
            for one in fields(config)
            if not facts_of(type(config), one.name).get("affects_steps", True)
        }
        if config.lr_scheduler == "constant":
            without.add("max_steps")
        facts = {**asdict(config), **more}
        kept = {name: value for name, value in facts.items() if name not in without}
        self.kept = json.loads(json.dumps(kept))  # lists for tuples, as in a file

    def state_dict(self) -> dict:
        return self.kept

    def load_state_dict(self, before: dict) -> None:
        changed = "; ".join(
            f"{name} was {before[name]!r} and is {value!r}"
            for name, value in self.kept.items()
            if name in before and before[name] != value
        )
        if changed:
            warnings.warn(
                f"the checkpoint was made with other settings: {changed}. The steps "
                "from here on follow the new ones; if you do not mean that, stop, and "
                "set them as they were, or choose another output_dir",
                stacklevel=2,
            )


def find_start(run, size: int) -> int:
    """Let a `Run` take back its last checkpoint; returns the step to go on with.

    It then also holds its settings (and that it shows `size` pictures), to be compared
    when it goes on, and the scaler of float16.
    """
    if run.accelerator.scaler:
        run.stateful["scaler"] = run.accelerator.scaler
    if run.main:
        record = SettingsRecord(run.config, processes=run.world, pictures=size)
        run.stateful["settings"] = record
    folder = Path(run.config.output_dir) / "checkpoints"
    with run.accelerator.main_process_first():
        for left in folder.glob(".*.tmp") if run.main else ():
            left.unlink()  # by a run that was killed while it wrote
        path = find_checkpoint(run.config)
        first = load_checkpoint(path, run.stateful) if path else 0
        run.log.cut(first)
        if run.main:
            set_aside(folder, first)
    return first
