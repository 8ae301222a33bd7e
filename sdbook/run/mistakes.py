"""Mistakes that people make in the book's parts, and what to say of each.

`sdbook check` makes them in the book's own part, to see which answers as a reader's
does. For modules a mistake is a change of the built module, all through its tree; for
functions, and classes that are no modules, it is a wrong version of them.
"""

import math
from types import MethodType

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from .. import attention, clip, evaluation, finetuning, resblocks, schedulers, unet, vae
from .. import pipeline as pipelines
from ..training import loss as losses

__all__ = ["mistakes_of", "forward", "other", "change_eps", "skip_module", "attend"]

MODULES, OTHERS = [], {}


def mistakes_of(name: str, reference):
    """(what to say, a wrong version, a change of it or None) for a part."""
    for words, version in OTHERS.get(name, ()):
        yield words, version, None
    if isinstance(reference, type) and issubclass(reference, nn.Module):
        for words, change in MODULES:
            yield words, reference, change


def forward(kind: type, words: str, where=lambda part: True):
    """Note a wrong `forward` of a class, wherever in a module one stands.

    `where`: for which of them it is a mistake.
    """

    def note(function):
        def change(module):
            found = [
                part for part in module.modules() if type(part) is kind and where(part)
            ]
            for part in found:
                part.forward = MethodType(function, part)
            return bool(found)

        MODULES.append((words, change))
        return function

    return note


def other(name: str, words: str):
    """Note a wrong version of a function, or of a class that is no module."""

    def note(version):
        OTHERS.setdefault(name, []).append((words, version))
        return version

    return note


# ---- norms ---------------------------------------------------------------------


def change_eps(kind: type, right: float, wrong: float):
    """Note that norms of a kind have another eps."""

    def change(module):
        found = [
            part for part in module.modules()
            if isinstance(part, kind) and part.eps == right
        ]  # fmt: skip
        for part in found:
            part.eps = wrong
        return bool(found)

    words = f"your {kind.__name__}'s eps looks like {wrong:.0e}; here it is {right:.0e}"
    MODULES.append((words.replace("e-0", "e-"), change))


change_eps(nn.GroupNorm, 1e-6, 1e-5)
change_eps(nn.GroupNorm, 1e-5, 1e-6)
change_eps(nn.LayerNorm, 1e-5, 1e-6)


def skip_module(name: str, words: str):
    """Note that a module's child is left out."""

    def change(module):
        found = [part for part in module.modules() if hasattr(part, name)]
        for part in found:
            getattr(part, name).forward = lambda x, *others: x
        return bool(found)

    MODULES.append((words, change))


skip_module("quant_conv", "is quant_conv used? It follows the encoder")
skip_module("post_quant_conv", "is post_quant_conv used? It comes before the decoder")
skip_module("final_layer_norm", "is final_layer_norm used? It comes last")
skip_module("conv_norm_out", "is conv_norm_out used? It comes before conv_out")
skip_module("group_norm", "is group_norm used? Tokens are read from the normalised map")
skip_module("proj_in", "is proj_in used? It comes between the norm and the blocks")


# ---- attention -----------------------------------------------------------------


