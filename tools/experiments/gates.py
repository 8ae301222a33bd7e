"""Check a model stage by stage, since a later stage hides an earlier one's fault.

    python tools/experiments/gates.py  gates 1 and 2, shipped model
    sdbook train --config sdbook/configs/scenes-overfit-cpu.yaml
    python tools/experiments/gates.py runs/overfit --gate 3

Gate 1: the judge reads real renders, and tells a scene from its near twin. Gate 2: it
reads what the VAE makes of the renders. Gate 3: a UNet that was trained on nothing but
500 scenes draws their captions. Ends with status 1 when a gate is not passed.
"""

import argparse
import sys
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from sdbook import StableDiffusion
from sdbook.data import Request, Scenes, read_caption
from sdbook.evaluation import Judge, satisfies
from sdbook.pipeline import to_pictures
from sdbook.training import Twins

NEEDED = {1: 0.99, 2: 0.99, 3: 0.95}  # the share that has to be right
BATCH = 50


def count_right(pictures: Iterable[Image.Image], requests: Iterable[Request]) -> int:
    """How many pictures show what is asked for."""
    judge = Judge()
    verdicts = (judge.read(np.asarray(picture)) for picture in pictures)
    return sum(satisfies(v, r) for v, r in zip(verdicts, requests, strict=True))


def gate_1(count: int) -> int:
    """Scenes that fit their own caption and not their twin's."""
    right = 0
    twins = Twins(Scenes(split="validation"))
    for i in range(count):
        pixels, captions = zip(*twins[i], strict=True)
        pictures = to_pictures(torch.stack(pixels), "pil")
        own = [read_caption(caption) for caption in captions]
        exchanged = count_right(pictures, own[::-1])
        right += count_right(pictures, own) == 2 and not exchanged
    return right


@torch.no_grad()
def gate_2(count: int, vae) -> int:
    """Unseen scenes that fit their caption after encoding and decoding."""
    world, right = Scenes(split="validation"), 0
    for i in range(count):
        pixels, caption = world[i]
        rebuilt = vae.decode(vae.encode(pixels[None]).mode())
        right += count_right(to_pictures(rebuilt, "pil"), [read_caption(caption)])
    return right


def gate_3(count: int, pipe: StableDiffusion, guidance_scale: float) -> int:
    """Captions of the first training scenes that are drawn right, at the first try."""
    captions = [Scenes().scene(i).caption for i in range(count)]
    right = 0
    for start in range(0, count, BATCH):
        some = captions[start : start + BATCH]
        out = pipe(some, guidance_scale=guidance_scale, seed=start, progress=False)
        right += count_right(out.images, map(read_caption, some))
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint_path", nargs="?", default="scenes")
    parser.add_argument("--gate", type=int, nargs="+", choices=NEEDED, default=[1, 2])
    parser.add_argument("--count", type=int, default=500, help="scenes of each gate")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    options = parser.parse_args(arguments)

    pipe = StableDiffusion.from_pretrained(options.checkpoint_path)
    gates = {
        1: lambda: gate_1(options.count),
        2: lambda: gate_2(options.count, pipe.vae),
        3: lambda: gate_3(options.count, pipe, options.guidance_scale),
    }
    failed = 0
    for gate in options.gate:
        right = gates[gate]()
        passed = right >= NEEDED[gate] * options.count
        failed += not passed
        print(
            f"gate {gate}: {right} of {options.count} right, "
            f"{NEEDED[gate]:.0%} needed: {'passed' if passed else 'NOT passed'}"
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
