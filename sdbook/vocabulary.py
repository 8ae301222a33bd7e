"""A tokenizer's words: learning them, the files that keep them, what may go wrong.

Written by hand. Chapter 6 teaches byte-pair encoding, and has the class `Tokenizer`.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from .counts import counted
from .files import as_path, write_json

__all__ = [
    "START", "END", "byte_symbols", "merges_of", "learn_merges", "write_vocabulary",
    "open_tokenizer", "write_older_files", "learn_vocabulary", "expand_words",
    "check_text", "warn_about_cut_words",
]  # fmt: skip

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(rest)]


def merges_of(library_tokenizer) -> list[tuple[str, str]]:
    """The merges that a tokenizer of the library `tokenizers` holds, in order."""
    merges = json.loads(library_tokenizer.to_str())["model"]["merges"]
    return [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]


def learn_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
    """The first `count` merges of byte-pair encoding, in the order they are learned.

    Fewer when the captions have no more. From Sennrich et al. (2016).
    """
    import tokenizers as library
    from tokenizers import pre_tokenizers as cutters

    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner = library.Tokenizer(library.models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFC(), library.normalizers.Lowercase()]
    )
    learner.pre_tokenizer = cutters.Sequence(
        [
            cutters.Split(library.Regex(words), behavior="removed", invert=True),
            cutters.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Naming every symbol beforehand fixes the order in which ties are broken.
    trainer = library.trainers.BpeTrainer(
        vocab_size=512 + count,
        initial_alphabet=byte_symbols(),
        special_tokens=[symbol + "</w>" for symbol in byte_symbols()],
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return merges_of(learner)


def write_vocabulary(
    tokens: list[str], merges: list[tuple[str, str]], folder: str | Path
) -> None:
    """Write vocab.json (token to number) and merges.txt, as CLIP has them."""
    numbers = {token: i for i, token in enumerate(tokens)}
    text = json.dumps(numbers, ensure_ascii=False, indent=0)
    (Path(folder) / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def open_tokenizer(folder: str | Path):
    """The `transformers.CLIPTokenizer` of a folder; errors name the folder."""
    folder = as_path(folder, "a tokenizer")
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer (neither vocab.json nor tokenizer.json); "
            "give a folder that save_pretrained wrote"
        )
    from transformers import CLIPTokenizer

    try:
        backend = CLIPTokenizer.from_pretrained(str(folder))
        length = backend.model_max_length
        if type(length) not in (int, float) or not length > 2:
            raise ValueError(f"model_max_length={length!r} is no number of tokens")
        return backend
    except Exception as error:  # each file has its own way to be broken
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({error}); copy it again"
        ) from error


def write_older_files(backend, folder: str | Path) -> None:
    """Write vocab.json and merges.txt beside what the library saves itself."""
    model = json.loads(backend.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    write_vocabulary(tokens, merges_of(backend.backend_tokenizer), folder)


def learn_vocabulary(
    captions: Iterable[str], vocab_size: int, max_length: int, folder: str | Path
) -> None:
    """Learn merges from captions and write a tokenizer folder."""
    if vocab_size < 514:
        raise ValueError(
            f"vocab_size={vocab_size}, but bytes, bytes at a word's end, start "
            "and end are 514 already; ask for 514 or more"
        )
    merges = learn_merges(list(captions), vocab_size - 514)
    tokens = byte_symbols() + [symbol + "</w>" for symbol in byte_symbols()]
    tokens += [first + second for first, second in merges] + [START, END]
    write_vocabulary(tokens, merges, folder)
    special = {"bos_token": START, "eos_token": END, "pad_token": END}
    write_json(
        {**special, "unk_token": END, "model_max_length": max_length},
        Path(folder) / "tokenizer_config.json",
    )


def expand_words(backend, ids: list[int]) -> list[int]:
    """Ids, and after an added word its other rows: `<x>_1`, `<x>_2`, … (chapter 12)."""
    added, expanded = backend.added_tokens_encoder, []
    names = {number: name for name, number in added.items()}
    for number in ids:
        word, count = names.get(number), 0
        while number is not None:
            expanded.append(number)
            count += 1
            number = added.get(f"{word}_{count}") if word else None
    return expanded


def check_text(text: str) -> None:
    """Raise ValueError for a text with halves of characters, which no file can hold."""
    halves = [letter for letter in text if "\ud800" <= letter <= "\udfff"]
    if halves:
        raise ValueError(
            f"the text {text!r} holds {halves[0]!r}, half of a character, as of a file "
            "or a terminal that is not UTF-8; write it again as UTF-8"
        )


def warn_about_cut_words(lost: str, room: int) -> None:
    """Say which words of a prompt did not fit."""
    words = lost.split()
    shown = " ".join(words[:12]) + (" …" if len(words) > 12 else "")
    warnings.warn(
        f"only {room} tokens of the prompt fit; the model does not see its last "
        f"{counted(len(words), 'word')}: {shown!r}. Shorten the prompt",
        stacklevel=4,
    )
