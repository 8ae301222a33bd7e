"""The command line: `sdbook sample`, `train`, `train-lora`, `evaluate`, and others."""

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Literal

COMMANDS = {
    "sample": "draw pictures from prompts",
    "train": "train a UNet on a frozen VAE and text model",
    "train-vae": "train a VAE",
    "train-clip": "train a CLIP text model and its tokenizer",
    "train-lora": "fine-tune a UNet on a few pictures",
    "train-word": "teach a text model a new word",
    "evaluate": "score a model's pictures, kind by kind of prompt",
}
# Flags of the first edition, and what to do without them.
GONE = dict.fromkeys(
    ("unet_channels", "layers_per_block", "attention_levels", "num_heads"),
    "choose a unet_preset, or describe the UNet in a file and give it as unet_config",
)
GONE["norm_num_groups"] = GONE["num_heads"]
GONE["offset_noise"] = "the noise is the schedule's alone; leave it out"
GONE |= dict.fromkeys(
    ("critic_weight", "critic_start", "perceptual_weight", "perceptual_path"),
    "the VAE is trained without it (chapter 5 has it as an exercise); leave it out",
)
Dtype = Literal["float32", "float16", "bfloat16"]


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


def load(checkpoint_path: str, device: str, dtype: str, **options):
    """The pipeline of a checkpoint, on a device, in a dtype."""
    import torch

    from . import StableDiffusion

    device = pick_device(device)  # before the slow part
    return StableDiffusion.from_pretrained(
        checkpoint_path, dtype=getattr(torch, dtype), **options
    ).to(device)


def sample(
    prompt: list[str],
    negative_prompt: str = "",
    checkpoint_path: str = "scenes",
    tokenizer_path: str | None = None,
    variant: str | None = None,
    output_path: str = "picture.png",
    image_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    image_path: str | None = None,
    mask_path: str | None = None,
    strength: float | None = None,
    tile_size: int | None = None,
    lora_path: str | None = None,
    lora_scale: float = 1.0,
    word_path: str | None = None,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 25,
    scheduler: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    device: str = "auto",
    dtype: Dtype = "float32",
    grid: bool = False,
):
    """Draw pictures from prompts.

    Args:
        prompt: what to draw; several sentences make several pictures.
        negative_prompt: what to steer away from.
        checkpoint_path: a shipped model's name, a folder, a hub id, or one original
            .safetensors or .ckpt file.
        tokenizer_path: a model (see above) with the tokenizer, which one file lacks.
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
        guidance_scale: how strongly the prompt pulls; 1 is no guidance.
        num_inference_steps: denoising steps.
        scheduler: a sampler's name, such as ddim; the model's own by default.
        seed: of the first picture; the next has seed + 1, and so on.
        num_images: pictures for each prompt.
        device: auto, cpu, cuda or mps.
        dtype: float32, float16 or bfloat16.
        grid: write one labelled sheet in place of single pictures.
    """
    asked = dict(locals())
    path = Path(output_path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output_path {output_path!r} must end in .png")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; give at least 1")
    if lora_path is None and lora_scale != 1:
        raise ValueError(f"lora_scale {lora_scale} without lora_path; give the LoRA")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {"image": image_path, "mask": mask_path}
    start = {name: open_picture(file) for name, file in pictures.items() if file}
    source = {"tokenizer": tokenizer_path, "variant": variant}
    source = {name: value for name, value in source.items() if value is not None}
    pipe = load(checkpoint_path, device, dtype, **source)
    pipe.vae.tile_size = tile_size
    add_pieces(pipe, lora_path, lora_scale, word_path)
    if scheduler:
        pipe.scheduler = scheduler
    images = pipe(
        prompt,
        **start,
        strength=strength,
        negative_prompt=negative_prompt,
        height=image_size if height is None else height,
        width=image_size if width is None else width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=num_images,
        seed=seed,
    ).images
    unsaid = {"prompt", "output_path", "image_size", "seed", "num_images", "device"}
    unsaid |= {"grid"} if lora_path else {"grid", "lora_scale"}
    asked |= {"scheduler": type(pipe.scheduler).__name__}
    asked |= {"height": images[0].height, "width": images[0].width}
    facts = {
        name: value
        for name, value in asked.items()
        if value is not None and name not in unsaid
    }
    texts = [text for text in prompt for _ in range(num_images)]
    if grid:
        from .images import labelled_grid

        facts |= {"prompt": prompt, "seed": seed, "num_images": num_images}
        write_png(labelled_grid(images, texts), path, facts | {"grid": True})
        return
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        tail = f"-{number}" if number else ""
        target = path.with_name(f"{path.stem}{tail}{path.suffix}")
        write_png(image, target, facts | {"prompt": text, "seed": seed + number})


