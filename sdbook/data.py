"""Data: a world that can be checked

Generated from chapters/04_data.ipynb; do not edit.
"""

import csv
import functools
import io
import itertools
import json
import math
import os
import random
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

__all__ = [
    "COLOURS",
    "BACKGROUNDS",
    "SIZES",
    "SHAPES",
    "draw_thing",
    "Thing",
    "draw_background",
    "draw",
    "HELD_OUT_PAIRS",
    "HELD_OUT_COMBINATIONS",
    "Group",
    "Request",
    "is_held_out",
    "COUNTS",
    "RELATIONS",
    "PLACES",
    "OPENINGS",
    "plural",
    "describe",
    "read_caption",
    "KINDS",
    "invent",
    "say",
    "stands",
    "CELLS",
    "arrange",
    "Scene",
    "to_pixels",
    "SPLITS",
    "HELD_OUT_KINDS",
    "pick_kind",
    "odds_of",
    "Scenes",
    "Crowds",
    "write_folder",
    "IMAGE_SUFFIXES",
    "find_captions",
    "to_rgb",
    "read_picture",
    "Cut",
    "PictureFiles",
    "CaptionedImages",
    "CaptionedShards",
    "ShardSteps",
]


COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 142, 30),
    "yellow": (250, 214, 50),
    "green": (42, 157, 72),
    "blue": (38, 92, 214),
    "purple": (128, 62, 176),
    "pink": (247, 130, 182),
    "brown": (116, 72, 44),
}
BACKGROUNDS = {  # colour at the top, colour at the bottom
    "paper": ((250, 246, 236), (244, 238, 224)),
    "sky": ((176, 214, 242), (226, 241, 250)),
    "meadow": ((222, 238, 206), (184, 216, 158)),
    "sand": ((246, 230, 196), (226, 202, 158)),
    "dusk": ((208, 196, 236), (246, 222, 232)),
}
SIZES = {"small": 16, "big": 24}  # pixels, in a picture of 64


def _ring(radius, count, start=-math.pi / 2, x=0.0, y=0.0):
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _star():
    outer, inner = _ring(1.0, 5, y=0.08), _ring(0.45, 5, math.pi * -0.3, y=0.08)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart():
    angles = [2 * math.pi * i / 60 for i in range(60)]
    curve = [
        (
            16 * math.sin(a) ** 3,
            13 * math.cos(a)
            - 5 * math.cos(2 * a)
            - 2 * math.cos(3 * a)
            - math.cos(4 * a),
        )
        for a in angles
    ]
    return [(x / 16.5, -(y + 2.5) / 15.5) for x, y in curve]


