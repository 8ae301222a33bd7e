"""What a call of the pipeline may say: words, numbers, sizes, pictures to start from.

Each function here checks some arguments of `StableDiffusion.__call__` (chapter 9), and
returns them ready for use or raises ValueError: what was given, what was expected, what
to do. So mistakes are found before the first second of computing. Written by hand.
"""

import math
import random
import warnings
from reprlib import repr as shorten

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from .counts import counted
from .images import to_rgb
from .kinds import KIND_NAMES, cleaned
from .schedulers import DDIMScheduler, Scheduler
from .vocabulary import check_text

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST = 2**16  # pixels of a side, pictures of a prompt: beyond is a slip, or a trap


def require(holds, message: str) -> None:
    """Raise ValueError with this message unless something holds."""
    if not holds:
        raise ValueError(message)


def number(name: str, value, kind: type, least=-math.inf, most=math.inf):
    """An argument as Python's own number of a kind, `int` or `float`, in these limits.

    Takes NumPy's, too. Raises ValueError, with the argument's name, for anything else:
    texts, truth, NaN.
    """
    expected = f"{name}={shorten(value)}: expected {KIND_NAMES[kind][0]}"
    if least > -math.inf or most < math.inf:
        expected += f" from {least:,}" if least > -math.inf else ""
        expected += f" up to {most:,}"
    try:
        value = cleaned(value, kind)
    except (TypeError, OverflowError):
        raise ValueError(expected) from None
    require(least <= value <= most, expected)
    return value


def check_outputs(output_type, callback) -> None:
    """Raise ValueError for an unknown type of output, or what cannot be called back."""
    check_output_type(output_type)
    require(
        callback is None or callable(callback),
        f"callback={shorten(callback)}: "
        "expected a function that takes (step, t, latents)",
    )


def check_output_type(output_type) -> None:
    """Raise ValueError for what is not one of OUTPUT_TYPES."""
    require(
        output_type in OUTPUT_TYPES,
        f"output_type={output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}",
    )


# Words and numbers -------------------------------------------------------------


def prepare_prompts(prompt, negative, num_images: int) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt for each picture, in order."""
    negative = "" if negative is None else negative
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    several = isinstance(negative, list | tuple)
    negatives = list(negative) if several else [negative] * len(prompts)
    require(prompts, "an empty list of prompts; pass a text or a list of texts")
    for text in (*prompts, *negatives):
        kind = type(text).__name__
        require(
            isinstance(text, str),
            f"a prompt of type {kind}; pass a text or a list of texts",
        )
        check_text(text)
    require(
        len(negatives) == len(prompts),
        f"{counted(len(prompts), 'prompt')} but {len(negatives)} negative prompts; "
        "pass one for all, or one for each",
    )
    return tuple(
        [one for one in texts for _ in range(num_images)]
        for texts in (prompts, negatives)
    )


def prepare_seeds(seed, count: int) -> list[int]:
    """One seed for each picture: seed, seed + 1, … or the list that was given."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if isinstance(seed, list | tuple):
        seeds = [number("seed", one, int) for one in seed]
    else:
        first = number("seed", seed, int)
        seeds = list(range(first, first + count))
    require(
        len(seeds) == count,
        f"{counted(len(seeds), 'seed')} for {counted(count, 'picture')}; "
        "pass one seed, or one for each",
    )
    require(
        all(-(2**63) <= one < 2**64 for one in seeds),
        f"seed={seed}: expected a number of at most 64 bits",
    )
    return seeds


def prepare_guidance(scale, negatives: list[str]) -> float:
    """The scale of guidance, 1 for none; warns where an argument has no effect."""
    scale = float(number("guidance_scale", scale, float))
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
    return max(scale, 1.0)


def prepare_eta(eta, scheduler: Scheduler) -> dict[str, int | float]:
    """Options for the scheduler's steps; ValueError for eta where there is none."""
    eta = number("eta", eta, float)
    require(
        eta == 0 or isinstance(scheduler, DDIMScheduler),
        f"{type(scheduler).__name__} has no eta; use scheduler ddim",
    )
    require(0 <= eta <= 1, f"eta={eta}: expected 0 (deterministic) to 1 (DDPM)")
    return {"eta": eta} if eta else {}


def prepare_skip(clip_skip, layers: int) -> int:
    """How many of the text model's layers to leave out; ValueError for all of them."""
    skip = 0 if clip_skip is None else number("clip_skip", clip_skip, int)
    require(
        0 <= skip < layers,
        f"clip_skip={skip}: this text model has {layers} "
        f"layers, and needs one; give 0 to {layers - 1}",
    )
    return skip


def prepare_strength(strength, image, mask, steps: int) -> int | float:
    """The share of the steps to make: 0.8 by default, and 1 with a mask."""
    for name, given in (("mask", mask), ("strength", strength)):
        require(
            given is None or image is not None,
            f"{name} without image; pass the picture to start from",
        )
    if strength is None:
        return 1.0 if image is None or mask is not None else 0.8
    strength = number("strength", strength, float)
    require(0 < strength <= 1, f"strength={strength}: expected more than 0, up to 1")
    require(
        int(steps * strength) >= 1 or steps < 1,  # set_timesteps refuses those
        f"strength={strength} of {steps} steps is less than one step; "
        "raise strength or num_inference_steps",
    )
    return strength


