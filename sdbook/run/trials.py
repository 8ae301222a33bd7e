"""How each part that `sdbook check` knows is tried out, with small inputs.

A trial gets `make`, which makes the part (and gives a module the book's weights), and
yields pairs: what is asked, in words that follow the part's name, and the answer.
"""

import torch

from ..schedulers import make_scheduler

__all__ = ["TRIALS", "trial"]

TRIALS = {}  # {a part's name: its trial}


def trial(*names: str):
    """Note a function as the trial of the parts with these names."""

    def note(function):
        TRIALS.update(dict.fromkeys(names, function))
        return function

    return note


def numbers(*shape: int, seed: int = 1, size: float = 1.0) -> torch.Tensor:
    """The same normal numbers every time."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator)


def refusal(function, *args, **options) -> str:
    """What a call raises."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"a {type(error).__name__}"
    return "no error"


# ---- 1 and 2: attention, residual blocks ---------------------------------------


@trial("attention")
def try_attention(make):
    query, key = numbers(2, 3, 5, 8), numbers(2, 3, 7, 8, seed=2)
    value = numbers(2, 3, 7, 6, seed=3)
    yield "5 queries and 7 keys", make(query, key, value)
    yield "large scores", make(100 * query, key, value)
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    yield "with a mask", make(query, key, value, mask)


@trial("Attention")
def try_multi_head(make):
    x, context = numbers(2, 6, 12), numbers(2, 5, 10, seed=2)
    yield "self-attention, 3 heads", make(12, num_heads=3)(x)
    yield "a context of another width", make(12, 10, num_heads=3)(x, context)
    yield "a context of the same width", make(12, num_heads=3)(x, x.flip(1)[:, :4])
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    yield "with a mask", make(12, num_heads=3)(x, mask=mask)
    yield "with qkv_bias", make(12, num_heads=2, qkv_bias=True)(x)
    yield "12 channels for 5 heads", refusal(make, 12, num_heads=5)


@trial("GEGLU")
def try_geglu(make):
    yield "tokens of width 12 to 20", make(12, 20)(numbers(2, 6, 12, size=3))


@trial("FeedForward")
def try_feed_forward(make):
    yield "tokens of width 12", make(12)(numbers(2, 6, 12, size=3))
    yield "twice as wide inside", make(12, mult=2)(numbers(2, 6, 12, size=3))


@trial("TransformerBlock")
def try_transformer_block(make):
    x, context = numbers(2, 6, 12), numbers(2, 5, 10, seed=2)
    yield "tokens and a context", make(12, 3, 10)(x, context)
    yield "faint tokens", make(12, 3, 10)(0.003 * x, context)


@trial("SpatialTransformer")
def try_spatial_transformer(make):
    x, context = numbers(2, 12, 4, 3), numbers(2, 5, 10, seed=2)
    block = make(12, 3, depth=2, context_dim=10, num_groups=4)
    yield "a map of 4 by 3, depth 2", block(x, context)
    yield "a faint map", block(0.003 * x, context)


@trial("timestep_embedding")
def try_timestep_embedding(make):
    t = torch.tensor([0, 1, 500, 999])
    yield "width 16", make(t, 16)
    yield "fractional timesteps", make(t + 0.25, 320)
    yield "an odd width", make(t, 7)


@trial("TimestepMLP")
def try_timestep_mlp(make):
    yield "width 8 to 20", make(8, 20)(numbers(3, 8, size=3))


@trial("ResBlock")
def try_resblock(make):
    x, time = numbers(2, 8, 6, 5), numbers(2, 12, seed=2)
    block = make(8, 16, time_dim=12, num_groups=4)
    yield "8 to 16 channels, with a time", block(x, time)
    yield "one time for all", block(x, time[:1])
    yield "without a time", make(8, num_groups=4)(x)
    faint = make(8, num_groups=4, eps=1e-6)
    yield "a faint map, eps=1e-6", faint(0.003 * x)
    yield "a faint map, eps as it is", make(8, num_groups=4)(0.003 * x)


@trial("Downsample")
def try_downsample(make):
    yield "6 by 8", make(4)(numbers(2, 4, 6, 8))
    yield "symmetric=False", make(4, symmetric=False)(numbers(2, 4, 6, 8))


@trial("Upsample")
def try_upsample(make):
    yield "3 by 4", make(4)(numbers(2, 4, 3, 4))
    yield "3 by 4 to a size of 5 by 7", make(4)(numbers(2, 4, 3, 4), size=(5, 7))


# ---- 3: the UNet ---------------------------------------------------------------


