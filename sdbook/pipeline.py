"""From a prompt to a picture

Generated from chapters/09_sampling.ipynb; do not edit.
"""

import importlib.resources
import inspect
import math
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from .schedulers import (
    DDIMScheduler,
    Scheduler,
    change_scheduler,
    make_scheduler,
    noise_like,
    scheduler_class,
)
from .unet import UNet
from .vae import AutoencoderKL
from .weights import (
    NAMINGS,
    WeightsError,
    download,
    family,
    is_for_training,
    is_hub_id,
    read_json,
    read_weights,
    save_weights,
    to_original,
    write_json,
)

__all__ = [
    "model_folders",
    "shipped_models",
    "PARTS",
    "find_model",
    "guide",
    "OUTPUT_TYPES",
    "to_pictures",
    "Pictures",
    "check_tokenizer",
    "Components",
    "load_scheduler",
    "CLIP",
    "find_tokenizer",
    "check_checkpoint",
    "open_checkpoint",
    "StoredPipeline",
    "SamplingSteps",
    "check_choice",
    "prepare_prompts",
    "check_latents",
    "prepare_seeds",
    "prepare_guidance",
    "prepare_eta",
    "SizedPipeline",
    "StableDiffusion",
]


def model_folders() -> list[Path]:
    """Where shipped models may lie: $SDBOOK_MODELS, the package, the book's data/."""
    package = Path(str(importlib.resources.files("sdbook")))
    folders = [package / "models", package.parent / "data" / "models"]
    if os.environ.get("SDBOOK_MODELS"):
        folders.insert(0, Path(os.environ["SDBOOK_MODELS"]))
    return folders


def shipped_models() -> dict[str, Path]:
    """The models that need no download, by name."""
    found = {}
    for folder in model_folders():
        for index in sorted(folder.glob("*/model_index.json")):
            found.setdefault(index.parent.name, index.parent)
    return found


PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "scheduler": ("diffusers", None),
}


def find_model(
    name: str | os.PathLike, revision: str | None = None, variant: str | None = None
) -> Path:
    """Where a model is: a folder, a file, a shipped model's name, a Hugging Face id.

    Raises FileNotFoundError, saying what there is, when it is none of them.
    """
    shipped, path = shipped_models(), Path(name)
    known = f"shipped with the book: {', '.join(shipped) or 'none found'}"
    if (path / "model_index.json").is_file() or path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{path} has no model_index.json (it has: {found}); give the folder that "
            f"save_pretrained wrote, or a name ({known})"
        )
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"there is no model {str(name)!r}; give a folder, an id like "
            f"owner/model, or a name ({known})"
        )
    return download(str(name), tuple(PARTS), revision, variant)


