"""`sdbook sample`: from prompts to pictures that say how to make them again."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from .settings import check_png, check_settings, setting

DTYPES = ("float32", "float16", "bfloat16")
MOST_BYTES = 10**7  # of a file of prompts
PIXELS_AT_ONCE = 2**20  # 256 pictures of 64 × 64, 4 of 512 × 512
# Not in a picture's metadata: what is said in another way, or changes no pixel.
UNSAID = {
    "prompt", "prompt_file", "output_path", "image_size", "seed", "num_images",
    "device", "grid",
}  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """Draw pictures from prompts: `sdbook sample`.

    Attributes:
        prompt: what to draw, one text or more.
        prompt_file: a text file with a prompt a line, in place of prompt.
        negative_prompt: what to steer away from.
        checkpoint_path: a shipped model's name, a folder, a hub id, or one original
            .safetensors or .ckpt file.
        tokenizer_path: a model (see above) with the tokenizer, which one file lacks.
        vae_path: a VAE in place of the model's own: a folder, a hub id or a file.
        variant: of the weights' files, such as fp16.
        output_path: a PNG; further pictures get -1, -2, … before the suffix.
        image_size: height and width in pixels; the model's own by default.
        height: in pixels, if not image_size.
        width: in pixels, if not image_size.
        image_path: a picture to start from.
        mask_path: a picture that is white where image_path may change.
        strength: how much of image_path to draw anew, up to 1.
        tile_size: decode larger pictures in tiles of so many pixels, to save memory.
        lora_path: a LoRA to draw with, a folder (as train-lora wrote it) or file.
        lora_scale: how strongly it changes the model, from 0.
        word_path: a new word that the prompts may say (as train-word wrote it).
        word: what the prompts call it; what the file calls it by default.
        clip_skip: how many of the text model's last layers to leave out.
        guidance_scale: how strongly the prompt pulls; 1 is no guidance.
        num_inference_steps: denoising steps.
        scheduler: a sampler's name, such as ddim; the model's own by default.
        seed: of the first picture; the next has seed + 1, and so on.
        num_images: pictures for each prompt.
        device: auto, cpu, cuda or mps.
        dtype: float32, float16 or bfloat16.
        grid: write one labelled sheet in place of single pictures.
    """

    prompt: tuple[str, ...] = ()
    prompt_file: str | None = None
    negative_prompt: str = ""
    checkpoint_path: str = "scenes"
    tokenizer_path: str | None = None
    vae_path: str | None = None
    variant: str | None = None
    output_path: str = "picture.png"
    image_size: int | None = setting(None, at_least=1)
    height: int | None = setting(None, at_least=1)
    width: int | None = setting(None, at_least=1)
    image_path: str | None = None
    mask_path: str | None = None
    strength: float | None = setting(None, more_than=0, at_most=1)
    tile_size: int | None = setting(None, at_least=1)
    lora_path: str | None = None
    lora_scale: float = 1.0
    word_path: str | None = None
    word: str | None = None
    clip_skip: int | None = setting(None, at_least=0)
    guidance_scale: float = 3.0
    num_inference_steps: int = setting(25, at_least=1)
    scheduler: str | None = None
    seed: int = 0
    num_images: int = setting(1, at_least=1)
    device: str = "auto"
    dtype: str = setting("float32", choices=DTYPES)
    grid: bool = False

    def __post_init__(self):
        check_settings(self)
        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("give a prompt or a prompt_file, one of the two")
        check_png("output_path", self.output_path)
        for name, what, needs in (
            ("lora_scale", "LoRA", "lora_path"),
            ("word", "word's file", "word_path"),
            ("mask_path", "picture", "image_path"),
            ("strength", "picture", "image_path"),
        ):
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name]
            if value != usual.default and getattr(self, needs) is None:
                raise ValueError(f"{name} {value} without {needs}; give the {what}")


def sample(config: SamplingConfig) -> None:
    """Draw what the settings say, and write each picture once it is there."""
    from ..inputs import prepare_prompts

    prompts = list(config.prompt) or read_prompts(config.prompt_file)
    texts, _ = prepare_prompts(prompts, config.negative_prompt, config.num_images)
    files = name_files(config, 1 if config.grid else len(texts))
    files[0].parent.mkdir(parents=True, exist_ok=True)  # or fail before the work
    start = {"image": config.image_path, "mask": config.mask_path}
    start = {name: open_picture(path) for name, path in start.items() if path}
    pipe = open_model(config)
    drawn, seeds = [], range(config.seed, config.seed + len(texts))
    for first, images in draw(config, pipe, texts, seeds, start):
        facts = facts_to_write(config, pipe, images[0])
        if config.grid:
            drawn += images
            continue
        for number, image in enumerate(images, first):
            own = {"prompt": texts[number], "seed": seeds[number]}
            write_png(image, files[number], facts | own)
    if config.grid:
        from ..images import labelled_grid

        facts |= {"prompt": prompts, "seed": config.seed}
        facts |= {"num_images": config.num_images, "grid": True}
        write_png(labelled_grid(drawn, texts), files[0], facts)


def draw(config: SamplingConfig, pipe, texts: list[str], seeds, start: dict):
    """Yield (number of the first, pictures), as many at once as memory may hold."""
    from ..inputs import prepare_size

    cell = pipe.vae.config.downscale
    sides = config.height or config.image_size, config.width or config.image_size
    sides = prepare_size(*sides, start.get("image"), None, cell)
    *_, h, w = pipe.latent_shape(1, *sides)
    at_once = max(1, PIXELS_AT_ONCE // (h * w * cell**2))
    for first in range(0, len(texts), at_once):
        some = slice(first, first + at_once)
        yield first, pipe(
            texts[some],
            **start,
            strength=config.strength,
            negative_prompt=config.negative_prompt,
            height=h * cell,
            width=w * cell,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            clip_skip=config.clip_skip,
            seed=list(seeds[some]),
        ).images


# What goes in ------------------------------------------------------------------


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line; empty lines are none. ValueError without."""
    from ..folders import text_of

    with open(path, "rb") as file:  # a pipe, too, but none without an end
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"prompt_file {path} is larger than 10 MB; give fewer prompts")
    lines = text_of(data, path).replace("\r", "\n").split("\n")
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt_file {path} holds no prompt; write one a line")
    return prompts