def add_pieces(pipe, lora_path, lora_scale, word_path):
    """What was fine-tuned, where it is given."""
    if lora_path is None and word_path is None:
        return
    from .finetuning import load_lora, load_word

    if word_path is not None:
        load_word(pipe, word_path)
    for lora in load_lora(pipe, lora_path, lora_scale) if lora_path else []:
        lora.merge()  # one model to draw with: no cost per step


def open_picture(path: str):
    """A picture's pixels; ValueError for a file that is none, or is cut short."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)  # phones turn by a note only
    except FileNotFoundError:
        raise
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from error


def write_png(image, path: Path, facts: dict):
    """Write a picture with all it takes to make it again in its metadata.

    Each flag is a text of its own; `command` is the whole command line.
    """
    from PIL.PngImagePlugin import PngInfo

    from . import __version__

    info, words = PngInfo(), ["sdbook", "sample"]
    for name, value in facts.items():
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
        words += [f"--{name}", *values]
        info.add_itxt(name, "\n".join(values))
    info.add_itxt("command", shlex.join(words))
    info.add_itxt("model", facts["checkpoint_path"])
    info.add_itxt("version", f"sdbook {__version__}")
    image.save(path, pnginfo=info)
    print(f"wrote {path}")


def evaluate(
    checkpoint_path: str = "scenes",
    output_dir: str = "evaluation",
    num_prompts: int = 200,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    compare_with: str | None = None,
    clip_path: str = "clip",
    inception_path: str | None = None,
    geneval_prompts: str | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
):
    """Score a model of the scenes, kind by kind of prompt.

    Args:
        checkpoint_path: a shipped model's name or a folder.
        output_dir: where scores.json, scores.md and pictures go.
        num_prompts: prompts of each kind.
        seed: of the prompts and the pictures.
        num_inference_steps: denoising steps.
        guidance_scale: how strongly the prompt pulls.
        compare_with: the output_dir of another run with the same prompts.
        clip_path: the CLIP of the CLIP score; a shipped one's name, the output of
            train-clip, or a folder of transformers.
        inception_path: weights of Inception v3 for FID and KID, in place of the
            features of the shipped CLIP.
        geneval_prompts: GenEval's evaluation_metadata.jsonl; then its prompts are
            drawn into output_dir, four pictures each, for its own tool to score.
        device: auto, cpu, cuda or mps.
        dtype: float32, float16 or bfloat16.
    """
    from . import evaluation
    from .run import reports

    drawing = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    if geneval_prompts:
        if compare_with or inception_path:
            raise ValueError(
                "geneval_prompts only draws, and GenEval's own tool scores; leave out "
                "compare_with and inception_path"
            )
        listed = reports.read_geneval(geneval_prompts)
        pipe = load(checkpoint_path, device, dtype)
        reports.write_geneval(pipe, listed, output_dir, **drawing)
        print(f"wrote {output_dir}")
        return
    other = reports.read_report(compare_with) if compare_with else None
    Path(output_dir).mkdir(parents=True, exist_ok=True)  # or fail before the work
    clip = evaluation.open_clip(clip_path)
    network = evaluation.open_features(inception_path).to(pick_device(device))
    pipe = load(checkpoint_path, device, dtype)
    settings = {"num_prompts": num_prompts, **drawing}
    records = evaluation.evaluate(pipe, **settings)
    measures = evaluation.measure(records, clip, network, seed)
    facts = {"model": checkpoint_path, **settings, "clip": clip_path}
    facts["features"] = Path(inception_path).name if inception_path else "clip"
    evaluation.save_report(records, output_dir, measures, **facts)
    print((Path(output_dir) / "scores.md").read_text(encoding="utf-8"))
    if other:
        table = evaluation.compare(records, other["records"])
        (Path(output_dir) / "comparison.md").write_text(table, encoding="utf-8")
        print(table)
    print(f"wrote {output_dir}")


def training_of(command: str):
    """A training's function and the class of its settings."""
    from . import finetuning, training

    return {
        "train": (training.train, training.TrainingConfig),
        "train-vae": (training.train_vae, training.VAETrainingConfig),
        "train-clip": (training.train_clip, training.CLIPTrainingConfig),
        "train-lora": (finetuning.train_lora, finetuning.LoRATrainingConfig),
        "train-word": (finetuning.train_word, finetuning.WordTrainingConfig),
    }[command]


