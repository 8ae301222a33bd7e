"""From a prompt to a picture

Generated from chapters/09_sampling.ipynb; do not edit.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from .files import (
    as_path,
    read_weights,
    save_weights,
    saving_together,
    upload,
)

# Names that once stood here, for whoever imports them from here.
from .formats import (  # noqa: F401
    check_checkpoint,
    check_index,
    check_task,
    find_model,
    find_part,
    find_tokenizer,
    model_folders,
    shipped_models,
    to_original,
    told_schedule,
    write_index,
)
from .inputs import (
    as_pixels,  # noqa: F401
    check_latents,
    check_output_type,
    check_outputs,
    number,
    prepare_eta,
    prepare_guidance,
    prepare_pictures,
    prepare_prompts,
    prepare_seeds,
    prepare_size,
    prepare_skip,
    prepare_strength,
    require,
)
from .scheduler_files import UnsupportedScheduler, load_scheduler
from .schedulers import (
    DDIMScheduler,
    Scheduler,
    make_scheduler,
    noise_like,
    scheduler_class,
)
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL, VAEConfig
from .weights import about, family, refuse_options

__all__ = [
    "guide", "StableDiffusion", "check_parts", "check_tokenizer", "to_pictures",
    "Pictures", "SourceImage", "SD15_SCHEDULE", "NETWORKS", "find_networks",
    "find_words", "find_scheduler",
]


def guide(
    uncond: Float[Tensor, "*shape"], cond: Float[Tensor, "*shape"], scale: int | float
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance (Ho and Salimans, 2022): walk from uncond past cond.

    0 gives uncond, 1 gives cond, more exaggerates what the prompt changes.
    """
    return uncond + scale * (cond - uncond)