# A shape is a list of parts in a box from -1 to 1 (y down). A part is a shade
# ("plain", "dark", "light" or "hole") with a polygon, or with an ellipse's box.
SHAPES = {
    "ball": [
        ("plain", (-0.95, -0.95, 0.95, 0.95)),
        ("light", (-0.6, -0.65, -0.1, -0.15)),
    ],
    "square": [
        ("plain", [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
        ("light", [(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)]),
    ],
    "star": [("plain", _star())],
    "heart": [("plain", _heart())],
    "moon": [
        ("plain", (-0.95, -0.95, 0.95, 0.95)),
        ("hole", (-0.3, -1.0, 1.4, 0.7)),
    ],
}


SHAPES |= {
    "house": [
        ("plain", [(-0.75, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95)]),
        ("dark", [(-1.0, -0.1), (0.0, -0.98), (1.0, -0.1)]),
        ("light", [(-0.25, 0.3), (0.25, 0.3), (0.25, 0.95), (-0.25, 0.95)]),
    ],
    "tree": [
        ("dark", [(-0.2, 0.5), (0.2, 0.5), (0.2, 1.0), (-0.2, 1.0)]),
        ("plain", [(-0.65, 0.05), (0.0, -1.0), (0.65, 0.05)]),
        ("plain", [(-0.9, 0.6), (0.0, -0.45), (0.9, 0.6)]),
    ],
    "fish": [
        ("plain", (-1.0, -0.6, 0.5, 0.6)),
        ("plain", [(0.2, 0.0), (1.0, -0.65), (1.0, 0.65)]),
        ("light", (-0.75, -0.3, -0.4, 0.05)),
    ],
    "boat": [
        ("dark", [(-1.0, 0.35), (1.0, 0.35), (0.65, 0.9), (-0.65, 0.9)]),
        ("plain", [(0.0, -1.0), (0.85, 0.2), (0.0, 0.2)]),
        ("light", [(-0.12, -0.7), (-0.12, 0.2), (-0.75, 0.2)]),
        ("dark", [(-0.12, -1.0), (0.0, -1.0), (0.0, 0.4), (-0.12, 0.4)]),
    ],
    "flower": [
        ("dark", [(-0.1, 0.0), (0.1, 0.0), (0.1, 1.0), (-0.1, 1.0)]),
        ("dark", [(0.0, 0.95), (0.7, 0.35), (0.6, 0.75)]),
        *(
            ("plain", (x - 0.33, y - 0.33, x + 0.33, y + 0.33))
            for x, y in _ring(0.42, 5, y=-0.28)
        ),
        ("light", (-0.27, -0.55, 0.27, -0.01)),
    ],
}


@functools.cache
def draw_thing(shape: str, colour: str, pixels: int) -> UInt8[np.ndarray, "h w 4"]:
    """One thing alone as RGBA: drawn eight times too large, then averaged down."""
    big = pixels * 8
    base = np.array(COLOURS[colour], dtype=float)
    fills = {
        "plain": (*base.astype(int), 255),
        "dark": (*(base * 0.62).astype(int), 255),
        "light": (*(base * 0.45 + 255 * 0.55).astype(int), 255),
        "hole": (0, 0, 0, 0),
    }
    canvas = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    for shade, outline in SHAPES[shape]:
        if isinstance(outline, tuple):
            pen.ellipse([(v + 1) * big / 2 for v in outline], fills[shade])
        else:
            points = [((x + 1) * big / 2, (y + 1) * big / 2) for x, y in outline]
            pen.polygon(points, fills[shade])
    return np.asarray(canvas.reduce(8))  # weights colours by their alpha


@dataclass(frozen=True)
class Thing:
    """One thing in a picture; `x` and `y` are its centre, from 0 to 1."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@functools.cache
def draw_background(name: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """A background: a quiet gradient from top to bottom."""
    top, bottom = (np.array(colour, dtype=float) for colour in BACKGROUNDS[name])
    rows = np.linspace(0, 1, size)[:, None]
    column = (top * (1 - rows) + bottom * rows).round().astype(np.uint8)
    return np.repeat(column[:, None], size, axis=1)


def draw(
    things: tuple[Thing, ...], background: str, size: int = 64
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw things on a background as an RGB picture of `size` × `size` pixels."""
    picture = draw_background(background, size).astype(np.float32)
    for thing in things:
        sprite = draw_thing(thing.shape, thing.colour, SIZES[thing.size] * size // 64)
        side = sprite.shape[0]
        left = round(thing.x * size) - side // 2
        top = round(thing.y * size) - side // 2
        patch = picture[top : top + side, left : left + side]
        alpha = sprite[..., 3:] / np.float32(255)
        patch += alpha * (sprite[..., :3] - patch)
    return picture.round().astype(np.uint8)


HELD_OUT_PAIRS = frozenset(  # (shape, colour) never drawn in training
    zip(list(SHAPES)[:8], list(COLOURS), strict=True)
)
HELD_OUT_COMBINATIONS = frozenset(  # shapes never together in one training scene
    frozenset(pair)
    for pair in [
        ("fish", "star"),
        ("house", "heart"),
        ("boat", "moon"),
        ("tree", "ball"),
        ("flower", "square"),
    ]
)


@dataclass(frozen=True)
class Group:
    """Some equal things: how many, which shape; colour or size None: not said."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Request:
    """What a caption says: one group, or two with or without a relation."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None


def is_held_out(things: tuple[Thing | Group, ...]) -> bool:
    """Do they show a pair, or a combination, that training never sees?"""
    pairs = {(thing.shape, thing.colour) for thing in things}
    shapes = frozenset(thing.shape for thing in things)
    return bool(pairs & HELD_OUT_PAIRS) or shapes in HELD_OUT_COMBINATIONS


COUNTS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
}
PLACES = {
    "paper": "on paper",
    "sky": "in the sky",
    "meadow": "on a meadow",
    "sand": "on the sand",
    "dusk": "at dusk",
}
OPENINGS = ("", "", "a picture of ")  # no opening is twice as likely


def plural(shape: str, count: int) -> str:
    """The word for `count` things of a shape: star, stars; fish, fish."""
    return shape if count == 1 or shape == "fish" else shape + "s"


def describe(request: Request, rng: np.random.Generator | None = None) -> str:
    """Say a request in words; `rng` chooses among phrasings (None: the plainest)."""

    def choose(options):
        return options[0 if rng is None else rng.integers(len(options))]

    def name(group: Group) -> str:
        words = [group.size, group.colour, plural(group.shape, group.count)]
        phrase = " ".join(word for word in words if word)
        count = COUNTS[group.count]
        if count == "a" and phrase[0] in "aeiou":
            count = "an"
        return f"{count} {phrase}"

    text = choose(OPENINGS) + name(request.groups[0])
    if len(request.groups) == 2:
        link = choose(RELATIONS[request.relation]) if request.relation else "and"
        text += f" {link} {name(request.groups[1])}"
    if request.background:
        text += " " + PLACES[request.background]
    return text


_FIELDS = ("shape", "colour", "size")
_LINKS = {word: name for name, words in RELATIONS.items() for word in words}
_GROUP = (  # the {0} becomes 1 for the first group, 2 for the second
    rf"(?P<count{{0}}>an?|one|two|three) (?:(?P<size{{0}}>{'|'.join(SIZES)}) )?"
    rf"(?:(?P<colour{{0}}>{'|'.join(COLOURS)}) )?(?P<shape{{0}}>{'|'.join(SHAPES)})s?"
)
_CAPTION = re.compile(
    r"(?:a picture of )?"
    + _GROUP.format(1)
    + rf"(?: (?P<link>and|{'|'.join(_LINKS)}) {_GROUP.format(2)})?"
    + rf"(?: (?P<place>{'|'.join(PLACES.values())}))?"
)


def read_caption(caption: str) -> Request:
    """Turn a caption of this world back into the request that it makes.

    Raises `ValueError` for a sentence that the world's grammar does not have.
    """
    found = _CAPTION.fullmatch(caption.strip().lower())
    if found is None:
        raise ValueError(
            f"cannot read {caption!r}; say it like 'a red star above two blue "
            f"houses at dusk', with shapes {', '.join(SHAPES)} and colours "
            f"{', '.join(COLOURS)}"
        )
    counts = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
    groups = tuple(
        Group(counts[found[f"count{i}"]], *(found[f"{k}{i}"] for k in _FIELDS))
        for i in (1, 2)
        if found[f"count{i}"]
    )
    places = {phrase: name for name, phrase in PLACES.items()}
    return Request(groups, _LINKS.get(found["link"]), places.get(found["place"]))


KINDS = {  # GenEval's six kinds of prompt, and how often training shows each
    "single": 0.06,
    "two": 0.12,
    "counting": 0.22,
    "colours": 0.14,
    "position": 0.26,
    "attribution": 0.20,
}


def invent(kind: str, rng: np.random.Generator, held_out: bool = False) -> Request:
    """Make up a request of one of `KINDS`, every colour and size decided.

    What is decided but will not be said, `say` takes out again. With `held_out`,
    the request shows a pair or combination that training never sees.
    """

    def pick(options):
        return list(options)[rng.integers(len(options))]

    counts = (1,)
    if kind == "counting":
        counts = (pick((2, 3)),)
    elif kind == "two":
        counts = (1, 1)
    elif kind in ("position", "attribution"):
        counts = pick([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2)])
    relation = pick(RELATIONS) if kind == "position" else None
    while True:
        shapes = rng.permutation(list(SHAPES))  # the groups never share a shape
        groups = tuple(
            Group(count, str(shape), pick(COLOURS), pick(SIZES))
            for count, shape in zip(counts, shapes, strict=False)
        )
        if is_held_out(groups) == held_out:
            return Request(groups, relation, pick(BACKGROUNDS))


def say(request: Request, kind: str, rng: np.random.Generator) -> Request:
    """Leave out what the caption of this kind does not say."""
    says_colour = {"single": 0.0, "two": 0.0, "colours": 1.0, "attribution": 1.0}
    colour = rng.random() < says_colour.get(kind, 0.7)
    groups = tuple(
        replace(
            group,
            colour=group.colour if colour else None,
            size=group.size if rng.random() < 0.2 else None,
        )
        for group in request.groups
    )
    background = request.background if rng.random() < 0.5 else None
    return Request(groups, request.relation, background)


def stands(
    first: np.ndarray, second: np.ndarray, relation: str
) -> np.ndarray | np.bool_:
    """Is the first group's centre above, below, left or right of the second's?

    Takes centres (..., things, 2) as (x, y), gives (...) booleans; the named
    direction must be the larger one of the two.
    """
    x, y = np.moveaxis(first.mean(axis=-2) - second.mean(axis=-2), -1, 0)
    sideways, amount = {
        "left": (y, -x),
        "right": (y, x),
        "above": (x, -y),
        "below": (x, y),
    }[relation]
    return amount > np.abs(sideways)


CELLS = 16  # things stand on a grid of 16 × 16 cells: the latents' own grid


def arrange(request: Request, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Find room for the things of a request: no two closer than one cell.

    Every colour and size must be decided. Raises `ValueError` without room.
    """
    kinds = [group for group in request.groups for _ in range(group.count)]
    first = request.groups[0].count
    sides = np.array([SIZES[kind.size] * CELLS // 64 for kind in kinds])
    low, high = sides[:, None] // 2, CELLS - sides[:, None] // 2 + 1
    room = (sides[:, None] + sides) // 2 + 1  # between two centres, in cells
    for _ in range(100):
        spots = rng.integers(low, high, (200, len(kinds), 2))  # 200 guesses
        apart = np.abs(spots[:, :, None] - spots[:, None]).max(-1)
        good = (apart + np.eye(len(kinds)) * 99 >= room).all((1, 2))
        if request.relation:
            good &= stands(spots[:, :first], spots[:, first:], request.relation)
        if good.any():
            spot = spots[good.argmax()] / CELLS  # the first good one
            return tuple(
                Thing(kind.shape, kind.colour, kind.size, float(x), float(y))
                for kind, (x, y) in zip(kinds, spot, strict=True)
            )
    raise ValueError(f"found no room for {describe(request)!r}")


@dataclass(frozen=True)
class Scene:
    """A picture as a list of things, and what its caption says of them."""

    things: tuple[Thing, ...]
    background: str
    request: Request
    caption: str


def to_pixels(picture: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """An RGB picture of bytes as a tensor from -1 to 1, the VAE's range."""
    tensor = torch.from_numpy(np.array(picture))  # a copy: torch wants to own it
    return tensor.permute(2, 0, 1).float() / 127.5 - 1


SPLITS = ("train", "validation", "held_out")
# What is held out has to be said, so these kinds only:
HELD_OUT_KINDS = {"colours": 0.3, "attribution": 0.35, "position": 0.35}


def pick_kind(odds: dict[str, float], rng: np.random.Generator) -> str:
    """One of the kinds, each as often as its odds say."""
    total = sum(odds.values())
    return str(rng.choice(list(odds), p=[odd / total for odd in odds.values()]))


def odds_of(kinds: list[str]) -> dict[str, float]:
    """Each kind as often as in `KINDS`, or twice as often when it is named twice."""
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds {kinds}; name some of {', '.join(KINDS)}")
    odds = {kind: KINDS[kind] * kinds.count(kind) for kind in KINDS}
    return {kind: share for kind, share in odds.items() if share}


class Scenes(Dataset):
    """Endless pictures with captions; picture `i` is always the same.

    `split` is "train", "validation" (the same world, other pictures) or "held_out"
    (each shows something that the other two never do). Items are
    `(pixels, caption)`: float32 (3, size, size) from -1 to 1, and a sentence.
    `length` says where an epoch ends; `scene(i)` knows no end. `kinds` are the kinds
    of prompt to show (not of held-out scenes), as often as `odds_of` says.
    """

    def __init__(
        self, size: int = 64, split: str = "train", seed: int = 0,
        length: int = 20_000, kinds: Iterable[str] = tuple(KINDS),
    ):  # fmt: skip
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if size % 64 or size <= 0:
            raise ValueError(f"size {size} must be a multiple of 64, such as 64 or 128")
        self.odds = odds_of(list(kinds))
        self.size, self.split, self.seed, self.length = size, split, seed, length

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """What stands in picture `index`, and what its caption says."""
        if index < 0:
            raise IndexError(f"scene {index}: indices start at 0")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        held_out = self.split == "held_out"
        kind = pick_kind(HELD_OUT_KINDS if held_out else self.odds, rng)
        truth = invent(kind, rng, held_out)
        things = arrange(truth, rng)
        said = say(truth, "attribution" if held_out else kind, rng)
        return Scene(things, truth.background, said, describe(said, rng))

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], str]:
        if index >= self.length:
            raise IndexError(f"scene {index} of {self.length}")
        scene = self.scene(index)
        return to_pixels(draw(scene.things, scene.background, self.size)), scene.caption


