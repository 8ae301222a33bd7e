"""From a prompt to a picture

Generated from chapters/09_sampling.ipynb; do not edit.
"""

import math
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from .files import read_weights, save_weights, saving_together

# Names that once stood here, for whoever imports them from here.
from .formats import (  # noqa: F401
    check_checkpoint,
    check_index,
    check_task,
    find_model,
    find_tokenizer,
    model_folders,
    shipped_models,
    to_original,
    told_schedule,
    write_index,
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
    "guide", "StableDiffusion", "require", "check_parts", "check_tokenizer",
    "OUTPUT_TYPES", "check_output_type", "to_pictures", "Pictures", "SourceImage",
    "prepare_prompts", "prepare_seeds", "prepare_guidance", "prepare_eta",
    "prepare_strength", "prepare_size", "check_latents", "picture_size",
    "prepare_pictures", "as_pixels", "SD15_SCHEDULE", "NETWORKS", "find_sizes",
    "find_scheduler",
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
    def encode_prompt(self, prompts: list[str]) -> Float[Tensor, "b n d"]:
        """Texts to the sequence of embeddings that the UNet attends to."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

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
        """Latents, as the UNet sees them, to pictures of one of OUTPUT_TYPES."""
        check_output_type(output_type)
        if output_type == "latent":
            return latents
        require(latents.isfinite().all(), "the latents are not finite: the UNet "
                f"overflowed in {self.dtype}; use float32 or bfloat16")
        z = latents.to(self.device) / self.vae.config.scaling_factor
        return to_pictures(self.without_overflow(self.vae.decode, z), output_type)

    def without_overflow(self, function: Callable, x: Tensor) -> Tensor:
        """`function` of the VAE in its own dtype, or in float32 if that overflows."""
        dtype = next(self.vae.parameters()).dtype
        result = function(x.to(dtype))
        if result.isfinite().all() or dtype.itemsize >= 4:
            return result
        message = f"the VAE overflowed in {dtype}; doing it in float32 instead"
        warnings.warn(message, stacklevel=3)
        try:
            self.vae.float()
            return function(x.float())
        finally:
            self.vae.to(dtype)

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
    ) -> "Pictures":
        """Draw pictures of a prompt, or of a list of prompts.

        Sizes are in pixels and default to what the model was trained on. Picture k
        draws its noise from `seed + k` alone, on the CPU: it is the same in any batch
        and on every device. A list sets the seeds one by one; None picks one.
        `latents` (b,c,h,w) replaces the start noise; `output_type="latent"` returns
        the final ones. `guidance_scale` 1 or less turns guidance off, as in diffusers.
        With `image`, one for all or one for each prompt, that picture is redrawn, by
        `strength` of the steps (0.8); with a `mask` only where it is white, and by all
        of them. `eta` is DDIM's. `callback(step, t, latents)` is called after each
        step. Raises ValueError for what cannot be drawn, before drawing starts.
        """
        check_output_type(output_type)
        each = num_images_per_prompt
        prompts, negatives = prepare_prompts(prompt, negative_prompt, each)
        seeds = prepare_seeds(seed, len(prompts))
        guided = prepare_guidance(guidance_scale, negatives)
        options = prepare_eta(eta, self.scheduler)
        strength = prepare_strength(strength, image, mask, num_inference_steps)
        size = prepare_size(height, width, image, latents, self.vae.config.downscale)
        shape = self.latent_shape(len(prompts), *size)
        check_latents(latents, shape)
        pixels, mask = prepare_pictures(image, mask, size, shape, each)
        self.scheduler.set_timesteps(num_inference_steps)

        texts = self.encode_prompt(negatives + prompts if guided else prompts)
        uncond, context = texts.chunk(2) if guided else (None, texts)
        options["generator"] = [torch.Generator().manual_seed(one) for one in seeds]
        noise = shape, options["generator"], latents
        x, source = self.start(*noise, pixels, mask, strength)
        x = self.denoise(
            x, context, uncond, guidance_scale, source, callback, progress, **options
        )
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
        tensors = {}
        for part in (self.unet, self.vae, self.text_encoder):
            tensors |= to_original(part)
        save_weights({k: t.to(dtype or t.dtype) for k, t in tensors.items()}, path)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, dtype: torch.dtype | None = None,
        variant: str | None = None, revision: str | None = None, ema: bool = True,
        config: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
    ):
        """Open a model: a shipped one by name, a folder, a Hugging Face id, a file.

        `dtype` defaults to float32; `variant` ("fp16") names another copy of the
        weights, `revision` a version on the hub. Of one original file it takes the
        averaged (EMA) UNet if there are two, the other with `ema=False`; `config` is
        then a folder with the sizes, if they are not SD 1.5's or 2.1's. `tokenizer` is
        a folder or id, by default the model's own; for a file, `config`'s or CLIP's.
        Raises FileNotFoundError or ValueError, naming the file and the way out, also
        for what would mean nothing: `ema=False` or `config` of a folder, `variant` or
        `revision` of a file.
        """
        path, one_file = Path(name), Path(name).is_file()
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
            check_index(folder)
        state = check_checkpoint(path) if one_file else {}
        sizes = find_sizes(folder, family(state))
        words = folder if tokenizer is None else tokenizer
        words = Tokenizer.from_pretrained(find_tokenizer(words))
        if not folder and not tokenizer and family(state) == "SD 2.x":
            words.backend.pad_token = "!"  # where CLIP fills up with its end token
        # All that can be seen to be wrong is, before the slow part.
        with about(path):
            check_parts(sizes["vae"], sizes["text_encoder"], words, sizes["unet"])
        scheduler, networks = find_scheduler(path, folder), {}
        for part, network in NETWORKS.items():
            source = path if one_file else path / part
            networks[part] = network.from_pretrained(
                source, dtype, variant, ema=ema, config=sizes[part]
            )
        return cls(tokenizer=words, scheduler=scheduler, **networks)


def require(holds, message: str) -> None:
    """Raise ValueError with this message unless something holds."""
    if not holds:
        raise ValueError(message)


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


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    """Raise ValueError for what is not one of OUTPUT_TYPES."""
    valid = ", ".join(OUTPUT_TYPES)
    require(output_type in OUTPUT_TYPES,
            f"output_type={output_type!r}: choose one of {valid}")


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


def prepare_prompts(prompt, negative, num_images: int) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt for each picture, in order."""
    negative = "" if negative is None else negative
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    several = isinstance(negative, list | tuple)
    negatives = list(negative) if several else [negative] * len(prompts)
    require(prompts, "an empty list of prompts; pass a text or a list of texts")
    for text in (*prompts, *negatives):
        kind = type(text).__name__
        require(isinstance(text, str),
                f"a prompt of type {kind}; pass a text or a list of texts")
    require(len(negatives) == len(prompts),
            f"{len(prompts)} prompts but {len(negatives)} negative prompts; "
            "pass one for all, or one for each")
    require(num_images >= 1, f"num_images_per_prompt={num_images}: expected 1 or more")
    return tuple([one for one in texts for _ in range(num_images)]
                 for texts in (prompts, negatives))


def prepare_seeds(seed: int | list[int] | None, count: int) -> list[int]:
    """One seed for each picture: seed, seed + 1, … or the list that was given."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    several = isinstance(seed, list | tuple)
    seeds = [int(one) for one in (seed if several else range(seed, seed + count))]
    require(len(seeds) == count, f"{len(seeds)} seeds for {count} pictures; "
            "pass one seed, or one for each")
    require(all(-(2**63) <= one < 2**64 for one in seeds),
            f"seed={seed}: expected a number of at most 64 bits")
    return seeds


def prepare_guidance(scale: int | float, negatives: list[str]) -> bool:
    """Whether to guide at all; warns where an argument will have no effect."""
    require(math.isfinite(scale), f"guidance_scale={scale}: expected a number, as 3")
    if scale < 1:
        warnings.warn(
            f"guidance_scale={scale} is treated as 1 (no guidance), as in diffusers; "
            "for the unconditional model pass an empty prompt", stacklevel=4,
        )
    if scale <= 1 and any(negatives):
        warnings.warn(f"negative_prompt has no effect at guidance_scale={scale}; "
                      "raise it above 1", stacklevel=4)
    return scale > 1


def prepare_eta(eta: int | float, scheduler: Scheduler) -> dict[str, int | float]:
    """Options for the scheduler's steps; ValueError for eta where there is none."""
    require(eta == 0 or isinstance(scheduler, DDIMScheduler),
            f"{type(scheduler).__name__} has no eta; use scheduler ddim")
    require(0 <= eta <= 1, f"eta={eta}: expected 0 (deterministic) to 1 (DDPM)")
    return {"eta": eta} if eta else {}


def prepare_strength(strength, image, mask, steps: int) -> int | float:
    """The share of the steps to make: 0.8 by default, and 1 with a mask."""
    for name, given in (("mask", mask), ("strength", strength)):
        require(given is None or image is not None,
                f"{name} without image; pass the picture to start from")
    if strength is None:
        strength = 1.0 if image is None or mask is not None else 0.8
    require(0 < strength <= 1, f"strength={strength}: expected more than 0, up to 1")
    require(int(steps * strength) >= 1 or steps < 1,  # set_timesteps refuses those
            f"strength={strength} of {steps} steps is less than one step; "
            "raise strength or num_inference_steps")
    return strength


def prepare_size(height, width, image, latents, cell: int) -> list[int | None]:
    """Height and width as given, or the picture's, or the latents', or None."""
    default = None, None
    if image is not None:
        default = picture_size(image)
        if isinstance(image, Image.Image | list | tuple):  # arrays are not resized
            default = [max(side // cell, 1) * cell for side in default]
    elif latents is not None and latents.ndim == 4:
        default = [side * cell for side in latents.shape[2:]]
    given = zip((height, width), default)
    return [other if side is None else side for side, other in given]


def check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError for latents of another shape than a call needs."""
    if latents is not None:
        found = tuple(latents.shape)
        require(latents.ndim != 4 or found[0] == shape[0],
                f"prompt batch of {shape[0]} but latents for {found[0]}; "
                "pass one latent per prompt")
        require(found == shape, f"latents of shape {found}, expected {shape}; "
                "leave out height and width, or latents")


def picture_size(image) -> tuple[int, int]:
    """Height and width of the pictures of a call; ValueError for what is none."""
    several = isinstance(image, list | tuple) and len(image) > 0
    if all(isinstance(one, Image.Image) for one in (image if several else [image])):
        first = image[0] if several else image
        return first.height, first.width
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.size:
        return image.shape[-3:-1]
    if isinstance(image, Tensor) and image.ndim in (3, 4) and image.numel():
        return tuple(image.shape[-2:])
    raise ValueError(
        f"a picture of type {type(image).__name__}; pass a PIL image or a list of "
        "them, an array (b, h, w, 3) or a tensor (b, 3, h, w), values from 0 to 1"
    )


def prepare_pictures(image, mask, size: list, shape: tuple, num_images: int):
    """Pixels (b, 3, H, W) and the mask (b, 1, h, w) for a call, or None."""
    count, prompts = shape[0], shape[0] // num_images

    def one_each(pictures: Tensor) -> Tensor:
        require(len(pictures) in (1, prompts, count),
                f"{len(pictures)} pictures or masks for {prompts} prompts; "
                "pass one for all, or one for each prompt")
        return pictures.repeat_interleave(count // len(pictures), dim=0)

    if image is None:
        return None, None
    pixels = one_each(as_pixels(image, *size))
    if mask is not None:
        mask = (as_pixels(mask, *size, mode="L") >= 0.5).float()
        mask = one_each(F.interpolate(mask, size=shape[2:]))
    return pixels, mask


def as_pixels(
    pictures, height: int, width: int, mode: str = "RGB"
) -> Float[Tensor, "b c h w"]:
    """Pictures as a tensor with values in [0, 1]; with mode "L", of one channel.

    PIL images are resized. Raises ValueError for arrays of another size or range.
    """
    shape = len(mode), height, width
    if getattr(pictures, "ndim", None) == 2:  # a mask without an axis of channels
        is_array = isinstance(pictures, np.ndarray)
        pictures = pictures[..., None] if is_array else pictures[None]
    picture_size(pictures)  # refuses what is none
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, list | tuple):
        for one in pictures:
            require(not one.mode.startswith("I"), f"a picture of mode {one.mode}, with "
                    "16 bits or more; convert it to 8 bits, or pass an array with "
                    "values from 0 to 1")
        resized = [one.resize((width, height), Image.LANCZOS) for one in pictures]
        arrays = [np.asarray(one.convert(mode), np.float32) / 255 for one in resized]
        pictures = np.stack(arrays).reshape(-1, height, width, len(mode))
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).movedim(-1, -3)
    pixels = pictures.float().reshape(-1, *pictures.shape[-3:])
    require(pixels.shape[1:] == shape, f"a picture or mask of shape "
            f"{tuple(pixels.shape)}, expected (b, {', '.join(map(str, shape))}); "
            "resize it, or pass PIL images")
    require(pixels.min() >= 0 and pixels.max() <= 1,  # NaN is neither
            f"a picture or mask with values from {pixels.min():g} to "
            f"{pixels.max():g}; expected 0 to 1")
    return pixels


SD15_SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True,
)


NETWORKS = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet}


def find_sizes(folder: Path | None, family: str) -> dict:
    """The configs of the three networks: a folder's, or else those of a family."""
    if folder:
        return {part: one.find_config(folder / part) for part, one in NETWORKS.items()}
    return {part: one.config_class.of(family) for part, one in NETWORKS.items()}


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