class StableDiffusion:
    """Text to picture with latent diffusion (Rombach et al., 2022).

    Its parts are attributes: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.
    Raises ValueError for parts that were not trained together.
    """

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: Tokenizer,
        unet: UNet, scheduler: Scheduler,
    ):
        check_parts(vae.config, text_encoder.config, tokenizer, unet.config)
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler

    @property
    def scheduler(self) -> Scheduler:
        """The sampler; assign a name ("ddim") or a scheduler object."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, new: str | Scheduler):
        if isinstance(new, str):  # latents have no range to be clipped to
            options = {"clip_sample": False} | self._scheduler.options
            new = scheduler_class(new).from_options(options, foreign=True)
        kind = type(new).__name__
        require(isinstance(new, Scheduler), f"a scheduler of type {kind}; give a name, "
                "such as ddim, or one of sdbook.schedulers")
        self._scheduler = new

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(self, device=None, dtype: torch.dtype | None = None):
        """Move the models to a device, a dtype or both; returns itself."""
        for model in (self.vae, self.text_encoder, self.unet):
            model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode_prompt(
        self, prompts: list[str], clip_skip: int = 0
    ) -> Float[Tensor, "b n d"]:
        """Texts to the sequence of embeddings that the UNet attends to."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device), clip_skip)

    @torch.no_grad()
    def predict(
        self, latents: Float[Tensor, "b c h w"], t: int | float,
        context: Float[Tensor, "b n d"], uncond: Float[Tensor, "b n d"] | None = None,
        guidance_scale: int | float = 1.0,
    ) -> Float[Tensor, "b c h w"]:
        """The UNet's answer at timestep t, guided away from `uncond` if given."""
        x = self.scheduler.scale_model_input(latents, t).to(self.dtype)
        if uncond is None:
            return self.unet(x, t, context).to(latents.dtype)
        both = self.unet(torch.cat([x, x]), t, torch.cat([uncond, context]))
        return guide(*both.to(latents.dtype).chunk(2), guidance_scale)

    @torch.no_grad()
    def denoise(
        self, x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b n d"], uncond: Float[Tensor, "b n d"] | None = None,
        guidance_scale: int | float = 1.0, source: "SourceImage | None" = None,
        callback: Callable | None = None, progress: bool = True, **options,
    ) -> Float[Tensor, "b c h w"]:
        """From noise to latents, over all of the scheduler's timesteps.

        `options` are the scheduler's for a step: `generator`, and DDIM's `eta`.
        """
        timesteps = self.scheduler.timesteps.tolist()
        for i, t in enumerate(tqdm(timesteps, disable=not progress)):
            output = self.predict(x, t, context, uncond, guidance_scale)
            x = self.scheduler.step(output, t, x, **options)
            if source is not None:
                x = source.put_back(x, self.scheduler, *timesteps[i + 1 : i + 2])
            if callback is not None:
                callback(i, t, x)
        return x

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"], output_type: str = "pil"):
        """Latents, as the UNet sees them, to pictures of an output type.

        Raises ValueError for what overflowed, in the UNet or in the VAE.
        """
        check_output_type(output_type)
        require(latents.isfinite().all(), "the latents are not finite: the UNet "
                f"overflowed in {self.dtype}; use float32 or bfloat16, a smaller "
                "guidance_scale, or weights without NaN")
        if output_type == "latent":
            return latents
        z = latents.to(self.device) / self.vae.config.scaling_factor
        return to_pictures(self.without_overflow(self.vae.decode, z), output_type)

    def without_overflow(self, function: Callable, x: Tensor) -> Tensor:
        """`function` of the VAE in its own dtype, or in float32 if that overflows."""
        dtype = next(self.vae.parameters()).dtype
        result = function(x.to(dtype))
        if not result.isfinite().all() and dtype.itemsize < 4:
            message = f"the VAE overflowed in {dtype}; doing it in float32 instead"
            warnings.warn(message, stacklevel=3)
            try:
                self.vae.float()
                result = function(x.float())
            finally:
                self.vae.to(dtype)
        require(result.isfinite().all(), "the VAE overflowed in float32, too; give "
                "another (vae=) for damaged weights, or a smaller guidance_scale")
        return result

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "b c h w"], generators=None
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Pixels in [0, 1] to latents as the UNet sees them, drawn by the VAE."""

        def parameters(x):
            posterior = self.vae.encode(x)
            return torch.cat([posterior.mean, posterior.std], dim=1)

        x = (2 * pixels - 1).to(self.device)
        mean, std = self.without_overflow(parameters, x).float().chunk(2, dim=1)
        drawn = mean + std * noise_like(mean, generators)
        return drawn * self.vae.config.scaling_factor

    @torch.no_grad()
    def start(
        self, shape: tuple[int, ...], generators: list[torch.Generator],
        latents: Tensor | None = None, pixels: Tensor | None = None,
        mask: Tensor | None = None, strength: int | float = 1.0,
    ) -> "tuple[Tensor, SourceImage | None]":
        """What the first step begins with, and the picture it was made of, if any."""
        scheduler = self.scheduler
        x0 = None if pixels is None else self.encode(pixels, generators)
        if latents is None:
            latents = noise_like(torch.empty(shape), generators)
        if mask is not None:
            noise_like(torch.empty(shape), generators)  # the third draw
            mask = mask.to(self.device)
        noise = latents.to(self.device, torch.promote_types(self.dtype, torch.float32))
        source = None if x0 is None else SourceImage(x0, noise, mask)
        if source is None or (mask is not None and strength == 1):
            return noise * scheduler.init_noise_sigma, source
        steps = scheduler.num_inference_steps
        scheduler.skip(steps - int(steps * strength))
        return scheduler.add_noise(x0, noise, scheduler.timesteps[:1]), source

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = "",
        height: int | None = None, width: int | None = None,
        num_inference_steps: int = 25, guidance_scale: int | float = 3.0,
        num_images_per_prompt: int = 1, seed: int | list[int] | None = 0,
        latents: Float[Tensor, "b c h w"] | None = None, output_type: str = "pil",
        *, image=None, strength: int | float | None = None, mask=None,
        eta: int | float = 0.0, callback: Callable | None = None, progress: bool = True,
        clip_skip: int | None = 0,
    ) -> "Pictures":
        """Draw pictures of a prompt, or of a list of prompts.

        Sizes are in pixels and default to what the model was trained on. Picture k
        draws its noise from `seed + k` alone, on the CPU: it is the same in any batch
        and on every device. A list sets the seeds one by one; None picks one.
        `latents` (b,c,h,w) replaces the start noise; `output_type="latent"` returns
        the final ones. `guidance_scale` 1 or less turns guidance off, as in diffusers.
        With `image`, one for all or one for each prompt, that picture is redrawn, by
        `strength` of the steps (0.8); with a `mask` only where it is white, and by all
        of them. Transparency is white, and no mask. `eta` is DDIM's. `clip_skip` is for
        the prompt alone, as in diffusers. `callback(step, t, latents)` is called after
        each step. Raises ValueError for what cannot be drawn, before drawing starts.
        """
        check_outputs(output_type, callback)
        steps = number("num_inference_steps", num_inference_steps, int)
        each = number("num_images_per_prompt", num_images_per_prompt, int, 1, 10_000)
        prompts, negatives = prepare_prompts(prompt, negative_prompt, each)
        seeds = prepare_seeds(seed, len(prompts))
        skip = prepare_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        scale = prepare_guidance(guidance_scale, negatives)
        options = prepare_eta(eta, self.scheduler)
        strength = prepare_strength(strength, image, mask, steps)
        size = prepare_size(height, width, image, latents, self.vae.config.downscale)
        shape = self.latent_shape(len(prompts), *size)
        check_latents(latents, shape)
        pixels, mask = prepare_pictures(image, mask, size, shape, each)
        self.scheduler.set_timesteps(steps)

        texts = self.encode_prompt(negatives + prompts if scale > 1 else prompts)
        uncond, context = texts.chunk(2) if scale > 1 else (None, texts)
        if skip:
            context = self.encode_prompt(prompts, skip)
        dice = [torch.Generator().manual_seed(one) for one in seeds]
        x, source = self.start(shape, dice, latents, pixels, mask, strength)
        look_on = source, callback, progress
        x = self.denoise(x, context, uncond, scale, *look_on, generator=dice, **options)
        return Pictures(self.decode(x, output_type), seeds)

    def latent_shape(
        self, count: int = 1, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(b, c, h, w) of the latents of pictures; ValueError for impossible sizes."""
        cell, sides = self.vae.config.downscale, self.unet.config.sample_size
        sides = list(sides) if isinstance(sides, tuple) else [sides, sides]
        for axis, (name, side) in enumerate((("height", height), ("width", width))):
            if side is not None:
                lower = max(side // cell, 1) * cell
                require(side >= cell and side % cell == 0,
                        f"{name}={side}: this model draws multiples of {cell} pixels; "
                        f"try {lower} or {lower + cell}")
                sides[axis] = side // cell
        return count, self.unet.config.in_channels, *sides

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: torch.dtype | None = None
    ) -> None:
        """Write all parts; diffusers.StableDiffusionPipeline opens the folder."""
        with saving_together(folder) as side:  # never a new UNet beside an old VAE
            for part in ("vae", "text_encoder", "unet"):
                getattr(self, part).save_pretrained(side / part, dtype)
            self.tokenizer.save_pretrained(side / "tokenizer")
            self.scheduler.save_pretrained(side / "scheduler")
            write_index(side, self.scheduler.name)

    def save_original(
        self, path: str | os.PathLike, dtype: torch.dtype | None = None
    ) -> None:
        """Write one safetensors file with the names of the original Stable Diffusion.

        Every weight is in it, bit for bit (or as `dtype`); the sizes, the tokenizer and
        the scheduler are not. `from_pretrained(path)` reads it, and so do others.
        """
        path, tensors = as_path(path, "what to save"), {}
        for part in (self.unet, self.vae, self.text_encoder):
            tensors |= to_original(part)
        save_weights({k: t.to(dtype or t.dtype) for k, t in tensors.items()}, path)

    def push_to_hub(
        self, name: str, private: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Save to a Hugging Face repository; returns its address.

        `name` is owner/model, made if there is none. First log in: `hf auth login`.
        Raises OSError, with the reason, where that fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return upload(folder, name, private)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, dtype: torch.dtype | None = None,
        variant: str | None = None, revision: str | None = None, ema: bool = True,
        config: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
    ):
        """Open a model: a shipped one by name, a folder, a Hugging Face id, a file.

        `dtype` defaults to float32; `variant` ("fp16") names another copy of the
        weights, `revision` a version on the hub. Of one original file it takes the
        averaged (EMA) UNet if there are two, the other with `ema=False`; `config` is
        then a folder with the sizes, if they are not SD 1.5's or 2.1's. `tokenizer` is
        a folder or id, by default the model's own; for a file, `config`'s or CLIP's.
        `vae` is a folder, a file or an id, in place of the model's own. Raises
        FileNotFoundError or ValueError, naming the file and the way out, also for what
        would mean nothing: `ema=False` or `config` of a folder, `variant` of a file.
        """
        require(isinstance(dtype, torch.dtype | None),
                f"dtype={dtype!r}: expected one of torch, such as torch.float16")
        path, given = as_path(name, "a model"), () if vae is None else ("vae",)
        one_file = path.is_file()
        if one_file:
            unused = dict(variant=variant, revision=revision)
            refuse_options(name, "a folder or a hub id", **unused)
            folder = None if config is None else find_model(config, weights=False)
            require(not folder or folder.is_dir(), f"config={str(config)!r} is a file, "
                    "but must be a folder with the sizes, in diffusers' layout")
        else:
            unused = dict(ema=None if ema else False, config=config)
            refuse_options(name, "a single file", **unused)
            folder = path = find_model(name, revision, variant)
            check_index(folder, given)
        kind = family(check_checkpoint(path, given) if one_file else {})
        paths, sizes = find_networks(path, folder, kind, vae)
        words = find_words(folder if tokenizer is None else tokenizer, kind)
        # All that can be seen to be wrong is, before the slow part.
        with about(path):
            check_parts(sizes["vae"], sizes["text_encoder"], words, sizes["unet"])
        scheduler, networks = find_scheduler(path, folder), {}
        for part, network in NETWORKS.items():
            copy = None if part in given else variant
            networks[part] = network.from_pretrained(
                paths[part], dtype, copy, ema=ema, config=sizes[part]
            )
        return cls(tokenizer=words, scheduler=scheduler, **networks)


