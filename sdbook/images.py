"""Folders and shards

Generated from chapters/C_folders_and_shards.ipynb; do not edit.
"""

import hashlib
import io
import json
import os
import textwrap
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from .files import as_path, is_hub_id, write_atomically
from .folders import (
    IMAGE_SUFFIXES,
    find_captions,
    find_files,
    find_in_rows,
    find_in_shards,
    first_lines,
)

__all__ = [
    "KEY_LENGTH", "to_pixels", "short_name", "CaptionedDataset", "to_rgb",
    "read_picture", "Cut", "CaptionedImages", "remembered", "CaptionedShards",
    "CaptionedRows", "open_pictures", "labelled_grid",
]


KEY_LENGTH = 32


def to_pixels(picture: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """An RGB picture of bytes as a tensor from -1 to 1, the VAE's range."""
    tensor = torch.from_numpy(np.array(picture))  # a copy: torch wants to own it
    return tensor.permute(2, 0, 1).float() / 127.5 - 1


def short_name(*facts) -> str:
    """A key for bytes, texts and numbers: 32 letters, others if any fact is."""
    digest = hashlib.sha256()
    for fact in facts:
        data = fact if isinstance(fact, bytes) else str(fact).encode()
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()[:KEY_LENGTH]


class CaptionedDataset(Dataset):
    """What training may ask of every dataset of captioned pictures.

    Items are `(pixels, caption)`: float32 (3, side, side) from -1 to 1, and a string.
    `problems` lists what had to be left out. If it is `drawn`, by our own code and
    without end, `scene(i)` tells what stands in picture i.
    """

    side: int
    problems: Sequence[str] = ()
    drawn = False

    def read(self, index: int) -> Float[Tensor, "3 h w"] | None:
        """The pixels of an item; None if its picture cannot be read."""
        return self[index][0]

    def captions(self) -> list[str]:
        """The caption of every item, without opening a picture."""
        raise NotImplementedError

    def keys(self, notes: Path) -> list[str]:
        """A key for every item; `notes` is a folder to remember files in."""
        raise NotImplementedError

    def sample_captions(self, count: int = 1000) -> list[str]:
        """Some captions, at most `count`, that stand for all."""
        return self.captions()[:count]

    def held_out(self, count: int) -> tuple[list[int], Dataset]:
        """The numbers of the items to train on; and other items, to validate on.

        At most `count` of those, and at most a tenth of all items.
        """
        count = min(count, len(self) // 10)
        order = np.random.default_rng(0).permutation(len(self)).tolist()
        return sorted(order[count:]), Subset(self, order[:count])

    def unread(self, wanted: list[tuple[str, int]]) -> list[tuple[str, Tensor | None]]:
        """`(key, pixels)` of items given as (key, number); None if unreadable."""
        return [(key, self.read(number)) for key, number in wanted]

    def for_vae(self, seed: int = 0) -> "CaptionedDataset":
        """What to train a VAE on, which reads no captions: here, the same."""
        return self


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB with 8 bits, transparency over white.

    Floats count from 0 to 1, integers of 16 or 32 bits from 0 to 65,535. Raises
    `ValueError` for pixels beyond that.
    """
    if picture.mode[0] in "IF":  # convert would clip them to black or white
        values, top = np.asarray(picture), 1 if picture.mode == "F" else 65_535
        if not 0 <= values.min() <= values.max() <= top:
            raise ValueError(f"pixels beyond 0 to {top:,}; save it with 8 bits")
        scaled = (values.astype(np.float32) / (top / 255)).round().astype(np.uint8)
        scaled[values == picture.info.get("transparency", -1)] = 255
        picture = Image.fromarray(scaled)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def read_picture(
    file: Path | io.BufferedIOBase, name: str = "", convert: Callable = to_rgb
) -> Image.Image:
    """Read a picture file upright, as RGB; of an animation, the first frame.

    Whoever wants to see its transparency gives another function than `to_rgb`.
    Raises `ValueError` with the file's name (or `name`) if it cannot be read, or has
    more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, 89 million.
    """
    try:
        if isinstance(file, str | Path) and not Path(file).is_file():
            raise ValueError("no such file, or a pipe or a device")
        with Image.open(file) as opened:
            (width, height), most = opened.size, Image.MAX_IMAGE_PIXELS
            if most and width * height > most:
                raise ValueError(f"{width} × {height} pixels; make it smaller")
            if opened.format == "EPS":
                raise ValueError("PostScript, which is a program; save it as PNG")
            return convert(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(
            f"cannot read the picture {name or file} ({error}); mend or remove it"
        ) from error


@dataclass(frozen=True)
class Cut:
    """How a picture becomes squares: its middle or `crops` places, mirrored too or not.

    Called with an RGB picture, its name and the number of a look, it gives float32
    (3, size, size) from -1 to 1. Equal arguments give equal squares, in any process.
    """

    size: int = 64
    crops: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"image_size {self.size} must be at least 1 pixel")
        if self.crops < 0:
            raise ValueError(f"crops {self.crops}: give 0 (the middle) or more")

    @property
    def looks(self) -> int:
        """How many squares one picture gives."""
        return max(1, self.crops) * (1 + self.flip)

    def place(self, name: str, look: int) -> tuple[float, bool]:
        """Where along the longer side, from 0 to 1, and whether it is mirrored."""
        crop, mirrored = divmod(look, 1 + self.flip)
        if self.crops == 0:
            return 0.5, bool(mirrored)
        letters = name.encode(errors="surrogateescape")  # of any file system
        rng = np.random.default_rng((self.seed, crop, *letters))
        return float(rng.random()), bool(mirrored)

    def __call__(
        self, picture: Image.Image, name: str, look: int = 0
    ) -> Float[Tensor, "3 h w"]:
        """The square of a look."""
        along, mirrored = self.place(name, look)
        square = ImageOps.fit(
            picture, (self.size, self.size), Image.Resampling.LANCZOS, 0, (along, along)
        )
        square = ImageOps.mirror(square) if mirrored else square
        return to_pixels(np.asarray(square))

    def key(self, content: str, name: str, look: int) -> str:
        """The key of a look at a picture, of which `content` is the short name."""
        return short_name(content, self.size, *self.place(name, look))


class CaptionedImages(CaptionedDataset):
    """Pictures with captions from a folder, each cut to a square (`Cut`).

    Items are `(pixels, caption)`: float32 (3, image_size, image_size) from -1 to 1,
    and a string. Item `i` is look `i // n` of picture `i % n`, of n pictures; `flip`
    is wrong where captions say left and right. `problems` lists pictures without a
    caption and captions without a picture. They are left out with a warning, and
    another picture stands in for one that cannot be read; with `on_error="raise"`
    both are a `ValueError`. Raises what `find_captions` raises, too.
    """

    def __init__(
        self, path: str | Path, image_size: int = 64, flip: bool = False,
        on_error: str = "skip", crops: int = 0, seed: int = 0,
        image_column: str | None = None, caption_column: str | None = None,
        leave_out: Collection[Path] = (),
    ):  # fmt: skip
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error {on_error!r} is neither 'skip' nor 'raise'")
        self.path, self.on_error = Path(path).expanduser(), on_error
        self.cut, self.side = Cut(image_size, crops, flip, seed), image_size
        self.columns, self.leave_out = (image_column, caption_column), leave_out
        self.pairs, self.problems = self.find()
        # Shared by all workers, so that each unreadable picture is reported once.
        flags = torch.zeros(len(self.pairs), dtype=torch.bool)
        self.unreadable = flags.share_memory_()
        if self.problems:
            count, shown = len(self.problems), first_lines(self.problems)
            self.report(f"{count} left out in {path}:{shown}")

    def find(self) -> tuple[list, list[str]]:
        """Pairs of picture file and caption, and what has to be left out."""
        return find_captions(self.path, *self.columns, self.leave_out)

    def report(self, problem: str) -> None:
        """Warn of what is left out, or refuse it."""
        if self.on_error == "raise":
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=4)

    def __len__(self) -> int:
        return len(self.pairs) * self.cut.looks

    def read(self, index: int) -> Float[Tensor, "3 h w"] | None:
        """The pixels of an item; None, and once a report, if they cannot be read."""
        look, number = divmod(index, len(self.pairs))
        if self.unreadable[number]:
            return None
        file = self.pairs[number][0]
        try:
            with file.open("rb") as data:
                picture = read_picture(data, str(file))
        except (OSError, ValueError) as error:
            self.unreadable[number] = True
            return self.report(str(error))
        return self.cut(picture, self.name(number), look)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for place in range(index, index + len(self)):
            pixels = self.read(place % len(self))
            if pixels is not None:
                return pixels, self.pairs[place % len(self.pairs)][1]
        raise ValueError(f"none of the {len(self.pairs)} pictures can be read")

    def name(self, number: int) -> str:
        """The name of a picture inside the folder, the same on every computer."""
        return self.pairs[number][0].relative_to(self.path).as_posix()

    def captions(self) -> list[str]:
        """The caption of every look at every picture."""
        return [caption for _, caption in self.pairs] * self.cut.looks

    def keys(self, notes: Path) -> list[str]:
        """Keys of what the files hold and how it is cut.

        `notes/pictures.json` remembers the files by size and date.
        """
        contents = remembered(
            notes / "pictures.json", [file for file, _ in self.pairs],
            lambda file: short_name(file.read_bytes()),
        )  # fmt: skip
        named = [(content, self.name(n)) for n, content in enumerate(contents)]
        looks = range(self.cut.looks)
        return [self.cut.key(*one, look) for look in looks for one in named]


def remembered(notes: Path, files: list, read: Callable) -> list:
    """`read(file)` of every file; as noted, where size and date are those noted."""
    try:
        known = dict(json.loads(notes.read_text()))
    except (OSError, ValueError, TypeError):  # none, or damaged ones
        known = {}
    found = []
    for file in tqdm(files, desc="files"):
        facts, name = file.stat(), os.path.abspath(file)
        stamp = [facts.st_size, facts.st_mtime_ns]
        if name not in known or known[name][0] != stamp:
            known[name] = [stamp, read(file)]
        found.append(known[name][1])
    write_atomically(notes, lambda path: path.write_text(json.dumps(known)))
    return found


class CaptionedShards(CaptionedImages):
    """Pictures with captions from the .tar files of a WebDataset.

    `path` names the files, as in "pets/{0000..0099}.tar". The rest is as of
    `CaptionedImages`. Raises `ValueError` for a shard that is torn, too.
    """

    def find(self) -> tuple[list, list[str]]:
        return find_in_shards(self.path.as_posix())


class CaptionedRows(CaptionedImages):
    """Pictures with captions from a data set in Hugging Face's form.

    `path` is a .parquet file (or several, with *), a folder of them, or an id of the
    hub. The rest is as of `CaptionedImages`; `image_column` is "image" unless given.
    """

    def find(self) -> tuple[list, list[str]]:
        return find_in_rows(self.path.as_posix(), *self.columns)


def open_pictures(path: str, *how, **options) -> CaptionedImages:
    """The pictures of a folder, of .tar or .parquet files, or of a set on the hub."""
    folder, kind = as_path(path, "pictures").expanduser(), CaptionedImages
    inside = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    if path.endswith(".tar"):
        kind = CaptionedShards
    elif path.endswith(".parquet") or is_hub_id(path):
        kind = CaptionedRows
    elif inside and not find_files(folder, IMAGE_SUFFIXES, (), []):
        kind = CaptionedRows
    return kind(path, *how, **options)


def labelled_grid(
    images: list[Image.Image], labels: list[str], columns: int = 4
) -> Image.Image:
    """One picture of many, small ones enlarged, each with its label below it."""
    scale = max(1, 192 // images[0].width)
    side, font = images[0].width * scale, ImageFont.load_default(13)
    wrapped = [textwrap.fill(label, side // 7) for label in labels]
    margin = 8 + 16 * max(text.count("\n") + 1 for text in wrapped)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = (side + 12, side + margin + 12)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        x, y = number % columns * cell[0] + 6, number // columns * cell[1] + 6
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + side + 4), text, "black", font)
    return sheet
