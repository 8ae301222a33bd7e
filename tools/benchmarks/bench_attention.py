"""Is PyTorch's fused attention faster than the formula, and from how many keys on?

    tools/benchmarks/bench_attention.py            one CPU core

Forward and back, in turns with the formula of chapter 1: self-attention over more and
more positions, cross-attention with prompts of both models' lengths, and a whole step
of training the shipped UNet. Counted is the processor's time, so that other programs
disturb little. A ratio below 1 means that the kernel is faster. The record, medians and
middle halves over the rounds, goes to data/runs/attention/cpu.json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from timing import ratios, write_record

import sdbook.attention
from sdbook import StableDiffusion
from sdbook.attention import attention, fused_attention

FILE = Path(__file__).resolve().parents[2] / "data" / "runs" / "attention" / "cpu.json"
# What, batch, heads, positions that read, positions or words that are heard, width.
LAYERS = [
    ("ours, self, 4 × 4", 16, 4, 16, 16, 32),
    ("ours, self, 8 × 8", 16, 4, 64, 64, 24),
    ("ours, prompt", 16, 4, 64, 24, 24),
    ("SD, self, 8 × 8", 2, 8, 64, 64, 160),
    ("SD, self, 16 × 16", 1, 8, 256, 256, 160),
    ("SD, self, 32 × 32", 1, 8, 1024, 1024, 80),
    ("SD, self, 64 × 64", 1, 8, 4096, 4096, 40),
    ("SD, prompt", 1, 8, 4096, 77, 40),
]


def layer(function: Callable, shape: tuple[int, ...]) -> Callable:
    """Forward and back through one way to attend."""
    b, heads, n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(b, heads, n, d, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(b, heads, m, d, generator=generator, requires_grad=True)
        for _ in range(2)
    )
    return lambda: torch.autograd.grad(function(q, k, v).sum(), (q, k, v))


def training_step(function: Callable, batch: int) -> Callable:
    """A step of training the shipped UNet that attends in this way."""
    unet = StableDiffusion.from_pretrained("scenes").unet.train()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    context = torch.randn(batch, 24, 128, generator=generator)

    def step():
        sdbook.attention.fused_attention = function
        unet(latents, 500, context).square().mean().backward()
        sdbook.attention.fused_attention = fused_attention

    return step


def seconds(function: Callable) -> float:
    """The processor's time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(make: Callable, rounds: int) -> dict[str, float]:
    """The formula's milliseconds, and the kernel's time as a share of them."""
    both = make(attention), make(fused_attention)
    for function in both:
        function()  # the first call prepares
    turns = [[seconds(function) for function in both] for _ in range(rounds)]
    plain, fused = zip(*turns, strict=True)
    shares = ratios(fused, plain)
    return {
        "plain_ms": float(f"{1000 * median(plain):.3g}"),
        "ratio": round(median(shares), 3),
        "middle_half": [round(shares[rounds // 4], 3), round(shares[-rounds // 4], 3)],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name, *shape in LAYERS:
        rounds = options.rounds if shape[3] < 1000 else max(options.rounds // 4, 5)
        found = compare(lambda function: layer(function, tuple(shape)), rounds)  # noqa: B023
        rows.append({"name": name, "readers": shape[2], "keys": shape[3], **found})
        print(rows[-1])
    found = compare(lambda function: training_step(function, 16), options.rounds)
    rows.append({"name": "ours, a step of training", **found})
    print(rows[-1])
    write_record(options.json, Path(__file__).name, arguments, "cpu", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
