"""The training of the autoencoder.

Generated from chapters/05_vae.ipynb; do not edit.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from ..pipeline import to_pictures
from ..run.configs import VAETrainingConfig
from ..run.folder import owns_output_dir
from ..run.memory import memory_needed
from ..run.plan import say_plan
from ..run.processes import is_main_process
from ..run.settings import open_dataset
from ..vae import AutoencoderKL, VAEConfig
from .loop import optimise
from .loss import ALL_ROWS

__all__ = [
    "start_certain", "some_pixels", "latent_noise", "latent_spread", "VAELoss",
    "new_vae", "reconstruction_psnr", "rebuilt_sheet", "train_vae",
]


@torch.no_grad()
def start_certain(vae: AutoencoderKL, logvar: float = -6.0) -> None:
    """Let a new encoder begin with little noise, not with the prior's.

    With a standard deviation of 1 at the start, the noise drowns the means and a
    latent channel gives up before it has learnt to carry anything.
    """
    vae.quant_conv.bias[vae.config.latent_channels :] = logvar


def some_pixels(dataset: Dataset | list, count: int) -> Iterator[Tensor]:
    """The pictures (3, h, w) of the first items; a stream of them will do."""
    for pixels, _ in islice(dataset, min(count, len(dataset))):
        yield pixels


def latent_noise(
    config: VAEConfig, pixels: Tensor, generator, rows: slice = ALL_ROWS
) -> Tensor:
    """Noise for the latents of these rows of a step's pictures."""
    sides = (side // config.downscale for side in pixels.shape[-2:])
    shape = (len(pixels) * rows.step, config.latent_channels, *sides)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise[rows]


@torch.no_grad()
def latent_spread(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 256
) -> float:
    """Standard deviation of latents drawn by the VAE, over everything.

    Means and noise together, by the law of total variance; scaling undoes it.
    """
    device = next(vae.parameters()).device
    posteriors = [
        vae.encode(pixels[None].to(device)) for pixels in some_pixels(dataset, count)
    ]
    means = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.std.square() for posterior in posteriors])
    return (means.var() + noise.mean()).sqrt().item()


class VAELoss(nn.Module):
    """A VAE in training: pictures and noise give the loss and numbers for the log.

    The weights are those of the absolute error, of the squared error, and of the
    divergence per number of a picture.
    """

    former_state = ("batches",)  # what checkpoints of older versions have besides

    def __init__(
        self, vae: AutoencoderKL, l1_weight: float = 0.1, l2_weight: float = 1.0,
        kl_weight: float = 3e-4,
    ):
        super().__init__()
        self.vae = vae
        self.l1_weight, self.l2_weight = l1_weight, l2_weight
        self.kl_weight = kl_weight

    def forward(self, pixels: Tensor, noise: Tensor):
        posterior = self.vae.encode(pixels)
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise)
        error = rebuilt - pixels
        absolute, squared = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / pixels[0].numel()
        loss = self.l1_weight * absolute + self.l2_weight * squared
        return loss + self.kl_weight * kl, {"kl": kl, "squared": squared}


def new_vae(config: VAETrainingConfig) -> AutoencoderKL:
    """A VAE with random weights that begins certain."""
    vae = AutoencoderKL(
        VAEConfig(
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.image_size,
        )
    )
    start_certain(vae)
    return vae


@torch.no_grad()
def reconstruction_psnr(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 64
) -> float:
    """Mean PSNR, in dB, of `count` pictures through encoder and decoder."""
    device, values = next(vae.parameters()).device, []
    for pixels in some_pixels(dataset, count):
        pixels = pixels[None].to(device)
        rebuilt = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        values.append(10 * math.log10(4 / (rebuilt - pixels).square().mean().item()))
    return sum(values) / len(values)

def rebuilt_sheet(
    loss: VAELoss, dataset: Dataset | list, count: int = 8
) -> Image.Image:
    """Pictures above what a VAE in training makes of them, as one picture."""
    pixels = torch.stack([*some_pixels(dataset, count)])
    device = next(loss.parameters()).device
    with torch.no_grad():
        rebuilt = loss.vae.decode(loss.vae.encode(pixels.to(device)).mode()).cpu()
    sheet = make_grid(torch.cat([pixels, rebuilt]).clamp(-1, 1), len(pixels))
    return to_pictures(sheet[None], "pil")[0]


@owns_output_dir
def train_vae(config: VAETrainingConfig) -> AutoencoderKL | None:
    """Say the plan (with `dry_run` that is all), train a VAE, measure its latent scale.

    Writes `output_dir/vae` in diffusers' layout.
    """
    torch.manual_seed(config.seed)
    dataset, held = open_dataset(config), open_dataset(config, "validation")
    shown, side = dataset.for_vae(config.seed), config.image_size
    vae = new_vae(config)
    pixels = torch.empty(config.batch_size, 3, side, side, device="meta")
    empty = copy.deepcopy(vae).to("meta")
    say_plan(config, shown, empty, memory_needed(config, empty, pixels))
    if config.dry_run:
        return None

    def loss_of(module, batch, generator, rows):
        pixels = batch[0].to(generator.device, memory_format=torch.channels_last)
        return module(pixels, latent_noise(vae.config, pixels, generator, rows))

    loss = VAELoss(vae, config.l1_weight, config.l2_weight, config.kl_weight)
    loss = optimise(
        config, loss, shown, loss_of, sample=lambda loss: rebuilt_sheet(loss, held),
        validate=lambda loss: {"psnr": reconstruction_psnr(loss.vae, held)},
    )  # fmt: skip
    vae = loss.vae.eval()
    scale = round(1 / latent_spread(vae, dataset), 5)
    vae.config = replace(vae.config, scaling_factor=scale)
    if is_main_process():
        vae.save_pretrained(Path(config.output_dir) / "vae")
    return vae
