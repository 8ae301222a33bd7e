"""Checkpoints of a run: written whole or not at all, found, checked, set aside."""

import json
import os
import warnings
import zipfile
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..files import write_atomically
from ..images import short_name
from .folder import checkpoint_folder, checkpoint_name, list_checkpoints
from .processes import any_process
from .settings import RunConfig, facts_of

NO_NUMBER = (
    "{what}; try a lower learning_rate, more warmup_steps, mixed_precision bf16 or no "
    "in place of fp16, and look for broken pictures. With that, the same command goes "
    "on from {last}"
)


def save_checkpoint(folder: Path, step: int, stateful: dict, keep: int = 1) -> Path:
    """Write the state of all that is `stateful` as step-….pt, whole or not at all.

    Older ones beyond `keep` are removed afterwards. Raises OSError, naming the last
    whole one, when it cannot be written.
    """
    state = {name: thing.state_dict() for name, thing in stateful.items()}
    path = Path(folder) / checkpoint_name(step)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(state | {"step": step}, file)

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the second
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        last = max(list_checkpoints(path.parent), default=None)
        raise OSError(
            f"{path} could not be written ({reason}); make room, and the same command "
            f"goes on from {last or 'zero'}"
        ) from error
    for old in list_checkpoints(path.parent)[:-keep]:
        old.unlink()
    return path


@lru_cache(maxsize=16)
def fault_of(path: Path, *facts) -> str | None:
    """Why a file is no checkpoint; None for one that is.

    It must be whole by its check sums, which read all of it: so the answer is
    remembered, by `facts` such as its size and date.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return "a piece of it does not fit its check sum"
    except Exception:  # each way of being torn raises another one
        return "it is cut off, or another kind of file"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it is damaged, or another kind of file: {reason:.80}"
    return fault_in(state)


def fault_in(state) -> str | None:
    """Why what a file holds is no state of a training; None if it is."""
    state = state if isinstance(state, dict) else {}
    lacks = [name for name in ("model", "optimiser", "step") if name not in state]
    if lacks:
        return f"it has no {', no '.join(lacks)}"
    for name in ("model", "ema"):
        weights = state.get(name, {})
        if not isinstance(weights, dict) or not all(map(is_tensor, weights.values())):
            return f"its {name} is none"
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            return f"its {name} has weights that are no numbers"
    moved = state["optimiser"]
    moved = moved.get("state") if isinstance(moved, dict) else None
    if not isinstance(moved, dict) or not all(
        isinstance(means, dict) and all(map(is_tensor, means.values()))
        for means in moved.values()
    ):
        return "its optimiser is none"
    means = [mean for means in moved.values() for mean in means.values()]
    if not all(bool(mean.isfinite().all()) for mean in means):
        return "its optimiser has means that are no numbers"
    if type(state["step"]) is not int or state["step"] < 0:
        return f"its step is {state['step']!r:.40}"
    return None


def is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def why_not(path: Path) -> str | None:
    """Why a path is no checkpoint; None if it is one."""
    if not path.is_file():  # to open a pipe would take for ever
        return "it is no file"
    facts = path.stat()
    return fault_of(path, facts.st_size, facts.st_mtime_ns)


def read_checkpoint(path: Path, mapped: bool = False) -> dict:
    """What a checkpoint holds, or a view of the file; ValueError for any other file."""
    if reason := why_not(path):
        raise ValueError(
            f"{path} is no checkpoint of a training that can be read ({reason}); copy "
            "it again, or set resume to another one, or to none to start from zero"
        )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def load_checkpoint(path: Path, stateful: dict) -> int:
    """Give all that is `stateful` its state back; returns the step to go on with.

    Raises ValueError for a file that is torn, or of another model.
    """
    state = read_checkpoint(path)
    # An average or a scaler begun only now has no state there.
    state = {"ema": state["model"], **state}
    for name in {"model", "ema"} & set(stateful):
        former = getattr(stateful[name], "former_state", ())
        state[name] = {k: t for k, t in state[name].items() if k not in former}
        compare(path, state[name], stateful[name].state_dict())
    state["optimiser"] = moved_by(path, state["optimiser"], stateful["optimiser"])
    for name in [name for name in stateful if name in state]:
        try:
            stateful[name].load_state_dict(state[name])
        except Exception as error:  # each part raises another one
            raise ValueError(
                f"{path}: what it holds as {name} is something else ({error!r:.80}); "
                "set resume to another one, or to none to start from zero"
            ) from error
    return state["step"]


def moved_by(path: Path, theirs: dict, optimiser: torch.optim.Optimizer) -> dict:
    """A checkpoint's state of an optimiser, with the settings of now.

    Raises ValueError unless its means are as large as the weights: beyond them, the
    fused step of AdamW would read any memory.
    """
    weights = [w for group in optimiser.param_groups for w in group["params"]]
    there, here = {}, {}
    for number, means in theirs["state"].items():
        start = f"optimiser.{number}."
        there |= {f"{start}{name}": mean for name, mean in means.items()}
        if number in range(len(weights)):
            w = weights[number]
            means = {"step": torch.tensor(0.0), "exp_avg": w, "exp_avg_sq": w}
            here |= {f"{start}{name}": mean for name, mean in means.items()}
    compare(path, there, here)
    return theirs | {"param_groups": optimiser.state_dict()["param_groups"]}


def check_fits(path: Path | None, model: nn.Module) -> None:
    """Raise ValueError if a checkpoint is of a model with other weights than this.

    Reads no weights, so the model may live on the meta device.
    """
    if path is not None:
        theirs = read_checkpoint(path, mapped=True)["model"]
        compare(path, theirs, model.state_dict())


def compare(path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint's tensors have our names and shapes."""
    for name in [*ours, *theirs]:
        there, here = (
            tuple(state[name].shape) if name in state else "missing"
            for state in (theirs, ours)
        )
        if there != here:
            raise ValueError(
                f"{path} is of another model ({name} is {there} there and {here} "
                "here); set the sizes (unet_preset, layers_per_block, rank and so on) "
                "as they were, or go on with the version of sdbook that wrote it, or "
                "choose another output_dir, or set resume to none to start from zero"
            )


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `resume` means; None to start from zero.

    Of a folder it is the newest that can be used, with a warning for each other.
    Raises ValueError if none can, FileNotFoundError for a path without any.
    """
    if config.resume == "none":
        return None
    run = Path(config.output_dir if config.resume == "auto" else config.resume)
    if run.is_file():
        read_checkpoint(run, mapped=True)
        return run
    found = list_checkpoints(checkpoint_folder(run))[::-1]
    for path in found:
        reason = why_not(path)
        if reason is None:
            return path
        warnings.warn(
            f"{path} cannot be used ({reason}); trying the one before it", stacklevel=2
        )
    if found:
        raise ValueError(
            f"no checkpoint in {found[0].parent} can be used; copy them again, or set "
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
    for path in list_checkpoints(folder):
        if path.name > checkpoint_name(first):
            old = folder.with_name(folder.name + "-old")
            old.mkdir(exist_ok=True)
            path.replace(old / path.name)


def content_of(dataset: Dataset) -> str | None:
    """A short name for what a dataset holds, as captions and sizes of files tell.

    One around others, such as a subset, holds what they do. None where settings say
    it all: scenes are drawn.
    """
    if hasattr(dataset, "content"):
        return dataset.content
    if pairs := getattr(dataset, "pairs", ()):
        facts = [f"{size_of(file)} {caption}" for file, caption in pairs]
        return short_name(*facts)
    inside = [part for part in vars(dataset).values() if isinstance(part, Dataset)]
    names = [name for name in map(content_of, inside) if name]
    return short_name(*names) if names else None


def size_of(file) -> int:
    """How long a file is; 0 for one that cannot be asked."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