def check_parts(
    vae: VAEConfig, text: CLIPTextConfig, tokenizer: Tokenizer, unet: UNetConfig
) -> None:
    """Raise ValueError for parts that were not trained together."""
    check_task(unet.in_channels, vae.latent_channels, "this")
    for name, wanted, other, given in (
        ("in_channels", unet.in_channels,
         "the VAE's latent_channels", vae.latent_channels),
        ("cross_attention_dim", unet.cross_attention_dim,
         "the text encoder's hidden_size", text.hidden_size),
    ):
        require(wanted == given, f"the UNet's {name} is {wanted} but {other} is "
                f"{given}; these parts were not trained together")
    check_tokenizer(tokenizer, text)


def check_tokenizer(tokenizer: Tokenizer, config: CLIPTextConfig) -> None:
    """Raise ValueError for a tokenizer with more tokens or places than the model.

    One whose files name no length takes the model's places.
    """
    tokens, places = config.vocab_size, config.max_position_embeddings
    tokenizer.take_length(places)
    require(
        len(tokenizer) <= tokens and tokenizer.max_length <= places,
        f"the tokenizer has {len(tokenizer)} tokens and rows of "
        f"{tokenizer.max_length}, but the text encoder knows {tokens} tokens and "
        f"{places} places; use the tokenizer it was trained with",
    )


