"""Files of models: JSON and tensors, in a folder, in shards, on the hub.

Written by hand. Appendix B says what such files are, and what must not go wrong.
"""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "WeightsError", "naming", "write_atomically", "write_json", "save_weights",
    "sort_facts", "as_path", "INDEX", "saving_together", "finish_saving", "no_file",
    "list_folder", "some", "read_json", "TOGETHER", "read_safetensors", "read_facts",
    "check_sums", "STEMS", "KINDS", "VARIANTS", "weights_names", "find_weights",
    "find_shards", "other_copies", "Ignored", "STAND_INS", "ParameterDict",
    "read_pickle", "read_weights", "explain", "is_hub_id", "lacks_weights", "fetch",
    "upload", "download",
]


class WeightsError(ValueError):
    """A config or weights file that cannot be used; says which and what to do."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError that names `path` and the way out of what writing can raise."""
    try:
        yield
    except Exception as error:  # of this library or that
        number = re.search(r"(?:Errno|os error) (\d+)", str(error))
        if not number and not isinstance(error, OSError):
            raise
        reason = os.strerror(int(number[1])) if number else error
        raise OSError(
            *([int(number[1])] if number else []),
            f"{path} could not be written ({reason}), and what was there is as before; "
            "make room, or choose another folder",
        ) from error


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, then rename it to `path`.

    Raises OSError, naming `path`, for a full disk and the like; an old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a rename may come before the bytes
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

    They may lie on any device and in any layout. The header keeps a check sum of each.
    """
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state_dict.items()
    }
    flat = {key: tensor.reshape(-1) for key, tensor in tensors.items()}
    sums = {key: crc32(x.view(torch.uint8).numpy()) for key, x in flat.items()}
    facts = {"format": "pt", "crc32": json.dumps(sums), **facts}

    def write(file: Path) -> None:
        save_file(tensors, file, metadata=facts)
        sort_facts(file)
        file.chmod(0o644)  # safetensors' files are private; a model is for sharing

    write_atomically(path, write)


def sort_facts(path: Path) -> None:
    """Sort what a header says, which comes in any order: equal weights, equal bytes."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))  # spaces at the end, as the format has it


def as_path(path, what: str) -> Path:
    """A path that somebody gave. Raises ValueError for an empty one, or none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).strip():
        raise ValueError(f"the path of {what} is {path!r:.80}; give a file or a folder")
    return Path(path)


INDEX = "model_index.json"  # without which no program opens a model's folder


@contextmanager
def saving_together(folder: str | Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in `folder` all at the end.

    Interrupted before, all is as it was; after, `finish_saving` goes on. Other
    people's files stay. For one writer at a time.
    """
    folder = as_path(folder, "what to save")
    side = folder / ".saving"
    finish_saving(folder)
    shutil.rmtree(side, ignore_errors=True)  # of one that was killed
    try:
        with naming(folder):
            side.mkdir(parents=True)
            yield side
            os.replace(side, folder / ".saved")  # from here on it is only finished
    finally:
        shutil.rmtree(side, ignore_errors=True)
    finish_saving(folder)


def finish_saving(folder: Path) -> None:
    """Put files that were saved together into their places, also after a crash.

    What would else mix with them goes: copies of older weights, an older index first.
    """
    saved = folder / ".saved"
    if not saved.is_dir():
        return
    files = [path for path in saved.rglob("*") if path.is_file()]
    if (saved / INDEX).is_file():
        (folder / INDEX).unlink(missing_ok=True)
    for file in sorted(files, key=lambda path: path.name == INDEX):
        place = folder / file.relative_to(saved)
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in other_copies(place):
            old.unlink()
        os.replace(file, place)
    shutil.rmtree(saved)


def no_file(path: Path) -> str:
    """Why a path cannot be read as a file, for an error message."""
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if path.exists():
        return f"{path} is a pipe or a device, not a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} (for {path.name})"
    return f"{path.parent} has no {path.name} (it has: {list_folder(path.parent)})"


def list_folder(folder: Path) -> str:
    """The names in a folder, for an error message."""
    return some(sorted(path.name for path in folder.iterdir())) or "nothing"


def some(names: list[str], most: int = 20) -> str:
    """Names (or the first of them), for an error message."""
    return ", ".join(names[:most] + ["…"] * (len(names) > most))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; errors say which file, what is wrong and what to do.

    Raises FileNotFoundError if it is missing, WeightsError if it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{no_file(path)}; give a folder that save_pretrained wrote"
        )
    try:
        if path.stat().st_size > 10**8:
            raise ValueError("it has more than 100 MB")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not valid JSON ({error}); copy or save it again"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object; is it another file's name?")
    return values


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