def attend(self, q, k, v, mask=None, scale=None, order="(heads d)", over=-1, back=None):
    """Attention with room for mistakes: q, k, v are (b, n, dim)."""
    heads = self.num_heads
    split = f"b n {order} -> b heads n d"
    q, k, v = (rearrange(x, split, heads=heads) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(dim=over) @ v
    if back == "lies":
        return out.reshape(out.shape[0], -1, heads * out.shape[-1])
    return rearrange(out, f"b heads n d -> b n {order}")


HEADS = {
    "are the scores divided by √d? d is the width of one head": dict(scale=1),
    "√d is of the width of one head, not of all together": dict(scale="all"),
    "the softmax runs over the keys: the last axis of the scores": dict(over=-2),
    "heads are the slow axis of the width: (heads d), not (d heads)": dict(
        order="(d heads)"
    ),
    "back to (b, n, heads, d) before the last reshape": dict(back="lies"),
}


def attention_mistake(words: str, facts: dict):
    def options(width):
        return facts | (dict(scale=width**-0.5) if facts.get("scale") == "all" else {})

    @forward(attention.Attention, words)
    def attention_forward(self, x, context=None, mask=None):
        context = x if context is None else context
        given = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attend(self, *given, mask, **options(x.shape[-1])))

    one_head = facts in (dict(scale=1), dict(over=-2))  # others are right with one

    @forward(vae.ImageAttention, words, lambda part: one_head)
    def image_forward(self, x):
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        given = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out(attend(self, *given, **options(x.shape[1])))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])

    @forward(clip.CLIPAttention, words)
    def clip_forward(self, x, mask=None):
        given = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(self, *given, mask, **options(x.shape[-1])))


for words, facts in HEADS.items():
    attention_mistake(words, facts)


def plain_attention(query, key, value, mask=None, scale=None, over=-1, flip=False):
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(mask if flip else ~mask, float("-inf"))
    return scores.softmax(dim=over) @ value


@other("attention", "are the scores divided by √d? d is the last axis of the queries")
def undivided(*given):
    return plain_attention(*given, scale=1)


@other("attention", "the scores are divided by √d, not by d")
def divided_by_d(query, *given):
    return plain_attention(query, *given, scale=1 / query.shape[-1])


@other("attention", "the softmax runs over the keys: the last axis of the scores")
def over_queries(*given):
    return plain_attention(*given, over=-2)


@other("attention", "the mask is True where a query may look")
def masked_out(*given):
    return plain_attention(*given, flip=True)


@other("attention", "does your function use its mask?")
def unmasked(query, key, value, mask=None):
    return plain_attention(query, key, value)


@forward(attention.GEGLU, "the first half is the value, the second the gate")
def gate_first(self, x):
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


@forward(attention.GEGLU, "the GELU here is exact, not the one with tanh")
def gate_tanh(self, x):
    value, gate = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


@forward(attention.GEGLU, "the gate goes through a GELU, not a SiLU")
def gate_silu(self, x):
    value, gate = self.proj(x).chunk(2, dim=-1)
    return value * F.silu(gate)


@forward(attention.GEGLU, "the gate goes through a GELU, not a sigmoid")
def gate_sigmoid(self, x):
    value, gate = self.proj(x).chunk(2, dim=-1)
    return value * torch.sigmoid(gate)


@forward(attention.TransformerBlock, "add to x itself, not to the normalised x")
def add_to_norm(self, x, context):
    x = self.norm1(x)
    x = self.norm2(x + self.attn1(x))
    x = self.norm3(x + self.attn2(x, context))
    return x + self.ff(x)


@forward(attention.TransformerBlock, "norms come before each part, not after the sum")
def norm_after(self, x, context):
    x = self.norm1(x + self.attn1(x))
    x = self.norm2(x + self.attn2(x, context))
    return self.norm3(x + self.ff(x))


@forward(attention.TransformerBlock, "each of the three parts is added to its input")
def nothing_added(self, x, context):
    x = self.attn1(self.norm1(x))
    x = self.attn2(self.norm2(x), context)
    return self.ff(self.norm3(x))


@forward(attention.TransformerBlock, "self-attention comes first, then the text")
def text_first(self, x, context):
    x = x + self.attn2(self.norm2(x), context)
    x = x + self.attn1(self.norm1(x))
    return x + self.ff(self.norm3(x))


def spatial(self, x, context, cells="(h w)", norm=True):
    height, width = x.shape[-2:]
    tokens = self.proj_in(self.norm(x) if norm else x)
    tokens = rearrange(tokens, f"b c h w -> b {cells} c")
    for block in self.transformer_blocks:
        tokens = block(tokens, context)
    out = rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)
    return self.proj_out(out)


