"""How fast this machine trains the UNet, and what share of its arithmetic that uses.

    python tools/benchmarks/measure_throughput.py        some minutes on two CPU cores
    python tools/benchmarks/measure_throughput.py --gpu  one GPU, larger batches

Every row is the whole step of `sdbook train` (loss, backward, clipping, AdamW, average)
on latents and texts that lie ready. Its arithmetic is counted by PyTorch's
FlopCounterMode, once, and divided by the time. The peak is measured, too: the fastest
of some products of two large matrices in the same precision. Each row is timed in
several rounds, one row after the other, and the median kept. Writes cpu.json or
gpu.json to data/runs/throughput/.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median

import torch
from bench_training import next_steps, our_step, parts
from timing import seconds, write_record
from torch.utils.flop_counter import FlopCounterMode

from sdbook.clip import Tokenizer
from sdbook.training import RunConfig, make_accelerator

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs" / "throughput"
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = 24  # tokens of a caption


def peak_flops(device, dtype, side: int, rounds: int = 8) -> float:
    """The most operations a second in a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(torch.matmul, a, b) for _ in range(rounds)]
    return 2 * side**3 / min(times)


def make_step(sizes: str, batch: int, precision: str, compiled: bool):
    """The step, how many operations it takes, and how many weights it moves."""
    accelerator = make_accelerator(RunConfig(mixed_precision=precision))
    unet, _, text_encoder = parts(sizes, Tokenizer.train(["a red star"], 514, WORDS))
    side = unet.config.sample_size
    moments = torch.randn(batch, 8, side, side, device=accelerator.device)
    states = torch.randn(batch, WORDS, text_encoder.config.hidden_size)
    data = {"batch": lambda number: (moments, states.to(accelerator.device)),
            "empty": states[0].numpy(), "scale": 1.0}  # fmt: skip
    step = our_step(accelerator, unet, data)
    with FlopCounterMode(display=False) as counter:
        step(0)
    if compiled:
        torch._dynamo.reset()  # or the second size gets code made for any
        unet.compile()
    count = sum(weight.numel() for weight in unet.parameters())
    return step, counter.get_total_flops(), count


def measure(rows: list[dict], options) -> None:
    """Fill in what each row reached. Rows that do not fit into memory say so."""
    for row in rows:
        names = ("sizes", "batch", "precision", "compiled")
        try:
            step, flops, count = make_step(*(row[name] for name in names))
            row |= {"flops": flops, "weights": count}
            row["first_seconds"] = seconds(next_steps(step, 3))  # compiles, allocates
            if options.gpu:
                torch.cuda.reset_peak_memory_stats()
            steps = next_steps(step, options.steps)
            times = [seconds(steps) for _ in range(options.rounds)]
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
            continue
        finally:
            step = steps = None
        middle = median(times) / options.steps
        row |= {
            "pictures_per_second": row["batch"] / middle,
            "flops_per_second": flops / middle,
            "share_of_peak": flops / middle / options.peaks[row["precision"]],
        }
        if options.gpu:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        print(
            f"{row['sizes']:6} batch {row['batch']:5} {row['precision']:5}"
            f"{' compiled' if row['compiled'] else '':10}"
            f"{row['pictures_per_second']:10.1f} pictures/s"
            f"{row['flops_per_second'] / 1e12:9.3f} TFLOP/s"
            f"{row['share_of_peak']:7.0%} of the peak",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="on the GPU")
    parser.add_argument("--sizes", default="book", help="tiny, book or sd15")
    parser.add_argument("--batches", type=int, nargs="+", help="pictures at once")
    parser.add_argument(
        "--precisions", nargs="+", choices=TYPES, default=["no", "bf16"]
    )
    parser.add_argument("--steps", type=int, default=4, help="in each round (4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each row (5)")
    parser.add_argument("--side", type=int, help="of the matrices for the peak")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of records")
    options = parser.parse_args(arguments)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu, but PyTorch sees no GPU here; leave it out for the CPU")
    if not options.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    device = "cuda" if options.gpu else "cpu"
    # The peak of float32 and the step of float32 shall count the same digits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    side = options.side or (8192 if options.gpu else 2048)
    options.peaks = {
        name: peak_flops(device, TYPES[name], side) for name in options.precisions
    }
    for name, peak in options.peaks.items():
        print(f"peak, {name}: {peak / 1e12:.3f} TFLOP/s")
    batches = options.batches or ([64, 256, 1024] if options.gpu else [4, 16, 64])
    rows = [
        {"sizes": options.sizes, "batch": b, "precision": p, "compiled": c}
        for p in options.precisions
        for c in (False, True)
        for b in batches
    ]
    measure(rows, options)
    file = options.output / f"{'gpu' if options.gpu else 'cpu'}.json"
    what = {"peaks": options.peaks, "rows": rows}
    write_record(file, "measure_throughput.py", arguments, device, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