def find_settings(name: str) -> str:
    """What `--config` names: a file, or one that ships, as `lora` or with its path."""
    folder, path = Path(__file__).with_name("configs"), Path(name)
    own = folder / f"{path.stem}.yaml"
    plain = path.name in (own.stem, own.name)
    if path.is_file() or ":" in name:  # YAML itself is allowed, too
        return name
    if plain and path.parent in (Path(), Path("sdbook/configs")) and own.is_file():
        return str(own)
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"there is no file {name}; give --config a YAML file, or one of these, which "
        f"ship with the book: {names}"
    )


def texts_of(prompt) -> list[str]:
    """The prompts of the command line, or of a YAML file, where one needs no list."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(
                f"prompt holds {text!r}, which is no text; in a YAML file, put it "
                "between quotes"
            )
    return prompts


def run(command: str, arguments: list[str]):
    """Parse a command's flags and call it."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser, cfg, values, option_string=None):
            super().__call__(parser, cfg, find_settings(values), option_string)

    parser = ArgumentParser(
        prog=f"sdbook {command}",
        description=COMMANDS[command],
        exit_on_error=False,
    )
    words = "YAML file with these keys, or the name of one that ships, such as lora"
    parser.add_argument("--config", action=ConfigFile, help=words)
    function = {"sample": sample, "evaluate": evaluate}.get(command)
    if command == "sample":  # without a type, so that no text is read as YAML
        words = {"nargs": "+", "required": True, "metavar": "TEXT"}
        parser.add_argument("--prompt", **words, help="what to draw, one text or more")
    if function:
        parser.add_function_arguments(function, as_group=False, skip={"prompt"})
    else:
        function, config_class = training_of(command)
        parser.add_class_arguments(config_class, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--dry_run` alone is true
            action.nargs, action.const = "?", True
    options = parser.parse_args(arguments)
    options.pop("config")
    if command == "sample":
        options.prompt = texts_of(options.prompt)
    if command in ("sample", "evaluate"):
        return function(**options)
    config = config_class(**options)
    if function(config) is not None:  # not after a dry run
        print(f"wrote {config.output_dir}")


def main(arguments: list[str] | None = None):
    """Entry point of the `sdbook` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: sdbook COMMAND [--help] [--config FILE] [flags]\n")
        for name, meaning in COMMANDS.items():
            print(f"  {name:12} {meaning}")
        asked = not arguments or arguments[0] in ("-h", "--help")
        if not asked:
            print(f"\nsdbook: no command {arguments[0]!r}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    from jsonargparse import ArgumentError

    command = arguments[0]
    with warnings.catch_warnings():
        warnings.showwarning = tell_warning
        try:
            run(command, arguments[1:])
        except ArgumentError as error:
            sys.exit(fail(command, f"error: {reason_for(error, command)}"))
        except (ValueError, OSError) as error:
            sys.exit(fail(command, f"error: {reason_of(error)}"))
        except KeyboardInterrupt as error:
            sys.exit(fail(command, f"stopped {error}", 130))


def reason_for(error: Exception, command: str) -> str:
    """What is wrong with the flags, and for one of the first edition what to do."""
    unknown = re.match(r"unrecognized arguments: --(\w+)|Option '(\w+)'", str(error))
    name = unknown and (unknown[1] or unknown[2])
    if name in GONE:
        return f"{name} is gone: {GONE[name]}"
    return f"{error}; see sdbook {command} --help"


def reason_of(error: Exception) -> str:
    """An error's message; of one in a data worker, the end of its traceback."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return text


def fail(command: str, message: str, status: int = 2) -> int:
    """Say what went wrong in one line; returns the exit status."""
    text = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"sdbook {command}: {text}", file=sys.stderr)
    return status


def tell_warning(message, *where, **more):
    """A warning as one line, without the place in the code."""
    print(f"sdbook: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
