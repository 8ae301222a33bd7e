"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..attention import TransformerBlock
from ..clip import CLIPTextModel, Tokenizer
from ..formats import find_model, find_tokenizer
from ..pipeline import StableDiffusion, check_tokenizer, load_scheduler
from ..run.checkpoints import check_fits, find_checkpoint
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
from ..schedulers import DDIMScheduler
from ..unet import UNet, UNetConfig, start_as_identity
from ..vae import AutoencoderKL
from ..weights import build_empty
from .cache import Encoded, caption_ids
from .loop import as_it_is, optimise, step_generator
from .loss import DiffusionLoss

__all__ = [
    "whitening",
    "start_white",
    "Validation",
    "train",
    "UNetShape",
    "UNET_SIZES",
    "PRESETS",
    "asked_sizes",
    "NoiseSettings",
    "TrainingConfig",
    "make_noise_schedule",
    "check_noise",
    "check_shape",
    "FROZEN",
    "source_of",
    "open_frozen",
    "unet_from_zero",
    "check_asked_sizes",
    "find_sizes",
    "new_unet",
    "check_schedule",
    "sheet_of",
    "unet_memory",
]


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


def train(config: "TrainingConfig") -> StableDiffusion | None:
    """Train a UNet on a frozen VAE and text model, and save the whole pipeline.

    Says the plan first; with `dry_run` that is all. The pictures and captions go
    through the frozen parts once, before the loop. Writes the model to `output_dir`,
    which diffusers and `StableDiffusion.from_pretrained` open.
    """
    accelerator = make_accelerator(config)
    sizes = find_sizes(config)
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
    vae.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    folder = Path(config.output_dir) / "cache"
    encoded = Encoded(dataset, *frozen, folder, config.num_workers)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    unet = new_unet(config, sizes, torch.tensor(encoded.sample))
    scheduler = make_noise_schedule(config)
    empty = torch.tensor(encoded.texts[0]).float().to(accelerator.device)
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


@dataclass(frozen=True)
class UNetShape:
    """How large a UNet is; what is not said comes from the preset, or `pretrained`.

    Attributes:
        unet_preset: "tiny", "small", "base" or "sd15", Stable Diffusion 1.5's; small
            for a UNet from zero.
        unet_dim: width of the first level; the preset's others keep their proportion.
        unet_channels: width of each level.
        layers_per_block: residual blocks per level on the way down.
        attention_levels: levels that attend to the text, counted from 0 at the top.
        num_heads: attention heads.
        norm_num_groups: groups of every GroupNorm.
    """

    unet_preset: str | None = None
    unet_dim: int | None = setting(None, at_least=1)
    unet_channels: tuple[int, ...] | None = None
    layers_per_block: int | None = setting(None, at_least=1)
    attention_levels: tuple[int, ...] | None = None
    num_heads: int | None = setting(None, at_least=1)
    norm_num_groups: int | None = setting(None, at_least=1)


UNET_SIZES = (
    "unet_channels", "layers_per_block", "attention_levels", "num_heads",
    "norm_num_groups",
)  # fmt: skip
PRESETS = {
    "tiny": ((32, 64), 1, (1,), 2, 8),
    "small": ((64, 128, 192), 1, (1, 2), 4, 16),
    "base": ((128, 256, 384, 512), 2, (1, 2, 3), 8, 32),
    "sd15": ((320, 640, 1280, 1280), 2, (0, 1, 2), 8, 32),
}


