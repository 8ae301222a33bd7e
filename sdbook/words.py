"""Words of textual inversion: which can be new, and their files, whoever wrote them.

A word has one row of the text model's table or several, each with a token of its own:
`<x>`, `<x>_1`, `<x>_2`, as in diffusers.
"""

import re
from pathlib import Path

from torch import Tensor

from .adapters import file_for
from .clip import Tokenizer
from .files import WeightsError, as_path, list_folder, read_weights, save_weights
from .vocabulary import expand_words
from .weights import WIDTHS

WORD_FILE = "learned_embeds.safetensors"
WORD_FILES = (WORD_FILE, "learned_embeds.bin")
# What A1111's files call their rows. Their word is the name of the file.
NAMELESS = ("emb_params", "*")


def spelled(word: str, count: int) -> list[str]:
    """The tokens of a word with so many rows."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def check_words(tokenizer: Tokenizer, words: list[str]) -> None:
    """Raise ValueError for words that the tokenizer knows, or that cannot be new."""
    backend = tokenizer.backend
    vocabulary, added = backend.get_vocab(), backend.added_tokens_encoder
    known = [token.removesuffix("</w>") for token in vocabulary if token not in added]
    for word in words:
        one = isinstance(word, str) and word.split() == [word] and len(word) < 200
        if not one:
            raise ValueError(
                f"{word!r:.60} is not one word; give one without spaces, as <new>"
            )
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{word!r} is no text; give a word, as <new>") from None
        pieces, other = backend.tokenize(word), f"<{word.strip('<>')}-2>"
        if word in vocabulary or len(pieces) < 2:
            raise ValueError(
                f"the tokenizer knows {word!r} already; choose another word, as {other}"
            )
        base = re.fullmatch(r"(.+)_\d+", word)
        if f"{word}_1" in vocabulary or (base and base[1] in added):
            raise ValueError(
                f"{word!r} would be one word with several rows together with one that "
                f"was added already; choose another word, as {other}"
            )
        symbols = "".join(pieces).replace("</w>", "")
        if torn := sorted({token for token in known if symbols in token}):
            torn = [backend.convert_tokens_to_string([one]) for one in torn[:5]]
            raise ValueError(
                f"{word!r} is a piece of words that the tokenizer knows, which it "
                f"would tear ({', '.join(torn)}); choose another word, as {other}"
            )


def number_of(tokenizer: Tokenizer, word: str) -> int:
    """The number of a word that is one token. Raises ValueError for any other."""
    text = word if isinstance(word, str) else ""
    ids = tokenizer.backend(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"{word!r:.60} is {len(ids)} tokens; give a word that is one, such as a "
            "common one for what you teach"
        )
    return ids[0]


def find_word(path: str | Path) -> Path:
    """The file of a word: the file itself, or a folder's.

    Raises FileNotFoundError, saying what a folder has instead.
    """
    path = as_path(path, "a word")
    if not path.is_dir():
        return path
    found = [path / name for name in WORD_FILES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path} has no {WORD_FILE} (it has: {list_folder(path)}); give the file"
        )
    return found[0]


def read_word(path: str | Path, width: int, most: int) -> tuple[str, Tensor]:
    """The word of a file (or folder) and its rows (n, d), at most so many.

    Reads diffusers' files and those of A1111, whose word is the file's name. Raises
    FileNotFoundError, and WeightsError for what holds no such rows of `width`.
    """
    path = find_word(path)
    tensors = read_weights(path)
    found = ", ".join(f"{name:.60} {(*t.shape,)}" for name, t in tensors.items())
    if len(tensors) != 1:
        xl = " (a word for Stable Diffusion XL)" if "clip_g" in tensors else ""
        raise WeightsError(
            f"{path} holds {found[:300] or 'nothing'}{xl}, but one word is expected; "
            "give a word for this text model"
        )
    ((name, rows),) = tensors.items()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point():
        kind = WIDTHS.get(rows.shape[-1] if rows.ndim else 0)
        made_for = f", as for {kind}," if kind else ""
        raise WeightsError(
            f"{path} holds {found}{made_for} but rows of {width} are expected; give a "
            "word that was trained for this text model"
        )
    if not 0 < len(rows) <= most or not rows.isfinite().all():
        raise WeightsError(
            f"{path} holds {found}, but 1 to {most} rows of finite numbers are "
            "expected, which is what a prompt has room for; train it again"
        )
    return path.stem if name in NAMELESS else name, rows.detach()


def save_word(path: str | Path, pipe, word: str) -> None:
    """Write a word of a pipeline and its rows as diffusers does: `{word: (n, d)}`.

    `path` is a .safetensors file or a folder. Raises ValueError for a word that the
    pipeline was not taught.
    """
    path = file_for(path, WORD_FILE, "a word")
    backend = pipe.tokenizer.backend
    added = backend.added_tokens_encoder
    taught = [one for one in added if one not in backend.all_special_tokens]
    if word not in taught:
        raise ValueError(
            f"{word!r} is no added word of this pipeline, which has "
            f"{', '.join(taught[:12]) or 'none'}; give one of these, or add it first"
        )
    table = pipe.text_encoder.embeddings.token_embedding.weight
    save_weights({word: table[expand_words(backend, [added[word]])]}, path)
