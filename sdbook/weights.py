"""Weights and configs: reading, writing, loading strictly.

Generated from chapters/05_vae.ipynb; do not edit.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = [
    "WeightsError",
    "write_atomically",
    "write_json",
    "read_json",
    "list_folder",
    "save_weights",
    "read_weights",
    "refuse_what_is_no_weights_file",
    "load_strictly",
    "Config",
    "read_config",
    "find_weights",
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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or of a pickle (.bin, .ckpt, .pt).

    A pickle is opened with `weights_only=True` and cannot run code. Raises
    FileNotFoundError for a missing file, WeightsError for a truncated or foreign
    one; the message names the file and the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    refuse_what_is_no_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or "
            "is another kind of file: copy or download it again"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a torn pickle raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path} could not be opened as a file of tensors ({reason}); it may be "
            "cut short: copy it again, or use the .safetensors version of it"
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


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


def load_strictly(
    module: nn.Module, state_dict: dict[str, Tensor], where: str = "the state dict"
) -> None:
    """Make `state_dict` the weights of `module`; every key and shape must agree.

    Nothing is copied, so this also fills a module built on the meta device. Raises
    one WeightsError that lists the missing, unexpected and mis-shaped keys.
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
    }
    problems = [
        f"{len(keys)} {name} ({', '.join(keys[:20])}{', …' * (len(keys) > 20)})"
        for name, keys in found.items()
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}. "
            "Use the config.json that belongs to these weights"
        )
    module.load_state_dict(state_dict, assign=True)


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
        names = {field.name for field in fields(cls)}
        known, refused = {}, []
        for key, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if key in names:
                known[key] = value
            elif key in cls.fixed:
                if value != cls.fixed[key]:
                    refused.append(f"{key}={value!r} (only {cls.fixed[key]!r})")
            elif not key.startswith("_") and key not in cls.ignored:
                refused.append(f"{key}={value!r} (unknown)")
        if refused:
            raise WeightsError(
                f"{where} asks for what {cls.__name__} does not do: "
                f"{', '.join(refused)}. Use a Stable Diffusion 1.x model"
            )
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; the reference library reads it too."""
        return asdict(self)


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
    return config_class.from_dict(values, str(where))


def find_weights(folder: str | Path, name: str) -> Path:
    """The weights file in a folder: `name`, its half precision copy, or a pickle."""
    folder, stem = Path(folder), Path(name).stem
    old = "pytorch_model.bin" if stem == "model" else f"{stem}.bin"
    for candidate in (name, f"{stem}.fp16.safetensors", old):
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(
        f"{folder} has no {name} (it has: {list_folder(folder)}); "
        "copy the weights file there, or save the model again"
    )


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

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None):
        """Read the model from a folder, ready to evaluate, as `dtype` (or float32).

        Raises FileNotFoundError or WeightsError, which name the file and the remedy.
        """
        config = read_config(folder, cls.config_class, cls.diffusers_class)
        with torch.device("meta"):
            model = cls(config)
        path = find_weights(folder, cls.weights_name)
        load_strictly(model, cls.rename_on_load(read_weights(path)), str(path))
        return model.to(dtype or torch.float32).eval()

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
