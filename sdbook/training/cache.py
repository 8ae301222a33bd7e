"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    get_worker_info,
)
from tqdm.auto import tqdm

from ..clip import Tokenizer
from ..data import CaptionedImages, CaptionedShards, Cut, Scenes
from ..run.settings import RunConfig, open_dataset
from ..run.tables import Rows, fingerprint, look_into, short_name

__all__ = [
    "write_texts",
    "Encoded",
    "captions_of",
    "caption_ids",
    "warn_about_long",
    "look_key",
    "list_items",
    "Missing",
    "MissingInShards",
    "BATCH_PIXELS",
    "write_moments",
    "side_of",
    "fill_cache",
    "find_rows",
    "encode_dataset",
]


@torch.no_grad()
def write_texts(table: "Rows", texts, text_encoder, tokenizer, batch_size=256) -> None:
    """Add the states (tokens, d) of every text that the table lacks."""
    device, known = next(text_encoder.parameters()).device, table.numbers()
    keys = {short_name(text): text for text in texts}  # equal texts once, in order
    missing = [(key, text) for key, text in keys.items() if key not in known]
    with tqdm(total=len(keys), initial=len(keys) - len(missing), desc="texts") as bar:
        for start in range(0, len(missing), batch_size):
            names, batch = map(list, zip(*missing[start : start + batch_size]))
            states = text_encoder(caption_ids(tokenizer, batch).to(device))
            table.append(names, states.half().cpu().numpy())
            bar.update(len(batch))
    warn_about_long(tokenizer, [text for _, text in missing])