def small_unet(make, **options):
    """A config of two levels with room for mistakes; all its widths differ."""
    values = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=12, norm_num_groups=4,
    )  # fmt: skip
    return make.config("unet.UNetConfig", **values | options)


@trial("pushed_channels")
def try_pushed_channels(make):
    yield "Stable Diffusion 1.5", make(make.config("unet.UNetConfig"))
    yield "two levels, one layer", make(small_unet(make, layers_per_block=1))


@trial("UNet")
def try_unet(make):
    latents, context = numbers(2, 4, 8, 8), numbers(2, 7, 12, seed=2)
    unet = make(small_unet(make))
    yield "two levels, t = (3, 700)", unet(latents, torch.tensor([3, 700]), context)
    yield "t as one number", unet(latents, 500, context)
    yield "an odd size", unet(latents[..., :7, :5], 20, context)
    deep = small_unet(
        make, block_out_channels=(8, 8, 16), layers_per_block=1,
        attention_head_dim=(2, 4, 8), transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    yield "three levels, heads for each", make(deep)(latents, 500, context)
    wrong = numbers(3, 7, 12)
    yield "3 prompts for 2 latents", refusal(unet, latents, 500, wrong)


STRENGTHS = ((0.1, "with small weights"), (2.5, "with large weights"))


def inside(make, channels: int):
    """A map, a time and a context for a block of `small_unet`."""
    return numbers(2, channels, 4, 6), numbers(2, 32, seed=2), numbers(2, 7, 12, seed=3)


@trial("DownBlock")
def try_down_block(make):
    config = small_unet(make)
    x, time, context = inside(make, 8)
    for level, words in ((0, "the first level"), (1, "the last level, no attention")):
        out, skips = make(config, level)(x, time, context)
        yield words, out
        yield f"the maps that {words.split(',')[0]} remembers", list(skips)
    for make.strength, words in STRENGTHS:
        yield words, make(config, 0)(0.1 * x, time, context)[0]


@trial("MiddleBlock")
def try_middle_block(make):
    x, time, context = inside(make, 16)
    yield "a map of 4 by 6", make(small_unet(make))(x, time, context)
    for make.strength, words in STRENGTHS:
        yield words, make(small_unet(make))(0.1 * x, time, context)


@trial("UpBlock")
def try_up_block(make):
    config = small_unet(make)
    _, time, context = inside(make, 8)
    skips = [numbers(2, c, 7, 11, seed=c + i) for i, c in enumerate((8, 8, 8))]
    below = [numbers(2, c, 4, 6, seed=c + i) for i, c in enumerate((8, 16, 16))]
    channels, maps = [8, 8, 8, 8, 16, 16], skips + below
    lower = make(config, 1, channels)
    yield "channels left after the lower level", list(channels)
    upper = make(config, 0, channels)
    x = lower(numbers(2, 16, 4, 6), maps, time, context)
    yield "the lower level", x
    yield "maps left after the lower level", len(maps)
    yield "the upper level, with attention", upper(x, maps, time, context)
    for make.strength, words in STRENGTHS:
        maps = [0.1 * one for one in skips]
        upper = make(config, 0, [8, 8, 8])
        yield words, upper(numbers(2, 16, 7, 11), maps, time, context)


# ---- 4: the world --------------------------------------------------------------

CAPTIONS = (
    "a red star", "three yellow flowers", "two fish", "an orange house at dusk",
    "a small blue boat and a big green tree on paper",
    "a red star above two blue houses", "two pink hearts left of a moon in the sky",
)  # fmt: skip


@trial("describe")
def try_describe(make):
    from ..scenes import read_caption

    for caption in CAPTIONS:
        yield f"a request for {caption!r}", make(read_caption(caption))


@trial("read_caption")
def try_read_caption(make):
    others = ("a picture of one red star under a blue fish", "A Red Star On The Sand ")
    for caption in CAPTIONS + others:
        found = make(caption)
        groups = [(g.count, g.shape, g.colour, g.size) for g in found.groups]
        yield f"{caption!r}", repr((groups, found.relation, found.background))
    yield "a sentence of another world", refusal(make, "a purple elephant")


@trial("stands")
def try_stands(make):
    first, second = (numbers(50, n, 2, seed=n).numpy() for n in (2, 1))
    for relation in ("above", "below", "left", "right"):
        yield relation, make(first, second, relation)


# ---- 5: the autoencoder --------------------------------------------------------


def small_vae(make, **options):
    values = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    return make.config("vae.VAEConfig", **values | options)


@trial("DiagonalGaussian")
def try_gaussian(make):
    found = make(numbers(2, 6, 4, 4))
    yield "mean", found.mean
    yield "logvar", found.logvar
    yield "std", found.std
    yield "mode()", found.mode()
    noise = torch.Generator().manual_seed(3)
    yield "sample(generator)", found.sample(noise)
    yield "kl(), one number a picture", found.kl()
    yield "logvar of extreme numbers", make(numbers(2, 6, 4, 4, size=100)).logvar


@trial("ImageAttention")
def try_image_attention(make):
    x = numbers(2, 8, 4, 3)
    yield "a map of 4 by 3", make(8, num_groups=4)(x)
    yield "a faint map", make(8, num_groups=4)(0.003 * x)


@trial("Encoder")
def try_encoder(make):
    encoder, x = make(small_vae(make)), numbers(2, 3, 8, 12)
    yield "a picture of 8 by 12", encoder(x)
    bare = small_vae(make, mid_block_add_attention=False, layers_per_block=2)
    yield "without attention", make(bare)(x)
    make.strength = 0.1
    yield "with small weights", make(small_vae(make))(x)


@trial("Decoder")
def try_decoder(make):
    for make.strength, words in ((1, ""), (0.1, ", small weights")):
        decoder = make(small_vae(make))
        yield f"latents of 4 by 6{words}", decoder(numbers(2, 4, 4, 6))


@trial("AutoencoderKL")
def try_autoencoder(make):
    vae, x, z = make(small_vae(make)), numbers(2, 3, 8, 12), numbers(2, 4, 4, 6)
    found = vae.encode(x)
    yield "encode(x).mean", found.mean
    yield "encode(x).logvar", found.logvar
    yield "decode(z)", vae.decode(z)
    make.strength = 0.1
    yield "encode(x).mean with small weights", make(small_vae(make)).encode(x).mean
    picture, _ = vae(x, torch.Generator().manual_seed(1))
    yield "forward(x, generator)", picture
    yield "a picture of 7 by 12", refusal(vae.encode, x[:, :, :7])


# ---- 6: the text encoder -------------------------------------------------------


@trial("causal_mask")
def try_causal_mask(make):
    yield "5 tokens", make(5)


@trial("quick_gelu")
def try_quick_gelu(make):
    yield "numbers from -6 to 6", make(torch.linspace(-6, 6, 50))


@trial("CLIPAttention")
def try_clip_attention(make):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    yield "without a mask", make(12, 3)(numbers(2, 5, 12, size=3))
    yield "with a mask", make(12, 3)(numbers(2, 5, 12, size=3), mask)


@trial("CLIPMLP")
def try_clip_mlp(make):
    yield "as CLIP has it", make(12, 20)(numbers(2, 5, 12, size=3))
    yield "activation='gelu'", make(12, 20, "gelu")(numbers(2, 5, 12, size=3))


SMALL_TEXT = dict(
    vocab_size=60, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=12, bos_token_id=58,
    eos_token_id=59, pad_token_id=59,
)  # fmt: skip


@trial("CLIPTextModel")
def try_clip_text_model(make):
    ids = torch.tensor([[58, 3, 7, 7, 59, 59], [58, 20, 21, 4, 5, 59]])
    model = make(make.config("clip.CLIPTextConfig", **SMALL_TEXT))
    yield "six tokens", model(ids)
    make.strength = 0.3
    weak = make(make.config("clip.CLIPTextConfig", **SMALL_TEXT))
    yield "six tokens, small weights", weak(ids)
    yield "without its last layer (skip=1)", model(ids, skip=1)
    other = make.config("clip.CLIPTextConfig", **SMALL_TEXT | {"hidden_act": "gelu"})
    yield "hidden_act='gelu'", make(other)(ids)
    yield "13 tokens for 12 places", refusal(model, ids[:1].repeat(1, 3)[:, :13])


@trial("ImageTower")
def try_image_tower(make):
    tower = make(image_size=16, width=32)
    yield "two pictures of 16 by 16", tower(numbers(2, 3, 16, 16))
    yield "a picture of 8 by 8", refusal(tower, numbers(1, 3, 8, 8))


@trial("contrastive_loss")
def try_contrastive_loss(make):
    logits = numbers(4, 4, size=3)
    yield "the diagonal is right", make(logits)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    yield "two captions alike", make(logits, same)


# ---- 7 and 10: schedulers ------------------------------------------------------


@trial("make_betas")
def try_make_betas(make):
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        yield schedule, make(schedule, 1000, 0.00085, 0.012)
    yield "an unknown schedule", refusal(make, "wavy", 1000, 0.00085, 0.012)


@trial("rescale_zero_terminal_snr")
def try_rescale(make):
    yield "Stable Diffusion's betas", make(torch.linspace(0.029, 0.11, 1000) ** 2)


def levels(*values):
    return [torch.tensor(value) for value in values]


@trial("posterior_mean")
def try_posterior_mean(make):
    for now, before in ((0.3, 0.5), (0.98, 1.0)):
        given = numbers(2, 3), numbers(2, 3, seed=2), *levels(now, before)
        yield f"ᾱ from {now} to {before}", make(*given)


@trial("posterior_variance")
def try_posterior_variance(make):
    for now, before in ((0.3, 0.5), (0.98, 0.99)):
        yield f"ᾱ from {now} to {before}", make(*levels(now, before))


@trial("split_output")
def try_split_output(make):
    output, x = numbers(2, 3), numbers(2, 3, seed=2)
    for kind in ("epsilon", "sample", "v_prediction"):
        yield kind, make(kind, output, x, *levels(0.6, 0.8))
    given = output, x, *levels(1.0, 2.0, 5**0.5)
    yield "v_prediction with size=√5", make("v_prediction", *given)


@trial("spaced_timesteps")
def try_spaced_timesteps(make):
    for spacing in ("linspace", "leading", "trailing"):
        yield f"{spacing}, n = 10", make(spacing, 10, 1000)
        yield f"{spacing}, n = 7, offset 1", make(spacing, 7, 1000, 1)[:7]
        yield f"{spacing}, n = 1", make(spacing, 1, 1000)
    yield "linspace, the 9 noisiest of 10", make("linspace", 9, 1000, 0, 10)
    yield "leading, the 9 noisiest of 10", make("leading", 9, 1000, 1, 10)


@trial("ddim_step")
def try_ddim_step(make):
    given = numbers(2, 3), numbers(2, 3, seed=2)
    yield "no fresh noise", make(*given, torch.tensor(0.5), 0.0)
    yield "std = 0.3", make(*given, torch.tensor(0.5), torch.tensor(0.3))


SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
RUNS = {
    "nothing but the defaults": {},
    "Stable Diffusion's betas, offset 1": SD | dict(steps_offset=1),
    "v_prediction": SD | dict(prediction_type="v_prediction"),
    "spacing leading, offset 1": SD | dict(timestep_spacing="leading", steps_offset=1),
    "spacing trailing": SD | dict(timestep_spacing="trailing"),
    "spacing linspace": SD | dict(timestep_spacing="linspace"),
}
SAMPLERS = {
    "DDPMScheduler": (dict(clip_sample=False), dict(variance_type="fixed_large")),
    "DDIMScheduler": (dict(clip_sample=False), dict(set_alpha_to_one=False)),
    "PNDMScheduler": (dict(skip_prk_steps=True), dict(set_alpha_to_one=True)),
    "LMSDiscreteScheduler": (dict(use_karras_sigmas=True),),
    "EulerDiscreteScheduler": (dict(use_karras_sigmas=True),),
    "EulerAncestralDiscreteScheduler": (),
    "HeunDiscreteScheduler": (dict(use_karras_sigmas=True), dict(clip_sample=True)),
    "DPMSolverMultistepScheduler": (dict(use_karras_sigmas=True),),
    "UniPCMultistepScheduler": (dict(use_karras_sigmas=True),),
}


def unlike_a_network(x, t):
    """A smooth answer that depends on both."""
    return torch.sin(2 * x + float(t) / 300) - 0.3 * x


def drawn(scheduler, n: int):
    """Where a run of n steps ends, each step with the same dice."""
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(5)
    x = numbers(1, 2, 4, 4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unlike_a_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator)
    return x


@trial(*SAMPLERS)
def try_sampler(make):
    name = make.reference.__name__
    more = {
        ", ".join(f"{key}={value}" for key, value in one.items()): SD | one
        for one in SAMPLERS[name]
    }
    for words, options in (RUNS | more).items():
        scheduler = make(**options)
        scheduler.set_timesteps(10)
        yield f"{words}: the timesteps of 10", scheduler.timesteps
        if words == "nothing but the defaults":
            yield "the spread that a run begins with", float(scheduler.init_noise_sigma)
            x0, noise, t = numbers(2, 3), numbers(2, 3, seed=2), scheduler.timesteps[3]
            yield "add_noise", scheduler.add_noise(x0, noise, t)
        for n in (10, 7):
            yield f"{words}: {n} steps", drawn(make(**options), n)


@trial("karras_sigmas")
def try_karras_sigmas(make):
    yield "14.6 to 0.03 in 10", make(14.6, 0.03, 10)


def history(count: int):
    """σ falling, and as many tensors."""
    return levels(6.0, 4.5, 3.0, 2.0)[-count:], [
        numbers(2, 3, seed=20 + i) for i in range(count)
    ]


@trial("euler_step")
def try_euler_step(make):
    yield "σ from 3 to 2", make(numbers(2, 3), numbers(2, 3, seed=2), *levels(3.0, 2.0))
    yield "σ to 0", make(numbers(2, 3), numbers(2, 3, seed=2), *levels(3.0, 0.0))


@trial("heun_step")
def try_heun_step(make):
    given = [numbers(2, 3, seed=seed) for seed in range(4)]
    yield "σ from 3 to 2", make(*given, *levels(3.0, 2.0))


@trial("lagrange_weights")
def try_lagrange_weights(make):
    for nodes in ([3.0], [4.5, 3.0], [6.0, 4.5, 3.0], [0, 1, 2, 3]):
        yield f"{len(nodes)} nodes", make(nodes, 2.0 if nodes[-1] == 3.0 else 4)


@trial("transfer")
def try_transfer(make):
    given = numbers(2, 3), numbers(2, 3, seed=2)
    yield "ᾱ from 0.3 to 0.5", make(*given, *levels(0.3, 0.5))
    yield "ᾱ from 0.5 back to 0.3", make(*given, *levels(0.5, 0.3))


@trial("plms_noise")
def try_plms_noise(make):
    for count in (1, 2, 3, 4):
        yield f"of {count} noises, the newest last", make(history(count)[1])


@trial("runge_kutta_noise")
def try_runge_kutta_noise(make):
    yield "of four noises", make(history(4)[1])


@trial("dpmpp_2m_step")
def try_dpmpp(make):
    x = numbers(2, 3)
    for count in (1, 2):
        yield f"{count} in the history", make(x, *history(count), torch.tensor(1.5))
    yield "to σ = 0", make(x, *history(2), torch.tensor(0.0))


@trial("unic_step")
def try_unic(make):
    x, x0 = numbers(2, 3), numbers(2, 3, seed=9)
    for count in (1, 2):
        yield f"{count} in the history", make(x, *history(count), torch.tensor(1.5), x0)


@trial("euler_ancestral_step")
def try_euler_ancestral(make):
    given = numbers(2, 3), numbers(2, 3, seed=2), *levels(3.0, 2.0)
    yield "σ from 3 to 2", make(*given, numbers(2, 3, seed=3))


# ---- 8, 9, 11, 12 and D --------------------------------------------------------


@trial("min_snr_weights")
def try_min_snr_weights(make):
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = make_scheduler("ddpm", prediction_type=kind, **SD)
        yield f"{kind}, gamma = 5", make(schedule, 5)
        yield f"{kind}, gamma = 5, power = 0.5", make(schedule, 5, 0.5)
        yield f"{kind}, gamma = 0", make(schedule, 0)


@trial("lean_to_noise")
def try_lean_to_noise(make):
    place = torch.linspace(0, 0.999, 21)
    for share in (0.0, 0.4, 1.0):
        yield f"share = {share:g}", make(place, share)


@trial("guide")
def try_guide(make):
    for scale in (0, 1, 3.0):
        yield f"scale {scale:g}", make(numbers(2, 3), numbers(2, 3, seed=2), scale)


@trial("wilson")
def try_wilson(make):
    for right in (0, 28, 100):
        yield f"{right} of 100", make(right, 100)


@trial("sign_test")
def try_sign_test(make):
    for wins, losses in ((8, 2), (2, 8), (5, 5), (0, 0)):
        first = [True] * wins + [False] * losses + [True, False]
        second = [False] * wins + [True] * losses + [True, False]
        yield f"{wins} to {losses}", make(first, second)


@trial("LowRank")
def try_low_rank(make):
    layer = make(torch.nn.Linear(12, 8), 3, 6)
    yield "a linear layer", layer(numbers(2, 12))
    yield "change()", layer.change()
    conv = make(torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), 2, 1)
    yield "a convolution of stride 2", conv(numbers(2, 4, 6, 6))
    yield "its change()", conv.change()
    yield "rank 0", refusal(make, torch.nn.Linear(12, 8), 0, 1)


@trial("frechet_distance", "kernel_distance")
def try_distance(make):
    first, second = numbers(40, 6), 1.3 * numbers(30, 6, seed=2) + 0.2
    yield "40 and 30 vectors", make(first, second)
    yield "the same vectors, shifted by 1", make(first, first + 1)
    yield "one vector", refusal(make, first, second[:1])


@trial("cubic_kernel")
def try_cubic_kernel(make):
    x, y = numbers(5, 6).double(), numbers(4, 6, seed=2).double()
    yield "5 and 4 vectors", make(x, y)
