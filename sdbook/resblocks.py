"""Residual blocks

Generated from chapters/02_resblocks.ipynb; do not edit.
"""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["timestep_embedding", "TimestepMLP", "ResBlock", "Downsample", "Upsample"]


def timestep_embedding(t: Num[Tensor, "b"], dim: int) -> Float[Tensor, "b dim"]:
    """Cosines, then sines, of t at dim/2 frequencies from 1 down towards 1/10000.

    t (b,), whole or fractional steps -> (b, dim) float32; an odd `dim` ends in
    a zero. From Vaswani et al. (2017), section 3.5.
    """
    half = dim // 2
    # t up to 999 magnifies the rounding of a frequency, so the order of these
    # operations is the reference's: multiply, divide, then the exponential.
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * steps / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class TimestepMLP(nn.Module):
    """Two linear layers with a SiLU between: (b, dim_in) -> (b, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Float[Tensor, "b dim"]) -> Float[Tensor, "b time_dim"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Two convolutions, told the time in between, added to their input.

    x (b, in_channels, h, w) and time (b, time_dim), or (1, time_dim) for all, give
    (b, out_channels, h, w).
    With `time_dim` None the block takes no time, as in the VAE.
    From He et al. (2016) and Ho et al. (2020), appendix B.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        time_dim: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
    ):
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, "#b time_dim"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        hidden = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.conv_shortcut(x) + hidden


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: (b, c, h, w) -> (b, c, h/2, w/2).

    The UNet pads one pixel on every side (`symmetric`), the VAE only on the
    right and below.
    """

    def __init__(self, channels: int, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2, padding=1 if symmetric else 0
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel four times, then a 3x3 convolution: (b, c, h, w) -> (b, c, 2h, 2w).

    `size` (height, width) asks for another size, for maps that were halved from an
    odd one: 5 rows become 3, and should become 5 again.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b c h2 w2"]:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