class Encoded(Dataset):
    """A dataset after its frozen parts: latents' moments and text states, in files.

    `moments` (rows, 2c, h, w) and `texts` (m, tokens, d), both float16, are mapped
    from `folder`, which several trainings may share; `rows` and `which` are the rows of
    each item, `captions` what it says. Text 0 is "". What is missing is computed first
    (`fill_cache`); pictures that cannot be read are left out, with a warning. Indexed
    with a list, it gives `(moments, text states)` of the whole batch at once. `sample`
    (m, tokens, d) are the states of `some_captions` (or of the first 1000 items').
    """

    def __init__(
        self, dataset, vae, text_encoder, tokenizer, folder, num_workers=0,
        some_captions=(),
    ):  # fmt: skip
        *self.tables, items = fill_cache(
            Path(folder), dataset, vae, text_encoder, tokenizer, num_workers,
            some_captions,
        )  # fmt: skip
        self.rows, self.which = find_rows(*self.tables, items).T
        self.moments, self.texts = (table.open() for table in self.tables)
        some = list(some_captions) or [text for _, text in items[:1000]]
        number = self.tables[1].numbers()
        said = {number[short_name(text)]: text for _, text in items}
        self.captions = [said[which] for which in self.which]
        self.sample = self.texts[[number[short_name(text)] for text in some]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        moments = torch.from_numpy(self.moments[self.rows[indices]])
        return moments, torch.from_numpy(self.texts[self.which[indices]])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        moments, states = self.__getitems__([index])
        return moments[0], states[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "moments": None, "texts": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.moments, self.texts = (table.open() for table in self.tables)


def captions_of(dataset: Dataset) -> list[str]:
    """Every caption of a dataset, without opening a picture."""
    if isinstance(dataset, Scenes):
        return [dataset.scene(i).caption for i in range(len(dataset))]
    if isinstance(dataset, CaptionedShards):
        return [caption for *_, caption in dataset.samples(dataset.shards)]
    return [caption for _, caption in dataset.pairs]


def caption_ids(tokenizer: Tokenizer, captions: list[str]) -> Int64[Tensor, "m n"]:
    """Token ids of captions, without a warning for each that is too long."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* tokens of the prompt fit")
        return tokenizer(captions)


def warn_about_long(tokenizer: Tokenizer, captions: list[str]) -> None:
    """Warn, once for all of them, of captions that the text model sees in part only."""
    rows = tokenizer.backend(captions, verbose=False)["input_ids"] if captions else []
    room = tokenizer.max_length
    long = [text for text, ids in zip(captions, rows, strict=True) if len(ids) > room]
    if long:
        warnings.warn(
            f"{len(long):,} captions are longer than {room - 2} tokens, and the text "
            "model does not see their ends; shorten them, or begin them with what "
            "matters most (train-clip can also raise max_length). One of them: "
            f"{long[0]!r}",
            stacklevel=2,
        )


def look_key(content: str, cut: Cut, name: str, look: int) -> str:
    """The key of one look at a picture, of which `content` is the short name."""
    return short_name(content, cut.size, *cut.place(name, look))


def list_items(dataset: Dataset, folder: Path) -> list[tuple[str, str]]:
    """(key, caption) of every item, in order; `folder` keeps notes of the files."""
    if isinstance(dataset, Scenes):
        first = copy.copy(dataset)
        first.length = 16
        world = short_name(*(pixels.numpy().tobytes() for pixels, _ in first))
        captions = captions_of(dataset)
        return [(short_name(world, i), text) for i, text in enumerate(captions)]
    if isinstance(dataset, CaptionedShards):
        shards = look_into(folder / "shards.json", dataset.shards, lambda shard: [
            (short_name(data), name, caption)
            for name, data, caption in dataset.samples([shard])
        ])  # fmt: skip
        pictures = [picture for shard in shards for picture in shard]
    else:
        files, captions = map(list, zip(*dataset.pairs))
        contents = look_into(
            folder / "pictures.json", files, lambda file: short_name(file.read_bytes())
        )
        names = map(dataset.name, range(len(files)))
        pictures = list(zip(contents, names, captions))
    return [
        (look_key(content, dataset.cut, name, look), caption)
        for look in range(dataset.cut.looks)
        for content, name, caption in pictures
    ]


class Missing(Dataset):
    """The items of `wanted` {key: number} as (key, pixels); None if unreadable."""

    def __init__(self, dataset: Dataset, wanted: dict[str, int]):
        self.dataset, self.wanted = dataset, list(wanted.items())

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[str, Tensor | None]:
        key, number = self.wanted[place]
        if isinstance(self.dataset, CaptionedImages):
            return key, self.dataset.read(number)
        return key, self.dataset[number][0]


class MissingInShards(IterableDataset):
    """The same from shards, in their order; workers share the shards."""

    def __init__(self, dataset: CaptionedShards, wanted: dict[str, int]):
        self.dataset, self.wanted = dataset, wanted

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        worker, shards, cut = get_worker_info(), self.dataset.shards, self.dataset.cut
        mine = shards[worker.id :: worker.num_workers] if worker else shards
        for name, data, _ in self.dataset.samples(mine):
            content = short_name(data)
            for look in range(cut.looks):
                key = look_key(content, cut, name, look)
                if key in self.wanted:
                    yield key, self.dataset.read(name, data, look)


BATCH_PIXELS = 2**19  # fits into any memory: 128 pictures of 64 × 64, 2 of 512 × 512


@torch.no_grad()
def write_moments(table: Rows, dataset, keys: list[str], vae, num_workers=0) -> None:
    """Add mean and log-variance (2c, h, w) of every item that the table lacks."""
    device, known = next(vae.parameters()).device, table.numbers()
    wanted = {key: number for number, key in enumerate(keys) if key not in known}
    if not wanted:
        return
    shards = isinstance(dataset, CaptionedShards)
    source = (MissingInShards if shards else Missing)(dataset, wanted)
    batch_size = max(1, BATCH_PIXELS // side_of(dataset) ** 2)
    loader = DataLoader(source, batch_size, collate_fn=list, num_workers=num_workers)
    done = len(keys) - len(wanted)
    with tqdm(total=len(keys), initial=done, desc="latents") as bar:
        for items in loader:
            bar.update(len(items))
            good = [(key, pixels) for key, pixels in items if pixels is not None]
            if good:
                names, pixels = zip(*good)
                pixels = torch.stack(pixels).to(
                    device, memory_format=torch.channels_last
                )
                posterior = vae.encode(pixels)
                moments = torch.cat([posterior.mean, posterior.logvar], 1)
                table.append(list(names), moments.half().cpu().numpy())


def side_of(dataset: Dataset) -> int:
    """The side of a dataset's pictures, in pixels."""
    return dataset.size if isinstance(dataset, Scenes) else dataset.cut.size


def fill_cache(
    folder: Path, dataset, vae, text_encoder, tokenizer, num_workers=0, captions=()
) -> tuple[Rows, Rows, list[tuple[str, str]]]:
    """Compute what the cache in `folder` lacks of a dataset and of more `captions`.

    Returns the tables of moments and of texts, and (key, caption) of every item.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(tokenizer.backend.get_vocab().items()), tokenizer.max_length
    texts = Rows(folder / f"texts-{fingerprint(text_encoder)}-{short_name(words)}")
    moments = Rows(folder / f"moments-{fingerprint(vae)}-{side_of(dataset)}")
    with FileLock(folder / "lock"):
        items = list_items(dataset, folder)
        keys, said = map(list, zip(*items))
        write_texts(texts, ["", *said, *captions], text_encoder, tokenizer)
        write_moments(moments, dataset, keys, vae, num_workers)
    return moments, texts, items


def find_rows(moments: Rows, texts: Rows, items: list[tuple[str, str]]) -> np.ndarray:
    """The rows (n, 2) of each item's moments and text.

    For a picture that cannot be read the next one stands in, with its caption.
    """
    row, number = moments.numbers(), texts.numbers()
    good = [i for i, (key, _) in enumerate(items) if key in row]
    if not good:
        raise ValueError(f"none of {len(items)} pictures can be read; mend the files")
    if len(good) < len(items):
        count = f"{len(items) - len(good)} of {len(items)} pictures"
        warnings.warn(f"{count} cannot be read; others stand in", stacklevel=2)
    places = np.searchsorted(good, np.arange(len(items))) % len(good)
    stand_ins = (items[good[place]] for place in places)
    return np.array([(row[key], number[short_name(text)]) for key, text in stand_ins])


def encode_dataset(
    config: RunConfig, dataset, accelerator, vae, text_encoder, tokenizer
):
    """The pictures and captions of a run after the frozen parts."""
    some = ()
    if isinstance(dataset, Scenes):
        some = captions_of(open_dataset(replace(config, kinds=(), num_pictures=1000)))
    vae.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    return Encoded(
        dataset, vae, text_encoder, tokenizer, Path(config.output_dir) / "cache",
        config.num_workers, some,
    )  # fmt: skip
