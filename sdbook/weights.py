"""Weights and configs: reading, writing, loading strictly.

Generated from chapters/05_vae.ipynb; do not edit.
"""

import errno
import json
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "WeightsError",
    "write_atomically",
    "write_json",
    "read_json",
    "list_folder",
    "save_weights",
    "DTYPES",
    "PIECE",
    "map_tensors",
    "unknown_type",
    "Ignored",
    "STAND_INS",
    "read_pickle",
    "read_weights",
    "refuse_what_is_no_weights_file",
    "CLUES",
    "WIDTHS",
    "family",
    "load_strictly",
    "is_of_type",
    "sort_options",
    "Config",
    "UNET_RULES",
    "VAE_RULES",
    "OLD_VAE_RULES",
    "NAMINGS",
    "as_pattern",
    "count_places",
    "rename",
    "renamed_keys",
    "averaged_name",
    "is_for_training",
    "rename_all",
    "take_averages",
    "take_part",
    "to_original",
    "read_config",
    "find_weights",
    "find_shards",
    "is_hub_id",
    "WEIGHTS_NAMES",
    "weights_patterns",
    "lacks_weights",
    "fetch",
    "download",
    "BUILDING",
    "build_empty",
    "fill",
    "refuse_options",
    "Stored",
    "Pretrained",
]


class WeightsError(ValueError):
    """A config or weights file that cannot be used; says which and what to do."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(values: dict[str, Any], path: str | Path) -> None:
    """Write a dict as readable JSON, atomically."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; errors say which file, what is wrong and what to do.

    Raises FileNotFoundError if it is missing, WeightsError if it is no JSON object.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.parent}; give the folder that holds {path.name}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name} (it has: {list_folder(path.parent)}); "
            "give a folder that save_pretrained wrote"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(
            f"{path} is not valid JSON ({error}); copy or save it again"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object; is it another file's name?")
    return values


def list_folder(folder: Path) -> str:
    """The names in a folder (a dozen at most), for an error message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12] + ["…"] * (len(names) > 12)) or "nothing"


def save_weights(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, atomically, from any device and layout."""
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state_dict.items()
    }

    def write(file: Path) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors' files are private; a model is for sharing

    write_atomically(path, write)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
PIECE = 2**28  # bytes that are mapped together: each piece keeps a file open


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each a piece of that file.

    Nothing is read before it is used. Changing a tensor does not change the file.
    """
    with safe_open(path, framework="pt"):
        pass  # refuses a file that is cut short, or whose header is wrong
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data, whole = 8 + length, path.stat().st_size - 8 - length
    tensors, start, piece = {}, 0, b""
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise unknown_type(path, entry["dtype"])
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if begin == end:  # of nothing there is no piece
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        if end > start + len(piece):  # on to the next piece, or to one large tensor
            start, size = begin, min(max(PIECE, end - begin), whole - begin)
            piece = np.memmap(path, np.uint8, mode="c", offset=data + start, shape=size)
        tensor = torch.from_numpy(piece[begin - start : end - start])
        tensors[name] = tensor.view(dtype).view(shape)
    return tensors


def unknown_type(path: Path, kind: str) -> WeightsError:
    """The error for a file with numbers of a type that we do not read."""
    return WeightsError(
        f"{path} holds numbers of the type {kind}, which we cannot read; "
        "use a float32, float16 or bfloat16 version of it"
    )


class Ignored:
    """Stands in for an object in a checkpoint that is no tensor."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


STAND_INS = [
    type(name, (Ignored,), {"__module__": module, "__qualname__": name})
    for module, name in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )
]


