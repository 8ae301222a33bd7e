"""Stable Diffusion 1.5 at full size, ours beside diffusers: the same picture? How much
memory?

    tools/benchmarks/check_full_size.py                  4.3 GB of weights, some minutes
    tools/benchmarks/check_full_size.py --toy --size 64  the same, tiny, in seconds

Makes random weights of SD 1.5's architecture in a temporary folder, which is removed
again (--folder keeps them elsewhere). Then ours and diffusers each open that folder
in a fresh Python, as float32 on the CPU, and draw the same prompt from the same
noise. Memory is the largest resident set of each; `import torch` alone, and the
import of the library, are recorded as well. The seconds are those of a single run and
of whatever else the machine was doing: quote the memory. The record goes to
data/runs/full_size/results.json, or where --json says.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "data" / "runs" / "full_size" / "results.json"

MAKE = """
import json, sys
import torch
from sdbook import StableDiffusion
from sdbook.clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from sdbook.schedulers import make_scheduler
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

folder, toy = sys.argv[1], sys.argv[2] == "toy"
torch.manual_seed(0)
sizes = [{}, {}, {}]
if toy:
    sizes = [
        {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 48},
        {"block_out_channels": (32, 64, 96, 96)},
        {"hidden_size": 48, "intermediate_size": 96},
    ]
tokenizer = Tokenizer.train(["a red star above a blue house"], vocab_size=514)
pipe = StableDiffusion(
    AutoencoderKL(VAEConfig(**sizes[1])),
    CLIPTextModel(CLIPTextConfig(**sizes[2])),
    tokenizer,
    UNet(UNetConfig(**sizes[0])),
    make_scheduler(
        "ddim", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        steps_offset=1, clip_sample=False, set_alpha_to_one=False,
    ),
)
parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
for part in parts.values():
    for parameter in part.parameters():
        if parameter.ndim == 1:  # biases of 0 and norms of 1 would prove little
            parameter.data += 0.1 * torch.randn_like(parameter)
pipe.save_pretrained(folder)
print(json.dumps({
    name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()
}))
"""

DRAW = """
import json, resource, sys, time
import torch

who, folder, size, steps, prompt, out = sys.argv[1:]
size, steps = int(size), int(steps)
unit = 1 if sys.platform == "darwin" else 1024

def peak():
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

seen = {"torch_alone": peak()}
latents, times = [], []
if who == "ours":
    from sdbook import StableDiffusion
else:
    import diffusers
    diffusers.utils.logging.disable_progress_bar()
    diffusers.StableDiffusionPipeline
seen["imported"] = peak()
start = time.perf_counter()
kind = StableDiffusion if who == "ours" else diffusers.StableDiffusionPipeline
pipe = kind.from_pretrained(folder)
loaded = time.perf_counter() - start
seen["loaded"] = peak()

def note(x):
    times.append(time.perf_counter())
    latents.append(x)
    seen["loop"] = peak()

options = dict(
    height=size, width=size, num_inference_steps=steps, guidance_scale=7.5,
    output_type="np",
)
start = time.perf_counter()
if who == "ours":
    picture = pipe(
        prompt, seed=0, callback=lambda step, t, x: note(x), progress=False, **options
    ).images[0]
else:
    pipe.set_progress_bar_config(disable=True)

    def callback(pipe, step, t, values):
        note(values["latents"])
        return values

    generator = torch.Generator().manual_seed(0)
    picture = pipe(
        prompt, generator=generator, callback_on_step_end=callback, **options
    ).images[0]
end = time.perf_counter()
seen["decoded"] = peak()
import numpy
numpy.savez(out, picture=picture, latents=latents[-1].float().numpy())
print(json.dumps({
    "who": who, "seconds_to_load": round(loaded, 2),
    "seconds_in_the_loop": round(times[-1] - start, 2),
    "seconds_to_decode": round(end - times[-1], 2),
    "peak_bytes": {name: int(value) for name, value in seen.items()},
    "threads": torch.get_num_threads(),
}))
"""

PROMPT = "a red star above a blue house"


def run(code: str, *arguments: str) -> dict:
    """What a fresh Python prints last, as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # This package, and not another copy that may be installed.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", code, *arguments]
    out = subprocess.check_output(command, text=True, env=environment)
    return json.loads(out.splitlines()[-1])


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The largest difference, and the range of the values that it is a part of."""
    difference = float(np.abs(ours - theirs).max())
    extent = float(theirs.max() - theirs.min())
    return {
        "largest_difference": difference,
        "range": round(extent, 4),
        "share_of_the_range": difference / extent,
    }


def measure(folder: Path, size: int, steps: int) -> tuple[dict, list[dict]]:
    """Draw with both from the weights in a folder: (how equal, a row for each)."""
    rows, drawn = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for who in ("ours", "diffusers"):
            file = str(Path(temporary) / f"{who}.npz")
            rows.append(
                run(DRAW, who, str(folder), str(size), str(steps), PROMPT, file)
            )
            print(json.dumps(rows[-1]), flush=True)
            with np.load(file) as arrays:
                drawn.append(dict(arrays))
    equal = {name: compare(*(one[name] for one in drawn)) for name in drawn[0]}
    return equal, rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Full size, ours beside diffusers.")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (512)")
    parser.add_argument("--steps", type=int, default=2, help="steps of DDIM (2)")
    parser.add_argument("--toy", action="store_true", help="narrow networks, for tests")
    parser.add_argument("--folder", type=Path, help="where the weights lie, or will")
    parser.add_argument("--json", type=Path, default=RECORD, help="where to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        parameters = run(MAKE, str(folder), "toy" if options.toy else "full")
        print(f"parameters: {parameters}", flush=True)
        equal, rows = measure(folder, options.size, options.steps)
    for name, found in equal.items():
        print(f"{name}: largest difference {found['largest_difference']:.2e}", end="")
        print(f", {found['share_of_the_range']:.2e} of their range")
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(
            ["python", "tools/benchmarks/check_full_size.py", *given]
        ),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers")
        },
        "dtype": "float32", "size": options.size, "steps": options.steps,
        "guidance_scale": 7.5, "parameters": parameters,
        "equal": equal, "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
