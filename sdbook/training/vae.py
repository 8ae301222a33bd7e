"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from ..clip import ImageTower, quick_gelu
from ..files import read_weights
from ..images import CaptionedShards
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
from ..scenes import CrowdedScenes, Scenes
from ..vae import AutoencoderKL, VAEConfig
from .loop import optimise
from .loss import ALL

__all__ = [
    "PatchCritic",
    "balance",
    "WithCritic",
    "latent_noise",
    "VAEGame",
    "start_certain",
    "latent_spread",
    "VAETrainingConfig",
    "check_vae_choices",
    "VGG_MEAN",
    "VGG_STD",
    "stages_of_vgg",
    "stages_of_tower",
    "QuickGELU",
    "PerceptualDistance",
    "new_vae",
    "rebuilt_sheet",
    "reconstruction_psnr",
    "train_vae",
]


class PatchCritic(nn.Sequential):
    """Says of each patch of a picture how real it looks (Isola et al., 2017).

    Pixels (b, 3, h, w) to scores (b, 1, h / 4, w / 4); high is real.
    """

    def __init__(self, width: int = 32):
        def layer(before, after, stride):
            conv = nn.Conv2d(before, after, 4 if stride == 2 else 3, stride, padding=1)
            return conv, nn.GroupNorm(8, after), nn.LeakyReLU(0.2)

        super().__init__(
            nn.Conv2d(3, width, 4, 2, padding=1),
            nn.LeakyReLU(0.2),
            *layer(width, 2 * width, 2),
            *layer(2 * width, 4 * width, 1),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )


def balance(error: Tensor, reward: Tensor, weight: Tensor) -> Tensor:
    """The factor that makes the reward's gradient as long as the error's.

    At one weight, a layer's; Esser et al. (2021), equation 7.
    """
    lengths = [
        torch.autograd.grad(value, weight, retain_graph=True)[0].norm()
        for value in (error, reward)
    ]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()


class WithCritic(nn.Module):
    """What a VAE in training does with its critic, `critic`; `VAEGame` has the rest."""

    def play(self, pixels: Tensor, rebuilt: Tensor, error: Tensor):
        """What the critic adds to the loss, for both players."""
        critic, config = self.critic, self.config
        self.batches += 1
        if self.batches <= config.critic_start * config.gradient_accumulation_steps:
            return sum(0.0 * weight.sum() for weight in critic.parameters()), {}
        still = {name: weight.detach() for name, weight in critic.named_parameters()}
        fooled = -torch.func.functional_call(critic, still, (rebuilt,)).mean()
        factor = balance(error, fooled, self.vae.decoder.conv_out.weight)
        real, made = critic(torch.cat([pixels, rebuilt.detach()])).chunk(2)
        told = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        numbers = {"fooled": -fooled, "critic": told, "critic_factor": factor}
        return config.critic_weight * factor * fooled + told, numbers


