"""Does the picture show what the prompt says?

Generated from chapters/11_evaluation.ipynb; do not edit.
"""

import functools
import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from .data import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    Request,
    Thing,
    describe,
    draw_background,
    draw_thing,
    invent,
    read_caption,
    say,
    stands,
)
from .pipeline import StableDiffusion

__all__ = [
    "SIDE",
    "difference",
    "find_background",
    "find_blobs",
    "WINDOW",
    "templates",
    "redraw_error",
    "Verdict",
    "Judge",
    "cut_windows",
    "satisfies",
    "wilson",
    "prompts",
    "evaluate",
    "scores",
    "markdown_table",
    "labelled_grid",
    "save_report",
]


SIDE = 64  # pixels: the judge reads pictures of this size


def difference(
    picture: UInt8[np.ndarray, "h w 3"], background: str
) -> Float32[np.ndarray, "h w"]:
    """How far each pixel is from an empty background's: 0 to 441, in colour values."""
    empty = draw_background(background, SIDE).astype(np.float32)
    return np.linalg.norm(picture - empty, axis=2)


def find_background(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The background whose median difference from the picture is smallest."""
    return min(BACKGROUNDS, key=lambda name: np.median(difference(picture, name)))


def find_blobs(
    picture: UInt8[np.ndarray, "h w 3"],
    background: str,
    contrast: int | float = 36,
    smallest: int = 12,
) -> list[Bool[np.ndarray, "h w"]]:
    """A mask for each connected region that stands out from the background."""
    foreground = difference(picture, background) > contrast
    numbered, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    masks = [numbered == number for number in range(1, count + 1)]
    return [mask for mask in masks if mask.sum() >= smallest]


WINDOW = 32  # pixels: the largest thing, 24, with room around it


@functools.cache
def templates() -> tuple[list[tuple[str, str, str]], Tensor, Tensor, Tensor]:
    """Every (shape, colour, size) drawn once, its visible part centred in a window.

    Returns the names, colours (n, WINDOW, WINDOW, 3) and alphas (n, WINDOW, WINDOW, 1)
    from 0 to 1, and how far each thing's centre lies from its window's (n, 2), (y, x).
    """
    names, windows, offsets = [], [], []
    for shape in SHAPES:
        for colour in COLOURS:
            for size, side in SIZES.items():
                sprite = draw_thing(shape, colour, side)
                box = ndimage.find_objects((sprite[..., 3] > 127).astype(int))[0]
                middle = [(s.start + s.stop) // 2 for s in box]
                window = np.zeros((WINDOW, WINDOW, 4), np.float32)
                top, left = (WINDOW // 2 - m for m in middle)
                window[top : top + side, left : left + side] = sprite / np.float32(255)
                names.append((shape, colour, size))
                windows.append(window)
                offsets.append([side / 2 - m for m in middle])
    drawn = torch.from_numpy(np.stack(windows))
    return names, drawn[..., :3], drawn[..., 3:], torch.tensor(offsets)


def redraw_error(
    which: Tensor, seen: Float32[Tensor, "w w 3"], behind: Float32[Tensor, "w w 3"]
) -> Float32[Tensor, "n"]:
    """How badly each of the templates `which`, drawn over `behind`, explains `seen`.

    The mean absolute difference over the thing's area; colours go from 0 to 1.
    """
    _, colours, alphas, _ = templates()
    alpha = alphas[which]
    drawn = behind + alpha * (colours[which] - behind)
    return (drawn - seen).abs().sum((1, 2, 3)) / (3 * alpha.sum((1, 2, 3)))


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: the things, the background, and blobs it cannot name."""

    things: tuple[Thing, ...]
    background: str
    unknown: int

    def __str__(self) -> str:
        seen = [f"{t.size} {t.colour} {t.shape}" for t in self.things]
        seen += [f"{self.unknown} unknown"] * bool(self.unknown)
        return (", ".join(seen) or "nothing") + f" ({self.background})"


class Judge:
    """Reads a 64×64 picture of the world by drawing it again.

    The closest drawing names a blob, unless its mean absolute difference over the
    thing's area, from 0 to 1, is more than `tolerance`.
    """

    def __init__(
        self,
        tolerance: int | float = 0.15,
        contrast: int | float = 36,
        smallest: int = 12,
    ):
        self.tolerance, self.contrast, self.smallest = tolerance, contrast, smallest

    def read(self, picture: UInt8[np.ndarray, "h w 3"]) -> Verdict:
        """Say which things stand where in a picture, and on which background."""
        if picture.shape != (SIDE, SIDE, 3):
            shape = "×".join(map(str, picture.shape))
            raise ValueError(f"a picture of {shape}; the judge reads {SIDE}×{SIDE}×3")
        background = find_background(picture)
        blobs = find_blobs(picture, background, self.contrast, self.smallest)
        things = [self.name_blob(picture, background, blob) for blob in blobs]
        known = tuple(thing for thing in things if thing)
        return Verdict(known, background, len(things) - len(known))

    def name_blob(self, picture, background, blob) -> Thing | None:
        """The thing whose drawing is closest to a blob, or None if none is close."""
        box = ndimage.find_objects(blob.astype(int))[0]
        if max(side.stop - side.start for side in box) > WINDOW - 2:
            return None
        middle = [(side.start + side.stop) // 2 for side in box]
        windows = cut_windows(picture, background, blob, middle)
        names, _, _, offsets = templates()
        here = redraw_error(torch.arange(len(names)), *windows[0, 0])
        likely = here.topk(6, largest=False).indices
        errors = {step: redraw_error(likely, *pair) for step, pair in windows.items()}
        step = min(errors, key=lambda step: errors[step].min())
        if errors[step].min() > self.tolerance:
            return None
        index = likely[errors[step].argmin()].item()
        y, x = (m + s + o for m, s, o in zip(middle, step, offsets[index].tolist()))
        return Thing(*names[index], x / SIDE, y / SIDE)


def cut_windows(picture, background, blob, middle) -> dict[tuple[int, int], Tensor]:
    """What is seen, and the empty background, around a blob's middle.

    Nine pairs (2, WINDOW, WINDOW, 3), from 0 to 1, one for each step (dy, dx) of at
    most a pixel. What is not near the blob is replaced by the background.
    """
    empty = draw_background(background, SIDE)
    near = ndimage.binary_dilation(blob, iterations=2)[..., None]
    margin = ((0, 0), (WINDOW, WINDOW), (WINDOW, WINDOW), (0, 0))
    pair = np.pad(np.stack([np.where(near, picture, empty), empty]), margin)
    pair = torch.from_numpy(pair / np.float32(255))
    top, left = (m + WINDOW // 2 for m in middle)
    return {
        (dy, dx): pair[:, top + dy :, left + dx :][:, :WINDOW, :WINDOW]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }


def satisfies(verdict: Verdict, request: Request) -> bool:
    """Strictly: just the things asked for, each as said, standing as said.

    What the request does not say (a colour, a size, a background) may be anything.
    """
    if verdict.unknown or len(verdict.things) != sum(g.count for g in request.groups):
        return False
    if request.background and verdict.background != request.background:
        return False
    centres = []
    for group in request.groups:
        members = [
            thing
            for thing in verdict.things
            if thing.shape == group.shape
            and group.colour in (None, thing.colour)
            and group.size in (None, thing.size)
        ]
        if len(members) != group.count:
            return False
        centres.append(np.array([(thing.x, thing.y) for thing in members]))
    return request.relation is None or bool(stands(*centres, request.relation))


def wilson(right: int | float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927), from 0 to 1."""
    share = right / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def prompts(kind: str, count: int, seed: int = 0) -> list[str]:
    """`count` different prompts of one of `KINDS`, or "held_out", always the same.

    Held-out prompts name pairs and combinations that training never shows. Raises
    ValueError for another kind, and for more prompts than it has.
    """
    if kind not in (*KINDS, "held_out"):
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}, held_out")
    rng = np.random.default_rng((seed, 1_000_003))
    kinds = [kind] if kind != "held_out" else ["colours", "position", "attribution"]
    texts: dict[str, None] = {}
    for _ in range(10 * count + 1000):
        if len(texts) == count:
            return list(texts)
        asked = kinds[len(texts) % len(kinds)]
        truth = invent(asked, rng, held_out=kind == "held_out")
        said = say(truth, "attribution" if kind == "held_out" else asked, rng)
        texts[describe(said, rng)] = None
    raise ValueError(
        f"found only {len(texts)} different prompts of kind {kind!r}, not {count}; "
        "ask for fewer"
    )


def evaluate(
    pipe: StableDiffusion,
    num_prompts: int = 200,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: int | float = 3.0,
    kinds: Iterable[str] = (*KINDS, "held_out"),
    batch_size: int = 50,
) -> dict[str, list[dict]]:
    """Draw `num_prompts` prompts of every kind and let the judge read the pictures.

    Returns, for each kind, one record a prompt: the prompt, what was seen, whether
    it is right, and the picture (a PIL image).
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}; give at least 1")
    judge, records = Judge(), {}
    texts = {kind: prompts(kind, num_prompts, seed) for kind in kinds}
    bar = tqdm(total=num_prompts * len(texts), unit="picture")
    for kind in texts:
        records[kind] = []
        for start in range(0, num_prompts, batch_size):
            batch = texts[kind][start : start + batch_size]
            images = pipe(
                batch,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=seed + start,
                progress=False,
            ).images
            for text, image in zip(batch, images, strict=True):
                verdict = judge.read(np.asarray(image))
                right = satisfies(verdict, read_caption(text))
                record = {"prompt": text, "seen": str(verdict), "right": right}
                records[kind].append(record | {"image": image})
            bar.update(len(batch))
    bar.close()
    return records


def scores(records: dict[str, list[dict]]) -> dict[str, dict[str, int | float]]:
    """Per kind: how many right, of how many, and the 95 % interval of the share."""
    table = {}
    for kind, rows in records.items():
        right = sum(row["right"] for row in rows)
        low, high = wilson(right, len(rows))
        table[kind] = {
            "right": right,
            "total": len(rows),
            "share": round(right / len(rows), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return table


def markdown_table(table: dict[str, dict[str, int | float]]) -> str:
    """The scores as a Markdown table."""
    lines = ["| kind of prompt | right | of | share | 95 % interval |"]
    lines += ["|---|---:|---:|---:|---|"]
    for kind, row in table.items():
        lines.append(
            f"| {kind.replace('_', ' ')} | {row['right']} | {row['total']} "
            f"| {row['share']:.1%} | {row['low']:.1%} to {row['high']:.1%} |"
        )
    return "\n".join(lines) + "\n"


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


def save_report(records: dict[str, list[dict]], folder: str | Path, **facts) -> None:
    """Write scores.json (with `facts`), scores.md, and pictures of right and wrong."""
    folder, table = Path(folder), scores(records)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        kind: [{k: v for k, v in row.items() if k != "image"} for row in kind_rows]
        for kind, kind_rows in records.items()
    }
    report = {"facts": facts, "scores": table, "records": rows}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    (folder / "scores.md").write_text(markdown_table(table), encoding="utf-8")
    by_turns = [row for turn in zip(*records.values(), strict=False) for row in turn]
    for name, wanted in (("right", True), ("wrong", False)):
        chosen = [row for row in by_turns if row["right"] is wanted][:24]
        if chosen:
            labels = [f"{row['prompt']} → {row['seen']}" for row in chosen]
            sheet = labelled_grid([row["image"] for row in chosen], labels, 6)
            sheet.save(folder / f"{name}.png")