class Crowds(Dataset):
    """Pictures crowded with up to eight things anywhere, for training a VAE.

    A VAE reads no captions, and most of a scene is background: a crowd shows it more
    things a picture. Items are as of `Scenes`, with an empty caption; pairs that are
    held out stay held out.
    """

    def __init__(self, size: int = 64, seed: int = 0, length: int = 20_000):
        self.size, self.seed, self.length = size, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], str]:
        if index >= self.length:
            raise IndexError(f"crowd {index} of {self.length}")
        rng = np.random.default_rng((self.seed, len(SPLITS), index))
        things = []
        for _ in range(rng.integers(1, 9)):
            shape, colour, size = (
                str(rng.choice(list(options))) for options in (SHAPES, COLOURS, SIZES)
            )
            half = SIZES[size] * CELLS // 128
            x, y = rng.integers(half, CELLS - half + 1, 2) / CELLS
            if (shape, colour) not in HELD_OUT_PAIRS:
                things.append(Thing(shape, colour, size, float(x), float(y)))
        background = str(rng.choice(list(BACKGROUNDS)))
        return to_pixels(draw(tuple(things), background, self.size)), ""


def write_folder(scenes: Scenes, path: str | Path, count: int) -> None:
    """Write the first `count` scenes as `images/*.png` and `captions/*.txt`."""
    path = Path(path)
    for folder in ("images", "captions"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = scenes.scene(index)
        picture = Image.fromarray(draw(scene.things, scene.background, scenes.size))
        picture.save(path / "images" / f"{index:05}.png", optimize=True)
        caption = path / "captions" / f"{index:05}.txt"
        caption.write_text(scene.caption + "\n", encoding="utf-8")


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


def _report(problem: str, on_error: str) -> None:
    """Warn of what is left out, or refuse it."""
    if on_error == "raise":
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=4)