@forward(attention.SpatialTransformer, "the result is added to the map that came in")
def not_added(self, x, context):
    return spatial(self, x, context)


@forward(attention.SpatialTransformer, "is norm used? It comes before proj_in")
def not_normed(self, x, context):
    return x + spatial(self, x, context, norm=False)


@forward(attention.SpatialTransformer, "cells are read and put back row by row: (h w)")
def columns_first(self, x, context):
    return x + spatial(self, x, context, cells="(w h)")


# ---- residual blocks -----------------------------------------------------------


def embedded(t, dim, sines_first=False, half=None, base=10_000.0):
    steps = torch.arange(dim // 2, dtype=torch.float32)
    rates = torch.exp(-math.log(base) * steps / (half or dim // 2))
    angles = t.float()[:, None] * rates
    pair = [angles.cos(), angles.sin()]
    return F.pad(torch.cat(pair[::-1] if sines_first else pair, -1), (0, dim % 2))


TIMES = {
    "cosines come first, then sines": lambda t, dim: embedded(t, dim, True),
    "divide by dim/2, not by dim/2 - 1": lambda t, dim: embedded(
        t, dim, half=dim // 2 - 1
    ),
    "sines first and dim/2 - 1: here cosines come first, and one divides by dim/2": (
        lambda t, dim: embedded(t, dim, True, dim // 2 - 1)
    ),
    "sines and cosines stand in two halves, not in turns": lambda t, dim: F.pad(
        embedded(t, dim)[:, : dim // 2 * 2].unflatten(1, (2, -1)).mT.flatten(1),
        (0, dim % 2),
    ),
}
for words, version in TIMES.items():
    other("timestep_embedding", words)(version)

    def embed_otherwise(module, version=version):
        if not isinstance(module, unet.UNet):
            return False
        width = module.conv_in.out_channels
        module.embed_time = lambda t: module.time_embedding(version(t, width))
        return True

    MODULES.append((f"in the embedding of t, {words}", embed_otherwise))


@forward(resblocks.TimestepMLP, "the activation between the two layers is a SiLU")
def time_gelu(self, x):
    return self.linear_2(F.gelu(self.linear_1(x)))


@forward(resblocks.TimestepMLP, "a SiLU stands between the two layers, not after them")
def time_silu_after(self, x):
    return F.silu(self.linear_2(F.silu(self.linear_1(x))))


@forward(resblocks.TimestepMLP, "there is a SiLU between the two layers")
def time_linear(self, x):
    return self.linear_2(self.linear_1(x))


def residual(self, x, time=None, bend=F.silu, told=F.silu, late=False, order="norm"):
    def stage(norm, conv, x):
        return conv(bend(norm(x))) if order == "norm" else bend(norm(conv(x)))

    shift = 0.0
    if time is not None:
        shift = self.time_emb_proj(told(time))[:, :, None, None]
    hidden = stage(self.norm1, self.conv1, x)
    hidden = hidden if late else hidden + shift
    if late:
        return self.conv2(bend(self.norm2(hidden) + shift))
    return stage(self.norm2, self.conv2, hidden)


def same(x):
    return x


@forward(
    resblocks.ResBlock,
    "the time goes through a SiLU before time_emb_proj",
    lambda part: hasattr(part, "time_emb_proj"),
)
def time_as_it_is(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x, time, told=same)


@forward(
    resblocks.ResBlock,
    "the time is added before norm2, not after it",
    lambda part: hasattr(part, "time_emb_proj"),
)
def time_after_norm(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x, time, late=True)


@forward(
    resblocks.ResBlock,
    "is the time added? It goes in between the convolutions",
    lambda part: hasattr(part, "time_emb_proj"),
)
def time_lost(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x)


@forward(resblocks.ResBlock, "there is a SiLU between each norm and its convolution")
def no_bend(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x, time, bend=same)


@forward(resblocks.ResBlock, "the activation is a SiLU, not a ReLU")
def relu_bend(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x, time, bend=F.relu)


@forward(resblocks.ResBlock, "the activation is a SiLU, not a GELU")
def gelu_bend(self, x, time=None):
    return self.conv_shortcut(x) + residual(self, x, time, bend=F.gelu)


@forward(resblocks.ResBlock, "the input is added to the result: + conv_shortcut(x)")
def nothing_kept(self, x, time=None):
    return residual(self, x, time)


BELOW = "with symmetric=False, pad on the right and below only: (0, 1, 0, 1)"


@forward(resblocks.Downsample, BELOW, lambda part: not part.symmetric)
def always_around(self, x):
    return self.conv(F.pad(x, (1, 1, 1, 1)))


AROUND = "with symmetric=True, pad one pixel on every side"


@forward(resblocks.Downsample, AROUND, lambda part: part.symmetric)
def always_below(self, x):
    conv = self.conv
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)


@forward(resblocks.Upsample, "each pixel becomes four alike (nearest), not bilinear")
def bilinear(self, x, size=None):
    size = size or (2 * x.shape[-2], 2 * x.shape[-1])
    return self.conv(F.interpolate(x, size=tuple(size), mode="bilinear"))


@forward(resblocks.Upsample, "does your Upsample use its size?")
def always_double(self, x, size=None):
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ---- the UNet ------------------------------------------------------------------


@forward(unet.DownBlock, "remember each map after its attention, not before")
def remember_early(self, x, time, context):
    skips = []
    for i, resnet in enumerate(self.resnets):
        x = resnet(x, time)
        skips.append(x)
        if self.attentions:
            x = self.attentions[i](x, context)
    for downsampler in self.downsamplers:
        x = downsampler(x)
        skips.append(x)
    return x, skips


@forward(unet.MiddleBlock, "in the middle: residual block, attention, residual block")
def attend_last(self, x, time, context):
    for resnet in self.resnets:
        x = resnet(x, time)
    return self.attentions[0](x, context)


def climb(self, x, skips, time, context, take=lambda skips: skips.pop(), swap=False):
    for i, resnet in enumerate(self.resnets):
        pair = [x, take(skips)]
        x = resnet(torch.cat(pair[::-1] if swap else pair, dim=1), time)
        if self.attentions:
            x = self.attentions[i](x, context)
    for upsampler in self.upsamplers:
        x = upsampler(x, skips[-1].shape[-2:])
    return x


@forward(unet.UpBlock, "cat([x, skip]): the map from below, then the remembered one")
def skip_first(self, x, skips, time, context):
    return climb(self, x, skips, time, context, swap=True)


@forward(unet.UpBlock, "the last map that was remembered is taken first")
def in_order(self, x, skips, time, context):
    count = len(self.resnets)
    own = skips[-count:]
    del skips[-count:]
    own.reverse()
    return climb(self, x, skips, time, context, take=lambda _: own.pop())


# ---- the autoencoder -----------------------------------------------------------


@forward(vae.ImageAttention, "the result is added to the map that came in")
def image_not_added(self, x):
    tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
    mixed = attention.Attention.forward(self, tokens)
    return rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


@other("DiagonalGaussian", "the means come first, then the log-variances")
class VarianceFirst(vae.DiagonalGaussian):
    def __init__(self, parameters):
        super().__init__(torch.cat(parameters.chunk(2, dim=1)[::-1], dim=1))


@other("DiagonalGaussian", "std is exp(logvar / 2): exp(logvar) is the variance")
class VarianceAsSpread(vae.DiagonalGaussian):
    @property
    def std(self):
        return self.logvar.exp()


@other("DiagonalGaussian", "logvar is clamped to [-30, 20]")
class Unclamped(vae.DiagonalGaussian):
    def __init__(self, parameters):
        self.mean, self.logvar = parameters.chunk(2, dim=1)


@other("DiagonalGaussian", "kl() has a half before the sum")
class Doubled(vae.DiagonalGaussian):
    def kl(self):
        return 2 * super().kl()


@other("DiagonalGaussian", "kl() is a sum over each picture, not a mean")
class Averaged(vae.DiagonalGaussian):
    def kl(self):
        return super().kl() / self.mean[0].numel()


# ---- the text encoder ----------------------------------------------------------


@other("causal_mask", "True where a token may look, which is at itself and before")
def hidden_mask(n, device=None):
    return ~torch.ones(n, n, dtype=torch.bool).tril()


@other("causal_mask", "a token may look back, not ahead: the lower triangle")
def ahead(n, device=None):
    return torch.ones(n, n, dtype=torch.bool).triu()


@other("causal_mask", "a token may look at itself, too")
def not_itself(n, device=None):
    return torch.ones(n, n, dtype=torch.bool).tril(-1)


other("quick_gelu", "that is the exact GELU; CLIP has x * sigmoid(1.702 x)")(F.gelu)
other("quick_gelu", "that is SiLU; the x inside is multiplied by 1.702")(F.silu)


@forward(clip.CLIPMLP, "the activation is quick_gelu unless 'gelu' is asked for")
def exact_gelu(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


@forward(clip.CLIPMLP, "the activation is a GELU when 'gelu' is asked for")
def always_quick(self, x):
    return self.fc2(clip.quick_gelu(self.fc1(x)))


@forward(clip.CLIPEncoder, "is the causal mask used? A token sees none after itself")
def see_all(self, x, mask=None, skip=0):
    for layer in self.layers[: len(self.layers) - skip]:
        x = layer(x)
    return x


@forward(clip.CLIPEncoder, "skip leaves out the last layers")
def never_skip(self, x, mask=None, skip=0):
    for layer in self.layers:
        x = layer(x, mask)
    return x


@forward(clip.CLIPEmbeddings, "each place has a vector of its own, to be added")
def no_places(self, ids):
    if ids.shape[1] > self.position_embedding.num_embeddings:
        raise ValueError
    return self.token_embedding(ids)


@forward(clip.CLIPLayer, "norms come before each part, not after the sum")
def clip_norm_after(self, x, mask=None):
    x = self.layer_norm1(x + self.self_attn(x, mask))
    return self.layer_norm2(x + self.mlp(x))


def look(self, pixels, between=clip.quick_gelu, after=clip.quick_gelu):
    if pixels.shape[-1] != self.image_size:
        raise ValueError
    x = self.stem[0](pixels)
    for conv in self.stem[1:]:
        x = conv(between(x))
    said = self.say(after(self.neighbours(x)))
    return self.final_layer_norm(self.row(said.flatten(1)))


@forward(clip.ImageTower, "there is a quick_gelu between the block and `say`, too")
def say_as_it_is(self, pixels):
    return look(self, pixels, after=same)


@forward(clip.ImageTower, "the activations are quick_gelu, not GELU")
def look_with_gelu(self, pixels):
    return look(self, pixels, F.gelu, F.gelu)


@other("contrastive_loss", "texts find pictures, and pictures texts: both ways count")
def one_way(logits, same=None):
    same = torch.eye(len(logits)) if same is None else same.float()
    return F.cross_entropy(logits, same / same.sum(1, keepdim=True))


@other("contrastive_loss", "of several right answers each has an equal share")
def one_answer(logits, same=None):
    return clip.contrastive_loss(logits)


# ---- schedulers ----------------------------------------------------------------


@other("make_betas", "scaled_linear is linear in √β: square it at the end")
def linear_betas(schedule, count, start, end):
    schedule = "linear" if schedule == "scaled_linear" else schedule
    return schedulers.make_betas(schedule, count, start, end)


@other("rescale_zero_terminal_snr", "√ᾱ is shifted and stretched, not ᾱ")
def rescale_bars(betas):
    bars = torch.cumprod(1 - betas, 0)
    bars = (bars - bars[-1]) * bars[0] / (bars[0] - bars[-1])
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


@other("rescale_zero_terminal_snr", "stretch after the shift, so that √ᾱ_0 stays")
def only_shift(betas):
    roots = torch.cumprod(1 - betas, 0).sqrt()
    bars = (roots - roots[-1]) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


@other("posterior_mean", "the weight of x0 has √ᾱ of the earlier step (`before`)")
def wrong_root(x0, x, now, before):
    alpha = now / before
    weight = now.sqrt() * (1 - alpha) / (1 - now)
    return weight * x0 + alpha.sqrt() * (1 - before) / (1 - now) * x


@other("posterior_variance", "that is 1 - ᾱ_t/ᾱ_s, what a step adds; it is more")
def added(now, before):
    return 1 - now / before


@other("posterior_variance", "that is the spread; give its square")
def spread(now, before):
    return schedulers.posterior_variance(now, before).sqrt()


@other("split_output", "for v: x0 = signal x - spread v, noise = signal v + spread x")
def wrong_sign(kind, output, x, signal, spread, size=1):
    output = -output if kind == "v_prediction" else output
    return schedulers.split_output(kind, output, x, signal, spread, size)


@other("split_output", "does your function use size? The network sees x / size")
def sizeless(kind, output, x, signal, spread, size=1):
    return schedulers.split_output(kind, output, x, signal, spread)


@other("spaced_timesteps", "the noisiest timestep comes first")
def quiet_first(spacing, n, total, offset=0, points=0):
    return schedulers.spaced_timesteps(spacing, n, total, offset, points)[::-1].copy()


@other("spaced_timesteps", "the offset is added with leading spacing")
def no_offset(spacing, n, total, offset=0, points=0):
    return schedulers.spaced_timesteps(spacing, n, total, 0, points)


@other("ddim_step", "the variance of the fresh noise is taken off 1 - ᾱ of the old")
def ddim_as_if_certain(x0, noise, before, std):
    return schedulers.ddim_step(x0, noise, before, 0.0)


@other("ddim_step", "1 - ᾱ is a variance: its root multiplies the noise")
def ddim_rootless(x0, noise, before, std):
    return before.sqrt() * x0 + (1 - before - std**2) * noise


@other("karras_sigmas", "σ is evenly spaced in σ^(1/7), and raised to 7 again")
def linear_sigmas(largest, smallest, n):
    return np.linspace(largest, smallest, n)


@other("euler_step", "the slope is (x - x0) / σ of where one is, not of the next")
def slope_there(x, x0, sigma, following):
    return x + (following - sigma) * (x - x0) / following


@other("euler_step", "the step is following - σ, and so downwards")
def upwards(x, x0, sigma, following):
    return x + (sigma - following) * (x - x0) / sigma


@other("heun_step", "the step starts from x again, not from where it arrived")
def from_there(x, slope, arrived, x0, sigma, following):
    there = (arrived - x0) / following
    return arrived + (following - sigma) * (slope + there) / 2


@other("heun_step", "take the mean of the two slopes, not their sum")
def both_slopes(x, slope, arrived, x0, sigma, following):
    return x + (following - sigma) * (slope + (arrived - x0) / following)


@other("plms_noise", "the newest noise is the last of the list")
def newest_first(noises):
    return schedulers.plms_noise(noises[::-1])


@other("runge_kutta_noise", "the two in the middle count twice: (1, 2, 2, 1) / 6")
def plain_mean(noises):
    return sum(noises) / 4


@other("dpmpp_2m_step", "with two in the history, x0 goes on as it went")
def first_order(x, sigmas, x0s, following):
    return schedulers.dpmpp_2m_step(x, sigmas[-1:], x0s[-1:], following)


@other("unic_step", "the line through x0 starts from the step before, if there is one")
def two_ends(x, sigmas, x0s, arrived, x0):
    return schedulers.unic_step(x, sigmas[-1:], x0s[-1:], arrived, x0)


@other("euler_ancestral_step", "go down farther than the next σ before the fresh noise")
def not_farther(x, x0, sigma, following, noise):
    up = following * (1 - (following / sigma) ** 2).sqrt()
    return schedulers.euler_step(x, x0, sigma, following) + up * noise


OPTIONS = {
    "clip_sample is {} where nothing else is said": "clip_sample",
    "set_alpha_to_one is {} where nothing else is said": "set_alpha_to_one",
    "skip_prk_steps is {} where nothing else is said": "skip_prk_steps",
}
IGNORED = (
    ("steps_offset is added to the timesteps", "steps_offset", 0),
    ("does your class use prediction_type?", "prediction_type", "epsilon"),
    ("does your class use use_karras_sigmas?", "use_karras_sigmas", False),
    ("does your class use variance_type?", "variance_type", "fixed_small"),
    ("does your class use clip_sample?", "clip_sample", None),
)
SPACINGS = "timestep_spacing is {!r} where nothing else is said"


def default_mistakes(kind: type):
    for words, option in OPTIONS.items():
        if option in kind.defaults:
            right = kind.defaults[option]
            wrong = {option: not right}
            other(kind.__name__, words.format(right))(
                lambda wrong=wrong, **options: kind(**wrong | options)
            )
    for spacing in ("leading", "linspace", "trailing"):
        right = kind.defaults["timestep_spacing"]
        if spacing != right:
            other(kind.__name__, SPACINGS.format(right))(
                lambda spacing=spacing, **options: kind(
                    **dict(timestep_spacing=spacing) | options
                )
            )
    for words, option, value in IGNORED:
        if option in kind.defaults:
            value = kind.defaults[option] if value is None else value
            other(kind.__name__, words)(
                lambda option=option, value=value, **options: kind(
                    **options | ({option: value} if option in options else {})
                )
            )


for kind in schedulers.SCHEDULERS.values():
    default_mistakes(kind)


# ---- the rest ------------------------------------------------------------------


@other("guide", "start from uncond: uncond + scale * (cond - uncond)")
def from_cond(uncond, cond, scale):
    return cond + scale * (cond - uncond)


@other("guide", "the prompt comes second: go from uncond towards cond")
def away(uncond, cond, scale):
    return pipelines.guide(cond, uncond, scale)


@other("min_snr_weights", "min(SNR, γ) is for an error in x0: divide it for ε or v")
def undivided_weights(scheduler, gamma, power=1.0):
    snr = scheduler.snr(torch.arange(scheduler.num_train_timesteps))
    return snr.clamp(max=gamma) ** power if gamma else torch.ones_like(snr)


@other("min_snr_weights", "does your function use its power?")
def powerless(scheduler, gamma, power=1.0):
    return losses.min_snr_weights(scheduler, gamma)


@other("wilson", "that is the plain interval, share ± z √(share (1 - share) / n)")
def wald(right, total, z=1.96):
    share = right / total
    spread = z * math.sqrt(share * (1 - share) / total)
    return max(share - spread, 0.0), min(share + spread, 1.0)


@other("sign_test", "count both ends: the tail twice, and at most 1")
def one_tail(first, second):
    return evaluation.sign_test(first, second) / 2


@forward(finetuning.LowRank, "the change is scaled by alpha / rank")
def unscaled(self, x):
    return self.up(self.down(x))


@other("kernel_distance", "an estimate without bias leaves the diagonals out")
def biased(first, second):
    evaluation.check_features(first, second)
    first, second = first.double(), second.double()
    kernel = evaluation.cubic_kernel
    within = kernel(first, first).mean() + kernel(second, second).mean()
    return (within - 2 * kernel(first, second).mean()).item()
