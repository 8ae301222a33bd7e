"""What a training of the UNet starts from: settings, a shape, the frozen parts."""

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ..clip import CLIPTextModel, Tokenizer
from ..files import read_json
from ..formats import find_model, find_part, find_tokenizer
from ..pipeline import check_tokenizer, load_scheduler
from ..schedulers import DDIMScheduler
from ..unet import UNet, UNetConfig
from ..vae import AutoencoderKL
from .memory import memory_needed
from .settings import RunConfig, check_multiple, check_side, setting

# Widths of the levels, residual blocks a level, which levels read the text (counted
# from 0 at the top), attention heads, groups of every GroupNorm.
PRESETS = {
    "tiny": ((32, 64), 1, (1,), 2, 8),
    "scenes": ((48, 96, 128), 1, (1, 2), 4, 16),
    "small": ((64, 128, 192), 1, (1, 2), 4, 16),
    "base": ((128, 256, 384, 512), 2, (1, 2, 3), 8, 32),
    "sd15": ((320, 640, 1280, 1280), 2, (0, 1, 2), 8, 32),
}
SHARE = {"at_least": 0, "at_most": 1}


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Train a UNet on frozen latents and texts: `sdbook train`.

    Attributes:
        pretrained: a model to go on from: "scenes", a folder, a hub id or one file.
        vae_weights_path: the output of train-vae, or any model (or file) with a VAE:
            a folder, a hub id, "scenes"; by default `pretrained`, or runs/vae.
        text_encoder_path: the output of train-clip, or any model with a text encoder
            and a tokenizer; by default `pretrained`, or runs/clip.
        unet_preset: how large a UNet from zero is: "tiny", "scenes" (the shipped
            one's), "small" (where nothing is said), "base" or "sd15".
        unet_dim: width of the first level; the preset's others keep their proportion.
        unet_config: a UNet of any other shape: a file like diffusers' config.json.
        beta_schedule: "scaled_linear", "linear" or "cosine".
        diffusion_steps: timesteps of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        rescale_betas_zero_snr: let the schedule end in pure noise (Lin et al., 2024).
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
        snr_power: on these weights; below 1, noisy timesteps (the layout) count more.
        noisy_share: of the timesteps, moved to the noisiest quarter; 0 for none.
        gradient_checkpointing: compute the insides of blocks twice to save memory.
        num_validation: pictures to validate on, not trained on (a tenth at most).
        sample_prompts: what to draw every sample_every steps; by default captions of
            held-out pictures.
    """

    output_dir: str = "runs/unet"
    max_steps: int = 10_000
    checkpoint_every: int = 1000

    pretrained: str | None = None
    vae_weights_path: str | None = None
    text_encoder_path: str | None = None
    unet_preset: str | None = setting(None, choices=tuple(PRESETS))
    unet_dim: int | None = setting(None, at_least=1)
    unet_config: str | None = None

    beta_schedule: str = "scaled_linear"
    diffusion_steps: int = setting(1000, at_least=1)
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    caption_dropout: float = setting(0.1, **SHARE)
    snr_gamma: float = setting(5.0, at_least=0)
    snr_power: float = setting(1.0, **SHARE)
    noisy_share: float = setting(0.0, **SHARE)

    gradient_checkpointing: bool = setting(False, affects_steps=False)
    num_validation: int = setting(64, at_least=0)
    sample_prompts: tuple[str, ...] = setting((), affects_steps=False)

    def __post_init__(self):
        super().__post_init__()
        make_noise_schedule(self)  # refuses unknown schedules and prediction types
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr makes the last timestep pure noise, from which "
                "prediction_type 'epsilon' says nothing about the picture; set "
                "prediction_type to v_prediction, or rescale_betas_zero_snr to false"
            )
        if self.unet_config and (self.unet_preset or self.unet_dim):
            raise ValueError(
                f"unet_config is {self.unet_config}, and unet_preset or unet_dim is "
                "given, too; give one of them"
            )
        asked_shape(self)


def make_noise_schedule(config: TrainingConfig) -> DDIMScheduler:
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


def check_schedule(config: TrainingConfig) -> None:
    """Warn where the noise is not the one that `pretrained` was trained with."""
    folder = find_model(config.pretrained) / "scheduler" if config.pretrained else None
    if folder is None or not folder.is_dir():
        return
    theirs, ours = load_scheduler(folder).config, make_noise_schedule(config).config
    for name in (
        "prediction_type", "beta_schedule", "num_train_timesteps",
        "rescale_betas_zero_snr",
    ):  # fmt: skip
        was, is_ = (getattr(one, name, None) for one in (theirs, ours))
        if was != is_:
            key = {"num_train_timesteps": "diffusion_steps"}.get(name, name)
            warnings.warn(
                f"{key} is {is_}, but {config.pretrained} was trained with {was}; "
                f"unless you mean to change it, set {key} to {was}",
                stacklevel=2,
            )


# The shape of the UNet --------------------------------------------------------


def preset_shape(name: str, width: int | None = None) -> UNetConfig:
    """The config of a preset, whose first level may have another `width`."""
    widths, layers, readers, heads, groups = PRESETS[name]
    if width:
        widths = tuple(w * width // widths[0] for w in widths)
    reads = [level in readers for level in range(len(widths))]
    down = ("CrossAttnDownBlock2D" if read else "DownBlock2D" for read in reads)
    up = ("CrossAttnUpBlock2D" if read else "UpBlock2D" for read in reversed(reads))
    return UNetConfig(
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=widths,
        layers_per_block=layers,
        attention_head_dim=heads,
        norm_num_groups=groups,
    )


def asked_shape(config: TrainingConfig) -> UNetConfig | None:
    """The shape of UNet that the settings name; None for that of `pretrained`.

    Raises ValueError for one that cannot be built.
    """
    if config.unet_config:
        if not Path(config.unet_config).is_file():
            raise FileNotFoundError(
                f"unet_config: there is no file {config.unet_config}; give one like "
                "the config.json in a model's unet/, or leave it out"
            )
        shape = UNetConfig.from_dict(read_json(config.unet_config), config.unet_config)
    elif config.pretrained and not config.unet_preset and not config.unet_dim:
        return None
    else:
        shape = preset_shape(config.unet_preset or "small", config.unet_dim)
    widths = shape.block_out_channels
    check_multiple("the widths", widths, "norm_num_groups", shape.norm_num_groups)
    for level, width in enumerate(widths):
        heads = shape.at_level("attention_head_dim", level)
        check_multiple("the widths", [width], "attention_head_dim", heads)
    return shape


def find_sizes(config: TrainingConfig) -> UNetConfig:
    """The UNet's config, from the settings and the parts' config files alone.

    Raises ValueError for a picture size or parts that do not fit together.
    """
    vae = AutoencoderKL.find_config(source_of(config, "vae"))
    text = CLIPTextModel.find_config(source_of(config, "text_encoder"))
    fitting = {"cross_attention_dim": text.hidden_size}
    fitting |= {"in_channels": vae.latent_channels, "out_channels": vae.latent_channels}
    unet = asked = asked_shape(config)
    if config.pretrained:
        unet = UNet.find_config(source_of(config, "unet"))
        wanted = replace(asked or unet, **fitting, sample_size=unet.sample_size)
        check_same(config.pretrained, wanted, unet)
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    check_side(config.image_size, vae.downscale * halvings, "the VAE with this UNet")
    return replace(unet, **fitting, sample_size=config.image_size // vae.downscale)


def check_same(pretrained: str, wanted: UNetConfig, unet: UNetConfig) -> None:
    """Raise ValueError where shape or parts are others than `pretrained` has."""
    keys = {"cross_attention_dim": "text_encoder_path"}
    keys |= {"in_channels": "vae_weights_path", "out_channels": "vae_weights_path"}
    for name in (field.name for field in fields(unet)):
        ours, theirs = getattr(wanted, name), getattr(unet, name)
        if ours != theirs:
            key = keys.get(name, "unet_preset, unet_dim or unet_config")
            raise ValueError(
                f"{key}: {name} would be {ours}, but the UNet of {pretrained} has "
                f"{theirs}; leave {key} out to take what it was trained with"
            )


def unet_memory(config: TrainingConfig, unet: UNet) -> dict:
    """What training this (empty) UNet needs: see `memory_needed`."""
    b, side = config.batch_size, unet.config.sample_size
    with torch.device("meta"):
        latents = torch.empty(b, unet.config.in_channels, side, side)
        context = torch.empty(b, 77, unet.config.cross_attention_dim)
        return memory_needed(config, unet, latents, torch.zeros(b), context)


# The frozen parts -------------------------------------------------------------

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
        return path / part if (path / part).is_dir() else path
    if own is None and not Path(usual).exists():
        raise FileNotFoundError(
            f"there is no {usual}; `sdbook {command} --output_dir {usual}` makes it, or "
            f"set {key} to a model that has one, such as scenes"
        )
    try:
        return find_part(own or usual, part)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{key}: {error}; `sdbook {command}` makes one"
        ) from error


def open_frozen(
    config: TrainingConfig,
) -> tuple[AutoencoderKL, CLIPTextModel, Tokenizer]:
    """The trained VAE, text model and tokenizer."""
    words = source_of(config, "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(source_of(config, "text_encoder"))
    tokenizer = Tokenizer.from_pretrained(
        find_tokenizer(None if words.is_file() else words)
    )
    check_tokenizer(tokenizer, text_encoder.config)
    vae = AutoencoderKL.from_pretrained(source_of(config, "vae"))
    return vae.eval(), text_encoder.eval(), tokenizer