def asked_sizes(config: UNetShape, preset: str | None = None) -> dict:
    """The sizes that a config names, itself or by its preset (or by this one)."""
    values = PRESETS.get(config.unet_preset or preset, ())
    sizes = dict(zip(UNET_SIZES, values))
    if config.unet_dim and sizes:
        widths = sizes["unet_channels"]
        sizes["unet_channels"] = tuple(w * config.unet_dim // widths[0] for w in widths)
    own = {name: getattr(config, name) for name in UNET_SIZES}
    own = {name: size for name, size in own.items() if size is not None}
    return sizes | {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}


@dataclass(frozen=True)
class NoiseSettings:
    """What the UNet is asked, and how much an answer counts.

    Attributes:
        beta_schedule: "scaled_linear", "linear" or "cosine".
        diffusion_steps: timesteps of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        rescale_betas_zero_snr: let the schedule end in pure noise (Lin et al., 2024).
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
        snr_power: on these weights; below 1, noisy timesteps (the layout) count more.
        noisy_share: of the timesteps, moved to the noisiest quarter; 0 for none.
    """

    beta_schedule: str = "scaled_linear"
    diffusion_steps: int = 1000
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    caption_dropout: float = setting(0.1, at_least=0, at_most=1)
    snr_gamma: float = setting(5.0, at_least=0)
    snr_power: float = setting(1.0, at_least=0, at_most=1)
    noisy_share: float = setting(0.0, at_least=0, at_most=1)


@dataclass(frozen=True)
class TrainingConfig(RunConfig, NoiseSettings, UNetShape):
    """Train a UNet on frozen latents and texts: `sdbook train`.

    Attributes:
        pretrained: a model to go on from: a folder, a hub id or one file.
        vae_weights_path: folder (or file) of a VAE, or of a run of train-vae; by
            default that of `pretrained`, or runs/vae.
        text_encoder_path: folder with text_encoder/ and tokenizer/ (train-clip's); by
            default those of `pretrained`, or of runs/clip.
        gradient_checkpointing: compute the insides of blocks twice to save memory.
        num_validation: pictures to validate on, not trained on (a tenth at most).
        sample_prompts: what to draw every sample_every steps; by default captions of
            held-out pictures.
    """

    output_dir: str = setting("runs/unet", affects_steps=False)
    max_steps: int = setting(10_000, at_least=1)
    checkpoint_every: int = setting(1000, at_least=1, affects_steps=False)
    pretrained: str | None = None
    vae_weights_path: str | None = None
    text_encoder_path: str | None = None
    gradient_checkpointing: bool = setting(False, affects_steps=False)
    num_validation: int = setting(64, at_least=0)
    sample_prompts: tuple[str, ...] = setting((), affects_steps=False)

    def __post_init__(self):
        super().__post_init__()
        check_noise(self)
        check_shape(self)


def make_noise_schedule(config) -> DDIMScheduler:
    """The noise schedule, with Stable Diffusion's betas, as a sampler to save."""
    return DDIMScheduler(
        num_train_timesteps=config.diffusion_steps,
        beta_schedule=config.beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def check_noise(config) -> None:
    """Raise ValueError for settings of the noise that cannot be meant."""
    make_noise_schedule(config)  # refuses unknown schedules and prediction types
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr makes the last timestep pure noise, from which "
            "prediction_type 'epsilon' says nothing about the picture; set "
            "prediction_type to v_prediction, or rescale_betas_zero_snr to false"
        )


def check_shape(config) -> None:
    """Raise ValueError for a UNet that cannot be built."""
    if config.unet_preset not in (None, *PRESETS):
        raise ValueError(
            f"unet_preset {config.unet_preset!r} is none of {', '.join(PRESETS)}"
        )
    if config.unet_dim and config.unet_channels:
        raise ValueError(
            f"unet_dim is {config.unet_dim} and unet_channels {config.unet_channels}; "
            "give one of them"
        )
    sizes = asked_sizes(config, None if config.pretrained else "small")
    widths = sizes.get("unet_channels")
    if widths is None:
        return
    for level in sizes.get("attention_levels", ()):
        if not 0 <= level < len(widths):
            raise ValueError(
                f"attention_levels {sizes['attention_levels']}, but unet_channels has "
                f"{len(widths)} levels; give numbers from 0 to {len(widths) - 1}"
            )
    for name in ("norm_num_groups", "num_heads"):
        if name in sizes:
            check_multiple("unet_channels", widths, name, sizes[name])


FROZEN = {
    "vae": ("vae_weights_path", "runs/vae", "train-vae"),
    "text_encoder": ("text_encoder_path", "runs/clip", "train-clip"),
    "tokenizer": ("text_encoder_path", "runs/clip", "train-clip"),
}


def source_of(config: TrainingConfig, part: str) -> Path:
    """Where a part comes from: its own path, `pretrained`, or a training's output.

    Raises FileNotFoundError that says which command makes it.
    """
    key, usual, command = FROZEN.get(part, (None, None, None))
    own = getattr(config, key) if key else None
    if config.pretrained and own is None:
        path = find_model(config.pretrained)
    else:
        path = Path(own or usual)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; run `sdbook {command} --output_dir {path}` "
                f"first, or set {key}"
            )
    return path / part if (path / part).is_dir() else path