def to_pictures(pixels: Float[Tensor, "b c h w"], output_type: str):
    """Pixels in [-1, 1] as PIL images, NumPy (b,h,w,c) or a tensor, both in [0, 1]."""
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(one) for one in (array * 255).round().astype(np.uint8)]


@dataclass
class Pictures:
    """What a call returns: the pictures, and for each the seed that made it."""

    images: list[Image.Image] | np.ndarray | Tensor
    seeds: list[int]


@dataclass
class SourceImage:
    """The picture that a call starts from, as latents, and the noise on it.

    `mask` (b, 1, h, w) is 1 where the picture may change; None: everywhere.
    """

    x0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    mask: Float[Tensor, "b 1 h w"] | None = None

    def put_back(
        self, x: Tensor, scheduler: Scheduler, t: int | float | None = None
    ) -> Float[Tensor, "b c h w"]:
        """x, with the rest of the picture as it is at timestep t (None: at the end)."""
        if self.mask is None:
            return x
        known = self.x0
        if t is not None:
            known = scheduler.add_noise(self.x0, self.noise, t)
        return self.mask * x + (1 - self.mask) * known


SD15_SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True,
)


NETWORKS = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet}


def find_networks(
    model: Path, folder: Path | None, family: str, vae=None
) -> tuple[dict[str, Path], dict]:
    """Where the three networks are, and their configs: a folder's, or a family's."""
    paths = {part: model / part if model.is_dir() else model for part in NETWORKS}
    if vae is not None:
        paths["vae"] = find_part(vae, "vae")
    sizes = {}
    for part, network in NETWORKS.items():
        if part == "vae" and vae is not None:
            sizes[part] = network.find_config(paths[part])
        elif folder:
            sizes[part] = network.find_config(folder / part)
        else:
            sizes[part] = network.config_class.of(family)
    return paths, sizes


def find_words(source: str | os.PathLike | None, family: str) -> Tokenizer:
    """The tokenizer of a folder or an id, or else CLIP's, as a family fills it up."""
    words = Tokenizer.from_pretrained(find_tokenizer(source))
    if source is None and family == "SD 2.x":
        words.backend.pad_token = "!"  # where CLIP fills up with its end token
    return words


def find_scheduler(model: Path, folder: Path | None = None) -> Scheduler:
    """The scheduler of a model's folder, or of one file: `folder`'s or SD 1.5's.

    What a file tells of its training goes first; DDIM if that scheduler cannot.
    """
    folder = model if model.is_dir() else folder
    told = {} if model.is_dir() else told_schedule(model, read_weights(model))
    scheduler = make_scheduler("pndm", **SD15_SCHEDULE)
    if folder:
        scheduler = load_scheduler(folder / "scheduler")
    if not told:
        return scheduler
    options = scheduler.options | told
    if isinstance(scheduler, UnsupportedScheduler):
        return UnsupportedScheduler(scheduler.name, options, scheduler.reason)
    try:
        return scheduler.from_options(options, foreign=True)
    except ValueError:  # PNDM knows no schedule that ends in pure noise
        return DDIMScheduler.from_options(options, foreign=True)
