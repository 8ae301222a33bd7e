"""Does the picture show what the prompt says?

Generated from chapters/11_evaluation.ipynb; do not edit.
"""

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .clip import CLIP, CLIPTextModel, Tokenizer
from .files import read_weights, save_weights
from .formats import model_folders
from .images import labelled_grid, to_pixels
from .pipeline import StableDiffusion
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
    "measures_table",
    "save_report",
    "sign_test",
    "read_report",
    "compare",
    "extract_features",
    "OurCLIP",
    "TheirCLIP",
    "open_clip",
    "clip_score",
    "matrix_sqrt",
    "check_features",
    "frechet_distance",
    "cubic_kernel",
    "kernel_distance",
    "Inception",
    "pool_as_in_2015",
    "open_inception",
    "imagine",
    "measure",
    "mean_distance",
    "nearest",
    "read_geneval",
    "write_geneval",
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
    sides = [cells * pipe.vae.config.downscale for cells in pipe.latent_shape()[2:]]
    if sides != [SIDE, SIDE]:
        raise ValueError(
            f"this model draws pictures of {sides[0]}×{sides[1]}, and the judge reads "
            f"{SIDE}×{SIDE}; let GenEval's own tool score it (geneval_prompts)"
        )
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


def measures_table(measures: dict[str, dict[str, float]]) -> str:
    """What `measure` returns as a Markdown table; an empty text for nothing."""
    lines = ["", "| measure | pictures of the model | real pictures |"]
    lines += ["|---|---:|---:|"]
    for name, row in measures.items():
        lines.append(f"| {name} | {row['model']:.4g} | {row['real']:.4g} |")
    return "\n".join(lines) + "\n" if measures else ""


def save_report(
    records: dict[str, list[dict]],
    folder: str | Path,
    measures: dict[str, dict[str, float]] | None = None,
    **facts,
) -> None:
    """Write scores.json (with `facts`), scores.md, and pictures of right and wrong."""
    folder, table, measures = Path(folder), scores(records), measures or {}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        kind: [{k: v for k, v in row.items() if k != "image"} for row in kind_rows]
        for kind, kind_rows in records.items()
    }
    report = {"facts": facts, "scores": table, "measures": measures, "records": rows}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    text = markdown_table(table) + measures_table(measures)
    (folder / "scores.md").write_text(text, encoding="utf-8")
    by_turns = [row for turn in zip(*records.values(), strict=False) for row in turn]
    for name, wanted in (("right", True), ("wrong", False)):
        chosen = [row for row in by_turns if row["right"] is wanted][:24]
        if chosen:
            labels = [f"{row['prompt']}; seen: {row['seen']}" for row in chosen]
            sheet = labelled_grid([row["image"] for row in chosen], labels, 6)
            sheet.save(folder / f"{name}.png")


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


def read_report(folder: str | Path) -> dict:
    """What `save_report` wrote to a folder; ValueError where that cannot be read."""
    path = Path(folder) / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; give a folder that `sdbook evaluate` wrote"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["records"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no report of `sdbook evaluate` ({error}); "
            "evaluate that model again"
        ) from error
    return report