def pick_device(name: str) -> str:
    """`auto` is the GPU when there is one; ValueError for what this machine lacks."""
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(kind for kind, usable in there.items() if usable)
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    fits = number.isdecimal() and int(number) < count if ":" in name else True
    if not there.get(kind) or not fits:
        usable = ", ".join(kind for kind in there if there[kind])
        raise ValueError(f"device {name!r} cannot be used here; choose auto, {usable}")
    return name


def open_pipeline(checkpoint_path: str, device: str, dtype: str, **options):
    """The pipeline of a checkpoint, on a device, in a dtype."""
    import torch

    from ..pipeline import StableDiffusion

    device = pick_device(device)  # before the slow part
    return StableDiffusion.from_pretrained(
        checkpoint_path, dtype=getattr(torch, dtype), **options
    ).to(device)


def open_model(config: SamplingConfig):
    """The pipeline to draw with, and what was fine-tuned, where it is given."""
    source = {"tokenizer": config.tokenizer_path, "vae": config.vae_path}
    source["variant"] = config.variant
    source = {name: value for name, value in source.items() if value is not None}
    pipe = open_pipeline(config.checkpoint_path, config.device, config.dtype, **source)
    pipe.vae.tile_size = config.tile_size
    if config.word_path is not None:
        from ..finetuning import load_word

        load_word(pipe, config.word_path, config.word)
    if config.lora_path is not None:
        from ..finetuning import load_lora

        for lora in load_lora(pipe, config.lora_path, config.lora_scale):
            lora.merge()  # one model to draw with: no cost per step
    if config.scheduler:
        pipe.scheduler = config.scheduler
    return pipe


def open_picture(path: str):
    """A picture, upright and with its transparency; ValueError for what is none."""
    from ..images import read_picture

    return read_picture(Path(path), convert=lambda picture: picture)


# What comes out ----------------------------------------------------------------


def name_files(config: SamplingConfig, count: int) -> list[Path]:
    """Where the pictures go. ValueError where one would replace what it starts from."""
    path = Path(config.output_path)
    files = [path.with_stem(f"{path.stem}-{k}") if k else path for k in range(count)]
    given = {name: getattr(config, name) for name in ("image_path", "mask_path")}
    for name, source in given.items():
        for file in files if source and Path(source).exists() else ():
            if file.exists() and file.samefile(source):
                raise ValueError(
                    f"{file} is the {name}, and would be written over; choose another "
                    "output_path"
                )
    return files


def facts_to_write(config: SamplingConfig, pipe, picture) -> dict:
    """What a picture's metadata say, apart from its prompt and its seed."""
    asked = {one.name: getattr(config, one.name) for one in fields(config)}
    asked |= {"height": picture.height, "width": picture.width}
    asked["scheduler"] = type(pipe.scheduler).__name__
    unsaid = UNSAID if config.lora_path else UNSAID | {"lora_scale"}
    return {
        name: value
        for name, value in asked.items()
        if value is not None and name not in unsaid
    }


def write_png(image, path: Path, facts: dict) -> None:
    """Write a picture, whole or not at all, with all it takes to make it again.

    In its metadata each flag is a text of its own; `command` is the whole command line.
    """
    from PIL.PngImagePlugin import PngInfo

    from .. import __version__
    from ..files import write_atomically

    info, words = PngInfo(), ["sdbook", "sample"]
    for name, value in facts.items():
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
        dashed = len(values) == 1 and values[0].startswith("-")  # is no flag
        words += [f"--{name}={values[0]}"] if dashed else [f"--{name}", *values]
        info.add_itxt(name, "\n".join(values))
    info.add_itxt("command", shlex.join(words))
    info.add_itxt("model", facts["checkpoint_path"])
    info.add_itxt("version", f"sdbook {__version__}")
    write_atomically(path, lambda file: image.save(file, "PNG", pnginfo=info))
    print(f"wrote {path}")
