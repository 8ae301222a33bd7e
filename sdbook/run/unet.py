"""What a training of the UNet starts from: a shape, a noise schedule, frozen parts."""

import warnings
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..clip import CLIPTextModel, Tokenizer
from ..files import read_json
from ..formats import find_model, find_tokenizer
from ..pipeline import check_tokenizer, load_scheduler
from ..schedulers import DDIMScheduler
from ..unet import UNet, UNetConfig
from ..vae import AutoencoderKL
from .configs import TrainingConfig, sized_preset
from .memory import memory_needed
from .settings import check_multiple, check_side


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
    widths, layers, readers, heads, groups = sized_preset(name, width)
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
    unet = asked = asked_shape(config)
    vae = AutoencoderKL.find_config(source_of(config, "vae"))
    text = CLIPTextModel.find_config(source_of(config, "text_encoder"))
    fitting = {"cross_attention_dim": text.hidden_size}
    fitting |= {"in_channels": vae.latent_channels, "out_channels": vae.latent_channels}
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
    else:
        path = Path(own or usual)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; run `sdbook {command} --output_dir {path}` "
                f"first, or set {key}"
            )
    return path / part if (path / part).is_dir() else path


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