def compare(records: dict[str, list[dict]], others: dict[str, list[dict]]) -> str:
    """A Markdown table of two runs over the same prompts; ValueError for others.

    For each kind: how many each has right, how many only one of them has right, and
    P, how probable so uneven a split would be if both were equally good.
    """
    heads = "kind of prompt | this run | the other | only this | only the other | P"
    lines = [f"| {heads} |", "|---|---:|---:|---:|---:|---:|"]
    for kind, rows in records.items():
        pairs = list(zip(rows, others.get(kind, []), strict=False))
        alike = [one["prompt"] == other["prompt"] for one, other in pairs]
        if len(pairs) < max(len(rows), len(others.get(kind, []))) or not all(alike):
            raise ValueError(
                f"the two runs drew different prompts of kind {kind!r}; "
                "give both the same num_prompts and seed"
            )
        ours, theirs = ([row["right"] for row in side] for side in zip(*pairs))
        won = sum(a and not b for a, b in zip(ours, theirs))
        lost = sum(b and not a for a, b in zip(ours, theirs))
        lines.append(
            f"| {kind.replace('_', ' ')} | {sum(ours)} | {sum(theirs)} "
            f"| {won} | {lost} | {sign_test(ours, theirs):.3f} |"
        )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def extract_features(
    network: nn.Module, pictures: list, batch_size: int = 50
) -> Float64[Tensor, "n d"]:
    """What a network makes of pictures (PIL images, or arrays of bytes) of one size.

    `network` takes pixels (b, 3, h, w) in [-1, 1] and gives (b, d).
    """
    device = next(network.parameters()).device
    rows = []
    for start in range(0, len(pictures), batch_size):
        batch = [to_pixels(np.asarray(p)) for p in pictures[start : start + batch_size]]
        rows.append(network(torch.stack(batch).to(device)).double().cpu())
    return torch.cat(rows)


class OurCLIP:
    """Chapter 6's CLIP with its tokenizer: vectors of length 1, (n, p)."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer):
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "OurCLIP":
        """Open what `save_pretrained` wrote, or the output of `sdbook train-clip`."""
        folder = Path(folder)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        state = read_weights(folder / "clip.safetensors")
        state |= {f"text_encoder.{k}": t for k, t in text_encoder.state_dict().items()}
        width = len(state["image_encoder.final_layer_norm.weight"])
        cells = state["image_encoder.row.weight"].shape[1] // (width // 4)
        size, wide = 8 * math.isqrt(cells), len(state["text_projection.weight"])
        clip = CLIP(text_encoder, size, width, projection_dim=wide)
        clip.load_state_dict(state)
        return cls(clip, Tokenizer.from_pretrained(folder / "tokenizer"))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        """Write text model and tokenizer, and clip.safetensors with all the rest."""
        folder, text_encoder = Path(folder), self.clip.text_encoder
        text_encoder.save_pretrained(folder / "text_encoder", dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        state = self.clip.state_dict().items()
        rest = {k: t for k, t in state if not k.startswith("text_encoder.")}
        rest = {key: tensor.to(dtype or tensor.dtype) for key, tensor in rest.items()}
        save_weights(rest, folder / "clip.safetensors")

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "n p"]:
        """Vectors of sentences."""
        return self.clip.encode_text(self.tokenizer(texts))

    @torch.no_grad()
    def pictures(self, pictures: list) -> Float[Tensor, "n p"]:
        """Vectors of pictures of the size that the picture tower was trained on."""
        seen = extract_features(self.clip.image_encoder, pictures).float()
        return F.normalize(self.clip.visual_projection(seen), dim=-1)


class TheirCLIP:
    """A folder that holds transformers' `CLIPModel` and `CLIPProcessor`."""

    def __init__(self, folder: str | Path):
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(str(folder)).eval()
        self.processor = CLIPProcessor.from_pretrained(str(folder))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "n p"]:
        """Vectors of sentences."""
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        said = self.model.text_model(**self.processor(text=texts, **options))
        return F.normalize(self.model.text_projection(said.pooler_output), dim=-1)

    @torch.no_grad()
    def pictures(self, pictures: list, batch_size: int = 50) -> Float[Tensor, "n p"]:
        """Vectors of pictures of any size."""
        rows = []
        for start in range(0, len(pictures), batch_size):
            batch = [np.asarray(p) for p in pictures[start : start + batch_size]]
            pixels = self.processor(images=batch, return_tensors="pt")
            rows.append(self.model.vision_model(**pixels).pooler_output)
        return F.normalize(self.model.visual_projection(torch.cat(rows)), dim=-1)


