"""Tables of numbers in files: they only grow, and survive being cut off at any time."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
from torch import nn

from ..files import write_atomically
from ..images import KEY_LENGTH


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights: other weights, other name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_at(path: Path, place: int, data: bytes) -> None:
    """Write at a place of a file, and drop what came after it."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(place)
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the rows have to be there before their keys


class Rows:
    """A growing table of float16 rows in files, each row under a key.

    `folder` gets rows (the numbers), keys (32 letters a row) and shape.json. May be
    cut off at any time: a row counts once its key is written, which is done last. One
    process at a time may append; any number may read what was there when they opened.
    """

    def __init__(self, folder: Path):
        self.folder, self.shape_file = folder, folder / "shape.json"

    def count(self) -> int:
        """How many rows are there, whole and with a key."""
        if not (self.folder / "keys").exists():
            return 0
        row = 2 * math.prod(json.loads(self.shape_file.read_text()))  # bytes
        sizes = [os.path.getsize(self.folder / name) for name in ("keys", "rows")]
        return min(sizes[0] // KEY_LENGTH, sizes[1] // row)

    def numbers(self) -> dict[str, int]:
        """The number of each key's row."""
        count = self.count()
        text = (self.folder / "keys").read_text()[: count * KEY_LENGTH] if count else ""
        return {text[i * KEY_LENGTH :][:KEY_LENGTH]: i for i in range(count)}

    def append(self, keys: list[str], rows: np.ndarray) -> None:
        """Add rows (b, …) at the end; on the disk when this returns."""
        if not self.shape_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(rows.shape[1:])
            write_atomically(self.shape_file, lambda file: file.write_text(text))
        count, rows = self.count(), rows.astype(np.float16)
        write_at(self.folder / "rows", count * rows[0].nbytes, rows.tobytes())
        write_at(self.folder / "keys", count * KEY_LENGTH, "".join(keys).encode())

    def open(self) -> np.ndarray:
        """All rows (count, …), mapped into memory: read when they are used."""
        shape = (self.count(), *json.loads(self.shape_file.read_text()))
        return np.memmap(self.folder / "rows", np.float16, "r", shape=shape)
