"""Which picture goes with which caption: in folders, shards and tables.

Real ones are never clean, so most of this is about what may be wrong. Appendix C says
how it is used. Written by hand.
"""

import csv
import io
import json
import os
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from braceexpand import braceexpand

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def text_of(data: bytes, name: str | Path) -> str:
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


def first_lines(lines: list[str], most: int = 20) -> str:
    """Lines for an error message, each on its own; of many the first."""
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
            self.add(picture, text_of(text, where), where)
        except ValueError as error:
            self.broken.append(str(error))

    def check(self, path: str | Path, hint: str = "") -> tuple[list, list[str]]:
        """Pairs and problems; one error for all that is broken, or without a pair."""
        if self.broken:
            count, listed = len(self.broken), first_lines(self.broken)
            raise ValueError(f"{count} broken in {path}:{listed}")
        if not self.pairs:
            listed = first_lines(self.problems)
            raise ValueError(f"{path} holds no picture with a caption{hint}{listed}")
        return self.pairs, self.problems


def _csv_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict | str]]:
    """Yield (where, row) or (where, what is wrong) for every line of a table."""
    text = io.StringIO(text_of(path.read_bytes(), path), newline="")
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
    lines = text_of(path.read_bytes(), path).split("\n")
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


def _is_of_a_run(folder: Path) -> bool:
    """Is it the output_dir of a training, or the class pictures that one drew?"""
    places = [folder, folder.parent] if folder.name == "class" else [folder]
    return any((place / ".lock").is_file() for place in places)


def find_files(
    folder: Path, kinds: set[str], leave_out: Collection[Path], problems: list[str]
) -> list[str]:
    """Names of files with such endings, in order; hidden ones are not meant for us.

    Nor are the folders to `leave_out` and those of trainings, which is said. What
    cannot be read as a file, or would lead out of the folder, becomes one of the
    `problems`.
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
            elif home / name in leave_out or _is_of_a_run(file):
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
    pictures = find_files(path, IMAGE_SUFFIXES, leave_out, found.problems)
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
    names = {place: find_files(place, kinds, leave_out, found.problems)
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


def _tar_name(name: str) -> str:
    """A name as `_one_form` has it, but for a "./" in front, which stays."""
    return "./" * name.startswith("./") + _one_form(name)


def index_shard(path: Path, problems: list[str]) -> dict[str, dict[str, tuple]]:
    """{key: {ending: (path, start, size)}} of the files in a .tar.

    Only headers are read. As WebDataset has it, a key ends at the first dot of a
    file's name. Raises `ValueError` for a shard that is torn.
    """
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in filter(tarfile.TarInfo.isreg, tar):
                *folders, file = _tar_name(entry.name).split("/")
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


def _pictures_and_captions(sample: dict[str, tuple]) -> tuple[dict[str, str], list]:
    """{a picture's ending: its caption's} in a sample, and what pictures have none.

    Of the pictures with the fewest dots, each has the caption of its own name, v1.jpg
    has v1.txt; or else the first has txt. Those with more dots belong to them.
    """
    kinds = [kind for kind in sample if f".{kind.split('.')[-1]}" in IMAGE_SUFFIXES]
    fewest = min((kind.count(".") for kind in kinds), default=0)
    kinds, found = [kind for kind in kinds if kind.count(".") == fewest], {}
    for kind in kinds:
        own = ".".join([*kind.split(".")[:-1], "txt"])
        if own in sample and own not in found.values():
            found[kind] = own
    if kinds and not found and "txt" in sample:
        found = {kinds[0]: "txt"}
    return found, [kind for kind in kinds if kind not in found]


def find_in_shards(pattern: str) -> tuple[list[tuple[Packed, str]], list[str]]:
    """As `find_captions`, in the .tar files that pets/{0000..0099}.tar names."""
    found, shards = Found(), [Path(name) for name in braceexpand(pattern)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        count = f"{len(missing)} of {len(shards)}"
        raise FileNotFoundError(
            f"{count} shards are not there; copy them there, or name the ones that "
            f"are:{first_lines(missing)}"
        )
    for shard in shards:
        for key, sample in index_shard(shard, found.problems).items():
            name, (pairs, more) = f"{shard.name}/{key}", _pictures_and_captions(sample)
            has = ", ".join(sample)
            for kind, words in pairs.items():
                own = ".".join([key, *kind.split(".")[:-1]]) if len(pairs) > 1 else key
                picture = Packed(shard, own, _piece, sample[kind])
                found.add_text(picture, _piece(*sample[words]), f"{name}.{words}")
            if not pairs:
                lacks = "caption (.txt)" if more else "picture"
                found.problems.append(f"{name}: no {lacks}; it has {has}")
            for kind in more if pairs else ():
                wrong = f"no caption of its own; the sample has {has}"
                found.problems.append(f"{name}.{kind}: {wrong}")
    return found.check(
        pattern, "; a sample is two files, such as 0001.png and 0001.txt, whose names "
        "agree up to the first dot",
    )  # fmt: skip


def _row_bytes(path: str, rows, number: int, column: str) -> bytes:
    picture = rows[number][column] or {"bytes": None, "path": None}
    file = Path(picture["path"] or "")
    if not picture["bytes"] and not file.is_file():
        raise ValueError(f"{path}: row {number} holds no picture; mend or remove it")
    return picture["bytes"] or file.read_bytes()


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
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is no file, but a pipe or a device")
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
        said = (said or [None])[0] if isinstance(said, list) else said
        file = Packed(holder, f"{number:08}", _row_bytes, (path, rows, number, image))
        where = f"{path}: row {number}"
        if isinstance(said, str | None):
            found.add(file, said or "", where)
        else:
            wrong = "is no text; name another caption_column"
            found.broken.append(f"{where}: {words} {said!r:.60} {wrong}")
    return found.check(path)
