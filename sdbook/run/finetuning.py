"""What a fine-tuning starts from: the frozen model, pictures of the class.

And the plan of it, reckoned before anything is computed.
"""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from ..clip import CLIPTextModel
from ..counts import counted
from ..images import CaptionedImages
from ..pipeline import StableDiffusion
from ..reports import write_png, write_text
from ..unet import UNet
from ..weights import build_empty
from .checkpoints import check_fits, find_checkpoint
from .configs import FinetuningConfig, LoRATrainingConfig
from .memory import memory_needed
from .plan import say_plan
from .processes import count_steps, this_process
from .settings import check_side


def open_model(config: FinetuningConfig) -> StableDiffusion:
    """The model to fine-tune, frozen, on this process's device.

    Raises ValueError for an image_size that its parts cannot halve often enough.
    """
    device = this_process().device
    pipe = StableDiffusion.from_pretrained(config.pretrained).to(device)
    halvings = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    factor = pipe.vae.config.downscale * halvings
    check_side(config.image_size, factor, "the VAE with this UNet")
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.to(memory_format=torch.channels_last).requires_grad_(False)
    return pipe


def draw_class(config: LoRATrainingConfig, pipe: StableDiffusion) -> CaptionedImages:
    """What the model draws before it is changed, each picture beside its prompt.

    In `output_dir/class`; pictures that are there already stay. Each process draws its
    share.
    """
    process = this_process()
    mine = slice(process.process_index, None, process.num_processes)
    folder = Path(config.output_dir) / "class"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(config.num_class_pictures)[mine]:
        path = folder / f"{number:05}.png"
        prompt = config.class_prompts[number % len(config.class_prompts)]
        words = path.with_suffix(".txt")
        if path.exists() and words.exists() and words.read_bytes() == prompt.encode():
            continue
        image = pipe(prompt, seed=config.seed + number, progress=False).images[0]
        write_png(path, image)
        write_text(words, prompt)
    process.wait_for_everyone()
    return CaptionedImages(folder, config.image_size)


def empty_parts(pipe: StableDiffusion) -> tuple[UNet, CLIPTextModel]:
    """UNet and text model on the meta device, frozen, to reckon with."""
    unet = build_empty(UNet, pipe.unet.config)
    text_encoder = build_empty(CLIPTextModel, pipe.text_encoder.config)
    return unet.requires_grad_(False), text_encoder.requires_grad_(False)


def say_finetuning(
    config, pipe: StableDiffusion, dataset: Dataset, whole: nn.Module,
    *moving: nn.Module, copies: int = 1, **plan,
) -> None:  # fmt: skip
    """Say the plan of a fine-tuning, reckoned with `empty_parts`.

    `whole`, a `WithText`, computes, the first of `moving` is what is trained; a step
    sees `copies` of the batch. Raises ValueError for a checkpoint of other weights.
    """
    check_fits(find_checkpoint(config), moving[0])
    b, side = copies * config.batch_size, config.image_size // pipe.vae.config.downscale
    with torch.device("meta"):
        x = torch.empty(b, pipe.vae.config.latent_channels, side, side)
        ids = torch.zeros(b, pipe.tokenizer.max_length, dtype=torch.int64)
        memory = memory_needed(config, whole, x, torch.zeros(b), ids, beside=moving)
    say_plan(config, dataset, moving[0], memory, **plan)


def say_lora(
    config: LoRATrainingConfig, pipe: StableDiffusion, dataset: Dataset,
    whole: nn.Module, moving: nn.Module,
) -> None:  # fmt: skip
    """Say the plan of `train_lora`; of `whole`, `moving` is trained."""
    classes, also = 0, {}
    if config.class_prompts:
        classes = config.num_class_pictures
        also["class"] = (
            f"{counted(classes, 'picture')} drawn first, to {config.output_dir}/class; "
            "each step sees as many of them besides"
        )
    processes, longest = this_process().num_processes, max(len(dataset), classes)
    say_finetuning(
        count_steps(config, longest, processes), pipe, dataset, whole, moving,
        copies=2 if classes else 1, also=also,
    )  # fmt: skip