def open_frozen(config: TrainingConfig):
    """The trained VAE, text model and tokenizer."""
    words = source_of(config, "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(source_of(config, "text_encoder"))
    tokenizer = Tokenizer.from_pretrained(
        find_tokenizer(None if words.is_file() else words)
    )
    check_tokenizer(tokenizer, text_encoder.config)
    vae = AutoencoderKL.from_pretrained(source_of(config, "vae"))
    return vae.eval(), text_encoder.eval(), tokenizer


def unet_from_zero(config: TrainingConfig) -> UNetConfig:
    """The sizes of a new UNet, but for what the VAE and the text model decide."""
    sizes = asked_sizes(config, "small")
    levels = range(len(sizes["unet_channels"]))
    attends = [level in sizes["attention_levels"] for level in levels]
    down = ("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    up = ("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return UNetConfig(
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=sizes["unet_channels"],
        layers_per_block=sizes["layers_per_block"],
        attention_head_dim=sizes["num_heads"],
        norm_num_groups=sizes["norm_num_groups"],
    )


def check_asked_sizes(config: TrainingConfig, unet: UNetConfig) -> None:
    """Raise ValueError where the settings ask for other sizes than `pretrained` has."""
    blocks = enumerate(unet.down_block_types)
    attends = tuple(level for level, name in blocks if name.startswith("Cross"))
    has = dict(zip(UNET_SIZES, (
        unet.block_out_channels, unet.layers_per_block, attends,
        unet.attention_head_dim, unet.norm_num_groups,
    )))  # fmt: skip
    for name, size in asked_sizes(config).items():
        if size != has[name]:
            raise ValueError(
                f"{name} is {size}, but the UNet of {config.pretrained} has "
                f"{has[name]}; leave the sizes out, they are taken from there"
            )


def find_sizes(config: TrainingConfig) -> UNetConfig:
    """The UNet's sizes, from the settings and the parts' config files alone.

    Raises ValueError for a picture size or parts that do not fit together.
    """
    vae = AutoencoderKL.find_config(source_of(config, "vae"))
    text = CLIPTextModel.find_config(source_of(config, "text_encoder"))
    fitting = {"cross_attention_dim": text.hidden_size}
    fitting |= {"in_channels": vae.latent_channels, "out_channels": vae.latent_channels}
    if config.pretrained is None:
        unet = replace(unet_from_zero(config), **fitting)
    else:
        unet = UNet.find_config(source_of(config, "unet"))
        check_asked_sizes(config, unet)
    for name, size in fitting.items():
        if getattr(unet, name) != size:
            key = "text_encoder_path" if "cross" in name else "vae_weights_path"
            raise ValueError(
                f"{key}: the UNet of {config.pretrained} has {name} "
                f"{getattr(unet, name)}, but this part gives {size}; leave {key} out "
                "to take the part that it was trained with"
            )
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    check_side(config.image_size, vae.downscale * halvings, "the VAE with this UNet")
    return replace(unet, sample_size=config.image_size // vae.downscale)


def new_unet(config: TrainingConfig, sizes: UNetConfig, states: Tensor) -> UNet:
    """A UNet that starts from zero, or from the one in `pretrained`.

    From zero, it starts as the identity, and white for the text states (m, n, d).
    """
    if config.pretrained is None:
        return start_white(start_as_identity(UNet(sizes)), states)
    unet = UNet.from_pretrained(source_of(config, "unet"))
    unet.config = sizes  # the same, but for the size of the pictures
    return unet


def check_schedule(config: TrainingConfig) -> None:
    """Warn where the noise is not the one that `pretrained` was trained with."""
    folder = find_model(config.pretrained) / "scheduler" if config.pretrained else None
    if folder is None or not folder.is_dir():
        return
    theirs, ours = load_scheduler(folder).config, make_noise_schedule(config).config
    for key, name in (
        ("prediction_type", "prediction_type"), ("beta_schedule", "beta_schedule"),
        ("diffusion_steps", "num_train_timesteps"),
        ("rescale_betas_zero_snr", "rescale_betas_zero_snr"),
    ):  # fmt: skip
        was, is_ = (getattr(one, name, None) for one in (theirs, ours))
        if was != is_:
            warnings.warn(
                f"{key} is {is_}, but {config.pretrained} was trained with {was}; "
                f"unless you mean to change it, set {key} to {was}",
                stacklevel=2,
            )


def sheet_of(config: TrainingConfig, dataset, vae, text_encoder, tokenizer, scheduler):
    """A function that draws the sample prompts with a UNet, always from one noise."""
    pictures = islice(iter(dataset), min(4, len(dataset)))
    prompts = list(config.sample_prompts or (caption for _, caption in pictures))

    def draw_sheet(unet):
        from ..images import labelled_grid

        pipe = StableDiffusion(vae, text_encoder, tokenizer, unet, scheduler)
        images = pipe(prompts, seed=config.seed, progress=False).images
        return labelled_grid(images, prompts)

    return draw_sheet


def unet_memory(config: TrainingConfig, unet: UNet) -> dict:
    """What training this (empty) UNet needs: see `memory_needed`."""
    b, side = config.batch_size, unet.config.sample_size
    with torch.device("meta"):
        latents = torch.empty(b, unet.config.in_channels, side, side)
        context = torch.empty(b, 77, unet.config.cross_attention_dim)
        return memory_needed(config, unet, latents, torch.zeros(b), context)
