"""Tables of numbers in files: they only grow, and survive being cut off at any time."""

import hashlib
import json
import math
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
from torch import nn

from ..counts import counted
from ..files import naming, write_atomically
from ..images import KEY_LENGTH

CHECKED = 2**30  # bytes of rows that are read when a table is opened
STRUCK_OUT = b"-" * KEY_LENGTH


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights: other weights, other name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_at(path: Path, place: int, data: bytes, cut: bool = True) -> None:
    """Write at a place of a file, and `cut` off what came after it."""
    with naming(path), open(path, "r+b" if path.exists() else "wb") as file:
        if cut:
            file.truncate(place)
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the rows have to be there before their keys


def sums_of(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The check sum (n,) of each key (n, 32) with its row (n, …)."""
    pairs = zip(keys, rows, strict=True)
    sums = [zlib.crc32(row.tobytes(), zlib.crc32(key.tobytes())) for key, row in pairs]
    return np.array(sums, "<u4")


class Rows:
    """A growing table of float16 rows in files, each row under a key.

    `folder` gets rows (the numbers), sums (a CRC-32 of shape.json, then one of each key
    with its row), keys (32 letters a row) and shape.json. May be cut off at any time: a
    row counts once its key is written, which is done last. What a disk has damaged is
    found by its sum and struck out, to be made again. One process at a time may append;
    any number may read what was there when they opened.
    """

    def __init__(self, folder: Path):
        self.folder, self.shape_file = folder, folder / "shape.json"
        self.keys, self.sums, self.rows = (
            folder / name for name in ("keys", "sums", "rows")
        )
        self.maps, self.checked = None, False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "maps": None}  # each process maps the files itself

    def shape(self) -> tuple[int, ...] | None:
        """The shape of a row, as the file says; None if it says nothing of use."""
        try:
            shape = json.loads(self.shape_file.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        fits = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        return tuple(shape) if fits else None

    def row_bytes(self) -> int:
        """How long a row is."""
        return 2 * math.prod(self.shape())

    def count(self) -> int:
        """How many rows are there, whole and with a key."""
        if self.shape() is None or not self.keys.exists() or not self.rows.exists():
            return 0
        count = os.path.getsize(self.keys) // KEY_LENGTH
        if self.sums.exists():
            count = min(count, os.path.getsize(self.sums) // 4 - 1)
        return max(0, min(count, os.path.getsize(self.rows) // self.row_bytes()))

    def numbers(self) -> dict[str, int]:
        """The number of each key's row. The first time, damaged rows are struck out."""
        if not self.checked:
            self.check()
        data = self.keys.read_bytes() if self.count() else b""
        places = range(0, self.count() * KEY_LENGTH, KEY_LENGTH)
        keys = [data[place : place + KEY_LENGTH] for place in places]
        return {
            key.decode("ascii", "replace"): number
            for number, key in enumerate(keys)
            if key != STRUCK_OUT
        }

    def append(self, keys: list[str], rows: np.ndarray) -> None:
        """Add rows (b, …) at the end; on the disk when this returns.

        Raises ValueError for what is no number, or too large for float16.
        """
        if not self.checked:
            self.check()
        with np.errstate(over="ignore"):
            count, rows = self.count(), rows.astype(np.float16)
        if not np.isfinite(rows).all():
            raise ValueError(
                f"what {self.folder} should hold is no number, or too large for "
                "float16: the weights of the frozen part are lost; take other ones"
            )
        if self.shape() is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(rows.shape[1:])
            write_atomically(self.shape_file, lambda file: file.write_text(text))
            write_at(self.sums, 0, self.sum_of_shape())
        names = np.frombuffer("".join(keys).encode(), np.uint8).reshape(len(keys), -1)
        write_at(self.rows, count * self.row_bytes(), rows.tobytes())
        write_at(self.sums, 4 + 4 * count, sums_of(names, rows).tobytes())
        write_at(self.keys, count * KEY_LENGTH, names.tobytes())
        self.maps = None

    def mapped(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Keys, sums and rows, mapped into memory: read when they are used."""
        if self.maps is None:
            n, sums = self.count(), None
            if self.sums.exists():
                sums = np.memmap(self.sums, "<u4", "r", offset=4, shape=(n,))
            keys = np.memmap(self.keys, np.uint8, "r", shape=(n, KEY_LENGTH))
            rows = np.memmap(self.rows, np.float16, "r", shape=(n, *self.shape()))
            self.maps = keys, sums, rows
        return self.maps

    def open(self) -> np.ndarray:
        """All rows (count, …), mapped into memory as they are now."""
        self.maps = None
        return self.mapped()[2]

    def read(self, numbers) -> np.ndarray:
        """The rows of these numbers (n,), checked.

        Raises ValueError for one that was damaged; it is struck out.
        """
        keys, sums, rows = (part[numbers] for part in self.mapped())
        damaged = np.asarray(numbers)[sums_of(keys, rows) != sums]
        if len(damaged):
            self.strike_out(damaged)
            raise ValueError(
                f"{self.folder} was damaged on the disk, in "
                f"{counted(len(damaged), 'row')}; the same command makes them anew and "
                "goes on"
            )
        return rows

    def strike_out(self, numbers) -> None:
        """Let rows count no more."""
        for number in numbers:
            write_at(self.keys, int(number) * KEY_LENGTH, STRUCK_OUT, cut=False)

    def sum_of_shape(self) -> bytes:
        """The check sum of shape.json, as it stands at the start of sums."""
        return zlib.crc32(self.shape_file.read_bytes()).to_bytes(4, "little")

    def check(self) -> None:
        """Strike out damaged rows, of the first `CHECKED` bytes; `read` finds others.

        A table is emptied if its shape is damaged, and gets sums if it has none.
        """
        self.checked = True
        if not self.keys.exists() or not self.rows.exists():
            return
        if self.shape() is not None and not self.sums.exists():
            self.add_sums()
        if self.shape() is None or self.sums.read_bytes()[:4] != self.sum_of_shape():
            warn(f"{self.folder} is damaged in shape.json or sums, and is made anew")
            for file in (self.keys, self.sums, self.rows, self.shape_file):
                file.unlink(missing_ok=True)
        elif self.count():
            most = max(1, CHECKED // self.row_bytes())
            keys, sums, rows = (part[:most] for part in self.mapped())
            there = (keys != STRUCK_OUT[0]).any(1)
            damaged = np.flatnonzero((sums_of(keys, rows) != sums) & there)
            if len(damaged):
                count = counted(len(damaged), "damaged row")
                warn(f"{self.folder}: {count}, made anew")
                self.strike_out(damaged)

    def add_sums(self) -> None:
        """Write the sums of what is there, of a table that has none."""
        warn(f"{self.folder} has no check sums; they are made of what is there")
        count = self.count()
        sums = sums_of(*self.mapped()[::2]).tobytes() if count else b""
        data, self.maps = self.sum_of_shape() + sums, None
        write_atomically(self.sums, lambda file: file.write_bytes(data))


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