def read_pickle(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a pickle, which cannot run code while it is read."""
    mapped = mapped and zipfile.is_zipfile(path)  # older pickles cannot be mapped
    with torch.serialization.safe_globals(STAND_INS):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def read_weights(path: str | Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle (.bin, .ckpt, .pt).

    They are pieces of the file, not copies; with `mapped=False` a pickle is read
    into memory at once. A pickle is opened with `weights_only=True` and cannot run
    code. Raises FileNotFoundError for a missing file, WeightsError for one that is
    cut short, foreign or dangerous; the message names the file and the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    refuse_what_is_no_weights_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return map_tensors(path)
        return read_pickle(path, mapped)
    except SafetensorError as error:
        if kind := re.search(r"unknown variant `(\w+)`", str(error)):
            raise unknown_type(path, kind[1]) from error
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or "
            "is another kind of file: copy or download it again"
        ) from error
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a torn pickle raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "Too many open files" in reason:  # which is no fault of this file
            raise OSError(errno.EMFILE, "Too many open files", str(path)) from error
        guess = "it may be cut short: copy it again, or"
        if isinstance(error, pickle.UnpicklingError):  # whose own advice is unsafe
            wish = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it asks for {wish[1]}" if wish else "it holds more than tensors"
            guess = "nothing in it was run;"
        raise WeightsError(
            f"{path} could not be opened as a file of tensors ({reason}); {guess} "
            "use the .safetensors version of it"
        ) from error


def refuse_what_is_no_weights_file(path: Path) -> None:
    """Recognise an empty file and what `git clone` leaves without Git LFS."""
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise WeightsError(f"{path} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`"
        )


CLUES = {
    "lora": "a LoRA, which is a change to a model and not a model",
    "control_model.": "a ControlNet, which steers a model and is not a model",
    "controlnet_": "a ControlNet, which steers a model and is not a model",
    "conditioner.embedders.": "SDXL",
    "add_embedding.": "SDXL",
    "cond_stage_model.model.": "SD 2.x",
    "joint_blocks.": "SD 3",
    "double_blocks.": "FLUX",
}
# What the UNet reads, and what the text encoder writes.
WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL", 2048: "SDXL"}


def family(state_dict: dict[str, Tensor]) -> str:
    """What kind of model a file looks like, from its names and widths; for errors."""
    for clue, kind in CLUES.items():
        if any(clue in key.lower() for key in state_dict):
            return f"it looks like {kind}"
    for key, tensor in state_dict.items():
        if key.endswith(("attn2.to_k.weight", "token_embedding.weight")):
            width = tensor.shape[-1]
            other = f"a diffusion model of width {width}, where SD 1.x has 768"
            return f"it looks like {WIDTHS.get(width, other)}"
    if any(key.startswith(("decoder.", "first_stage_model.")) for key in state_dict):
        return "it looks like an autoencoder alone"
    return "it does not look like a diffusion model"


def load_strictly(
    module: nn.Module, state_dict: dict[str, Tensor], where: str = "the state dict"
) -> None:
    """Make `state_dict` the weights of `module`; every key and shape must agree.

    Nothing is copied, so this also fills a module built on the meta device. Raises
    one WeightsError that lists the missing, unexpected, mis-shaped and whole-numbered
    keys, and says which kind of model it is.
    """
    expected = module.state_dict()
    found = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "of another shape": [
            f"{key}: file {tuple(state_dict[key].shape)}, model {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        ],
        "not floating-point": [  # as of a model that was quantised to whole numbers
            f"{key}: {tensor.dtype}"
            for key, tensor in state_dict.items()
            if key in expected
            and expected[key].is_floating_point() > tensor.is_floating_point()
        ],
    }
    problems = [
        f"{len(keys)} {name} ({', '.join(keys[:20])}{', …' * (len(keys) > 20)})"
        for name, keys in found.items()
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            f"By its names {family(state_dict)}. "
            "Use the config.json that belongs to these weights; for a single file, "
            "pass it as config="
        )
    module.load_state_dict(state_dict, assign=True)


def is_of_type(value: Any, kind: Any, least: int = 1) -> bool:
    """Whether a config's value is of its field's type, and no number below `least`."""
    if get_origin(kind) is tuple:  # tuple[int, ...]
        each = get_args(kind)[0]
        some = type(value) is tuple and len(value) > 0
        return some and all(is_of_type(one, each) for one in value)
    if get_args(kind):  # int | tuple[int, ...]
        return any(is_of_type(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and value > 0
    return type(value) is kind and (kind is not int or value >= least)


def sort_options(
    values: dict[str, Any], config_class: type
) -> tuple[dict, list, list]:
    """A config file as the fields' values, what we do not do, what cannot be."""
    options = {field.name: field for field in fields(config_class)}
    known, refused, misfits = {}, [], []
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in options:
            known[key], field = value, options[key]
            # Sizes begin at 1, and only the numbers of tokens at 0.
            if not is_of_type(value, field.type, not key.endswith("_token_id")):
                misfits.append(f"{key}={value!r} (like {field.default!r})")
        elif key in config_class.fixed:
            if value != config_class.fixed[key]:
                refused.append(f"{key}={value!r} (only {config_class.fixed[key]!r})")
        elif not key.startswith("_") and key not in config_class.ignored:
            refused.append(f"{key}={value!r} (unknown)")
    return known, refused, misfits


@dataclass(frozen=True)
class Config:
    """Base of the model configs: a frozen dataclass that reads and writes config.json.

    Fields are named as in the reference library's file. `fixed` has its further
    options with the one value that we build; `ignored` names those that change no
    result.
    """

    fixed: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the config"):
        """Build it from what config.json holds; WeightsError for what we do not do."""
        known, refused, misfits = sort_options(values, cls)
        if refused:
            raise WeightsError(
                f"{where} asks for what {cls.__name__} does not do: "
                f"{', '.join(refused)}. Use a Stable Diffusion 1.x model"
            )
        if misfits:
            raise WeightsError(
                f"{where} has values that cannot be: {', '.join(misfits)}. Use the "
                "config.json that belongs to the weights"
            )
        try:
            return cls(**known)
        except ValueError as error:
            raise WeightsError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; the reference library reads it too."""
        return asdict(self)


UNET_RULES = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("resnets.{layer}.norm1.", "resnets.{layer}.in_layers.0."),
    ("resnets.{layer}.conv1.", "resnets.{layer}.in_layers.2."),
    ("resnets.{layer}.time_emb_proj.", "resnets.{layer}.emb_layers.1."),
    ("resnets.{layer}.norm2.", "resnets.{layer}.out_layers.0."),
    ("resnets.{layer}.conv2.", "resnets.{layer}.out_layers.3."),
    ("resnets.{layer}.conv_shortcut.", "resnets.{layer}.skip_connection."),
    ("down_blocks.{level}.resnets.{layer}.", "input_blocks.{after}.0."),
    ("down_blocks.{level}.attentions.{layer}.", "input_blocks.{after}.1."),
    ("down_blocks.{level}.downsamplers.0.conv.", "input_blocks.{after}.0.op."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
    ("up_blocks.{level}.resnets.{layer}.", "output_blocks.{place}.0."),
    ("up_blocks.{level}.attentions.{layer}.", "output_blocks.{place}.1."),
    ("up_blocks.{level}.upsamplers.0.conv.", "output_blocks.{place}.{last}.conv."),
)
VAE_RULES = (
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
    ("attentions.0.group_norm.", "attentions.0.norm."),
    ("attentions.0.to_q.", "attentions.0.q."),
    ("attentions.0.to_k.", "attentions.0.k."),
    ("attentions.0.to_v.", "attentions.0.v."),
    ("attentions.0.to_out.0.", "attentions.0.proj_out."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("down_blocks.{level}.resnets.{layer}.", "down.{level}.block.{layer}."),
    ("down_blocks.{level}.downsamplers.0.", "down.{level}.downsample."),
    ("up_blocks.{level}.resnets.{layer}.", "up.{mirror}.block.{layer}."),
    ("up_blocks.{level}.upsamplers.0.", "up.{mirror}.upsample."),
)


OLD_VAE_RULES = (
    (".attentions.0.to_q.", ".attentions.0.query."),
    (".attentions.0.to_k.", ".attentions.0.key."),
    (".attentions.0.to_v.", ".attentions.0.value."),
    (".attentions.0.to_out.0.", ".attentions.0.proj_attn."),
)
# Of each class, by diffusers' name for it: prefix and rules of the original first.
NAMINGS = {
    "UNet2DConditionModel": [("model.diffusion_model.", UNET_RULES)],
    "AutoencoderKL": [
        ("first_stage_model.", VAE_RULES), ("first_stage_model.", OLD_VAE_RULES),
    ],
    "CLIPTextModel": [("cond_stage_model.transformer.", ())],
}


@cache
def as_pattern(rule: str) -> re.Pattern:
    """`resnets.{layer}.` as a regular expression that finds the number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule)))


