"""Does the picture show what the prompt says?

Generated from chapters/11_evaluation.ipynb, chapters/D_usual_measures.ipynb; do not
edit.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from scipy import ndimage
from torch import Tensor, nn
from tqdm.auto import tqdm

from .features import (  # noqa: F401
    BookCLIP,
    Inception,
    TransformersCLIP,
    extract_features,
    open_clip,
    open_inception,
    pool_as_in_2015,
)

# Names that once stood here, for whoever imports them from here.
from .features import BookCLIP as OurCLIP  # noqa: F401
from .features import TransformersCLIP as TheirCLIP  # noqa: F401
from .images import labelled_grid  # noqa: F401
from .pipeline import StableDiffusion
from .reports import (  # noqa: F401
    markdown_table,
    measures_table,
    read_geneval,
    read_report,
    write_geneval,
    write_report,
)
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    Request,
    Thing,
    arrange,
    describe,
    draw,
    draw_background,
    draw_thing,
    invent,
    is_held_out,
    read_caption,
    say,
    stands,
)

__all__ = [
    "SIDE", "difference", "find_background", "find_blobs", "WINDOW", "templates",
    "redraw_error", "Verdict", "Judge", "cut_windows", "satisfies", "wilson",
    "prompts", "evaluate", "scores", "save_report", "sign_test", "compare",
    "matrix_sqrt", "check_features", "frechet_distance", "cubic_kernel",
    "kernel_distance", "clip_score", "mean_distance", "nearest", "imagine", "measure",
    "open_features",
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

    def __init__(self, tolerance: int | float = 0.15):
        self.tolerance = tolerance

    def read(self, picture: UInt8[np.ndarray, "h w 3"]) -> Verdict:
        """Say which things stand where in a picture, and on which background."""
        if picture.shape != (SIDE, SIDE, 3):
            shape = "×".join(map(str, picture.shape))
            raise ValueError(f"a picture of {shape}; the judge reads {SIDE}×{SIDE}×3")
        background = find_background(picture)
        blobs = find_blobs(picture, background)
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
    side = pipe.latent_shape()[2] * pipe.vae.config.downscale
    if side != SIDE:
        raise ValueError(
            f"this model draws pictures of {side}×{side}, and the judge reads "
            f"{SIDE}×{SIDE}; let GenEval's own tool score it (geneval_prompts)"
        )
    drawing = {"num_inference_steps": num_inference_steps}
    drawing |= {"guidance_scale": guidance_scale}
    judge, records = Judge(), {}
    texts = {kind: prompts(kind, num_prompts, seed) for kind in kinds}
    bar = tqdm(total=num_prompts * len(texts), unit="picture")
    for kind in texts:
        records[kind] = []
        for start in range(0, num_prompts, batch_size):
            batch = texts[kind][start : start + batch_size]
            options = {"seed": seed + start, "progress": False, **drawing}
            images = pipe(batch, **options).images
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
        share = {"share": right / len(rows), "low": low, "high": high}
        share = {name: round(value, 4) for name, value in share.items()}
        table[kind] = {"right": right, "total": len(rows), **share}
    return table


def save_report(
    records: dict[str, list[dict]],
    folder: str | Path,
    measures: dict[str, dict[str, float]] | None = None,
    **facts,
) -> None:
    """Write scores.json (with `facts`), scores.md, and pictures of right and wrong."""
    write_report(folder, records, scores(records), measures or {}, facts)


def sign_test(first: Iterable[bool], second: Iterable[bool]) -> float:
    """How probable so uneven a split is, if both are right equally often (0 to 1).

    `first` and `second` say which of the same prompts two models had right.
    """
    pairs = list(zip(first, second, strict=True))
    wins = sum(a and not b for a, b in pairs)
    losses = sum(b and not a for a, b in pairs)
    coins = wins + losses
    tail = sum(math.comb(coins, k) for k in range(min(wins, losses) + 1)) / 2**coins
    return min(1.0, 2 * tail)


def compare(records: dict[str, list[dict]], others: dict[str, list[dict]]) -> str:
    """A Markdown table of two runs over the same prompts; ValueError for others.

    For each kind: how many each has right, how many only one of them has right, and
    P, how probable so uneven a split would be if both were equally good.
    """
    rows = []
    for kind in records:
        ours, theirs = records[kind], others.get(kind, [])
        if [row["prompt"] for row in ours] != [row["prompt"] for row in theirs]:
            raise ValueError(
                f"the two runs drew different prompts of kind {kind!r}; "
                "give both the same num_prompts and seed"
            )
        first, second = ([row["right"] for row in run] for run in (ours, theirs))
        won = sum(a and not b for a, b in zip(first, second))
        lost = sum(b and not a for a, b in zip(first, second))
        test = f"{sign_test(first, second):.3f}"
        name = kind.replace("_", " ")
        rows.append([name, sum(first), sum(second), won, lost, test])
    heads = "kind of prompt | this run | the other | only this | only the other | P"
    return markdown_table(heads.split(" | "), rows)


def matrix_sqrt(matrix: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The root of a symmetric matrix with no negative eigenvalue: root @ root is it."""
    eigenvalues, axes = torch.linalg.eigh(matrix)
    return axes * eigenvalues.clamp(min=0).sqrt() @ axes.T


