"""The settings of a command: frozen dataclasses whose fields know their limits.

Every field is a flag of the command line and a key of its YAML files. Nothing heavy is
imported before a run needs it, so that a wrong flag is refused at once.
"""

import importlib.util
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, get_args, get_origin

from ..kinds import KIND_NAMES, cleaned

LIMITS = {
    "at_least": (operator.ge, "at least"),
    "more_than": (operator.gt, "more than"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def setting(default, *, affects_steps: bool = True, choices: tuple = (), **limits):
    """A field of a settings class, with what its value has to keep to.

    `limits` are `at_least`, `more_than`, `at_most` and `below`, each with a number; of
    a tuple, every value has to. A setting that does not affect what a step does is
    not compared when a run goes on from a checkpoint.
    """
    if unknown := [name for name in limits if name not in LIMITS]:
        raise TypeError(
            f"setting() knows no {unknown[0]}; it knows {', '.join(LIMITS)}"
        )
    facts = {"affects_steps": affects_steps, "choices": choices, **limits}
    return field(default=default, metadata=facts)


def facts_of(config_class: type, name: str) -> Mapping:
    """What `setting` says of a field: the class that names it, or else its bases.

    So a subclass may give a field another default and nothing more.
    """
    for base in config_class.__mro__:
        own = vars(base).get("__dataclass_fields__", {}).get(name)
        if own is not None and own.metadata:
            return own.metadata
    return {}


def demands(config_class: type, name: str) -> tuple:
    """What a setting has to be: its kind, its choices, and its limits with their words.

    The kind is a type, or a tuple of one. No choices: any.
    """
    (kind,) = (one.type for one in fields(config_class) if one.name == name)
    facts = facts_of(config_class, name)
    if get_origin(kind) is not tuple:  # int | None is int
        kind = next((one for one in get_args(kind) if one in KIND_NAMES), kind)
    limits = [(*LIMITS[limit], facts[limit]) for limit in LIMITS if limit in facts]
    return kind, facts.get("choices", ()), limits


def say_demands(config_class: type, name: str) -> str:
    """What to give for a setting, as in "a whole number, at least 1"."""
    kind, choices, limits = demands(config_class, name)
    if choices:
        return f"one of {', '.join(choices)}"
    several = get_origin(kind) is tuple
    words = KIND_NAMES[get_args(kind)[0] if several else kind][several]
    return ", ".join(filter(None, [words, say_limits(limits)]))


def say_limits(limits: list) -> str:
    """Limits in words, as in "at least 0 and at most 1"."""
    return " and ".join(f"{word} {bound}" for _, word, bound in limits)


def check_setting(config, name: str) -> None:
    """Clean one value of a settings object; ValueError for one that cannot be meant."""
    value = getattr(config, name)
    kind, choices, limits = demands(type(config), name)
    try:
        clean = cleaned(value, kind)
    except (TypeError, OverflowError):
        expected = say_demands(type(config), name)
        raise ValueError(f"{name} is {value!r}; give {expected}") from None
    if choices and clean not in choices:
        raise ValueError(f"{name} {clean!r} is none of {', '.join(choices)}")
    for number in clean if isinstance(clean, tuple) else (clean,):
        if not all(holds(number, bound) for holds, _, bound in limits):
            raise ValueError(f"{name} is {value!r}; give {say_limits(limits)}")
    object.__setattr__(config, name, clean)


def check_settings(config) -> None:
    """Raise ValueError for a value that cannot be meant, with what to give instead.

    That is one of another kind than its field, one beyond its limits, or an empty one.
    """
    for one in fields(config):
        value, default = getattr(config, one.name), one.default
        if value is None and default is None:
            continue
        empty = isinstance(value, str) and not value.strip() and default != ""
        if value is None or empty:
            lacks = "no value" if value is None else "an empty value"
            given = "" if default is None else f" for {default}"
            raise ValueError(
                f"{one.name} has {lacks}; give one, or leave it out{given}"
            )
        check_setting(config, one.name)


def check_machine(config: "RunConfig") -> None:
    """Raise ValueError for settings that this machine cannot follow."""
    if config.mixed_precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("mixed_precision fp16 needs a GPU; use 'no' or 'bf16'")
    package = config.log_with
    if package != "none" and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"log_with {package} needs a package that is not installed; run "
            f"`pip install {package}`, or set log_with to none"
        )


def check_places(config: "RunConfig", name: str) -> None:
    """Raise ValueError if a run would write over the model that it starts from."""
    given = getattr(config, name)
    folder = Path(config.output_dir)
    if given and folder.exists() and Path(given).resolve() == folder.resolve():
        raise ValueError(
            f"output_dir is {name}, {given}, and would be written over; choose another "
            "output_dir"
        )


def check_png(name: str, path: str) -> None:
    """Raise ValueError for the path of a picture to write that is no PNG's."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{name} {path!r} must end in .png; give it that ending")


def check_multiple(name: str, widths, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless every width is a multiple of the divisor."""
    if any(width % divisor for width in widths):
        raise ValueError(
            f"{name} {widths} do not split into {divisor_name} {divisor}; make every "
            "width a multiple of it"
        )


def check_side(image_size: int, factor: int, why: str = "the VAE") -> None:
    """Raise ValueError unless pictures of this side can be halved often enough."""
    if image_size % factor:
        near = max(1, round(image_size / factor)) * factor
        raise ValueError(
            f"image_size is {image_size}, but {why} needs a multiple of {factor}; "
            f"give {near}"
        )


@dataclass(frozen=True)
class RunConfig:
    """What every training run needs to know.

    Attributes:
        dataset_path: "scenes" for the book's own world, a folder of pictures, .tar
            shards, as in "pets/{0000..0099}.tar", .parquet files, or a hub id.
        image_column: the column with the pictures; none given: "image", of a
            metadata table "file_name".
        caption_column: the column with the captions; none given: "caption" or "text".
        num_pictures: how many of the endless scenes to use.
        kinds: kinds of scene to show (chapter 4's `KINDS`); none named: all; one that
            is named twice is shown twice as often.
        image_size: pictures are cut to squares of this side, in pixels.
        crops: squares cut from each picture at random places; 0: one, the middle.
        flip: show mirror images, too; wrong where captions say left and right.
        on_error: "skip" pictures that cannot be used, with a warning, or "raise".
        batch_size: pictures that a process takes at once.
        gradient_accumulation_steps: batches whose gradients make one step; a step sees
            batch_size pictures times this times the number of processes.
        num_workers: processes that prepare data.
        seed: of the weights, the data order and the noise.
        max_steps: optimiser steps.
        num_train_epochs: times that each picture is shown, in place of max_steps.
        learning_rate: the highest.
        lr_scheduler: what it does after the warm-up: "constant", "linear" or "cosine",
            the last two down to 0 at the last step.
        warmup_steps: steps until the highest learning rate.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are shortened to this.
        ema_decay: how slowly the averaged weights follow; 0 keeps no average.
        mixed_precision: "no", "fp16" or "bf16".
        compile: let torch.compile speed the model up (a GPU's gain).
        output_dir: where the model, checkpoints/ and the log (log.jsonl) go.
        log_every: steps between two lines of the log.
        log_with: "tensorboard" or "wandb" get the same numbers and pictures; "none".
        validate_every: steps between two looks at held-out pictures; 0 for none.
        sample_every: steps between two sheets of pictures; 0 for none.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of them stay, the newest.
        resume: "auto" goes on from the newest whole checkpoint in output_dir, "none"
            starts from zero and sets those aside, a path goes on from that file or run.
        dry_run: say what would be done, and stop before the first step.
    """

    enough: ClassVar[int] = 1000  # pictures; with fewer, there is a warning

    dataset_path: str = "scenes"
    image_column: str | None = None
    caption_column: str | None = None
    num_pictures: int = setting(20_000, at_least=1)
    kinds: tuple[str, ...] = ()
    image_size: int = setting(64, at_least=1)
    crops: int = setting(0, at_least=0)
    flip: bool = False
    on_error: str = setting("skip", choices=("skip", "raise"))
    batch_size: int = setting(64, at_least=1)
    gradient_accumulation_steps: int = setting(1, at_least=1)
    num_workers: int = setting(0, at_least=0, affects_steps=False)
    seed: int = setting(0, at_least=0, below=2**64)

    max_steps: int = setting(1000, at_least=1)
    num_train_epochs: int | None = setting(None, at_least=1)
    learning_rate: float = setting(1e-3, more_than=0)
    lr_scheduler: str = setting("cosine", choices=("constant", "linear", "cosine"))
    warmup_steps: int = setting(100, at_least=0)
    weight_decay: float = setting(0.01, at_least=0)
    max_grad_norm: float = setting(1.0, more_than=0)
    ema_decay: float = setting(0.999, at_least=0, below=1)
    mixed_precision: str = setting("no", choices=("no", "fp16", "bf16"))
    compile: bool = setting(False, affects_steps=False)

    output_dir: str = setting("runs/model", affects_steps=False)
    log_every: int = setting(50, at_least=1, affects_steps=False)
    log_with: str = setting(
        "none", choices=("none", "tensorboard", "wandb"), affects_steps=False
    )
    validate_every: int = setting(500, at_least=0, affects_steps=False)
    sample_every: int = setting(0, at_least=0, affects_steps=False)
    checkpoint_every: int = setting(500, at_least=1, affects_steps=False)
    keep_checkpoints: int = setting(2, at_least=1, affects_steps=False)
    resume: str = setting("auto", affects_steps=False)
    dry_run: bool = setting(False, affects_steps=False)

    def __post_init__(self):
        check_settings(self)
        check_machine(self)


def open_dataset(config: RunConfig, split: str = "train"):
    """A `CaptionedDataset`: the scenes, or somebody's own pictures, without splits.

    What this run writes is not among them, should output_dir lie in dataset_path.
    """
    from ..images import open_pictures
    from ..scenes import KINDS, Scenes

    if config.dataset_path == "scenes":
        kinds = config.kinds or tuple(KINDS)
        return Scenes(config.image_size, split, length=config.num_pictures, kinds=kinds)
    own = Path(config.output_dir).resolve()
    return open_pictures(
        config.dataset_path, config.image_size, config.flip, config.on_error,
        config.crops, config.seed, config.image_column, config.caption_column,
        leave_out=(own, own / "class"),
    )  # fmt: skip
