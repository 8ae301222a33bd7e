"""Folders and shards

Generated from chapters/C_folders_and_shards.ipynb; do not edit.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import random
import tarfile
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, get_worker_info
from tqdm.auto import tqdm

from .files import write_atomically

__all__ = [
    "KEY_LENGTH", "to_pixels", "short_name", "my_share", "Stream", "CaptionedDataset",
    "IMAGE_SUFFIXES", "find_captions", "to_rgb", "read_picture", "Cut", "read_notes",
    "CaptionedImages", "remembered", "CaptionedShards", "labelled_grid",
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


def my_share(items: list) -> list:
    """Those of the items that this worker reads; all of them without workers."""
    worker = get_worker_info()
    return items[worker.id :: worker.num_workers] if worker else items


class Stream(IterableDataset):
    """What `rows(*arguments)` yields, asked anew in every worker."""

    def __init__(self, rows: Callable[..., Iterator], *arguments):
        self.rows, self.arguments = rows, arguments

    def __iter__(self) -> Iterator:
        return self.rows(*self.arguments)


class CaptionedDataset(Dataset):
    """What training may ask of every dataset of captioned pictures.

    Items are `(pixels, caption)`: float32 (3, side, side) from -1 to 1, and a string.
    `problems` lists what had to be left out, `files` is what is read.
    """

    side: int
    problems: Sequence[str] = ()
    files: Sequence[str | Path] = ()

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

    def unread(self, wanted: dict[str, int]) -> Dataset:
        """`(key, pixels)` of the items numbered in `wanted`; None if unreadable."""
        return Stream(self.look_for, wanted)

    def look_for(self, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor | None]]:
        """This worker's share of `unread`."""
        for key, number in my_share(list(wanted.items())):
            yield key, self.read(number)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        line, looks_like = 1, "UTF-16"
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            looks_like = "ISO-8859-1"  # Latin-1
    raise ValueError(
        f"{path}:{line}: not UTF-8, it looks like {looks_like}; save it again as "
        f"UTF-8, for example with: iconv -f {looks_like} -t UTF-8 old.txt > new.txt"
    )


def _listed(lines: list[str], most: int = 20) -> str:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


def _raise_broken(path: Path, broken: list[str]) -> None:
    """One error for all that is broken, so that it can be mended in one go."""
    if broken:
        raise ValueError(f"{len(broken)} broken in {path}:{_listed(broken)}")


def _csv_rows(path: Path) -> Iterator[tuple[str, dict | str]]:
    """Yield (where, row) or (where, what is wrong) for every line of a table."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        columns = [name for name in reader.fieldnames or [] if name]
        if "file_name" not in columns or not {"caption", "text"} & set(columns):
            wrong = f"needs columns file_name and caption (or text), has {columns}"
            yield f"{path}:1", wrong
            return
        for row in reader:
            wrong = "more cells than columns; put captions with commas in quotes"
            yield f"{path}:{reader.line_num}", wrong if None in row else row
    except csv.Error as error:  # in the row after the last good one
        yield f"{path}:{reader.line_num + 1}", str(error)


def _json_rows(path: Path) -> Iterator[tuple[str, dict | str]]:
    """The same for JSON lines."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = f"not JSON: {error.msg}"
        if not isinstance(row, dict | str) or line.lstrip()[0] == '"':
            row = f"not a JSON object: {line[:60]}"
        yield f"{path}:{number}", row


def _read_table(path: Path) -> list[tuple[str, str, str]]:
    """List (where, file name, caption) for every row of metadata.csv or .jsonl."""
    entries, broken = [], []
    for where, row in (_csv_rows if path.suffix == ".csv" else _json_rows)(path):
        if isinstance(row, str):
            broken.append(f"{where}: {row}")
            continue
        name = row.get("file_name")
        said = [row[key] for key in ("caption", "text") if row.get(key) is not None]
        if not name or not said or not all(isinstance(v, str) for v in (name, *said)):
            broken.append(f"{where}: needs file_name and caption (or text), has {row}")
            continue
        place = PureWindowsPath(name)  # knows both kinds of slash
        if place.anchor or ".." in place.parts:
            broken.append(f"{where}: {name} leaves the folder; move it inside")
            continue
        entries.append((where, name, next(filter(str.strip, said), "")))
    _raise_broken(path, broken)
    return entries