def check_features(first: Tensor, second: Tensor) -> None:
    """ValueError for features that cannot be compared."""
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features of {first.shape[1]} and of {second.shape[1]} numbers; "
            "use the same network for both heaps"
        )
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"heaps of {len(first)} and {len(second)} pictures; give at least 2 each"
        )


def frechet_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d2"]
) -> float:
    """The squared Fréchet distance of two Gaussians, fitted to two heaps of features.

    With Inception's features it is the FID (Heusel et al., 2017). Never negative, and
    biased: too large for few pictures. Raises ValueError for fewer than two.
    """
    check_features(first, second)
    first, second = first.double(), second.double()
    spread, other = (torch.atleast_2d(x.T.cov()) for x in (first, second))
    root = matrix_sqrt(spread)
    overlap = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    distance = shift + spread.trace() + other.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding may take it just below


def cubic_kernel(
    x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]
) -> Float64[Tensor, "n m"]:
    """How alike each x and each y are: (x·y/d + 1)³."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d2"]
) -> float:
    """The squared maximum mean discrepancy of two heaps of features, unbiased.

    With Inception's features it is the KID (Bińkowski et al., 2018). It is 0 on
    average for two heaps of one kind, so now and then it is negative. Raises
    ValueError for fewer than two.
    """
    check_features(first, second)
    first, second = first.double(), second.double()
    within = 0.0
    for heap in (first, second):
        alike = cubic_kernel(heap, heap)
        within += (alike.sum() - alike.trace()) / (len(heap) * (len(heap) - 1))
    return (within - 2 * cubic_kernel(first, second).mean()).item()


def clip_score(
    clip: BookCLIP | TransformersCLIP, pictures: list, texts: list[str]
) -> Float[Tensor, "n"]:
    """100 times the cosine of each picture and its text, or 0 where it is negative.

    From Hessel et al. (2021), who have 2.5 in place of 100.
    """
    cosine = (clip.pictures(pictures) * clip.texts(list(texts))).sum(dim=1)
    return 100 * cosine.clamp(min=0)


def mean_distance(features: Float[Tensor, "n d"]) -> float:
    """How different pictures are: the mean distance over all pairs; needs two."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} picture has no distance; give at least 2")
    return torch.pdist(features).mean().item()


def nearest(
    queries: Float[Tensor, "n d"], training: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n"], Int64[Tensor, "n"]]:
    """How far the nearest training picture is from each query, and which it is."""
    exact = "donot_use_mm_for_euclid_dist"  # or a copy is not at distance 0
    distances, which = torch.cdist(queries, training, compute_mode=exact).min(dim=1)
    return distances, which


def imagine(request: Request, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """A real picture of a request; chance decides what it does not say.

    It shows what training never does only if the request says so.
    """

    def pick(options):
        return list(options)[rng.integers(len(options))]

    while True:
        groups = tuple(
            replace(
                group,
                colour=group.colour or pick(COLOURS),
                size=group.size or pick(SIZES),
            )
            for group in request.groups
        )
        if is_held_out(groups) == is_held_out(request.groups):
            break
    things = arrange(replace(request, groups=groups), rng)
    return draw(things, request.background or pick(BACKGROUNDS))


def measure(
    records: dict[str, list[dict]],
    clip: BookCLIP | TransformersCLIP,
    network: nn.Module,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """FID, KID and CLIP score of what `evaluate` drew, beside real pictures' own.

    Real are pictures that our world draws of the same prompts; "real" compares two
    heaps of these, so it says what a perfect model would get. `network` gives the
    features of FID and KID.
    """
    rows = [row for kind in records.values() for row in kind]
    images, texts = ([row[name] for row in rows] for name in ("image", "prompt"))
    heaps = [images]
    for heap in (0, 1):
        rng = np.random.default_rng((seed, heap))
        heaps.append([imagine(read_caption(text), rng) for text in texts])
    drawn, real, again = (extract_features(network, heap) for heap in heaps)
    measures = {
        name: {"model": distance(drawn, real), "real": distance(again, real)}
        for name, distance in (("FID", frechet_distance), ("KID", kernel_distance))
    }
    fits = [clip_score(clip, heap, texts).mean().item() for heap in heaps[:2]]
    return measures | {"CLIP score": dict(zip(("model", "real"), fits, strict=True))}


def open_features(inception_path: str | None = None) -> nn.Module:
    """The network for FID and KID: a file of Inception, or our CLIP's picture tower."""
    if inception_path:
        return open_inception(inception_path)
    return open_clip().clip.image_encoder