# Sizes -------------------------------------------------------------------------


def prepare_size(height, width, image, latents, cell: int) -> list[int | None]:
    """Height and width as given, or the picture's, or the latents', or None."""
    default = None, None
    if image is not None:
        default = picture_size(image)
        if isinstance(image, Image.Image | list | tuple):  # arrays are not resized
            default = [max(side // cell, 1) * cell for side in default]
    elif latents is not None and getattr(latents, "ndim", 0) == 4:
        default = [side * cell for side in latents.shape[2:]]
    given = [
        side if side is None else number(name, side, int, most=MOST)
        for name, side in (("height", height), ("width", width))
    ]
    return [other if side is None else side for side, other in zip(given, default)]


def check_latents(latents, shape: tuple[int, ...]) -> None:
    """Raise ValueError for latents of another shape than a call needs, or no floats."""
    if latents is None:
        return
    kind = getattr(latents, "dtype", type(latents).__name__)
    require(
        isinstance(latents, Tensor) and latents.is_floating_point(),
        f"latents of type {kind}; pass a tensor of floats, {shape}",
    )
    found = tuple(latents.shape)
    require(
        latents.ndim != 4 or found[0] == shape[0],
        f"prompt batch of {shape[0]} but latents for {found[0]}; "
        "pass one latent per prompt",
    )
    require(
        found == shape,
        f"latents of shape {found}, expected {shape}; "
        "leave out height and width, or latents",
    )
    require(latents.isfinite().all(), "latents hold NaN or infinity; draw them again")


# Pictures ----------------------------------------------------------------------


def picture_size(image) -> tuple[int, int]:
    """Height and width of the pictures of a call; ValueError for what is none."""
    several = isinstance(image, list | tuple) and len(image) > 0
    if all(isinstance(one, Image.Image) for one in (image if several else [image])):
        first = ImageOps.exif_transpose(image[0] if several else image)
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
        require(
            len(pictures) in (1, prompts, count),
            f"{len(pictures)} pictures or masks for {counted(prompts, 'prompt')}; "
            "pass one for all, or one for each prompt",
        )
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
    """Pictures as a tensor with values in [0, 1]; with mode "L", masks, one channel.

    PIL images may have any mode, and are resized. Raises ValueError for arrays of
    another size or range, and for masks with transparency.
    """
    shape = len(mode), height, width
    if getattr(pictures, "ndim", None) == 2:  # a mask without an axis of channels
        is_array = isinstance(pictures, np.ndarray)
        pictures = pictures[..., None] if is_array else pictures[None]
    picture_size(pictures)  # refuses what is none
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, list | tuple):
        plain = [as_seen(one, is_mask=mode == "L") for one in pictures]
        resized = [one.resize((width, height), Image.LANCZOS) for one in plain]
        arrays = [np.asarray(one.convert(mode), np.float32) / 255 for one in resized]
        pictures = np.stack(arrays).reshape(-1, height, width, len(mode))
    if isinstance(pictures, np.ndarray):
        kind = pictures.dtype
        require(kind.kind in "fiub", f"an array of {kind}; pass numbers from 0 to 1")
        pictures = torch.from_numpy(pictures.astype(np.float32)).movedim(-1, -3)
    pixels = pictures.float().reshape(-1, *pictures.shape[-3:])
    require(
        pixels.shape[1:] == shape,
        f"a picture or mask of shape "
        f"{tuple(pixels.shape)}, expected (b, {', '.join(map(str, shape))}); "
        "resize it, or pass PIL images",
    )
    require(
        pixels.min() >= 0 and pixels.max() <= 1,  # NaN is neither
        f"a picture or mask with values from {pixels.min():g} to "
        f"{pixels.max():g}; expected 0 to 1",
    )
    return pixels


def as_seen(picture: Image.Image, is_mask: bool) -> Image.Image:
    """A picture upright, as RGB, over white: as `sdbook.images` reads it for training.

    Of a mask with transparency nobody can say whether the transparent part is to stay
    or to change: ValueError.
    """
    picture = ImageOps.exif_transpose(picture)
    clear = False
    if picture.has_transparency_data and picture.mode[0] not in "IF":
        clear = picture.convert("RGBA").getextrema()[3][0] < 255
    require(
        not (clear and is_mask),
        f"a mask of mode {picture.mode} with transparency; "
        "pass one without, white where the picture may change. If that is where it "
        "is transparent: ImageOps.invert(mask.convert('RGBA').getchannel('A'))",
    )
    if clear:
        warnings.warn(
            "the transparent part of the picture becomes white, as in "
            "training; to draw only there, pass a mask",
            stacklevel=5,
        )
    return to_rgb(picture)
