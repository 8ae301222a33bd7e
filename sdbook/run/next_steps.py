"""What to run after a training: the next command, with the paths of this run."""

import shlex
import warnings
from dataclasses import fields
from pathlib import Path

from .configs import CLIPTrainingConfig, TrainingConfig, VAETrainingConfig
from .settings import RunConfig, open_dataset

# What the pictures are, and all three trainings have to agree on.
DATA = (
    "dataset_path", "image_column", "caption_column", "num_pictures", "kinds",
    "image_size", "crops", "flip",
)  # fmt: skip


def say_command(command: str, **flags) -> str:
    """A command line that can be pasted into a shell."""
    words = ["sdbook", command]
    for name, value in flags.items():
        value = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
        value = str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{name}", value] if value[:1] != "-" else [f"--{name}={value}"]
    return shlex.join(words)


def other_data(config: RunConfig, next_class: type) -> dict:
    """The flags that show another training the same pictures."""
    usual = {one.name: one.default for one in fields(next_class)}
    asked = {name: getattr(config, name) for name in DATA}
    return {name: value for name, value in asked.items() if value != usual[name]}


def beside(folder: str, this: str, other: str) -> Path:
    """Where another part of the same model goes: runs/my-vae, runs/my-clip."""
    path = Path(folder)
    name = path.name
    return path.with_name(
        name.replace(this, other) if this in name else f"{name}-{other}"
    )


def find_caption(config: RunConfig) -> str:
    """What the first picture of a run's data is said to show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training has said it
        _, caption = next(iter(open_dataset(config)))
    return caption


def next_command(command: str, config: RunConfig) -> str:
    """The command line that makes use of what a training wrote."""
    folder = config.output_dir
    if command in ("train-vae", "train-clip"):
        this, other = ("vae", "clip") if command == "train-vae" else ("clip", "vae")
        partner = beside(folder, this, other)
        if not partner.is_dir():
            kind = CLIPTrainingConfig if other == "clip" else VAETrainingConfig
            data = other_data(config, kind)
            return say_command(f"train-{other}", **data, output_dir=partner)
        places = {this: folder, other: partner}
        return say_command(
            "train",
            **other_data(config, TrainingConfig),
            vae_weights_path=places["vae"],
            text_encoder_path=places["clip"],
            output_dir=beside(folder, this, "unet"),
        )
    prompts = getattr(config, "sample_prompts", ())
    prompt = prompts[0] if prompts else find_caption(config)
    made = {"checkpoint_path": folder}
    if command == "train-lora" and not config.rank:
        made = {"checkpoint_path": f"{folder}/pipeline"}
    elif command != "train":
        made = {"checkpoint_path": config.pretrained}
        made |= {f"{command.removeprefix('train-')}_path": folder}
    return say_command("sample", **made, prompt=prompt)