class SettingsRecord:
    """The settings that decide what a step does, as a checkpoint holds them.

    `more` are facts of the same kind; those that are None are not known. Taking back
    others than these warns, naming each with its old and its new value.
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
        changed = [
            f"{name} was {before[name]!r} and is {value!r}"
            for name, value in self.kept.items()
            if name != "content" and name in before and before[name] != value
        ]
        was, is_ = before.get("content"), self.kept.get("content")
        if was and is_ and was != is_:
            changed.append(
                "the pictures or captions (or the frozen parts that read them) are "
                "others than they were"
            )
        if changed:
            warnings.warn(
                f"the checkpoint was made with other settings: {'; '.join(changed)}. "
                "The steps from here on follow the new ones; if you do not mean that, "
                "stop, and set them as they were, or choose another output_dir",
                stacklevel=2,
            )


# For a `Run` ------------------------------------------------------------------


def find_start(run, dataset: Dataset) -> int:
    """Let a `Run` take back its last checkpoint; returns the step to go on with.

    It then also holds its settings (and what it trains on), to be compared when it
    goes on, and the scaler of float16.
    """
    if run.accelerator.scaler:
        run.stateful["scaler"] = run.accelerator.scaler
    if run.main:
        run.stateful["settings"] = SettingsRecord(
            run.config, processes=run.world, pictures=len(dataset),
            content=content_of(dataset),
        )  # fmt: skip
    folder = checkpoint_folder(run.config.output_dir)
    with run.accelerator.main_process_first():
        path = find_checkpoint(run.config)
        first = load_checkpoint(path, run.stateful) if path else 0
        run.log.cut(first)
        if run.main:
            set_aside(folder, first)
    run.saved = first
    return first


def is_sound(run) -> bool:
    """Was the last loss of a `Run` a number, and is every weight one?"""
    weights = [*run.module.state_dict().values(), *run.averaged.state_dict().values()]
    lost = run.meter.lost or run.meter.unclear
    return not lost and all(bool(w.isfinite().all()) for w in weights)


def keep_state(run, done: int) -> None:
    """Write a checkpoint of a `Run` after so many steps, unless its weights are lost.

    They would push out what can be gone on from.
    """
    if not is_sound(run):
        return
    if run.main:
        folder = checkpoint_folder(run.config.output_dir)
        save_checkpoint(folder, done, run.stateful, run.config.keep_checkpoints)
    run.saved = done


def skip_step(run, step: int, loss: float) -> None:
    """Count a step of a `Run` that was left out; ValueError after ten in a row."""
    run.meter.skip(loss)
    if run.meter.in_a_row == 10:
        raise give_up(
            run, step, "the loss or its gradient was no number in ten steps running, "
            f"the last of them step {step}"
        )  # fmt: skip


def check_end(run) -> None:
    """Raise ValueError for a `Run` that has lost its weights, before they are saved."""
    if any_process(run.accelerator, not is_sound(run)):
        last = run.config.max_steps - 1
        what = f"after step {last + 1}, the last one, the loss or a weight is no number"
        raise give_up(run, last, what)


def give_up(run, step: int, what: str) -> ValueError:
    """Set aside the checkpoints that no good loss has followed; what to say then."""
    folder = checkpoint_folder(run.config.output_dir)
    if run.main:  # but not the one that the run has begun with
        set_aside(folder, max(run.first, step - run.meter.lost))
    first = 0 if run.config.resume == "auto" else run.first  # its file may be gone
    last = max(list_checkpoints(folder), default=f"step {first}")
    return ValueError(NO_NUMBER.format(what=what, last=last))