def guide(
    uncond: Float[Tensor, "*shape"], cond: Float[Tensor, "*shape"], scale: int | float
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance (Ho and Salimans, 2022): walk from uncond past cond.

    0 gives uncond, 1 gives cond, more exaggerates what the prompt changes.
    """
    return uncond + scale * (cond - uncond)


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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


def check_tokenizer(tokenizer: Tokenizer, config: CLIPTextConfig) -> None:
    """Raise ValueError for a tokenizer with more tokens or places than the model."""
    places = config.max_position_embeddings
    if len(tokenizer) > config.vocab_size or tokenizer.max_length > places:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and rows of "
            f"{tokenizer.max_length}, but the text encoder knows {config.vocab_size} "
            f"tokens and {places} places; use the tokenizer it was trained with"
        )


class Components:
    """The parts of a pipeline, and where they are."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: Tokenizer,
        unet: UNet,
        scheduler: Scheduler,
    ):
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        for name, wanted, other, given in (
            ("in_channels", unet.config.in_channels,
             "the VAE's latent_channels", vae.config.latent_channels),
            ("cross_attention_dim", unet.config.cross_attention_dim,
             "the text encoder's hidden_size", text_encoder.config.hidden_size),
        ):
            if wanted != given:
                raise ValueError(
                    f"the UNet's {name} is {wanted} but {other} is {given}; "
                    "these parts were not trained together"
                )
        check_tokenizer(tokenizer, text_encoder.config)

    @property
    def scheduler(self) -> Scheduler:
        """The sampler; assign a name ("ddim") or a scheduler object."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, new: str | Scheduler):
        if isinstance(new, str):
            new = change_scheduler(self._scheduler, new)
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


def load_scheduler(folder: Path) -> Scheduler:
    """The scheduler of a model folder; DDIM, with a warning, for one we lack."""
    try:
        return Scheduler.from_pretrained(folder)
    except ValueError:
        name = read_json(folder / "scheduler_config.json").get("_class_name")
        try:
            scheduler_class(str(name))
        except ValueError as missing:
            warnings.warn(f"{folder}: {missing}; using ddim", stacklevel=3)
            return DDIMScheduler.from_pretrained(folder)
        raise


CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer all SD 1.x models share


def find_tokenizer(source: str | os.PathLike | None) -> Path:
    """The folder of a tokenizer: one itself, a model's, or a hub id (CLIP's)."""
    path = Path(source or CLIP)
    if is_hub_id(path):
        try:
            path = download(str(path), weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"a single file holds no tokenizer, and {error} as tokenizer="
            ) from error
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def check_checkpoint(path: Path) -> None:
    """Raise WeightsError unless a file has all three networks and nothing else."""
    state_dict = read_weights(path)
    prefixes = {name: naming[0][0] for name, naming in NAMINGS.items()}
    problems = [
        f"no {name} (its keys begin with {prefix})"
        for name, prefix in prefixes.items()
        if not any(key.startswith(prefix) for key in state_dict)
    ]
    known = tuple(prefixes.values())
    unknown = [key for key in state_dict if not key.startswith(known)]
    unknown = [key for key in unknown if not is_for_training(key)]
    if unknown:
        rest = ", …" * (len(unknown) > 20)
        problems += [f"{len(unknown)} unexpected ({', '.join(unknown[:20])}{rest})"]
    if problems:
        raise WeightsError(
            f"{path} is not one whole Stable Diffusion 1.x checkpoint: "
            f"{'; '.join(problems)}. By its names {family(state_dict)}. Give a "
            "checkpoint of SD 1.x, or a folder in the diffusers layout"
        )


def open_checkpoint(path: Path, dtype, ema: bool, config, tokenizer) -> tuple:
    """The five parts of a pipeline from one original file, .safetensors or .ckpt."""
    check_checkpoint(path)
    if config is not None and is_hub_id(config):
        config = download(str(config), tuple(PARTS), weights=False)
    folder = None if config is None else find_model(config)
    words = find_tokenizer(tokenizer or folder)  # before the slow part
    networks = []
    for name, kind in (
        ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel), ("unet", UNet),
    ):
        sizes = kind.find_config(folder / name) if folder else kind.config_class()
        networks.append(kind.from_pretrained(path, dtype, ema=ema, config=sizes))
    vae, text_encoder, unet = networks
    if folder:
        scheduler = load_scheduler(folder / "scheduler")
    else:
        scheduler = make_scheduler(
            "pndm", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True,
        )
    return vae, text_encoder, Tokenizer.from_pretrained(words), unet, scheduler


class StoredPipeline(Components):
    """A pipeline that lives in a folder with diffusers' layout."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        ema: bool = True,
        config: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
    ):
        """Open a model: a shipped one by name, a folder, a Hugging Face id, a file.

        `dtype` defaults to float32; `variant` ("fp16") names another copy of the
        weights, `revision` a version on the hub. Of one original file it takes the
        averaged (EMA) UNet if there are two, the other with `ema=False`; `config`
        is then a folder with the sizes, if they are not SD 1.5's, and `tokenizer`
        a folder or id, by default `config`'s or CLIP's. Raises FileNotFoundError or
        ValueError, naming the file and the way out.
        """
        folder = find_model(name, revision, variant)
        if folder.is_file():
            return cls(*open_checkpoint(folder, dtype, ema, config, tokenizer))
        path = folder / "model_index.json"
        index = read_json(path)
        for part, (_, expected) in PARTS.items():
            found = (index.get(part) or [None, None])[1]
            known = (expected, f"{expected}Fast") if expected else (found,)
            if found is None or found not in known:
                raise WeightsError(
                    f"{path} ({index.get('_class_name')}) has {part} = {found}, "
                    f"expected {expected or 'a scheduler'}; "
                    "give a Stable Diffusion 1.x model"
                )
        return cls(
            AutoencoderKL.from_pretrained(folder / "vae", dtype, variant),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype, variant),
            Tokenizer.from_pretrained(tokenizer or folder / "tokenizer"),
            UNet.from_pretrained(folder / "unet", dtype, variant),
            load_scheduler(folder / "scheduler"),
        )

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: torch.dtype | None = None
    ) -> None:
        """Write all parts; diffusers.StableDiffusionPipeline opens the folder."""
        folder = Path(folder)
        for part in ("vae", "text_encoder", "unet"):
            getattr(self, part).save_pretrained(folder / part, dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {part: list(names) for part, names in PARTS.items()}
        index["scheduler"][1] = type(self.scheduler).__name__
        unused = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {part: [None, None] for part in unused}
        index |= {"_class_name": "StableDiffusionPipeline"}
        index |= {"requires_safety_checker": False}
        write_json(index, folder / "model_index.json")

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


class SamplingSteps(StoredPipeline):
    """What happens between prompt and picture, one method for each step."""

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Float[Tensor, "b n d"]:
        """Texts to the sequence of embeddings that the UNet attends to."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def predict(
        self,
        latents: Float[Tensor, "b c h w"],
        t: int | float,
        context: Float[Tensor, "b n d"],
        uncond: Float[Tensor, "b n d"] | None = None,
        guidance_scale: int | float = 1.0,
    ) -> Float[Tensor, "b c h w"]:
        """The UNet's answer at timestep t, guided away from `uncond` if given."""
        x = self.scheduler.scale_model_input(latents, t).to(self.dtype)
        if uncond is None:
            return self.unet(x, t, context).to(latents.dtype)
        both = self.unet(torch.cat([x, x]), t, torch.cat([uncond, context]))
        return guide(*both.to(latents.dtype).chunk(2), guidance_scale)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"], output_type: str = "pil"):
        """Latents, as the UNet sees them, to pictures ("pil", "np" or "pt")."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return latents
        if not latents.isfinite().all():
            raise ValueError(
                f"the latents are not finite: the UNet overflowed in {self.dtype}; "
                "use float32 or bfloat16"
            )
        dtype = next(self.vae.parameters()).dtype
        z = latents.to(self.device) / self.vae.config.scaling_factor
        pixels = self.vae.decode(z.to(dtype))
        if not pixels.isfinite().all() and dtype.itemsize < 4:
            warnings.warn(
                f"the VAE's decoder overflowed in {dtype}; decoding in float32 instead",
                stacklevel=2,
            )
            pixels = self.vae.float().decode(z.float())
            self.vae.to(dtype)
        return to_pictures(pixels, output_type)


def check_choice(name: str, value, valid: tuple) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(valid)}")


def prepare_prompts(prompt, negative, num_images: int) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt for each picture, in order."""
    negative = "" if negative is None else negative
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    one_each = isinstance(negative, list | tuple)
    negatives = list(negative) if one_each else [negative] * len(prompts)
    if not prompts:
        raise ValueError("an empty list of prompts; pass a text or a list of texts")
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"a prompt of type {kind}; pass a text or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts but {len(negatives)} negative prompts; "
            "pass one for all, or one for each"
        )
    if num_images < 1:
        raise ValueError(f"num_images_per_prompt={num_images}: expected 1 or more")
    repeat = [k for k in range(len(prompts)) for _ in range(num_images)]
    return [prompts[k] for k in repeat], [negatives[k] for k in repeat]


