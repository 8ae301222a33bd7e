"""What makes the guided loop faster, and by how much, measured in turns on one machine.

    tools/benchmarks/bench_speedups.py  the shipped model, CPU
    tools/benchmarks/bench_speedups.py --device cuda --dtype bf16
    tools/benchmarks/bench_speedups.py --device cuda --dtype fp16 --model folder-or-id

Every rung is the whole loop (DDIM, no decoder). All rungs run once in each round, one
after the other, and each time is divided by the first rung's of the same round: seconds
depend on the machine and on the hour, these ratios less so. The record, medians over
the rounds, goes to data/runs/speedups/<device>.json, or where --json says.

The record for the CPU that comes with the book has three more rungs, which this script
had at the commit that is named there: text read once, one latent for two texts, times
at once. Together they brought one to two per cent, and were taken out.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from timing import in_turns, processor, ratios, write_record
from torch import Tensor

from sdbook import StableDiffusion
from sdbook.pipeline import guide

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "runs" / "speedups"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = ["a red star above a blue house", "two green fish", "a boat", "a moon"]
SCALE = 3.0


class Ladder:
    """The guided loop, from plain to cheap; each method draws the same latents."""

    def __init__(self, pipe: StableDiffusion, batch: int, steps: int):
        self.pipe, self.unet = pipe, pipe.unet
        pipe.scheduler.set_timesteps(steps)
        prompts = [PROMPTS[k % len(PROMPTS)] for k in range(batch)]
        self.context = pipe.encode_prompt(prompts)
        self.uncond = pipe.encode_prompt([""] * batch)
        self.both = torch.cat([self.uncond, self.context])
        shape = pipe.latent_shape(batch)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(pipe.device)

    @torch.no_grad()
    def loop(self, predict: Callable[[Tensor, int], Tensor]) -> Tensor:
        """All steps; `predict` takes latents and the timestep."""
        scheduler, x = self.pipe.scheduler, self.noise
        for t in scheduler.timesteps.tolist():
            answer = predict(x.to(self.pipe.dtype), t).float()
            x = scheduler.step(answer, t, x)
        return x

    def plain(self) -> Tensor:
        def predict(x, t):
            uncond, cond = self.unet(x, t, self.uncond), self.unet(x, t, self.context)
            return guide(uncond, cond, SCALE)

        return self.loop(predict)

    def one_call(self) -> Tensor:
        def predict(x, t):
            answers = self.unet(torch.cat([x, x]), t, self.both)
            return guide(*answers.chunk(2), SCALE)

        return self.loop(predict)

    def no_guidance(self) -> Tensor:
        return self.loop(lambda x, t: self.unet(x, t, self.context))


def with_own_unet(pipe: StableDiffusion) -> StableDiffusion:
    """The same pipeline with a UNet that may be changed."""
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    return other


def rungs(
    pipe: StableDiffusion, fast: StableDiffusion | None, compiled: bool,
    batch: int, steps: int,
) -> dict[str, Callable]:  # fmt: skip
    """What to time, by name: the ladder, and beside it what changes more than that."""
    ladder = Ladder(pipe, batch, steps)
    found = {
        "plain: two calls": ladder.plain,
        "both halves in one call (our pipeline)": ladder.one_call,
    }
    other = with_own_unet(pipe)
    other.unet.to(memory_format=torch.channels_last)
    found["… in channels-last order"] = Ladder(other, batch, steps).one_call
    best, name = pipe, ""
    if fast is not None:
        best, name = fast, f" in {fast.dtype}".replace("torch.", "")
        found[f"…{name}"] = Ladder(fast, batch, steps).one_call
    if compiled:
        other = with_own_unet(best)
        other.unet.forward = torch.compile(other.unet.forward)
        found[f"… compiled{name}"] = Ladder(other, batch, steps).one_call
    found["… guidance off (another picture)"] = ladder.no_guidance
    return found


def measure(functions: dict[str, Callable], rounds: int) -> list[dict]:
    """One row for each function: median seconds, and of the first one's time."""
    reference, rows = None, []
    for name, function in functions.items():
        result = function().float().cpu()
        reference = result if reference is None else reference
        error = (result - reference).abs().max() / reference.abs().max()
        rows.append({"name": name, "difference": float(f"{error:.1e}")})
    times = in_turns(list(functions.values()), rounds)
    for row, ours in zip(rows, times, strict=True):
        of_plain = ratios(ours, times[0])
        row["seconds"] = round(median(ours), 4)
        row["of_plain"] = round(median(of_plain), 3)
        row["least"], row["most"] = round(of_plain[0], 3), round(of_plain[-1], 3)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What makes the guided loop faster.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="a second precision to time")
    parser.add_argument("--model", default="scenes", help="as from_pretrained takes it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=10, help="steps of DDIM (10)")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each (9)")
    parser.add_argument(
        "--compile", choices=("auto", "yes", "no"), default="auto",
        help="torch.compile as well (auto: on a GPU)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to write the record")
    options = parser.parse_args(arguments)
    device = options.device
    pipe = StableDiffusion.from_pretrained(options.model).to(device)
    pipe.scheduler = "ddim"
    fast = None
    if options.dtype and options.dtype != "fp32":
        fast = StableDiffusion.from_pretrained(options.model, DTYPES[options.dtype])
        fast.to(device).scheduler = pipe.scheduler
    compiled = options.compile == "yes" or (
        options.compile == "auto" and device == "cuda"
    )
    results = []
    for batch in options.batches:
        functions = rungs(pipe, fast, compiled, batch, options.steps)
        rows = measure(functions, options.rounds)
        results.append({"batch": batch, "rows": rows})
        print(f"\n{f'{batch} at a time':<38}{'seconds':>9}{'of plain':>10}  (range)")
        for row in rows:
            print(
                f"{row['name']:<38}{row['seconds']:9.3f}{row['of_plain']:10.2f}"
                f"  {row['least']:.2f} to {row['most']:.2f}",
                flush=True,
            )
    path = options.json or FOLDER / f"{device}.json"
    names = {name: getattr(options, name) for name in ("model", "steps", "rounds")}
    kind = {"device": device, "processor": processor(device)}
    what = {**kind, **names, "results": results}
    write_record(path, "bench_speedups.py", arguments, device, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
