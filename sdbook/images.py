"""Folders and shards

Generated from chapters/C_folders_and_shards.ipynb; do not edit.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from braceexpand import braceexpand
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from .files import is_hub_id, write_atomically

__all__ = [
    "KEY_LENGTH", "to_pixels", "short_name", "CaptionedDataset", "IMAGE_SUFFIXES",
    "Found", "find_captions", "to_rgb", "read_picture", "Cut", "CaptionedImages",
    "remembered", "Packed", "index_shard", "find_in_shards", "CaptionedShards",
    "find_in_rows", "CaptionedRows", "open_pictures", "labelled_grid",
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
    `problems` lists what had to be left out. If it is `drawn`, `scene(i)` tells what
    stands in picture i.
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


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _text_of(data: bytes, name: str | Path) -> str:
    """What stands in a text file; ValueError, with the way out, if it is no UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        line, looks_like = 1, "UTF-16"
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            looks_like = "ISO-8859-1"  # Latin-1
    raise ValueError(
        f"{name}:{line}: not UTF-8, it looks like {looks_like}; save it again as "
        f"UTF-8, for example with: iconv -f {looks_like} -t UTF-8 old.txt > new.txt"
    )


def _listed(lines: list[str], most: int = 20) -> str:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


class Found:
    """What a search has found: `pairs` of picture and caption, `problems`, `broken`."""

    def __init__(self):
        self.pairs, self.problems, self.broken = [], [], []

    def add(self, picture: os.PathLike, caption: str, where: str | Path) -> None:
        """Keep a pair, the caption on one line, unless it is empty."""
        if caption.strip():
            self.pairs.append((picture, " ".join(caption.split())))
        else:
            self.problems.append(f"{where}: the caption is empty")

    def add_text(self, picture: os.PathLike, text: bytes, where: str | Path) -> None:
        """The same for the bytes of a text file."""
        try:
            self.add(picture, _text_of(text, where), where)
        except ValueError as error:
            self.broken.append(str(error))

    def check(self, path: str | Path, hint: str = "") -> tuple[list, list[str]]:
        """Pairs and problems; one error for all that is broken, or without a pair."""
        if self.broken:
            count, listed = len(self.broken), _listed(self.broken)
            raise ValueError(f"{count} broken in {path}:{listed}")
        if not self.pairs:
            listed = _listed(self.problems)
            raise ValueError(f"{path} holds no picture with a caption{hint}{listed}")
        return self.pairs, self.problems