def check_latents(latents: Tensor, count: int) -> None:
    if latents.ndim != 4:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}: expected four axes, "
            "(pictures, channels, height, width)"
        )
    if len(latents) != count:
        raise ValueError(
            f"prompt batch of {count} but latents for {len(latents)}; "
            "pass one latent per prompt"
        )


def prepare_seeds(seed: int | list[int] | None, count: int) -> list[int]:
    """One seed for each picture: seed, seed + 1, … or the list that was given."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    one_each = isinstance(seed, list | tuple)
    seeds = [int(one) for one in seed] if one_each else range(seed, seed + count)
    if len(seeds) != count:
        raise ValueError(
            f"{len(seeds)} seeds for {count} pictures; pass one seed, or one for each"
        )
    if not all(-(2**63) <= one < 2**64 for one in seeds):
        raise ValueError(f"seed={seed}: expected a number of at most 64 bits")
    return list(seeds)


def prepare_guidance(scale: int | float, negatives: list[str]) -> bool:
    """Whether to guide at all; warns where an argument will have no effect."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale}: expected a number such as 3")
    if scale < 1:
        warnings.warn(
            f"guidance_scale={scale} is treated as 1 (no guidance), as in diffusers; "
            "for the unconditional model pass an empty prompt",
            stacklevel=4,
        )
    if scale <= 1 and any(negatives):
        warnings.warn(
            f"negative_prompt has no effect at guidance_scale={scale}; "
            "raise it above 1",
            stacklevel=4,
        )
    return scale > 1