class PictureFiles:
    """Picture files by number; one that cannot be read is None, and reported once.

    Once among all processes that were given this object. With `on_error="raise"` it
    is a `ValueError` instead.
    """

    def __init__(self, files: list[Path], on_error: str = "skip"):
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error {on_error!r} is neither 'skip' nor 'raise'")
        self.files, self.on_error = files, on_error
        self.unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __getitem__(self, number: int) -> Image.Image | None:
        if self.unreadable[number]:
            return None
        try:
            return read_picture(self.files[number])
        except ValueError as error:
            self.unreadable[number] = True
            _report(str(error), self.on_error)


class CaptionedImages(Dataset):
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
        self.path = Path(path)
        self.cut = Cut(image_size, crops, flip, seed)
        self.pairs, self.problems = find_captions(self.path)
        self.files = PictureFiles([file for file, _ in self.pairs], on_error)
        if self.problems:
            count, shown = len(self.problems), _listed(self.problems)
            _report(f"{count} left out in {path}:{shown}", on_error)

    def __len__(self) -> int:
        return len(self.pairs) * self.cut.looks

    def name(self, number: int) -> str:
        """The name of a picture inside the folder, the same on every computer."""
        return self.pairs[number][0].relative_to(self.path).as_posix()

    def read(self, index: int) -> Float[Tensor, "3 h w"] | None:
        """The pixels of an item; None if its picture cannot be read."""
        look, number = divmod(index, len(self.pairs))
        picture = self.files[number]
        return None if picture is None else self.cut(picture, self.name(number), look)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for place in range(index, index + len(self)):
            pixels = self.read(place % len(self))
            if pixels is not None:
                return pixels, self.pairs[place % len(self.pairs)][1]
        raise ValueError(f"none of the {len(self.pairs)} pictures can be read")


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


def _my_share(shards: list[str]) -> list[str]:
    """Those of the shards that this worker reads; all of them without workers."""
    worker = get_worker_info()
    return shards[worker.id :: worker.num_workers] if worker else shards


def _complete_samples(
    shards: list[str], on_error: str, shuffle: random.Random | None
) -> Iterator[tuple[str, bytes, str]]:
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
            _report(f"{name}: no {lacks}; left out", on_error)


class CaptionedShards(IterableDataset):
    """Pictures with captions, streamed from the .tar files of a WebDataset.

    `shards` names the files, as in "pets/{0000..0099}.tar". Items are as of
    `CaptionedImages`, every look once, in order. What cannot be used is reported.
    See also `ShardSteps`. Raises `FileNotFoundError`, or `ValueError` for a torn shard.
    """

    def __init__(
        self, shards: str | Path, image_size: int = 64, flip: bool = False,
        on_error: str = "skip", crops: int = 0, seed: int = 0,
    ):  # fmt: skip
        self.shards, self.on_error = _shard_files(shards), on_error
        self.cut = Cut(image_size, crops, flip, seed)
        PictureFiles([], on_error)  # checks on_error
        self.count = None

    def __len__(self) -> int:
        """Looks at complete samples; the first time, all shards are read for it."""
        if self.count is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reading them will say the same
                self.count = sum(1 for _ in self.samples(self.shards))
        return self.count * self.cut.looks

    def samples(
        self, shards: list[str], shuffle: random.Random | None = None
    ) -> Iterator[tuple[str, bytes, str]]:
        """(name, picture file, caption) of what is complete; `shuffle` stirs."""
        return _complete_samples(shards, self.on_error, shuffle)

    def read(self, name: str, data: bytes, look: int) -> Float[Tensor, "3 h w"] | None:
        """The pixels of a look at a sample; None if its picture cannot be read."""
        try:
            return self.cut(read_picture(io.BytesIO(data), name), name, look)
        except ValueError as error:
            _report(str(error), self.on_error)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "3 h w"], str]]:
        for look in range(self.cut.looks):
            for name, data, caption in self.samples(_my_share(self.shards)):
                pixels = self.read(name, data, look)
                if pixels is not None:
                    yield pixels, caption


def _endless_row(
    dataset: CaptionedShards, seed: int, reader: int, readers: int
) -> Iterator[tuple[str, bytes, str, int]]:
    """One reader's endless row of (name, picture file, caption, look)."""
    shards = dataset.shards
    if len(shards) < readers:
        raise ValueError(
            f"{len(shards)} shards for {readers} readers (processes × workers); "
            "write more and smaller shards, or lower num_workers"
        )
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(shards))
        mine = [shards[i] for i in order[reader::readers]]
        stir = random.Random(f"{seed} {epoch} {reader}")
        for name, data, caption in dataset.samples(mine, stir):
            look = (epoch + zlib.crc32(name.encode())) % dataset.cut.looks
            yield name, data, caption, look


class ShardSteps(IterableDataset):
    """The batches of steps `first` to `last`, each a list of items, from shards.

    `batch_size` counts the pictures of this process, `rank` of `world`. Shuffled by
    (seed, epoch); going on at `first` gives what an uninterrupted run would have seen
    there, with as many workers. For `DataLoader(…, batch_size=None)`. Raises
    `ValueError` if there are fewer shards than readers.
    """

    def __init__(
        self, shards: CaptionedShards, batch_size: int, seed: int, first: int,
        last: int, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.dataset, self.batch_size, self.seed = shards, batch_size, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __iter__(self) -> Iterator[list[tuple[Float[Tensor, "3 h w"], str]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn = (self.first + worker) % workers  # step s belongs to s % workers
        row = _endless_row(
            self.dataset, self.seed, self.rank * workers + turn, self.world * workers
        )
        past = len(range(turn, self.first, workers)) * self.batch_size
        row = itertools.islice(row, past, None)
        for _ in range(self.first + worker, self.last, workers):
            yield self.decode(list(itertools.islice(row, self.batch_size)))

    def decode(self, batch: list[tuple]) -> list[tuple[Float[Tensor, "3 h w"], str]]:
        """A batch's items; others of it stand in for what cannot be read."""
        items = [
            (self.dataset.read(name, data, look), caption)
            for name, data, caption, look in batch
        ]
        good = [item for item in items if item[0] is not None]
        if not good:
            ends = f"{batch[0][0]} to {batch[-1][0]}"
            raise ValueError(f"no picture of a batch, {ends}, can be read")
        return [good[i % len(good)] if x[0] is None else x for i, x in enumerate(items)]
