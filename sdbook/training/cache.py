"""The frozen parts, once: latents and text states in files (chapter 8).

Each answer is kept under a key, a hash of all that it depends on, in a table that only
grows (`sdbook.run.tables`). The folder's names hold a hash of the frozen weights.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..clip import Tokenizer
from ..counts import counted
from ..images import short_name
from ..run.progress import leave_signals_to_main
from ..run.tables import Rows, fingerprint


@torch.no_grad()
def write_texts(table: Rows, texts, text_encoder, tokenizer, batch_size=256) -> None:
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
            f"{counted(len(long), 'caption')} longer than {room - 2} tokens, whose "
            "ends the text model does not see; shorten them, or begin them with what "
            "matters most (train-clip can also raise max_length). One of them: "
            f"{long[0]!r}",
            stacklevel=2,
        )


@torch.no_grad()
def write_moments(
    table: Rows, dataset, keys: list[str], vae, batch_size=128, num_workers=0
) -> None:
    """Add mean and log-variance (2c, h, w) of every item that the table lacks."""
    device, known = next(vae.parameters()).device, table.numbers()
    wanted = {key: number for number, key in enumerate(keys) if key not in known}
    if not wanted:
        return
    items, read = list(wanted.items()), dataset.unread
    loader = DataLoader(
        items, batch_size, collate_fn=read, num_workers=num_workers,
        worker_init_fn=leave_signals_to_main,
    )  # fmt: skip
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


def as_it_is(batch):
    """The collation of `Encoded`, which already gives whole batches."""
    return batch


class Encoded(Dataset):
    """A dataset after its frozen parts: latents' moments and text states, in files.

    `moments` (rows, 2c, h, w) and `texts` (m, tokens, d), both float16, are mapped
    from `folder`, which several trainings may share; `rows` and `which` are the rows of
    each item, `captions` what it says. Text 0 is "". What is missing is computed first;
    pictures that cannot be read are left out, with a warning. Indexed with a list, it
    gives `(moments, text states)` of the whole batch at once. `sample` (m, tokens, d)
    are the states of captions that stand for all, `content` is a name for all of it.
    """

    batch_pixels = 2**19  # encoded at once: 128 pictures of 64 × 64, 2 of 512 × 512

    def __init__(self, dataset, vae, text_encoder, tokenizer, folder, num_workers=0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = sorted(tokenizer.backend.get_vocab().items()), tokenizer.max_length
        texts = f"texts-{fingerprint(text_encoder)}-{short_name(words)}"
        moments = f"moments-{fingerprint(vae)}-{dataset.side}"
        self.tables = Rows(folder / moments), Rows(folder / texts)
        some, captions = dataset.sample_captions(), dataset.captions()
        with FileLock(folder / "lock"):
            keys = dataset.keys(folder)
            said = ["", *captions, *some]
            write_texts(self.tables[1], said, text_encoder, tokenizer)
            size = max(1, self.batch_pixels // dataset.side**2)
            write_moments(self.tables[0], dataset, keys, vae, size, num_workers)
        self.find_rows(keys, captions)
        self.content = short_name(moments, texts, *keys, *captions)
        self.moments, self.texts = (table.open() for table in self.tables)
        number = self.tables[1].numbers()
        self.sample = self.tables[1].read([number[short_name(text)] for text in some])

    def find_rows(self, keys: list[str], captions: list[str]) -> None:
        """Where a picture cannot be read, the next one stands in with its caption."""
        row, number = (table.numbers() for table in self.tables)
        good = [i for i, key in enumerate(keys) if key in row]
        if not good:
            count = f"none of {len(keys)} pictures"
            raise ValueError(f"{count} can be read; mend the files")
        if len(good) < len(keys):
            count = f"{len(keys) - len(good)} of {len(keys)} pictures"
            warnings.warn(f"{count} cannot be read; others stand in", stacklevel=3)
        places = np.searchsorted(good, np.arange(len(keys))) % len(good)
        shown = [good[place] for place in places]
        self.captions = [captions[i] for i in shown]
        self.rows = np.array([row[keys[i]] for i in shown])
        self.which = np.array([number[short_name(text)] for text in self.captions])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        numbers = self.rows[indices], self.which[indices]
        both = (table.read(rows) for table, rows in zip(self.tables, numbers))
        return tuple(map(torch.from_numpy, both))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        moments, states = self.__getitems__([index])
        return moments[0], states[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "moments": None, "texts": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.moments, self.texts = (table.open() for table in self.tables)
