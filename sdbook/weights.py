"""Weights and configs: loading strictly, a model in a folder.

Generated from chapters/B_file_formats.ipynb; do not edit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

# Names that once stood here, for whoever imports them from here.
from importlib import import_module
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, ClassVar, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .files import (
    WeightsError,
    as_path,
    download,
    find_weights,
    finish_saving,
    is_hub_id,
    read_json,
    read_weights,
    save_weights,
    saving_together,
    some,
    write_atomically,  # noqa: F401
    write_json,
)

__all__ = [
    "load_strictly", "CLUES", "WIDTHS", "family", "LIMITS", "is_of_type", "about",
    "Config", "Pretrained", "Undrawn", "build_empty", "fill", "refuse_options",
]


def load_strictly(
    module: nn.Module, state_dict: dict[str, Tensor], where: str = "the state dict"
) -> None:
    """Make `state_dict` the weights of `module`; every key and shape must agree.

    Nothing is copied, so this also fills a module built on the meta device. Raises
    one WeightsError that lists the missing, unexpected, mis-shaped and whole-numbered
    keys, and says which kind of model it is.
    """
    expected = module.state_dict()
    both = {key: tensor for key, tensor in state_dict.items() if key in expected}
    found = {
        "missing": [key for key in expected if key not in both],
        "unexpected": [key for key in state_dict if key not in both],
        "of another shape": [
            f"{key}: file {tuple(t.shape)}, model {tuple(expected[key].shape)}"
            for key, t in both.items()
            if t.shape != expected[key].shape
        ],
        "not floating-point": [  # as of a model that was quantised to whole numbers
            f"{key}: {tensor.dtype}"
            for key, tensor in both.items()
            if expected[key].is_floating_point() > tensor.is_floating_point()
        ],
    }
    problems = [f"{len(k)} {name} ({some(k)})" for name, k in found.items() if k]
    if problems:
        raise WeightsError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            f"By its names it looks like {family(state_dict)}. "
            "Use the config.json that belongs to these weights; for a single file, "
            "pass it as config="
        )
    module.load_state_dict(state_dict, assign=True)


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
    """What kind of model a file looks like, from its names and widths."""
    for clue, kind in CLUES.items():
        if any(clue in key.lower() for key in state_dict):
            return kind
    for key, tensor in state_dict.items():
        if key.endswith(("attn2.to_k.weight", "token_embedding.weight")):
            width = tensor.shape[-1]
            other = f"a diffusion model of width {width}, where SD 1.x has 768"
            return WIDTHS.get(width, other)
    if any(key.startswith(("decoder.", "first_stage_model.")) for key in state_dict):
        return "an autoencoder alone"
    return "no diffusion model that we know"


# From where to where the numbers of a config go, by a part of their names. More would
# be a slip or a trap: a billion layers are built for ever, with or without memory.
LIMITS = {"layers": (1, 128), "sample_size": (1, 2**13)}
LIMITS |= {"token_id": (0, 2**20), "": (1, 2**20)}


def is_of_type(value: Any, kind: Any, name: str = "") -> bool:
    """Whether a config's value is of its field's type and within the LIMITS."""
    if get_origin(kind) is tuple:  # tuple[int, ...]
        each = get_args(kind)[0]
        whole = type(value) is tuple and 0 < len(value) <= 32
        return whole and all(is_of_type(one, each, name) for one in value)
    if get_args(kind):  # int | tuple[int, ...]
        return any(is_of_type(value, one, name) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and 0 < value < 2**20  # NaN is neither
    least, most = next(pair for part, pair in LIMITS.items() if part in name)
    return type(value) is kind and (kind is not int or least <= value <= most)


@contextmanager
def about(where: str | Path) -> Iterator[None]:
    """Makes a WeightsError that begins with `where` of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Config:
    """Base of the model configs: a frozen dataclass that reads and writes config.json.

    Fields are named as in the reference library's file. More may stand there: whatever
    is off (None, False or 0), known or not; what `fixed` and `derived` say; and what
    `ignored` names for changing nothing. The defaults are SD 1.5's, but for `families`.
    """

    fixed: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()
    families: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self.check()

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the config"):
        """Build it from what config.json holds; WeightsError for what we do not do."""
        options = {field.name: field for field in fields(cls)}
        known, others, problems = {}, {}, []
        for key, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if key in options:
                known[key], field = value, options[key]
                if not is_of_type(value, field.type, key):
                    problems.append(f"{key}={shorten(value)} (like {field.default!r})")
            elif not key.startswith("_") and key not in cls.ignored:
                others[key] = value
        with about(where):
            config = None if problems else cls(**known)
        for key, value in others.items() if config else ():
            only = cls.fixed | config.derived()
            if key in only and value != only[key]:
                problems.append(f"{key}={shorten(value)} (only {only[key]!r})")
            elif key not in only and value not in (None, False):  # 0 == False
                problems.append(f"{key}={shorten(value)} (unknown)")
        if problems:
            raise WeightsError(
                f"{where} has what {cls.__name__} does not do: {', '.join(problems)}. "
                "Use a Stable Diffusion 1.x or 2.x model, with its own config.json"
            )
        return config

    def check(self) -> None:
        """Raise ValueError for values that do not fit together."""

    def derived(self) -> dict[str, Any]:
        """What config.json says besides the fields, and follows from them."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; the reference library reads it too."""
        return asdict(self) | self.derived()

    @classmethod
    def of(cls, family: str):
        """The sizes of a family of models, such as "SD 2.x"; of others SD 1.5's."""
        return cls(**cls.families.get(family, {}))