def count_places(config, level: int, layer: int) -> dict[str, int]:
    """The numbers that a rule may write, from where a block is in our tree."""
    levels = len(config.block_out_channels)
    place = (config.layers_per_block + 1) * level + layer
    kinds = getattr(config, "up_block_types", ("",) * levels)
    return {
        "level": level, "layer": layer, "place": place, "after": place + 1,
        "mirror": levels - 1 - level, "last": 1 + ("CrossAttn" in kinds[level]),
    }


def rename(key: str, rules: tuple, config) -> str:
    """One of our keys in the words of others: each rule in turn."""
    for ours, theirs in rules:
        found = as_pattern(ours).search(key)
        if found:
            numbers = {name: int(text) for name, text in found.groupdict().items()}
            if "level" in numbers:  # a sampler has no layer: it comes last
                layer = numbers.get("layer", config.layers_per_block)
                numbers = count_places(config, numbers["level"], layer)
            key = key[: found.start()] + theirs.format(**numbers) + key[found.end() :]
    return key


def renamed_keys(model: nn.Module, naming: int = 0) -> dict[str, str]:
    """Each key of the model's file, and what others call it: {ours: theirs}."""
    prefix, rules = NAMINGS[model.diffusers_class][naming]
    keys = model.rename_on_save(model.state_dict())
    return {key: prefix + rename(key, rules, model.config) for key in keys}