def latent_noise(
    config: VAEConfig, pixels: Tensor, generator, rows: slice = ALL
) -> Tensor:
    """Noise for the latents of these rows of a step's pictures."""
    sides = (side // config.downscale for side in pixels.shape[-2:])
    shape = (len(pixels) * rows.step, config.latent_channels, *sides)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise[rows]


class VAEGame(WithCritic):
    """A VAE in training, with the critic that it has to please, if it has one.

    Pictures and noise for their latents give the loss and numbers for the log.
    """

    def __init__(self, config: "VAETrainingConfig", vae: AutoencoderKL):
        super().__init__()
        self.config, self.vae = config, vae
        self.critic = PatchCritic() if config.critic_weight else None
        eyes = config.perceptual_weight and PerceptualDistance(config.perceptual_path)
        self.frozen = [eyes]  # in a list: no part of what is trained and saved
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, pixels: Tensor, noise: Tensor):
        config = self.config
        posterior = self.vae.encode(pixels)
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise)
        error = rebuilt - pixels
        absolute, squared = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / pixels[0].numel()
        numbers = {"kl": kl, "squared": squared}
        loss = config.l1_weight * absolute + config.l2_weight * squared
        if config.perceptual_weight:
            numbers["perceptual"] = self.frozen[0].to(pixels.device)(rebuilt, pixels)
            loss = loss + config.perceptual_weight * numbers["perceptual"]
        if self.critic:
            played, scores = self.play(pixels, rebuilt, loss)
            loss, numbers = loss + played, numbers | scores
        return loss + config.kl_weight * kl, numbers


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
        perceptual_weight: of the difference that a frozen network sees; 0 for none.
        perceptual_path: that network: a run of train-clip, or a file with the weights
            of torchvision's vgg16.
        critic_weight: of pleasing a critic that learns to tell pictures from rebuilt
            ones; 0 for no critic.
        critic_start: steps before the critic begins.
    """

    output_dir: str = setting("runs/vae", affects_steps=False)
    batch_size: int = setting(32, at_least=1)
    max_steps: int = setting(1000, at_least=1)
    learning_rate: float = setting(1e-3, more_than=0)
    weight_decay: float = setting(0.0, at_least=0)
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = setting(1, at_least=1)
    norm_num_groups: int = setting(8, at_least=1)
    l1_weight: float = setting(0.1, at_least=0)
    l2_weight: float = setting(1.0, at_least=0)
    kl_weight: float = setting(3e-4, at_least=0)
    perceptual_weight: float = setting(0.0, at_least=0)
    perceptual_path: str | None = None
    critic_weight: float = setting(0.0, at_least=0)
    critic_start: int = setting(1000, at_least=0)

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
    path = config.perceptual_path
    if config.perceptual_weight and (path is None or not Path(path).exists()):
        raise ValueError(
            f"perceptual_weight is {config.perceptual_weight}, but there is no network "
            f"at perceptual_path {path}; give the output_dir of train-clip, or a file "
            "with the weights of torchvision's vgg16, or set perceptual_weight to 0"
        )
    if config.critic_weight and config.compile:
        raise ValueError(
            "critic_weight needs gradients inside the step, which compile cannot do; "
            "set compile to false"
        )


VGG_MEAN, VGG_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stages_of_vgg(path: Path) -> list[nn.Module]:
    """The five stages of torchvision's VGG16, for pixels in [-1, 1]."""
    from torchvision.models import vgg16
    from torchvision.transforms import Normalize

    network = vgg16(weights=None)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    mean, std = ([2 * m - 1 for m in VGG_MEAN], [2 * s for s in VGG_STD])
    cuts = (0, 4, 9, 16, 23, 30)
    stages = [network.features[start:end] for start, end in zip(cuts, cuts[1:])]
    stages[0] = nn.Sequential(Normalize(mean, std), *stages[0])
    return stages


def stages_of_tower(folder: Path) -> list[nn.Module]:
    """The stages of the picture tower that train-clip left in a folder."""
    state = read_weights(folder / "clip.safetensors").items()
    tower = {k.removeprefix("image_encoder."): t for k, t in state}
    stem = {key: value for key, value in tower.items() if key.startswith("stem.")}
    tower = ImageTower(8, width=len(stem["stem.2.weight"]))
    tower.load_state_dict(stem, strict=False)
    return [tower.stem[0], *(nn.Sequential(QuickGELU(), c) for c in tower.stem[1:])]


class QuickGELU(nn.Module):
    """CLIP's activation, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


class PerceptualDistance(nn.Module):
    """How different two batches of pictures look to a frozen network.

    The mean squared difference of features of length 1, over places and stages
    (Zhang et al., 2018, without their learned weights). Pixels are in [-1, 1].
    """

    def __init__(self, path: str | Path):
        super().__init__()
        path = Path(path)
        stages = stages_of_vgg(path) if path.is_file() else stages_of_tower(path)
        self.stages = nn.ModuleList(stages).eval().requires_grad_(False)

    def forward(self, one: Tensor, two: Tensor) -> Float[Tensor, ""]:
        distances = []
        for stage in self.stages:
            one, two = stage(one), stage(two)
            unit = (F.normalize(x, dim=1, eps=1e-6) for x in (one, two))
            distances.append((next(unit) - next(unit)).square().sum(1).mean())
        return sum(distances) / len(distances)


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
    def draw_sheet(game: VAEGame) -> Image.Image:
        device = next(game.parameters()).device
        rebuilt = game.vae.decode(game.vae.encode(pixels.to(device)).mode()).cpu()
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
    dataset, held = open_dataset(config), open_dataset(config, "validation")
    if isinstance(dataset, CaptionedShards):
        held = list(islice(held, 256))  # a stream has no numbers
    crowds = isinstance(dataset, Scenes)
    shown = dataset
    if crowds:
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

    game, sample = VAEGame(config, vae), rebuilt_sheet(held)
    game = optimise(config, game, shown, loss_of, validate, sample=sample)
    vae = game.vae.eval()
    some = held if isinstance(dataset, CaptionedShards) else dataset
    scale = round(1 / latent_spread(vae, some), 5)
    vae.config = replace(vae.config, scaling_factor=scale)
    if is_main_process():
        vae.save_pretrained(Path(config.output_dir) / "vae")
    return vae