class Pretrained:
    """Mixin that lets an nn.Module with a `.config` live in a folder.

    The folder holds `config.json` and one weights file, as diffusers and transformers
    have it. A class says its `config_class`, its `weights_name` and the
    `diffusers_class` that opens the same folder; it makes no buffers that are not in
    its state dict.
    """

    config_class: ClassVar[type]
    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    diffusers_class: ClassVar[str] = ""

    def rename_on_load(
        self, state: dict[str, Tensor], ema: bool = True
    ) -> dict[str, Tensor]:
        """From a file's keys to the module's: the same, unless a class knows better.

        `ema`: of weights that a file has twice, take the averaged copy.
        """
        return state

    def rename_on_save(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the module's keys to a file's."""
        return state

    def config_file(self) -> dict[str, Any]:
        """What config.json holds: the config, and the class that diffusers opens."""
        return {"_class_name": self.diffusers_class, **self.config.to_dict()}

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder, the weights as `dtype` (or as they are)."""
        state = {
            key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for key, tensor in self.state_dict().items()
        }
        with saving_together(folder) as side:
            save_weights(self.rename_on_save(state), side / self.weights_name)
            write_json(self.config_file(), side / "config.json")

    @classmethod
    def find_config(cls, path: Path):
        """The config of a folder, or of a file: beside it, or else its family's.

        Raises WeightsError for a config that says it belongs to another class.
        """
        where = (path.parent if path.is_file() else path) / "config.json"
        if path.is_file() and not where.is_file():
            return cls.config_class.of(family(read_weights(path)))
        values = read_json(where)
        other = values.get("_class_name", cls.diffusers_class)
        if other != cls.diffusers_class:
            raise WeightsError(
                f"{where} belongs to {other}, not to {cls.diffusers_class}; "
                "give the folder of the right model"
            )
        return cls.config_class.from_dict(values, str(where))

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
        has the `config` that is given, or lies beside it, or else its family's, SD 1.5
        or 2.1. Raises FileNotFoundError or WeightsError, which name the file and the
        remedy, and ValueError for a `variant` or `revision` of a file.
        """
        dtype, path = dtype or torch.float32, as_path(source, "a model")
        one = path.is_file()
        if one:
            options = {"variant": variant, "revision": revision}
            refuse_options(path, "a folder or a hub id", **options)
        elif is_hub_id(source):
            path = download(str(source), revision=revision, variant=variant)
        else:
            finish_saving(path)
        if config is None:
            config = cls.find_config(path)
        files = [path] if one else find_weights(path, cls.weights_name, variant)
        with about(path):
            model = build_empty(cls, config)
        fill(model, files, mapped=dtype == torch.float32, ema=ema)
        return model.to(dtype).eval()


class Undrawn(TorchFunctionMode):
    """Leaves out random numbers for no memory: PyTorch would load its compiler."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in (nn.init.normal_, Tensor.normal_):
            tensor = arguments[0] if arguments else options["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*arguments, **options)


def build_empty(model_class: type, config: Config) -> nn.Module:
    """A model on the meta device: parameters with shapes and without memory."""
    with torch.device("meta"), Undrawn():
        return model_class(config)


def fill(model: Pretrained, files: list[Path], mapped: bool, ema: bool) -> None:
    """Load one file, or the shards of one, into a model on the meta device."""
    state_dict = {}
    for file in files:
        state_dict |= read_weights(file, mapped)
    with about(files[0]):
        state_dict = model.rename_on_load(state_dict, ema)
    load_strictly(model, state_dict, str(files[0]))


def refuse_options(source: str | os.PathLike, kind: str, **options) -> None:
    """Raise ValueError if options are given that only another kind of source has."""
    given = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: only for {kind}, which {source} is not; leave it out"
        )


_MOVED = {"NAMINGS", "averaged_name", "rename_all", "renamed_keys", "to_original"}


def __getattr__(name: str):
    """Those of `sdbook.formats`, which stands above, when they are asked for."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sdbook.formats"), name)