def averaged_name(key: str) -> str:
    """Where an original checkpoint keeps the running average (EMA) of a weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def is_for_training(key: str) -> bool:
    """Whether an original checkpoint's key is no weight of the three networks."""
    return key.startswith(("model_ema.", "loss.")) or "." not in key


def rename_all(
    state_dict: dict[str, Tensor], new_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """Rename every key; WeightsError where two of them would get one name."""
    sources = {}
    for key in state_dict:
        other = sources.setdefault(new_name(key), key)
        if other != key:
            raise WeightsError(
                f"{other} and {key} are two names of one weight, {new_name(key)}; "
                "remove the one that does not belong to the model"
            )
    return {name: state_dict[key] for name, key in sources.items()}


def take_averages(
    part: dict[str, Tensor], state_dict: dict[str, Tensor], names: set[str]
) -> dict[str, Tensor]:
    """The averaged copy of `names` in place of the other; what is unknown stays."""
    averages = {averaged_name(name): name for name in names}
    counters = ("model_ema.decay", "model_ema.num_updates")  # of the averaging itself
    taken = {key: tensor for key, tensor in part.items() if key not in names}
    for key, tensor in state_dict.items():
        if key.startswith("model_ema.") and key not in counters:
            taken[averages.get(key, key)] = tensor
    return taken


def take_part(
    model: nn.Module, state_dict: dict[str, Tensor], ema: bool = True
) -> dict[str, Tensor]:
    """What of a file belongs to the model, with the names of the model's own file.

    Of an original checkpoint that holds the UNet twice it takes the averaged (EMA)
    copy, or with `ema=False` the other. Names that it does not know stay, so that
    strict loading can list them. Raises WeightsError for a weight with two names.
    """
    namings = NAMINGS.get(model.diffusers_class, [])
    if not namings:
        return state_dict
    if any(key.startswith("vision_model.") for key in state_dict):  # a whole CLIP
        return {k: t for k, t in state_dict.items() if k.startswith("text_model.")}
    ours = {}
    for naming in range(len(namings)):
        ours |= {name: key for key, name in renamed_keys(model, naming).items()}
    prefix = namings[0][0]
    part = {k: t for k, t in state_dict.items() if k.startswith(prefix)}
    if ema and any(averaged_name(name) in state_dict for name in ours):
        part = take_averages(part, state_dict, set(ours))
    start = "" if part else prefix
    if not part:
        part = state_dict
        if any(ours.get(prefix + key, key) != key for key in part):
            # The original's network alone, perhaps with what only training needed.
            part = {k: t for k, t in part.items() if not is_for_training(k)}
    return rename_all(
        part, lambda key: ours.get(start + key, key).removeprefix(prefix)
    )


def to_original(model: nn.Module) -> dict[str, Tensor]:
    """The weights as an original Stable Diffusion file has them, ready to be saved."""
    state_dict = model.rename_on_save(model.state_dict())
    original = {}
    for key, name in renamed_keys(model).items():
        tensor = state_dict[key]
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # there, a 1 × 1 convolution
        original[name] = tensor
    return original


def read_config(folder: str | Path, config_class: type, class_name: str):
    """The config in a folder, which must belong to `class_name` if it says whose."""
    where = Path(folder) / "config.json"
    values = read_json(where)
    other = values.get("_class_name", class_name)
    if other != class_name:
        raise WeightsError(
            f"{where} belongs to {other}, not to {class_name}; "
            "give the folder of the right model"
        )
    half = values.get("text_config")
    if isinstance(half, dict):  # of a whole CLIP, among many options of no effect
        known = {field.name for field in fields(config_class)} | {*config_class.fixed}
        values = {key: value for key, value in half.items() if key in known}
    return config_class.from_dict(values, str(where))


def find_weights(
    folder: str | Path, name: str, variant: str | None = None
) -> list[Path]:
    """The weights file in a folder, or all its shards; safetensors before pickles.

    Without a `variant`, the usual file or else its half precision copy; with "" the
    usual alone. Raises FileNotFoundError, which says what is there, or which shard
    is not, and WeightsError for an index that is none.
    """
    folder, stem = Path(folder), Path(name).stem
    old = "pytorch_model" if stem == "model" else stem
    for copy in ("", "fp16") if variant is None else (variant,):
        mark = f".{copy}" if copy else ""
        for start, kind in ((stem, "safetensors"), (old, "bin")):
            if (folder / f"{start}{mark}.{kind}").is_file():
                return [folder / f"{start}{mark}.{kind}"]
            index = folder / f"{start}.{kind}.index{mark}.json"
            if index.is_file():
                return find_shards(index)
    wanted = f"{stem}.{variant}.safetensors" if variant else name
    raise FileNotFoundError(
        f"{folder} has no {wanted} (it has: {list_folder(folder)}); "
        "copy the weights file there, or save the model again"
    )


def find_shards(index: Path) -> list[Path]:
    """The files that an index names, all of which must be there."""
    where = read_json(index).get("weight_map")
    names = list(where.values()) if isinstance(where, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise WeightsError(
            f"{index} needs a weight_map that says of each tensor which file holds it, "
            f"not {str(where):.40}; copy or download it again"
        )
    names = sorted(set(names))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} needs {', '.join(missing)}, but {index.parent} "
            f"has only: {list_folder(index.parent)}; copy or download all of it again"
        )
    return [index.parent / name for name in names]


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name looks like `owner/model` and is nothing on this machine."""
    parts = str(name).split("/")
    return (
        len(parts) == 2
        and all(parts)
        and parts[0] not in (".", "..", "~")
        and not Path(name).exists()
    )


WEIGHTS_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")


def weights_patterns(mark: str, kind: str) -> list[str]:
    """What weights files may be called, whole or in shards, of the older kind too."""
    ends = (mark, f"{mark}-?????-of-?????", f"-?????-of-?????{mark}")
    return [f"{name}{end}.{kind}" for name in WEIGHTS_NAMES for end in ends]


def lacks_weights(folder: Path, variant: str) -> bool:
    """Whether a folder has a network's config but not its weights of this variant."""
    for name in WEIGHTS_NAMES[:2]:
        try:
            find_weights(folder, name, variant)
            return False
        except FileNotFoundError:
            pass
    return (folder / "config.json").is_file()


def fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The cached copy of a repository, with the files that fit the patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns)
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"could not fetch {repository!r}{at} from the Hugging Face hub ({reason}); "
            f"there is no local folder {repository!r} either. Check the id and the "
            "network, or download it elsewhere and give the folder"
        ) from error


def download(
    repository: str,
    folders: tuple[str, ...] = ("",),
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
) -> Path:
    """The local copy of a Hugging Face repository, fetched on first use.

    Takes configs, vocabularies and, of `folders`, the weights: safetensors, or
    pickles where there are none, or else their half precision copies. The library's
    cache, HF_HUB_OFFLINE and HF_TOKEN hold as usual. Raises FileNotFoundError with
    the id and the way out.
    """
    starts = {folder: f"{folder}/" if folder else "" for folder in folders}
    texts = [s + text for s in starts.values() for text in ("*.json", "*.txt")]
    missing = list(folders) if weights else []
    copies = ("", "fp16") if variant is None else (variant,)
    for copy, kind in product(copies, ("safetensors", "bin")):
        files = weights_patterns(f".{copy}" if copy else "", kind)
        wanted = [starts[folder] + file for folder in missing for file in files]
        root = fetch(repository, revision, ["model_index.json", *texts, *wanted])
        missing = [folder for folder in missing if lacks_weights(root / folder, copy)]
        if not missing:
            break
    return root