def prepare_eta(scheduler: Scheduler, eta: int | float) -> dict[str, int | float]:
    """The scheduler's options for eta; ValueError if it has none."""
    if eta == 0:
        return {}
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"{type(scheduler).__name__} has no eta; use scheduler ddim")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: expected 0 (deterministic) to 1 (DDPM)")
    return {"eta": eta}


class SizedPipeline(SamplingSteps):
    """A pipeline that knows which sizes it can draw."""

    def latent_shape(
        self,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
    ) -> tuple[int, int, int, int]:
        """(b, c, h, w) of the latents for a call; ValueError if they cannot be."""
        factor, unet = self.vae.config.downscale, self.unet.config
        step = factor * 2 ** (len(unet.block_out_channels) - 1)
        if latents is not None:
            check_latents(latents, count)
            default = latents.shape[2:]
        else:
            default = unet.sample_size
            default = default if isinstance(default, tuple) else (default, default)
        sides = [
            cells * factor if given is None else given
            for given, cells in zip((height, width), default)
        ]
        for name, side in zip(("height", "width"), sides):
            if side < step or side % step:
                lower = max(side // step, 1) * step
                raise ValueError(
                    f"{name}={side}: this model draws multiples of {step} pixels; "
                    f"try {lower} or {lower + step}"
                )
        shape = count, unet.in_channels, *(side // factor for side in sides)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}, expected {shape} for "
                f"{sides[0]}×{sides[1]} pixels; "
                "leave out height and width, or latents"
            )
        return shape


class StableDiffusion(SizedPipeline):
    """Text to picture with latent diffusion (Rombach et al., 2022).

    Made of its parts, each an attribute: `vae`, `text_encoder`, `tokenizer`, `unet`
    and `scheduler`; `pipe.scheduler = "ddim"` changes the sampler and keeps the
    model's noise schedule.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: int | float = 3.0,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = 0,
        latents: Float[Tensor, "b c h w"] | None = None,
        output_type: str = "pil",
        *,
        eta: int | float = 0.0,
        callback=None,
        progress: bool = True,
    ) -> Pictures:
        """Draw pictures of a prompt, or of a list of prompts.

        Sizes are in pixels and default to what the model was trained on. Picture k of
        the call draws its noise from `seed + k` alone, on the CPU: it is the same in
        a batch of one (`seed=k`), in a batch of ten, and on every device. A list of
        seeds sets them one by one; None picks one. `latents` (b,c,h,w) replaces the
        start noise; `output_type="latent"` returns the final ones. `eta` is DDIM's.

        `guidance_scale` 1 turns guidance off and halves the work. Below 1 it is off
        too, as in diffusers, where the formula would fade the prompt out.
        `callback(step, t, latents)` is called after each step.

        Raises ValueError for anything that cannot be drawn, before drawing starts.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        prompts, negatives = prepare_prompts(
            prompt, negative_prompt, num_images_per_prompt
        )
        shape = self.latent_shape(len(prompts), height, width, latents)
        seeds = prepare_seeds(seed, len(prompts))
        guided = prepare_guidance(guidance_scale, negatives)
        options = prepare_eta(self.scheduler, eta)
        self.scheduler.set_timesteps(num_inference_steps)

        context = self.encode_prompt(prompts)
        uncond = self.encode_prompt(negatives) if guided else None
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        if latents is None:
            latents = noise_like(torch.empty(shape), generators)
        # 25 small steps in half precision would add up 25 roundings.
        x = latents.to(self.device, torch.promote_types(self.dtype, torch.float32))
        x = x * self.scheduler.init_noise_sigma
        timesteps = self.scheduler.timesteps.tolist()
        for step, t in enumerate(tqdm(timesteps, disable=not progress)):
            output = self.predict(x, t, context, uncond, guidance_scale)
            x = self.scheduler.step(output, t, x, generator=generators, **options)
            if callback is not None:
                callback(step, t, x)
        return Pictures(self.decode(x, output_type), seeds)
