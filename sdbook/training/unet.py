"""The training of the UNet.

Generated from chapters/08_training.ipynb; do not edit.
"""

from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..attention import TransformerBlock
from ..images import labelled_grid
from ..pipeline import StableDiffusion
from ..run.checkpoints import check_fits, find_checkpoint
from ..run.folder import owns_output_dir
from ..run.plan import say_plan
from ..run.processes import is_main_process, this_process
from ..run.settings import open_dataset
from ..run.unet import (
    TrainingConfig,
    check_schedule,
    find_sizes,
    make_noise_schedule,
    open_frozen,
    source_of,
    unet_memory,
)
from ..unet import UNet, UNetConfig, start_as_identity
from ..weights import build_empty
from .cache import Encoded, caption_ids
from .loop import as_it_is, optimise, step_generator
from .loss import DiffusionLoss

__all__ = ["whitening", "start_white", "Validation", "train", "new_unet", "sheet_of"]


def whitening(
    states: Float[Tensor, "m n d"], floor: float = 0.01
) -> Float[Tensor, "d d"]:
    """S^(-1/2), with S the second moments of the states' vectors.

    `floor`, as a share of the mean, is added to the strength of every direction.
    """
    x = states.flatten(0, 1).float()
    strengths, directions = torch.linalg.eigh(x.T @ x / len(x))
    strengths = strengths + floor * strengths.mean()
    return directions / strengths.sqrt() @ directions.T


@torch.no_grad()
def start_white(unet: UNet, states: Float[Tensor, "m n d"]) -> UNet:
    """Let the maps that read the text start as if its states were white.

    `states` are those of many captions. `to_k` and `to_v` of each cross-attention
    are multiplied by their `whitening`.
    """
    whiten = whitening(states)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            for read in (block.attn2.to_k, block.attn2.to_v):
                read.weight.copy_(read.weight @ whiten.to(read.weight))
    return unet


class Validation:
    """The UNet's error on held-out pictures, with the same noise each time.

    Called with a UNet, it gives numbers for the log: the mean, and that of each band
    of timesteps, a quarter of them by default.
    """

    def __init__(self, loss, held: Dataset, vae, text_encoder, tokenizer, bands=4):
        self.loss, self.device = loss, next(vae.parameters()).device
        last = loss.scheduler.num_train_timesteps
        self.edges = [last * band // bands for band in range(bands + 1)]
        self.batches = []
        for start in range(0, len(held), 8):
            items = (held[i] for i in range(start, min(start + 8, len(held))))
            pixels, captions = zip(*items, strict=True)
            with torch.no_grad():
                x0 = vae.encode(torch.stack(pixels).to(self.device)).mean * loss.scale
                ids = caption_ids(tokenizer, list(captions)).to(self.device)
                context = text_encoder(ids)
            self.batches.append((x0, context))

    @torch.no_grad()
    def __call__(self, unet) -> dict[str, float]:
        means = {}
        for low, high in zip(self.edges, self.edges[1:]):
            generator = step_generator(0, low, device=self.device)
            errors = []
            for x0, context in self.batches:
                place = (torch.arange(len(x0), device=self.device) + 0.5) / len(x0)
                t = (low + place * (high - low)).long()
                noise = torch.randn(x0.shape, generator=generator, device=self.device)
                errors.append(self.loss.errors(unet, x0, noise, t, context))
            means[f"val_error_{low}_{high - 1}"] = torch.cat(errors).mean().item()
        return {"val_error": sum(means.values()) / len(means), **means}


@owns_output_dir
def train(config: TrainingConfig) -> StableDiffusion | None:
    """Train a UNet on a frozen VAE and text model, and save the whole pipeline.

    Says the plan first; with `dry_run` that is all. The pictures and captions go
    through the frozen parts once, before the loop. Writes the model to `output_dir`,
    which diffusers and `StableDiffusion.from_pretrained` open.
    """
    device = this_process().device
    sizes, scheduler = find_sizes(config), make_noise_schedule(config)
    check_schedule(config)
    empty_unet = build_empty(UNet, sizes)
    check_fits(find_checkpoint(config), empty_unet)
    dataset = open_dataset(config)
    shown, held = dataset.held_out(config.num_validation)
    memory = unet_memory(config, empty_unet)
    say_plan(config, dataset, empty_unet, memory, shown=len(shown), held=len(held))
    if config.dry_run:
        return None

    frozen = vae, text_encoder, tokenizer = open_frozen(config)
    vae.to(device, memory_format=torch.channels_last)
    text_encoder.to(device)
    folder = Path(config.output_dir) / "cache"
    encoded = Encoded(dataset, *frozen, folder, config.num_workers)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    unet = new_unet(config, sizes, torch.tensor(encoded.sample))
    empty = torch.tensor(encoded.texts[0]).float().to(device)
    loss = DiffusionLoss(
        scheduler, vae.config.scaling_factor, empty, config.caption_dropout,
        config.snr_gamma, config.snr_power, config.noisy_share,
    )  # fmt: skip
    unet = optimise(
        config, unet, Subset(encoded, shown), loss, collate=as_it_is,
        validate=Validation(loss, held, *frozen) if len(held) else None,
        sample=sheet_of(config, held if len(held) else dataset, *frozen, scheduler),
    )  # fmt: skip
    pipe = StableDiffusion(*frozen, unet.eval(), scheduler)
    if is_main_process():
        pipe.save_pretrained(config.output_dir)
    return pipe


def new_unet(config: TrainingConfig, sizes: UNetConfig, states: Tensor) -> UNet:
    """A UNet that starts from zero, or from the one in `pretrained`.

    From zero, it starts as the identity, and white for the text states (m, n, d).
    """
    if config.pretrained is None:
        return start_white(start_as_identity(UNet(sizes)), states)
    unet = UNet.from_pretrained(source_of(config, "unet"))
    unet.config = sizes  # the same, but for the size of the pictures
    return unet


def sheet_of(config: TrainingConfig, dataset, vae, text_encoder, tokenizer, scheduler):
    """A function that draws the sample prompts with a UNet, always from one noise."""
    pictures = islice(iter(dataset), min(4, len(dataset)))
    prompts = list(config.sample_prompts or (caption for _, caption in pictures))

    def draw_sheet(unet):
        pipe = StableDiffusion(vae, text_encoder, tokenizer, unet, scheduler)
        images = pipe(prompts, seed=config.seed, progress=False).images
        return labelled_grid(images, prompts)

    return draw_sheet