# `build_empty` exchanges a function of PyTorch's. Two at once could each put back
# what the other had put there, and leave it exchanged for good.
BUILDING = threading.Lock()


def build_empty(model_class: type, config: Config) -> nn.Module:
    """A model on the meta device: parameters with shapes and without memory."""

    def skip(tensor: Tensor, *arguments, **options) -> Tensor:
        return tensor if tensor.is_meta else draw(tensor, *arguments, **options)

    with BUILDING:
        draw = nn.init.normal_
        try:
            # Random numbers for no memory: PyTorch would load its compiler for them.
            nn.init.normal_ = skip
            with torch.device("meta"):
                return model_class(config)
        finally:
            nn.init.normal_ = draw


def fill(model: nn.Module, files: list[Path], mapped: bool, ema: bool) -> None:
    """Load one file, or the shards of one, into a model on the meta device."""
    state_dict = {}
    for file in files:
        state_dict |= read_weights(file, mapped)
    try:
        state_dict = model.rename_on_load(take_part(model, state_dict, ema))
    except WeightsError as error:
        raise WeightsError(f"{files[0]}: {error}") from error
    load_strictly(model, state_dict, str(files[0]))


def refuse_options(source: str | os.PathLike, kind: str, **options) -> None:
    """Raise ValueError if options are given that only another kind of source has."""
    given = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: only for {kind}, which {source} is not; leave it out"
        )


class Stored:
    """What `Pretrained` models have in common on disk, and how they are written.

    A class says its `config_class`, its `weights_name` and the `diffusers_class`
    that opens the same folder; it makes no buffers that are not in its state dict.
    """

    config_class: ClassVar[type]
    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    diffusers_class: ClassVar[str] = ""

    @classmethod
    def find_config(cls, path: Path):
        """The config of a folder, or of a file: beside it, or else SD 1.5's."""
        if path.is_file() and not (path.parent / "config.json").is_file():
            return cls.config_class()
        folder = path.parent if path.is_file() else path
        return read_config(folder, cls.config_class, cls.diffusers_class)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder, the weights as `dtype` (or as they are)."""
        state = {
            key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for key, tensor in self.state_dict().items()
        }
        save_weights(self.rename_on_save(state), Path(folder) / self.weights_name)
        write_json(self.config_file(), Path(folder) / "config.json")

    def config_file(self) -> dict[str, Any]:
        """What config.json holds: the config, and the class that diffusers opens."""
        return {"_class_name": self.diffusers_class, **self.config.to_dict()}

    @staticmethod
    def rename_on_load(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From a file's keys to the module's: the same, unless a class knows better."""
        return state

    @staticmethod
    def rename_on_save(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the module's keys to a file's."""
        return state


class Pretrained(Stored):
    """Mixin that lets an nn.Module with a `.config` live in a folder.

    The folder holds `config.json` and one weights file, as diffusers and transformers
    have it; `Stored` has the names that a class must say.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        ema: bool = True,
        config: Config | None = None,
    ):
        """Read the model from a folder, a hub id or one file, ready to evaluate.

        The weights become `dtype`, or float32. Of an original checkpoint it takes
        its own part, averaged (EMA) if there is a choice and `ema` is True. A file
        has the `config` that is given, or lies beside it, or else SD 1.5's. Raises
        FileNotFoundError or WeightsError, which name the file and the remedy, and
        ValueError for a `variant` or `revision` of a file.
        """
        dtype, path = dtype or torch.float32, Path(source)
        if path.is_file():
            options = {"variant": variant, "revision": revision}
            refuse_options(path, "a folder or a hub id", **options)
        if is_hub_id(source):
            path = download(str(source), revision=revision, variant=variant)
        if config is None:
            config = cls.find_config(path)
        one = path.is_file()
        files = [path] if one else find_weights(path, cls.weights_name, variant)
        model = build_empty(cls, config)
        fill(model, files, mapped=dtype == torch.float32, ema=ema)
        return model.to(dtype).eval()