def _csv_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict | str]]:
    """Yield (where, row) or (where, what is wrong) for every line of a table."""
    text = io.StringIO(_text_of(path.read_bytes(), path), newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        names = [name for name in reader.fieldnames or [] if name]
        if columns[0] not in names or not {*columns[1:]} & {*names}:
            needed = f"{columns[0]} and {' or '.join(columns[1:])}"
            yield f"{path}:1", f"needs columns {needed}, has {names}"
            return
        for row in reader:
            wrong = "more cells than columns; put captions with commas in quotes"
            yield f"{path}:{reader.line_num}", wrong if None in row else row
    except csv.Error as error:  # in the row after the last good one
        yield f"{path}:{reader.line_num + 1}", str(error)


def _json_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict | str]]:
    """The same for JSON lines."""
    lines = _text_of(path.read_bytes(), path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = f"not JSON: {getattr(error, 'msg', error)}"
        if not isinstance(row, dict | str) or line.lstrip()[0] == '"':
            row = f"not a JSON object: {line[:60]}"
        yield f"{path}:{number}", row


def _read_row(row: dict | str, columns: list[str]) -> tuple[str, str]:
    """(file name, caption) of a row; ValueError says what is wrong with it."""
    if isinstance(row, str):
        raise ValueError(row)
    name, *said = (row.get(column) for column in columns)
    said = [text for text in said if text is not None]
    if not name or not said or not all(isinstance(v, str) for v in (name, *said)):
        needed = f"{columns[0]} and {' or '.join(columns[1:])}"
        raise ValueError(f"needs {needed}, has {row}")
    place = PureWindowsPath(name)  # knows both kinds of slash
    if place.anchor or ".." in place.parts:
        raise ValueError(f"{name} leaves the folder; move it inside")
    if any("\ud800" <= sign <= "\udfff" for sign in "".join((name, *said))):
        raise ValueError(f"half a character (\\ud800 to \\udfff) in {row}")
    return name, next(filter(str.strip, said), "")


def _files(
    folder: Path, kinds: set[str], leave_out: Collection[Path], problems: list[str]
) -> list[str]:
    """Names of files with such endings, in order; hidden ones are not meant for us.

    Nor are the folders to `leave_out`, which is said. What cannot be read as a file,
    or would lead out of the folder, becomes one of the `problems`.
    """
    names, places, home = [], [""], folder.resolve()
    for inside in places:  # which grow as we go
        for entry in os.scandir(folder / inside):
            name, file = inside + entry.name, folder / inside / entry.name
            if entry.name[0] == ".":
                continue
            if not entry.is_dir():
                if os.path.splitext(entry.name)[1].lower() not in kinds:
                    continue
                if entry.is_file():
                    names.append(name)
                else:
                    problems.append(f"{file}: a link to nothing, or no file at all")
            elif home / name in leave_out:
                warnings.warn(f"{file} is where runs write: left out", stacklevel=2)
            elif entry.is_symlink():
                problems.append(f"{file}: a link to a folder; move that here")
            else:
                places.append(name + "/")
    return sorted(names)


def _one_form(name: str) -> str:
    """A name with / for \\, and each é as one character, as it is typed."""
    return unicodedata.normalize("NFC", PureWindowsPath(name).as_posix())


def _from_table(path: Path, table: Path, columns: list[str], leave_out) -> Found:
    found, named = Found(), set()
    pictures = _files(path, IMAGE_SUFFIXES, leave_out, found.problems)
    there = {_one_form(name): name for name in pictures}
    there |= {name: name for name in pictures}
    rows = _csv_rows if table.suffix == ".csv" else _json_rows
    for where, row in rows(table, columns):
        try:
            name, caption = _read_row(row, columns)
        except ValueError as error:
            found.broken.append(f"{where}: {error}")
            continue
        form = _one_form(name)
        other = next((n for n in (name, form) if (path / n).is_file()), None)
        file = there.get(name) or there.get(form) or other
        named.add(file)
        if file:
            found.add(path / file, caption, f"{where}: {name}")
        else:
            found.problems.append(f"{where}: no picture {name}")
    strangers = [name for name in pictures if name not in named]
    found.problems += [f"{path / name}: no caption" for name in strangers]
    return found


def _by_stem(folder: Path, names: list[str], kinds: set[str], problems: list[str]):
    """{name without its ending: name} for files with such endings."""
    found = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() in kinds and found.setdefault(stem, name) != name:
            first = os.path.basename(found[stem])
            problems.append(f"{folder / name}: same name as {first}; rename one")
    return found


def _from_texts(path: Path, leave_out: Collection[Path]) -> Found:
    images = path / "images" if (path / "images").is_dir() else path
    texts = path / "captions" if (path / "captions").is_dir() else images
    found, kinds = Found(), IMAGE_SUFFIXES | {".txt"}
    names = {place: _files(place, kinds, leave_out, found.problems)
             for place in dict.fromkeys((images, texts))}  # fmt: skip
    pictures = _by_stem(images, names[images], IMAGE_SUFFIXES, found.problems)
    captions = _by_stem(texts, names[texts], {".txt"}, found.problems)
    spare = {_one_form(stem): stem for stem in captions if stem not in pictures}
    for stem, name in pictures.items():
        key = stem if stem in captions else spare.pop(_one_form(stem), None)
        if key is None:
            found.problems.append(f"{images / name}: no caption")
        else:
            file = texts / captions.pop(key)
            found.add_text(images / name, file.read_bytes(), file)
    found.problems += [f"{texts / name}: no picture" for name in captions.values()]
    return found


def find_captions(
    path: Path, image_column: str | None = None, caption_column: str | None = None,
    leave_out: Collection[Path] = (),
) -> tuple[list[tuple[Path, str]], list[str]]:  # fmt: skip
    """List a folder's (picture, caption) pairs, and what has no partner.

    Reads metadata.csv or metadata.jsonl when there is one (columns file_name and
    caption or text, unless others are named), else `images/` with `captions/*.txt`,
    else pictures with a .txt of the same name beside them. Folders that are hidden,
    or to `leave_out`, are not read. Raises `FileNotFoundError` without the folder,
    `ValueError` for one with nothing usable and for anything broken, naming file and
    line.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}; give one with images/ and captions/, with "
            "pictures and .txt files side by side, or with metadata.csv or .jsonl"
        )
    tables = [path / f"metadata.{kind}" for kind in ("csv", "jsonl")]
    tables = [table for table in tables if table.is_file()]
    if len(tables) == 2:
        raise ValueError(f"{path} has metadata.csv and metadata.jsonl; keep one")
    columns = [image_column or "file_name"]
    columns += [caption_column] if caption_column else ["caption", "text"]
    if tables:
        found = _from_table(path, tables[0], columns, leave_out)
    else:
        found = _from_texts(path, leave_out)
    other = [] if found.pairs else [*path.rglob("metadata.*"), *path.glob("*.tar")]
    other = f" (but there is {min(other)}: give its place)" if other else ""
    return found.check(
        path, f"{other}; expected images/ and captions/*.txt, pictures with a .txt of "
        f"the same name beside them, or metadata.csv or .jsonl with {columns}",
    )  # fmt: skip


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB with 8 bits, transparency over white.

    Floats count from 0 to 1, integers of 16 or 32 bits from 0 to 65,535. Raises
    `ValueError` for pixels beyond that.
    """
    if picture.mode[0] in "IF":  # convert would clip them to black or white
        values, top = np.asarray(picture), 1 if picture.mode == "F" else 65_535
        if not 0 <= values.min() <= values.max() <= top:
            raise ValueError(f"pixels beyond 0 to {top:,}; save it with 8 bits")
        values = values.astype(np.float32) / (top / 255)
        picture = Image.fromarray(values.round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def read_picture(file: Path | io.BufferedIOBase, name: str = "") -> Image.Image:
    """Read a picture file upright, as RGB; of an animation, the first frame.

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
            return to_rgb(ImageOps.exif_transpose(opened))
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
            count, shown = len(self.problems), _listed(self.problems)
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

    def name(self, number: int) -> str:
        """The name of a picture inside the folder, the same on every computer."""
        return self.pairs[number][0].relative_to(self.path).as_posix()

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


@dataclass(frozen=True, slots=True)
class Packed:
    """A picture file inside a larger file, asked and opened like a `Path`."""

    holder: Path
    name: str
    read: Callable  # called with `where`, it gives the bytes
    where: tuple

    def read_bytes(self) -> bytes:
        return self.read(*self.where)

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.read_bytes())

    def stat(self) -> os.stat_result:
        return self.holder.stat()

    def relative_to(self, folder: Path) -> "Packed":
        return self  # the name is the same wherever the larger file lies

    def as_posix(self) -> str:
        return f"{self.holder.name}/{self.name}"

    def __fspath__(self) -> str:
        return f"{self.holder}/{self.name}"

    __str__ = __fspath__


def _piece(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _is_hidden(folders: list[str]) -> bool:
    return any(part[:1] == "." and part not in (".", "..") for part in folders)


def index_shard(path: Path, problems: list[str]) -> dict[str, dict[str, tuple]]:
    """{key: {ending: (path, start, size)}} of the files in a .tar.

    Only headers are read. As WebDataset has it, a key ends at the first dot of a
    file's name. Raises `ValueError` for a shard that is torn.
    """
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in filter(tarfile.TarInfo.isreg, tar):
                *folders, file = entry.name.split("/")
                stem, _, ending = file.partition(".")
                if not stem or _is_hidden(folders):
                    continue
                sample = samples.setdefault("/".join([*folders, stem]), {})
                place = path, entry.offset_data, entry.size
                if sample.setdefault(ending.lower(), place) != place:
                    name = f"{path.name}/{entry.name}"
                    problems.append(f"{name}: two of this name; the first counts")
            if _piece(path, tar.offset, 512).strip(b"\0"):  # tarfile stops at damage
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"cannot read the shard {path} ({error}); copy it again, or leave it out"
        ) from error
    return samples


def _picture_and_caption(sample: dict[str, tuple]) -> tuple[str, str]:
    """The endings of a sample's picture and caption; "" for what it has not."""
    kinds = [kind for kind in sample if f".{kind.split('.')[-1]}" in IMAGE_SUFFIXES]
    kind = min(kinds, key=lambda kind: kind.count("."), default="")
    own = ".".join([*kind.split(".")[:-1], "txt"])  # v1.jpg: v1.txt, or else txt
    return kind, next((words for words in (own, "txt") if words in sample), "")


def find_in_shards(pattern: str) -> tuple[list[tuple[Packed, str]], list[str]]:
    """As `find_captions`, in the .tar files that pets/{0000..0099}.tar names."""
    found, shards = Found(), [Path(name) for name in braceexpand(pattern)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} shards are not there:{_listed(missing)}"
        )
    for shard in shards:
        for key, sample in index_shard(shard, found.problems).items():
            name, (kind, words) = f"{shard.name}/{key}", _picture_and_caption(sample)
            if kind and words:
                picture = Packed(shard, key, _piece, sample[kind])
                found.add_text(picture, _piece(*sample[words]), f"{name}.{words}")
            else:
                lacks = "caption (.txt)" if kind else "picture"
                has = ", ".join(sample)
                found.problems.append(f"{name}: no {lacks}; it has {has}")
    return found.check(pattern)


class CaptionedShards(CaptionedImages):
    """Pictures with captions from the .tar files of a WebDataset.

    `path` names the files, as in "pets/{0000..0099}.tar". The rest is as of
    `CaptionedImages`. Raises `ValueError` for a shard that is torn, too.
    """

    def find(self) -> tuple[list, list[str]]:
        return find_in_shards(self.path.as_posix())


def _row_bytes(path: str, rows, number: int, column: str) -> bytes:
    picture = rows[number][column]
    if picture is None:
        raise ValueError(f"{path}: row {number} holds no picture; remove it")
    return picture["bytes"] or Path(picture["path"]).read_bytes()


def find_in_rows(path: str, image: str | None = None, words: str | None = None):
    """As `find_captions`, in .parquet files, a folder of them, or a set on the hub.

    Reads the split "train", with the library `datasets`; `image` and `words` name
    the columns. Of a list of captions the first counts.
    """
    try:
        from datasets import Image as Pictures
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{path} needs a library; pip install datasets") from None
    files = {"data_files": path} if path.endswith(".parquet") else {}
    try:
        rows = load_dataset("parquet" if files else path, split="train", **files)
        words = words or ("caption" if "caption" in rows.column_names else "text")
        rows = rows.select_columns([image := image or "image", words])
        rows = rows.cast_column(image, Pictures(decode=False))
    except Exception as error:  # the network, the hub, files, columns
        raise ValueError(
            f"cannot read {path} as a data set ({error}); give a folder, .tar or "
            ".parquet files, or an id of the hub; image_column and caption_column "
            "name its columns"
        ) from error
    found, holder = Found(), Path(rows.cache_files[0]["filename"])
    for number, said in enumerate(rows[words]):
        said = said[0] if said and isinstance(said, list) else said
        file = Packed(holder, f"{number:08}", _row_bytes, (path, rows, number, image))
        found.add(file, said or "", f"{path}: row {number}")
    return found.check(path)


class CaptionedRows(CaptionedImages):
    """Pictures with captions from a data set in Hugging Face's form.

    `path` is a .parquet file (or several, with *), a folder of them, or an id of the
    hub. The rest is as of `CaptionedImages`; `image_column` is "image" unless given.
    """

    def find(self) -> tuple[list, list[str]]:
        return find_in_rows(self.path.as_posix(), *self.columns)


def open_pictures(path: str, *how, **options) -> CaptionedImages:
    """The pictures of a folder, of .tar or .parquet files, or of a set on the hub."""
    folder, kind = Path(path).expanduser(), CaptionedImages
    inside = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    if path.endswith(".tar"):
        kind = CaptionedShards
    elif path.endswith(".parquet") or is_hub_id(path):
        kind = CaptionedRows
    elif inside and not _files(folder, IMAGE_SUFFIXES, (), []):
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
