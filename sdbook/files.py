"""Files of models: JSON and tensors, in a folder, in shards, on the hub.

Generated from chapters/B_file_formats.ipynb; do not edit.
"""

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "WeightsError", "write_atomically", "write_json", "save_weights", "read_json",
    "list_folder", "TOGETHER", "read_safetensors", "find_weights", "find_shards",
    "Ignored", "STAND_INS", "ParameterDict", "read_pickle", "read_weights", "explain",
    "WEIGHTS_NAMES", "is_hub_id", "weights_patterns", "lacks_weights", "fetch",
    "download",
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


def save_weights(
    state_dict: dict[str, Tensor], path: str | Path, **facts: str
) -> None:
    """Write tensors (and `facts` about them) as safetensors, atomically.

    They may lie on any device and in any layout.
    """
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state_dict.items()
    }

    def write(file: Path) -> None:
        save_file(tensors, file, metadata={"format": "pt", **facts})
        file.chmod(0o644)  # safetensors' files are private; a model is for sharing

    write_atomically(path, write)


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


TOGETHER = 16  # tensors that can be let go together


def read_safetensors(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each a piece of that file.

    Nothing is read before it is used. Changing a tensor does not change the file. The
    file is mapped once, or with `mapped=False` in pieces that can be let go.
    """
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    tensors, step = {}, (len(names) or 1) if mapped else TOGETHER
    for start in range(0, len(names), step):
        with safe_open(path, framework="pt") as file:
            for name in names[start : start + step]:
                tensors[name] = file.get_tensor(name)
    return tensors


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


class ParameterDict(dict):
    """Stands in for PyTorch's, in which the first words of textual inversion lie."""

    __module__ = "torch.nn.modules.container"

    def __setstate__(self, state):
        self.update(state["_parameters"])


STAND_INS.append(ParameterDict)


def read_pickle(path: Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a pickle, which cannot run code while it is read."""
    mapped = mapped and zipfile.is_zipfile(path)  # older pickles cannot be mapped
    with torch.serialization.safe_globals(STAND_INS):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    for shelf in ("state_dict", "string_to_param"):  # the second is A1111's for words
        loaded = loaded.get(shelf, loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def read_weights(path: str | Path, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle (.bin, .ckpt, .pt).

    They are pieces of the file, not copies. With `mapped=False` their memory can go
    bit by bit; a pickle is then read at once. A pickle is opened with
    `weights_only=True` and cannot run code. Raises FileNotFoundError for a missing
    file, WeightsError for one that is cut short, foreign or dangerous; the message
    names the file and the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise WeightsError(f"{path} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`"
        )
    try:
        if path.suffix.lower() == ".safetensors":
            return read_safetensors(path, mapped)
        return read_pickle(path, mapped)
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a torn pickle raises a dozen kinds
        raise explain(path, error) from error


def explain(path: Path, error: Exception) -> Exception:
    """What the error of a library means for whoever wanted to open `path`."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "Too many open files" in reason:  # which is no fault of this file
        return OSError(errno.EMFILE, "Too many open files", str(path))
    if kind := re.search(r"unknown variant `(\w+)`", reason):
        return WeightsError(
            f"{path} holds numbers of the type {kind[1]}, which we cannot read; "
            "use a float32, float16 or bfloat16 version of it"
        )
    if isinstance(error, SafetensorError):
        return WeightsError(
            f"{path} is not a whole safetensors file ({reason}); it was cut short or "
            "is another kind of file: copy or download it again"
        )
    guess = "it may be cut short: copy it again, or"
    if isinstance(error, pickle.UnpicklingError):  # whose own advice is unsafe
        wish = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wish[1]}" if wish else "it holds more than tensors"
        guess = "nothing in it was run;"
    return WeightsError(
        f"{path} could not be opened as a file of tensors ({reason}); {guess} "
        "use the .safetensors version of it"
    )


WEIGHTS_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name looks like `owner/model` and is nothing on this machine."""
    looks = re.fullmatch(r"[\w-][\w.-]*/[^/]+", str(name))
    return bool(looks) and not Path(name).exists()


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