def open_clip(name: str | Path = "clip") -> OurCLIP | TheirCLIP:
    """A CLIP: the shipped one, a folder of `sdbook train-clip`, or one of transformers.

    Raises FileNotFoundError, naming the three, for anything else.
    """
    for folder in (Path(name), *(folder / name for folder in model_folders())):
        if (folder / "clip.safetensors").is_file():
            return OurCLIP.from_pretrained(folder)
        if (folder / "preprocessor_config.json").is_file() or (
            folder / "processor_config.json"
        ).is_file():
            return TheirCLIP(folder)
    raise FileNotFoundError(
        f"there is no CLIP {str(name)!r}; give `clip` (it ships with the book), a "
        "folder that `sdbook train-clip` wrote, or one with transformers' CLIPModel "
        "and CLIPProcessor"
    )


def clip_score(
    clip: OurCLIP | TheirCLIP, pictures: list, texts: list[str]
) -> Float[Tensor, "n"]:
    """100 times the cosine of each picture and its text, or 0 where it is negative.

    From Hessel et al. (2021), who have 2.5 in place of 100.
    """
    cosine = (clip.pictures(pictures) * clip.texts(list(texts))).sum(dim=1)
    return 100 * cosine.clamp(min=0)


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


class Inception(nn.Module):
    """Inception v3 up to its last layer: pixels in [-1, 1] to 2048 features.

    Pictures of any size are resized to 299×299, cubic and anti-aliased.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        pixels = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)
        return self.network(pixels.clamp(-1, 1))


def pool_as_in_2015(block: nn.Module, pool) -> None:
    """Let the last branch of an Inception block pool in another way."""
    branches = block._forward
    block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]


def open_inception(path: str | Path) -> Inception:
    """The network of a weights file: torchvision's, or the FID's own of 2015.

    The latter (`pt_inception-2015-12-05-….pth`, with 1008 classes) does not count
    padding when it averages, and its last block takes the maximum. Only its numbers
    compare with published ones. Raises ValueError for weights of another network.
    """
    from torchvision.models import inception_v3

    state = read_weights(path)
    classes = len(state.get("fc.weight", ()))
    aux = any(key.startswith("AuxLogits.") for key in state)
    network = inception_v3(
        weights=None, num_classes=classes, aux_logits=aux, init_weights=False
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds no Inception v3 ({str(error).splitlines()[1].strip()}); "
            "give torchvision's inception_v3 or pytorch-fid's pt_inception file"
        ) from error
    network.fc = nn.Identity()
    if classes == 1008:
        options = {"kernel_size": 3, "stride": 1, "padding": 1}
        average = functools.partial(F.avg_pool2d, count_include_pad=False, **options)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            pool_as_in_2015(network.get_submodule(f"Mixed_{name}"), average)
        largest = functools.partial(F.max_pool2d, **options)
        pool_as_in_2015(network.Mixed_7c, largest)
    return Inception(network).eval()


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
    return draw(things, request.background or pick(BACKGROUNDS), SIDE)


def measure(
    records: dict[str, list[dict]],
    clip: OurCLIP | TheirCLIP,
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


def read_geneval(path: str | Path) -> list[dict]:
    """GenEval's evaluation_metadata.jsonl: one prompt a line, with what to check."""
    prompts = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)
            prompt["prompt"], prompt["tag"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"line {number} of {path} is no prompt of GenEval ({error}); give its "
                "evaluation_metadata.jsonl"
            ) from error
        prompts.append(prompt)
    return prompts


def write_geneval(
    pipe: StableDiffusion,
    prompts: list[dict],
    folder: str | Path,
    seed: int = 0,
    num_images: int = 4,
    **options,
) -> None:
    """Draw GenEval's prompts into the folders that its evaluate_images.py reads.

    00000/metadata.jsonl has the prompt's line, 00000/samples/0000.png and so on its
    pictures, drawn from `seed` on. `options` go to the pipeline.
    """
    for number, prompt in enumerate(tqdm(prompts, unit="prompt")):
        place = Path(folder) / f"{number:05}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps(prompt, ensure_ascii=False) + "\n"
        (place / "metadata.jsonl").write_text(line, encoding="utf-8")
        images = pipe(
            prompt["prompt"],
            num_images_per_prompt=num_images,
            seed=seed,
            progress=False,
            **options,
        ).images
        for k, image in enumerate(images):
            image.save(place / "samples" / f"{k:04}.png")