def _from_table(path: Path, table: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    pairs, problems, named = [], [], set()
    pictures = _files(path, IMAGE_SUFFIXES)
    there = set(pictures)
    for where, name, caption in _read_table(table):
        name = name if name in there else Path(name).as_posix()  # ./a//b.png: a/b.png
        named.add(name)
        if name not in there and not (path / name).is_file():
            problems.append(f"{where}: no picture {name}")
        elif not caption.strip():
            problems.append(f"{where}: the caption of {name} is empty")
        else:
            pairs.append((path / name, caption))
    strangers = [path / name for name in pictures if name not in named]
    return pairs, problems + [f"{file}: no caption" for file in strangers]


def _files(folder: Path, suffixes: set[str]) -> list[str]:
    """Names of files with such endings, in order; hidden ones are not meant for us."""
    names = []
    for place, _, files in os.walk(folder):
        inside = (Path(place).relative_to(folder).as_posix() + "/").removeprefix("./")
        names += [
            inside + name
            for name in files
            if os.path.splitext(name)[1].lower() in suffixes and name[0] != "."
        ]
    return sorted(names)


def _from_texts(path: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    images = path / "images" if (path / "images").is_dir() else path
    texts = path / "captions" if (path / "captions").is_dir() else images
    pairs, problems, broken, pictures = [], [], [], {}
    captions = {os.path.splitext(name)[0]: name for name in _files(texts, {".txt"})}
    for name in _files(images, IMAGE_SUFFIXES):
        key = os.path.splitext(name)[0]
        if key in pictures:
            first = os.path.basename(pictures[key])
            problems.append(f"{images / name}: same name as {first}; rename one")
            continue
        pictures[key] = name
        if key not in captions:
            problems.append(f"{images / name}: no caption")
            continue
        file = texts / captions[key]
        try:
            caption = _read_text(file)
        except ValueError as error:
            broken.append(str(error))
            continue
        if caption.strip():
            pairs.append((images / name, caption))
        else:
            problems.append(f"{file}: the caption is empty")
    alone = [texts / name for key, name in captions.items() if key not in pictures]
    _raise_broken(path, broken)
    return pairs, problems + [f"{file}: no picture" for file in alone]


def find_captions(path: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """List a folder's (picture, caption) pairs, and what has no partner.

    Reads metadata.csv or metadata.jsonl when there is one, else `images/` with
    `captions/*.txt`, else pictures with a .txt of the same name beside them.
    Raises `FileNotFoundError` without the folder, `ValueError` for one with nothing
    usable and for anything broken, naming file and line.
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
    pairs, problems = _from_table(path, tables[0]) if tables else _from_texts(path)
    if not pairs:
        raise ValueError(
            f"{path} holds no picture with a caption; expected images/ and "
            "captions/*.txt, pictures with a .txt of the same name beside them, or "
            f"metadata.csv or .jsonl with file_name and caption{_listed(problems)}"
        )
    return [(file, " ".join(text.split())) for file, text in pairs], problems


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB with 8 bits, transparency over white.

    Raises `ValueError` for pixels without a known range (32 bits, floats).
    """
    if picture.mode.startswith("I"):  # 16-bit grey; convert would clip it to white
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("32-bit pixels have no known range; save it with 8 bits")
        picture = Image.fromarray((values / 257).round().astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("float pixels have no known range; save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def read_picture(file: Path | io.BytesIO, name: str = "") -> Image.Image:
    """Read a picture file upright, as RGB; of an animation, the first frame.

    Raises `ValueError` with the file's name (or `name`) if it cannot be read.
    """
    try:
        with Image.open(file) as opened:
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
        rng = np.random.default_rng((self.seed, crop, *name.encode()))
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


def _checked(on_error: str) -> str:
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error {on_error!r} is neither 'skip' nor 'raise'")
    return on_error


def _report(problem: str, on_error: str) -> None:
    """Warn of what is left out, or refuse it."""
    if on_error == "raise":
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=4)


def read_notes(path: Path) -> dict:
    """What was noted in a file; nothing if it is damaged, for it can be found again."""
    try:
        notes = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


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
    ):  # fmt: skip
        self.path, self.on_error = Path(path), _checked(on_error)
        self.cut, self.side = Cut(image_size, crops, flip, seed), image_size
        self.pairs, self.problems = find_captions(self.path)
        self.files = [file for file, _ in self.pairs]
        # Shared by all workers, so that each unreadable picture is reported once.
        flags = torch.zeros(len(self.pairs), dtype=torch.bool)
        self.unreadable = flags.share_memory_()
        if self.problems:
            count, shown = len(self.problems), _listed(self.problems)
            _report(f"{count} left out in {path}:{shown}", on_error)

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
        try:
            picture = read_picture(self.pairs[number][0])
        except ValueError as error:
            self.unreadable[number] = True
            return _report(str(error), self.on_error)
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
            notes / "pictures.json", self.files,
            lambda file: short_name(file.read_bytes()),
        )  # fmt: skip
        named = [(content, self.name(n)) for n, content in enumerate(contents)]
        looks = range(self.cut.looks)
        return [self.cut.key(*one, look) for look in looks for one in named]


def remembered(notes: Path, files: list, read: Callable) -> list:
    """`read(file)` of every file; as noted, where size and date are those noted."""
    known = read_notes(notes)
    found = []
    for file in tqdm(files, desc="files"):
        facts, name = os.stat(file), os.path.abspath(file)
        stamp = [facts.st_size, facts.st_mtime_ns]
        if not isinstance(known.get(name), list) or known[name][0] != stamp:
            known[name] = [stamp, read(file)]
        found.append(known[name][1])
    write_atomically(notes, lambda path: path.write_text(json.dumps(known)))
    return found


def _tar_samples(shards: list[str]) -> Iterator[dict]:
    """What stands in .tar files, in order: {"__key__": …, "png": …, "txt": …}."""
    import webdataset  # here: who reads folders does not need it

    for shard in shards:
        try:
            yield from webdataset.tarfile_to_samples()([{"url": shard}])
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = error.args[0] if error.args else error
            raise ValueError(
                f"cannot read the shard {shard} ({reason}); copy it again, or leave "
                "it out"
            ) from error


def _shard_files(pattern: str | Path) -> list[str]:
    """The shards that a pattern such as pets/{0000..0099}.tar names."""
    from webdataset.shardlists import expand_urls

    shards = expand_urls(str(pattern))
    local = [shard for shard in shards if "://" not in shard]
    missing = [shard for shard in local if not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} shards are not there:{_listed(missing)}"
        )
    return shards


class CaptionedShards(CaptionedDataset, IterableDataset):
    """Pictures with captions, streamed from the .tar files of a WebDataset.

    `shards` names the files, as in "pets/{0000..0099}.tar". Items are as of
    `CaptionedImages`, every look once, in order. What cannot be used is reported.
    For a training: `steps`. Raises `FileNotFoundError`, or `ValueError` if torn.
    """

    def __init__(
        self, shards: str | Path, image_size: int = 64, flip: bool = False,
        on_error: str = "skip", crops: int = 0, seed: int = 0,
    ):  # fmt: skip
        self.shards, self.on_error = _shard_files(shards), _checked(on_error)
        self.cut, self.side = Cut(image_size, crops, flip, seed), image_size
        self.files, self.said = self.shards, None

    def __len__(self) -> int:
        """Looks at complete samples; the first time, all shards are read for it."""
        return len(self.captions())

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "3 h w"], str]]:
        for look in range(self.cut.looks):
            for name, data, caption in self.samples(my_share(self.shards)):
                pixels = self.decode(name, data, look)
                if pixels is not None:
                    yield pixels, caption

    def samples(
        self, shards: list[str], shuffle: random.Random | None = None
    ) -> Iterator[tuple[str, bytes, str]]:
        """(name, picture file, caption) of what is complete; `shuffle` stirs."""
        stream = _tar_samples(shards)
        if shuffle:
            from webdataset import shuffle as stir

            stream = stir(1000, rng=shuffle)(stream)
        for sample in stream:
            name = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            kinds = [kind for kind in sample if f".{kind}" in IMAGE_SUFFIXES]
            caption = sample.get("txt", b"").decode("utf-8", "replace").split()
            if kinds and caption:
                yield name, sample[kinds[0]], " ".join(caption)
            else:
                lacks = "caption (.txt)" if kinds else "picture"
                _report(f"{name}: no {lacks}; left out", self.on_error)

    def decode(
        self, name: str, data: bytes, look: int
    ) -> Float[Tensor, "3 h w"] | None:
        """The pixels of a look at a sample; None if its picture cannot be read."""
        try:
            return self.cut(read_picture(io.BytesIO(data), name), name, look)
        except ValueError as error:
            _report(str(error), self.on_error)

    def captions(self) -> list[str]:
        """The caption of every look; the first time, all shards are read for it."""
        if self.said is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reading pictures will say the same
                self.said = [caption for *_, caption in self.samples(self.shards)]
        return self.said * self.cut.looks

    def keys(self, notes: Path) -> list[str]:
        """The keys that the same pictures would have in a folder.

        `notes/shards.json` remembers the shards by size and date.
        """

        shards = remembered(notes / "shards.json", self.shards, lambda shard: [
            (short_name(data), name, caption)
            for name, data, caption in self.samples([shard])
        ])  # fmt: skip
        found = [sample for shard in shards for sample in shard]
        looks = range(self.cut.looks)
        return [self.cut.key(*one, look) for look in looks for *one, _ in found]

    def held_out(self, count: int) -> tuple[list[int], Dataset]:
        """All numbers and nothing: no item of a stream can be kept out of it."""
        return list(range(len(self))), Subset(self, [])

    def look_for(self, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor | None]]:
        """What this worker's shards hold of the wanted looks."""
        for name, data, _ in self.samples(my_share(self.shards)):
            content = short_name(data)
            for look in range(self.cut.looks):
                key = self.cut.key(content, name, look)
                if key in wanted:
                    yield key, self.decode(name, data, look)

    def row(
        self, seed: int, reader: int, readers: int
    ) -> Iterator[tuple[str, bytes, str, int]]:
        """One reader's endless row of (name, picture file, caption, look)."""
        shards = self.shards
        if len(shards) < readers:
            raise ValueError(
                f"{len(shards)} shards for {readers} readers (processes × workers); "
                "write more and smaller shards, or lower num_workers"
            )
        for epoch in itertools.count():
            order = np.random.default_rng((seed, epoch)).permutation(len(shards))
            mine = [shards[i] for i in order[reader::readers]]
            stir = random.Random(f"{seed} {epoch} {reader}")
            for name, data, caption in self.samples(mine, stir):
                look = (epoch + zlib.crc32(name.encode())) % self.cut.looks
                yield name, data, caption, look

    def steps(
        self, batch_size: int, seed: int, first: int, last: int, rank: int = 0,
        world: int = 1,
    ) -> Dataset:  # fmt: skip
        """The batches of steps `first` to `last`, each a list of items.

        `batch_size` counts the pictures of this process, `rank` of `world`. Shuffled by
        (seed, epoch); going on at `first` gives what an uninterrupted run would have
        seen there, with as many workers. For `DataLoader(…, batch_size=None)`. Raises
        `ValueError` there if there are fewer shards than readers.
        """
        return Stream(self.batches, batch_size, seed, first, last, rank, world)

    def batches(
        self, batch_size: int, seed: int, first: int, last: int, rank: int,
        world: int,
    ) -> Iterator[list[tuple[Float[Tensor, "3 h w"], str]]]:  # fmt: skip
        """Those of the batches of `steps` that this worker makes."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn = (first + worker) % workers  # step s belongs to s % workers
        row = self.row(seed, rank * workers + turn, world * workers)
        past = len(range(turn, first, workers)) * batch_size
        row = itertools.islice(row, past, None)
        for _ in range(first + worker, last, workers):
            yield self.decode_batch(list(itertools.islice(row, batch_size)))

    def decode_batch(self, batch: list) -> list[tuple[Float[Tensor, "3 h w"], str]]:
        """A batch's items; others of it stand in for what cannot be read."""
        items = [
            (self.decode(name, data, look), caption)
            for name, data, caption, look in batch
        ]
        good = [item for item in items if item[0] is not None]
        if not good:
            ends = f"{batch[0][0]} to {batch[-1][0]}"
            raise ValueError(f"no picture of a batch, {ends}, can be read")
        return [good[i % len(good)] if x[0] is None else x for i, x in enumerate(items)]


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
