"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from ..pipeline import to_pictures
from ..run.memory import memory_needed
from ..run.plan import say_plan
from ..run.processes import is_main_process, make_accelerator
from ..run.settings import (
    RunConfig,
    check_multiple,
    check_side,
    open_dataset,
    setting,
)
from ..scenes import CrowdedScenes
from ..vae import AutoencoderKL, VAEConfig
from .loop import optimise
from .loss import ALL_ROWS

__all__ = [
    "latent_noise",
    "VAELoss",
    "start_certain",
    "latent_spread",
    "VAETrainingConfig",
    "check_vae_choices",
    "new_vae",
    "rebuilt_sheet",
    "reconstruction_psnr",
    "train_vae",
]


def latent_noise(
    config: VAEConfig, pixels: Tensor, generator, rows: slice = ALL_ROWS
) -> Tensor:
    """Noise for the latents of these rows of a step's pictures."""
    sides = (side // config.downscale for side in pixels.shape[-2:])
    shape = (len(pixels) * rows.step, config.latent_channels, *sides)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise[rows]


class VAELoss(nn.Module):
    """A VAE in training: pictures and noise for their latents give the loss."""

    def __init__(self, config: "VAETrainingConfig", vae: AutoencoderKL):
        super().__init__()
        self.config, self.vae = config, vae

    def forward(self, pixels: Tensor, noise: Tensor):
        config = self.config
        posterior = self.vae.encode(pixels)
        error = self.vae.decode(posterior.mean + posterior.std * noise) - pixels
        absolute, squared = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / pixels[0].numel()
        loss = config.l1_weight * absolute + config.l2_weight * squared
        return loss + config.kl_weight * kl, {"kl": kl, "squared": squared}


@torch.no_grad()
def start_certain(vae: AutoencoderKL, logvar: float = -6.0) -> None:
    """Let a new encoder begin with little noise, not with the prior's.

    With a standard deviation of 1 at the start, the noise drowns the means and a
    latent channel gives up before it has learnt to carry anything.
    """
    vae.quant_conv.bias[vae.config.latent_channels :] = logvar


@torch.no_grad()
def latent_spread(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 256
) -> float:
    """Standard deviation of latents drawn by the VAE, over everything.

    Means and noise together, by the law of total variance; scaling undoes it.
    """
    device = next(vae.parameters()).device
    posteriors = [
        vae.encode(dataset[i][0][None].to(device))
        for i in range(min(count, len(dataset)))
    ]
    means = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.std.square() for posterior in posteriors])
    return (means.var() + noise.mean()).sqrt().item()


@dataclass(frozen=True)
class VAETrainingConfig(RunConfig):
    """Train an AutoencoderKL from zero: `sdbook train-vae`.

    Attributes:
        block_out_channels: width of each level; one halving between two levels.
        layers_per_block: residual blocks per level of the encoder.
        norm_num_groups: groups of every GroupNorm.
        l1_weight: of the absolute error.
        l2_weight: of the squared error.
        kl_weight: of the divergence from the standard normal, per pixel number.
    """

    output_dir: str = "runs/vae"
    batch_size: int = 32
    max_steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = setting(1, at_least=1)
    norm_num_groups: int = setting(8, at_least=1)
    l1_weight: float = setting(0.1, at_least=0)
    l2_weight: float = setting(1.0, at_least=0)
    kl_weight: float = setting(3e-4, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        check_vae_choices(self)


def check_vae_choices(config) -> None:
    """Raise ValueError for settings of the VAE's training that cannot be meant."""
    widths = config.block_out_channels
    check_multiple(
        "block_out_channels", widths, "norm_num_groups", config.norm_num_groups
    )
    check_side(config.image_size, 2 ** (len(widths) - 1))
    if not config.l1_weight and not config.l2_weight:
        raise ValueError("l1_weight and l2_weight are both 0; give one of them more")


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


def rebuilt_sheet(dataset: Dataset | list, count: int = 8):
    """A function that shows pictures above what a VAE in training makes of them."""
    pixels = torch.stack([dataset[i][0] for i in range(min(count, len(dataset)))])

    @torch.no_grad()
    def draw_sheet(module: VAELoss) -> Image.Image:
        device = next(module.parameters()).device
        rebuilt = module.vae.decode(module.vae.encode(pixels.to(device)).mode()).cpu()
        sheet = make_grid(torch.cat([pixels, rebuilt]).clamp(-1, 1), len(pixels))
        return to_pictures(sheet[None], "pil")[0]

    return draw_sheet


@torch.no_grad()
def reconstruction_psnr(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 64
) -> float:
    """Mean PSNR, in dB, of `count` pictures through encoder and decoder."""
    device = next(vae.parameters()).device
    values = []
    for index in range(min(count, len(dataset))):
        pixels = dataset[index][0][None].to(device)
        rebuilt = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        values.append(10 * math.log10(4 / (rebuilt - pixels).square().mean().item()))
    return sum(values) / len(values)


def train_vae(config: VAETrainingConfig) -> AutoencoderKL | None:
    """Train a VAE, measure its latent scale, and save it in diffusers' layout.

    Says the plan first; with `dry_run` that is all. Writes `output_dir/vae`.
    """
    make_accelerator(config)
    torch.manual_seed(config.seed)
    shown, held = open_dataset(config), open_dataset(config, "validation")
    dataset = shown
    if hasattr(dataset, "steps"):  # a stream has no numbers
        dataset = held = list(islice(held, 256))
    elif config.dataset_path == "scenes":
        shown = CrowdedScenes(config.image_size, config.seed, len(dataset))
    vae = new_vae(config)
    side = config.image_size
    pixels = torch.empty(config.batch_size, 3, side, side, device="meta")
    empty = copy.deepcopy(vae).to("meta")
    say_plan(config, shown, empty, memory_needed(config, empty, pixels))
    if config.dry_run:
        return None

    def loss_of(module, batch, generator, rows):
        pixels = batch[0].to(generator.device, memory_format=torch.channels_last)
        noise = latent_noise(vae.config, pixels, generator, rows)
        return module(pixels, noise)

    def validate(module):
        return {"psnr": reconstruction_psnr(module.vae, held)}

    module = optimise(
        config, VAELoss(config, vae), shown, loss_of, validate,
        sample=rebuilt_sheet(held),
    )  # fmt: skip
    vae = module.vae.eval()
    vae.config = replace(
        vae.config, scaling_factor=round(1 / latent_spread(vae, dataset), 5)
    )
    if is_main_process():
        vae.save_pretrained(Path(config.output_dir) / "vae")
    return vae
