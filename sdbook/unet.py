"""The UNet

Generated from chapters/03_unet.ipynb; do not edit.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import SpatialTransformer
from .formats import own_weights
from .resblocks import Downsample, ResBlock, TimestepMLP, Upsample, timestep_embedding
from .weights import Config, Pretrained

__all__ = [
    "UNetConfig", "pushed_channels", "residual_block", "transformer", "DownBlock",
    "MiddleBlock", "UpBlock", "UNet", "check_inputs", "start_as_identity",
]


@dataclass(frozen=True)
class UNetConfig(Config):
    """The UNet's sizes, named as in diffusers; the defaults are SD 1.5's.

    `attention_head_dim` is, despite its name, the number of heads: one number for
    all levels or one for each, like `transformer_layers_per_block`. Raises
    ValueError for lists that do not fit together.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    use_linear_projection: bool = False

    fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu", "attention_type": "default", "conv_in_kernel": 3,
        "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
    }
    ignored: ClassVar[tuple[str, ...]] = (
        "addition_embed_type_num_heads", "upcast_attention",
    )
    families: ClassVar[dict[str, dict[str, Any]]] = {"SD 2.x": dict(
        sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
        use_linear_projection=True,
    )}

    def at_level(self, name: str, level: int) -> int:
        """An option that is one number for all levels or one for each."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[level]

    def check(self) -> None:
        """Raise ValueError unless options have one entry for each level."""
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "transformer_layers_per_block",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{name} has {len(value)} entries but block_out_channels has "
                    f"{levels}; give one entry for each level"
                )
        for way in ("down", "up"):
            known = (f"{way.title()}Block2D", f"CrossAttn{way.title()}Block2D")
            for name in getattr(self, f"{way}_block_types"):
                if name not in known:
                    raise ValueError(
                        f"{way}_block_types: {name} is not implemented; use "
                        + " or ".join(known)
                    )


def pushed_channels(config: UNetConfig) -> list[int]:
    """Channels of the maps that the way down remembers, first to last."""
    widths = config.block_out_channels
    channels = [widths[0]]
    for level, width in enumerate(widths):
        downsampled = level < len(widths) - 1
        channels += [width] * (config.layers_per_block + downsampled)
    return channels


def residual_block(config: UNetConfig, in_channels: int, out_channels: int) -> ResBlock:
    """A residual block that is told the time."""
    time_dim = 4 * config.block_out_channels[0]
    return ResBlock(in_channels, out_channels, time_dim, config.norm_num_groups)


def transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    """The spatial transformer of one level."""
    return SpatialTransformer(
        config.block_out_channels[level],
        num_heads=config.at_level("attention_head_dim", level),
        depth=config.at_level("transformer_layers_per_block", level),
        context_dim=config.cross_attention_dim,
        num_groups=config.norm_num_groups,
    )


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, attention, a downsampler.

    x (b, c, h, w), time (b, time_dim) and context (b, n, d) give the new map, half
    as high and wide except at the last level, and the list of maps to remember.
    """

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        widths = config.block_out_channels
        channels, width = widths[max(level - 1, 0)], widths[level]
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for _ in range(config.layers_per_block):
            self.resnets.append(residual_block(config, channels, width))
            channels = width
            if attends:
                self.attentions.append(transformer(config, level))
        self.downsamplers = nn.ModuleList()
        if level < len(widths) - 1:
            self.downsamplers.append(Downsample(width))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, "#b time_dim"],
        context: Float[Tensor, "b n d"],
    ) -> tuple[Float[Tensor, "b2 c2 h2 w2"], list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MiddleBlock(nn.Module):
    """The bottom of the U: residual block, attention, residual block.

    x (b, c, h, w), time (b, time_dim) and context (b, n, d) give (b, c, h, w).
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(
            residual_block(config, width, width) for _ in range(2)
        )
        self.attentions = nn.ModuleList([transformer(config, -1)])

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, "#b time_dim"],
        context: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b c h w"]:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: each residual block also reads a remembered map.

    x (b, c, h, w), time (b, time_dim) and context (b, n, d) give the new map, as
    high and wide as the map that the next level will take. Pops its own maps from
    the end of `skips`, as its constructor pops their channels from the end of
    `skip_channels`.
    """

    def __init__(self, config: UNetConfig, level: int, skip_channels: list[int]):
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        channels, width = widths[min(level + 1, last)], widths[level]
        attends = config.up_block_types[last - level] == "CrossAttnUpBlock2D"
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for _ in range(config.layers_per_block + 1):
            channels += skip_channels.pop()
            self.resnets.append(residual_block(config, channels, width))
            channels = width
            if attends:
                self.attentions.append(transformer(config, level))
        self.upsamplers = nn.ModuleList()
        if level > 0:
            self.upsamplers.append(Upsample(width))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        skips: list[Tensor],
        time: Float[Tensor, "#b time_dim"],
        context: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b c2 h2 w2"]:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])
        return x


class UNet(Pretrained, nn.Module):
    """Predicts the noise in latents, given the timestep and the text.

    latents (b, in_channels, h, w), t (b,) or one number, context
    (b, n, cross_attention_dim) give (b, out_channels, h, w). Raises ValueError
    for inputs that do not fit. From Rombach et al. (2022), section 3.3.
    """

    config_class = UNetConfig
    diffusers_class = "UNet2DConditionModel"

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = config = UNetConfig() if config is None else config
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        skips = pushed_channels(config)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, i) for i in range(levels))
        self.mid_block = MiddleBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, i, skips) for i in reversed(range(levels))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed_time(self, t: Num[Tensor, "steps"]) -> Float[Tensor, "steps time_dim"]:
        """What the blocks are told of each of these timesteps."""
        # Half precision cannot count to 999 finely enough: embed t in float32.
        waves = timestep_embedding(t, self.conv_in.out_channels)
        return self.time_embedding(waves.to(self.conv_in.weight.dtype))

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        t: Num[Tensor, "..."] | int | float,
        context: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b out h w"]:
        t = torch.as_tensor(t)
        check_inputs(self.config, latents, t, context)
        time = self.embed_time(t.reshape(-1).to(latents.device))
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, time, context)
            skips += new_skips
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def rename_on_load(
        self, state: dict[str, Tensor], ema: bool = True
    ) -> dict[str, Tensor]:
        """Also read the original's names; of two copies, take the averaged."""
        return own_weights(self, state, ema)

    def rename_on_save(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the 1 × 1 convolutions as matrices, if the config says so."""
        if not self.config.use_linear_projection:
            return state
        places = (".proj_in.weight", ".proj_out.weight")
        return {k: t.flatten(1) if k.endswith(places) else t for k, t in state.items()}


def check_inputs(
    config: UNetConfig, latents: Tensor, t: Tensor, context: Tensor
) -> None:
    """Raise a ValueError that says which input does not fit and what would."""
    b, channels = latents.shape[:2]
    if channels != config.in_channels:
        raise ValueError(
            f"latents have {channels} channels but this UNet takes "
            f"{config.in_channels}; encode pictures with its VAE first"
        )
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, b)):
        raise ValueError(
            f"timesteps of shape {tuple(t.shape)} but latents for {b}; pass one "
            "timestep, or one for each latent"
        )
    if len(context) != b:
        raise ValueError(
            f"prompt batch of {len(context)} but latents for {b}; "
            "pass one latent per prompt"
        )
    if context.shape[-1] != config.cross_attention_dim:
        raise ValueError(
            f"text embeddings of width {context.shape[-1]} but this UNet reads "
            f"width {config.cross_attention_dim}; use the text encoder that it "
            "was trained with"
        )


def start_as_identity(unet: UNet) -> UNet:
    """Zero the last layer of every residual branch, for training from zero.

    Each block then starts by passing its input on. Dhariwal and Nichol (2021) and
    Stable Diffusion itself began so; loading weights overwrites it.
    """
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet
