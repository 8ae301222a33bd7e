"""Data: a world that can be checked

Generated from chapters/04_data.ipynb; do not edit.
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from .images import CaptionedDataset, short_name, to_pixels

__all__ = [
    "COLOURS", "BACKGROUNDS", "SIZES", "SHAPES", "shades", "paint", "draw_thing",
    "Thing", "draw_background", "draw", "HELD_OUT_PAIRS", "HELD_OUT_COMBINATIONS",
    "Group", "Request", "is_held_out", "COUNTS", "RELATIONS", "PLACES", "OPENINGS",
    "plural", "describe", "read_caption", "KINDS", "invent", "say", "stands", "CELLS",
    "arrange", "SPLITS", "HELD_OUT_KINDS", "Scene", "Scenes", "CrowdedScenes",
    "write_folder",
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
    def height(a):
        first, second = 13 * math.cos(a), 5 * math.cos(2 * a)
        return first - second - 2 * math.cos(3 * a) - math.cos(4 * a)

    angles = [2 * math.pi * i / 60 for i in range(60)]
    curve = [(16 * math.sin(a) ** 3, height(a)) for a in angles]
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


def shades(colour: str) -> dict[str, tuple[int, ...]]:
    """What the parts of a thing are filled with, as RGBA; a hole with nothing."""
    base = np.array(COLOURS[colour], dtype=float)
    tones = {"plain": base, "dark": base * 0.62, "light": base * 0.45 + 255 * 0.55}
    fills = {name: (*tone.astype(int).tolist(), 255) for name, tone in tones.items()}
    return fills | {"hole": (0, 0, 0, 0)}


def paint(
    shape: str, colour: str, side: int, ground: tuple[int, ...] = (0, 0, 0, 0)
) -> Image.Image:
    """A shape as wide as the picture, on plain ground, with jagged edges."""
    canvas = Image.new("RGBA", (side, side), ground)
    pen, fills = ImageDraw.Draw(canvas), shades(colour)
    for shade, outline in SHAPES[shape]:
        if isinstance(outline, tuple):
            pen.ellipse([(v + 1) * side / 2 for v in outline], fills[shade])
        else:
            points = [((x + 1) * side / 2, (y + 1) * side / 2) for x, y in outline]
            pen.polygon(points, fills[shade])
    return canvas


@functools.cache
def draw_thing(shape: str, colour: str, pixels: int) -> UInt8[np.ndarray, "h w 4"]:
    """One thing alone as RGBA: drawn eight times too large, then averaged down."""
    large = paint(shape, colour, pixels * 8)
    return np.asarray(large.reduce(8))  # weights colours by their alpha


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
    frozenset(pair.split())
    for pair in ("fish star", "house heart", "boat moon", "tree ball", "flower square")
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
    "single": 0.06, "two": 0.12, "counting": 0.22,
    "colours": 0.14, "position": 0.26, "attribution": 0.20,
}  # fmt: skip


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
    ways = {"left": (y, -x), "right": (y, x), "above": (x, -y), "below": (x, y)}
    sideways, amount = ways[relation]
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


SPLITS = ("train", "validation", "held_out")
# What is held out has to be said, so these kinds only:
HELD_OUT_KINDS = {"colours": 0.3, "attribution": 0.35, "position": 0.35}


@dataclass(frozen=True)
class Scene:
    """A picture as a list of things, and what its caption says of them."""

    things: tuple[Thing, ...]
    background: str
    request: Request
    caption: str


class Scenes(CaptionedDataset):
    """Endless pictures with captions; picture `i` is always the same.

    `split` is "train", "validation" (the same world, other pictures) or "held_out"
    (each shows something that the other two never do). Items are
    `(pixels, caption)`: float32 (3, size, size) from -1 to 1, and a sentence.
    `length` says where an epoch ends; `scene(i)` knows no end. The `kinds` of prompt
    (not in "held_out") come as often as `KINDS` says, or twice as often if named twice.
    """

    drawn = True

    def __init__(
        self, size: int = 64, split: str = "train", seed: int = 0,
        length: int = 20_000, kinds: Iterable[str] = tuple(KINDS),
    ):  # fmt: skip
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if size % 64 or size <= 0:
            raise ValueError(f"size {size} must be a multiple of 64, such as 64 or 128")
        kinds = list(kinds)
        if not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"kinds {kinds}; name some of {', '.join(KINDS)}")
        self.odds = {k: KINDS[k] * kinds.count(k) for k in KINDS if k in kinds}
        self.side, self.split, self.seed, self.length = size, split, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], str]:
        if index >= self.length:
            raise IndexError(f"scene {index} of {self.length}")
        scene = self.scene(index)
        return to_pixels(draw(scene.things, scene.background, self.side)), scene.caption

    def scene(self, index: int) -> Scene:
        """What stands in picture `index`, and what its caption says."""
        if index < 0:
            raise IndexError(f"scene {index}: indices start at 0")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        held_out = self.split == "held_out"
        odds = HELD_OUT_KINDS if held_out else self.odds
        total = sum(odds.values())
        kind = str(rng.choice(list(odds), p=[odd / total for odd in odds.values()]))
        truth = invent(kind, rng, held_out)
        things = arrange(truth, rng)
        said = say(truth, "attribution" if held_out else kind, rng)
        return Scene(things, truth.background, said, describe(said, rng))

    def captions(self) -> list[str]:
        """What each of the `length` scenes is said to show."""
        return [self.scene(index).caption for index in range(self.length)]

    def keys(self, notes: Path) -> list[str]:
        """A key of the world, which its first 16 pictures tell, with each number."""
        first = (self.scene(index) for index in range(16))
        drawn = (to_pixels(draw(s.things, s.background, self.side)) for s in first)
        world = short_name(*(pixels.numpy().tobytes() for pixels in drawn))
        return [short_name(world, index) for index in range(self.length)]

    def sample_captions(self, count: int = 1000) -> list[str]:
        """The first captions of the same world with all kinds of prompt."""
        return Scenes(self.side, self.split, self.seed, count).captions()

    def held_out(self, count: int) -> tuple[list[int], Dataset]:
        """All numbers, and scenes of the validation split, at most as many as these."""
        held = Scenes(self.side, "validation", self.seed, min(count, self.length))
        held.odds = self.odds
        return list(range(self.length)), held

    def for_vae(self, seed: int = 0) -> "CrowdedScenes":
        """As many pictures, in which there is more to see."""
        return CrowdedScenes(self.side, seed, self.length)


class CrowdedScenes(Scenes):
    """Pictures crowded with up to eight things anywhere, for training a VAE.

    A VAE reads no captions, and most of a scene is background. Items are as of
    `Scenes`, with an empty caption; pairs that are held out stay held out.
    """

    def __init__(self, size: int = 64, seed: int = 0, length: int = 20_000):
        super().__init__(size, "train", seed, length)

    def scene(self, index: int) -> Scene:
        """What stands in picture `index`, in which nothing is asked for or said."""
        rng = np.random.default_rng((self.seed, len(SPLITS), index))
        things, kinds = [], (SHAPES, COLOURS, SIZES)
        for _ in range(rng.integers(1, 9)):
            shape, colour, size = (str(rng.choice(list(kind))) for kind in kinds)
            half = SIZES[size] * CELLS // 128
            x, y = rng.integers(half, CELLS - half + 1, 2) / CELLS
            if (shape, colour) not in HELD_OUT_PAIRS:
                things.append(Thing(shape, colour, size, float(x), float(y)))
        background = str(rng.choice(list(BACKGROUNDS)))
        return Scene(tuple(things), background, Request(()), "")


def write_folder(scenes: Scenes, path: str | Path, count: int) -> None:
    """Write the first `count` scenes as `images/*.png` and `captions/*.txt`."""
    path = Path(path)
    for folder in ("images", "captions"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = scenes.scene(index)
        picture = Image.fromarray(draw(scene.things, scene.background, scenes.side))
        picture.save(path / "images" / f"{index:05}.png", optimize=True)
        caption = path / "captions" / f"{index:05}.txt"
        caption.write_text(scene.caption + "\n", encoding="utf-8")