def read_facts(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; nothing for other files."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@cache
def check_sums(path: Path, *version: int) -> None:
    """Raise WeightsError if a tensor is not as it was saved, by a file's own sums.

    `version` (its time and size) makes a program ask once.
    """
    told, wrong = read_facts(path).get("crc32", ""), []
    sums = json.loads(told) if told.startswith("{") else {}  # or not of our making
    buffer = memoryview(bytearray(2**20))  # mapped pages would stay in memory
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if sums else {}
        for name in sorted(header.keys() & sums.keys()):
            (begin, end), found = header[name]["data_offsets"], 0
            file.seek(8 + length + begin)
            while begin < end and (count := file.readinto(buffer[: end - begin])):
                found, begin = crc32(buffer[:count], found), begin + count
            if found != sums[name]:
                wrong.append(name)
    if wrong:
        raise WeightsError(
            f"{path} is damaged (wrong check sum: {some(wrong, 5)}); "
            "copy or download it again"
        )


STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
KINDS = ("safetensors", "bin")  # the second are pickles
VARIANTS = ("fp16", "bf16", "fp32", "non_ema")  # copies that people publish


def weights_names(stem: str, copy: str, kind: str) -> tuple[str, str, list[str]]:
    """What a network's weights may be called: one file, an index, patterns of shards.

    `copy` is a variant, such as "fp16", or "" for the usual.
    """
    if (stem, kind) == ("model", "bin"):
        stem = "pytorch_model"
    mark, shard = f".{copy}" if copy else "", "-?????-of-?????"
    shards = [f"{stem}{end}.{kind}" for end in (mark + shard, shard + mark)]
    return f"{stem}{mark}.{kind}", f"{stem}.{kind}.index{mark}.json", shards


def find_weights(
    folder: str | Path, name: str, variant: str | None = None
) -> list[Path]:
    """The weights file in a folder, or all its shards; safetensors before pickles.

    Without a `variant`, the usual file or else its half precision copy; with "" the
    usual alone. Raises FileNotFoundError, which says what is there, or which shard
    is not, and WeightsError for an index that is none.
    """
    folder, stem = Path(folder), Path(name).stem
    copies = ("", "fp16") if variant is None else (variant,)
    for copy, kind in product(copies, KINDS):
        file, index, _ = weights_names(stem, copy, kind)
        if (folder / file).is_file():
            return [folder / file]
        if (folder / index).is_file():
            return find_shards(folder / index)
    wanted = weights_names(stem, variant or "", KINDS[0])[0]
    raise FileNotFoundError(
        f"{no_file(folder / wanted)}; "
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


def other_copies(path: Path) -> list[Path]:
    """What some program would take beside or in place of `path`, though it is older."""
    if path.name == "tokenizer_config.json":
        more = ("added_tokens.json", "special_tokens_map.json")
        return [path.with_name(name) for name in more if path.with_name(name).exists()]
    if path.name not in [f"{stem}.safetensors" for stem in STEMS]:
        return []
    found = set()
    for copy, kind in product(("", *VARIANTS), KINDS):
        file, index, shards = weights_names(path.stem, copy, kind)
        for name in (file, index, *shards):
            found |= set(path.parent.glob(name))
    return sorted(found - {path})


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
    file, WeightsError for one that is cut short, damaged, foreign or dangerous; the
    message names the file and the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{no_file(path)}; give a file of weights")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise WeightsError(f"{path} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`"
        )
    try:
        if path.suffix.lower() != ".safetensors":
            return read_pickle(path, mapped)
        tensors, state = read_safetensors(path, mapped), path.stat()
        check_sums(path, state.st_mtime_ns, state.st_size)
        return tensors
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


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name looks like `owner/model` and is nothing on this machine.

    What is in runs/, where our trainings write, never does.
    """
    looks = re.fullmatch(r"(?!runs/)[\w-][\w.-]*/[^/]+", str(name))
    return bool(looks) and not Path(name).exists()


def lacks_weights(folder: Path, variant: str) -> bool:
    """Whether a folder has a network's config but not its weights of this variant."""
    for name in STEMS:
        try:
            return not find_weights(folder, name, variant)
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


def upload(folder: str | Path, repository: str, private: bool | None = None) -> str:
    """Put a folder's files into a Hugging Face repository; returns its address.

    It is made if there is none. Raises OSError with the id and the way out.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        made = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"could not write {repository!r} on the Hugging Face hub ({reason}). Check "
            "the id (owner/model) and the network, and log in with `hf auth login`"
        ) from error
    return str(made)


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
    for copy, kind in product(copies, KINDS):
        names = [weights_names(stem, copy, kind) for stem in STEMS]
        names = [name for file, _, shards in names for name in (file, *shards)]
        wanted = [starts[folder] + name for folder in missing for name in names]
        root = fetch(repository, revision, [INDEX, *texts, *wanted])
        missing = [folder for folder in missing if lacks_weights(root / folder, copy)]
        if not missing:
            break
    return root
