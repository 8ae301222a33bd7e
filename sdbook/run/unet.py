"""What a training of the UNet starts from: a shape, a noise schedule, frozen parts."""

import warnings
from dataclasses import fields, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from ..attention import TransformerBlock
from ..clip import CLIPTextModel, Tokenizer
from ..files import read_json
from ..formats import check_task, find_model, find_part, find_tokenizer
from ..pipeline import check_tokenizer, find_scheduler
from ..schedulers import DDIMScheduler
from ..unet import UNet, UNetConfig, start_as_identity
from ..vae import AutoencoderKL
from ..weights import build_empty
from .checkpoints import check_fits, find_checkpoint
from .configs import TrainingConfig, sized_preset
from .memory import memory_needed
from .plan import say_plan
from .settings import check_multiple, check_side, open_dataset


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
    if not config.pretrained:
        return
    theirs = find_scheduler(find_model(config.pretrained)).config
    ours = make_noise_schedule(config).config
    for name in (
        "prediction_type", "beta_schedule", "num_train_timesteps",
        "rescale_betas_zero_snr",
    ):  # fmt: skip
        was, is_ = (getattr(one, name, False) for one in (theirs, ours))
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
        check_task(unet.in_channels, vae.latent_channels, config.pretrained)
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


def prepare(config: TrainingConfig) -> tuple[UNetConfig, Dataset, list[int], Dataset]:
    """The UNet's config, the pictures, which of them to show, and those held out.

    Says the plan. Raises ValueError, before anything is opened, for settings, frozen
    parts or a checkpoint that do not fit together.
    """
    sizes = find_sizes(config)
    check_schedule(config)
    empty = build_empty(UNet, sizes)
    check_fits(find_checkpoint(config), empty)
    dataset = open_dataset(config)
    shown, held = dataset.held_out(config.num_validation)
    memory = unet_memory(config, empty)
    say_plan(config, dataset, empty, memory, shown=len(shown), held=len(held))
    return sizes, dataset, shown, held


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
            f"there is no {usual}; `sdbook {command} --output_dir {usual}` makes it, "
            f"or set {key} to a model that has one, such as scenes"
        )
    try:
        return find_part(own or usual, part)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{key}: {error}; `sdbook {command}` makes one"
        ) from error


def open_frozen(
    config: TrainingConfig, device="cpu"
) -> tuple[AutoencoderKL, CLIPTextModel, Tokenizer]:
    """The trained VAE, text model and tokenizer, on a device."""
    words = source_of(config, "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(source_of(config, "text_encoder"))
    tokenizer = Tokenizer.from_pretrained(
        find_tokenizer(None if words.is_file() else words)
    )
    check_tokenizer(tokenizer, text_encoder.config)
    vae = AutoencoderKL.from_pretrained(source_of(config, "vae"))
    vae.to(device, memory_format=torch.channels_last)
    return vae.eval(), text_encoder.to(device).eval(), tokenizer


# The first weights ------------------------------------------------------------


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


def new_unet(config: TrainingConfig, sizes: UNetConfig, states: Tensor) -> UNet:
    """A UNet that starts from zero, or from the one in `pretrained`.

    From zero, it starts as the identity, and white for the text states (m, n, d).
    """
    if config.pretrained is None:
        return start_white(start_as_identity(UNet(sizes)), states)
    unet = UNet.from_pretrained(source_of(config, "unet"))
    unet.config = sizes  # the same, but for the size of the pictures
    return unet
