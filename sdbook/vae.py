"""The autoencoder

Generated from chapters/05_vae.ipynb; do not edit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention
from .formats import own_weights
from .resblocks import Downsample, ResBlock, Upsample
from .tiles import fading, in_tiles, tile_starts  # noqa: F401
from .weights import Config, Pretrained

__all__ = [
    "stack", "Level", "ImageAttention", "MidBlock", "DiagonalGaussian", "VAEConfig",
    "Encoder", "Decoder", "AutoencoderKL", "check_size",
]


def stack(
    in_channels: int, out_channels: int, num_layers: int, num_groups: int
) -> nn.ModuleList:
    """`num_layers` residual blocks; the first changes the number of channels."""
    widths = [in_channels] + [out_channels] * num_layers
    return nn.ModuleList(
        ResBlock(before, after, num_groups=num_groups, eps=1e-6)
        for before, after in zip(widths[:-1], widths[1:], strict=True)
    )


class Level(nn.Module):
    """Residual blocks, then half the resolution, or twice, or the same."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int,
        halve: bool = False, double: bool = False,
    ):
        super().__init__()
        self.resnets = stack(in_channels, out_channels, num_layers, num_groups)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        if halve:
            self.downsamplers.append(Downsample(out_channels, symmetric=False))
        if double:
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class ImageAttention(Attention):
    """Self-attention with one head over the cells of a map, added to the map.

    `(b, c, h, w) -> (b, c, h, w)`
    """

    def __init__(self, channels: int, num_groups: int = 32):
        super().__init__(channels, num_heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        mixed = super().forward(tokens)
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    """Residual block, attention (if wanted), residual block; the size stays."""

    def __init__(self, channels: int, num_groups: int, add_attention: bool = True):
        super().__init__()
        self.resnets = stack(channels, channels, 2, num_groups)
        self.attentions = nn.ModuleList()
        if add_attention:
            self.attentions.append(ImageAttention(channels, num_groups))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        first, second = self.resnets
        for layer in [first, *self.attentions, second]:
            x = layer(x)
        return x


class DiagonalGaussian:
    """A normal distribution with its own mean and spread for every latent number.

    Built from the encoder's output `(b, 2c, h, w)`: means, then log-variances,
    which are clamped to [-30, 20] so that `exp` stays finite.
    """

    def __init__(self, parameters: Float[Tensor, "b c2 h w"]):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Float[Tensor, "b c h w"]:
        """The standard deviation, `exp(logvar / 2)`."""
        return torch.exp(0.5 * self.logvar)

    def sample(
        self, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Draw `mean + std * noise`, differentiable (Kingma & Welling, 2014)."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Float[Tensor, "b c h w"]:
        """The most likely latents, which are the means."""
        return self.mean

    def kl(self) -> Float[Tensor, "b"]:
        """Divergence from the standard normal, in nats, summed over each picture."""
        terms = self.mean**2 + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class VAEConfig(Config):
    """The autoencoder's sizes, named as in diffusers; the defaults are SD 1.5's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    fixed: ClassVar[dict[str, Any]] = {"act_fn": "silu"}
    ignored: ClassVar[tuple[str, ...]] = ("force_upcast",)

    def check(self) -> None:
        """Raise ValueError for widths that do not split."""
        widths, groups = self.block_out_channels, self.norm_num_groups
        if any(width % groups for width in widths):
            raise ValueError(
                f"block_out_channels {widths} do not split into norm_num_groups="
                f"{groups} groups; make every width a multiple of it"
            )

    def derived(self) -> dict[str, Any]:
        """The kind of every level, which diffusers writes down, too."""
        count = len(self.block_out_channels)
        return {
            "down_block_types": ("DownEncoderBlock2D",) * count,
            "up_block_types": ("UpDecoderBlock2D",) * count,
        }

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Encoder(nn.Module):
    """A picture `(b, 3, H, W)` to the parameters of its latents `(b, 2c, h, w)`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            halve = i < len(widths) - 1
            level = Level(before, width, config.layers_per_block, groups, halve)
            self.down_blocks.append(level)
            before = width
        self.mid_block = MidBlock(before, groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents `(b, c, h, w)` to a picture `(b, 3, H, W)`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        before = widths[0]
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.mid_block = MidBlock(before, groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            double, layers = i < len(widths) - 1, config.layers_per_block + 1
            level = Level(before, width, layers, groups, double=double)
            self.up_blocks.append(level)
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, config.out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(Pretrained, nn.Module):
    """The variational autoencoder of Stable Diffusion (Rombach et al., 2022).

    Pixels are in [-1, 1]. Latents are as the encoder gives them: multiply by
    `config.scaling_factor` before the UNet, divide before `decode`. To save memory,
    set `tile_size` (in pixels), and larger pictures are done in tiles that overlap; set
    `slicing`, and batches are done one by one.
    """

    config_class = VAEConfig
    diffusers_class = "AutoencoderKL"
    slicing = False
    _tile_size = None

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = config = config or VAEConfig()
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x: Float[Tensor, "b c h w"]) -> DiagonalGaussian:
        """Pixels in [-1, 1] to the distribution of their latents.

        Raises ValueError when a side is not a multiple of `config.downscale`.
        """
        check_size(x, self.config.downscale)
        steps = nn.Sequential(self.encoder, self.quant_conv)
        return DiagonalGaussian(self.in_parts(steps, x, self.config.downscale))

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Unscaled latents to pixels, about [-1, 1] (not clamped)."""
        return self.in_parts(nn.Sequential(self.post_quant_conv, self.decoder), z, 1)

    @property
    def tile_size(self) -> int | None:
        """Pixels along a tile's side; None for no tiles. ValueError if too small."""
        return self._tile_size

    @tile_size.setter
    def tile_size(self, size: int | None):
        least = 2 * self.config.downscale
        if size is not None and size < least:
            raise ValueError(
                f"tile_size={size}: give at least {least} pixels (None for no tiles)"
            )
        self._tile_size = size

    def in_parts(self, function: Callable[[Tensor], Tensor], x: Tensor, cell: int):
        """`function` of x at once, or as `slicing` and `tile_size` have it."""
        if self.slicing and len(x) > 1:
            return torch.cat([self.in_parts(function, one, cell) for one in x.split(1)])
        if self.tile_size is None:
            return function(x)
        tile = self.tile_size // self.config.downscale
        if max(x.shape[-2:]) <= tile * cell:
            return function(x)
        return in_tiles(function, x, tile, cell)

    def forward(
        self, x: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b c2 h w"], DiagonalGaussian]:
        """For training: encode, draw, decode; the picture and the distribution."""
        distribution = self.encode(x)
        return self.decode(distribution.sample(generator)), distribution

    def rename_on_load(
        self, state: dict[str, Tensor], ema: bool = True
    ) -> dict[str, Tensor]:
        """Also read the original's names, and diffusers' of its first days."""
        return own_weights(self, state, ema)


def check_size(x: Float[Tensor, "b c h w"], factor: int) -> None:
    """Raise ValueError when height or width is not a multiple of `factor`."""
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"picture of {height}×{width} pixels, but this autoencoder needs "
            f"multiples of {factor}; resize or crop it"
        )
