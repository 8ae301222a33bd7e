"""What each sampler does with a given number of steps, on a trained model.

    python tools/experiments/compare_samplers.py  writes data/runs/samplers/
    python tools/experiments/compare_samplers.py --prompts 2 --steps 5 10

All samplers start from the same noises. Two measures: how many pictures show what
their prompt says (chapter 11's judge), and how far the final latents are from those of
1000 steps of Euler, as a share of these latents' size. `errors.json` has one row for
each sampler and number of steps, which chapter 10 draws.
"""

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from sdbook import StableDiffusion
from sdbook.data import KINDS, read_caption
from sdbook.evaluation import Judge, prompts, satisfies
from sdbook.schedulers import SCHEDULERS, Scheduler, change_scheduler, noise_like

ROOT = Path(__file__).resolve().parents[2]
KARRAS = {"use_karras_sigmas": True}
STEPS = [4, 5, 8, 10, 20, 40]  # they divide 1000, or DDIM and PNDM miss timesteps
# Trailing timesteps, so that all begin at the noisiest level.
SAMPLERS = {
    "DDIM": ("ddim", {"set_alpha_to_one": True}),
    "PNDM": ("pndm", {"set_alpha_to_one": True, "skip_prk_steps": True}),
    "Euler": ("euler", {}),
    "Euler, Karras": ("euler", KARRAS),
    "Euler ancestral": ("euler_a", {}),
    "Heun, Karras": ("heun", KARRAS),
    "LMS, Karras": ("lms", KARRAS),
    "DPM++ 2M": ("dpmpp_2m", {}),
    "DPM++ 2M, Karras": ("dpmpp_2m", KARRAS),
    "UniPC, Karras": ("unipc", KARRAS),
}


def scheduler_like(model: Scheduler, name: str, options: dict) -> Scheduler:
    """The scheduler called `name` for this model, with other options."""
    shared = change_scheduler(model, name).options
    options = {**shared, "timestep_spacing": "trailing", **options}
    return SCHEDULERS[name].from_options(options, foreign=True)


def draw(pipe: StableDiffusion, texts: list[str], noise, steps: int, scale: float):
    """Final latents; the network's first input is `noise`, whatever the sampler."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    start = torch.full((1,), float(scheduler.init_noise_sigma))
    unit = scheduler.scale_model_input(start, scheduler.timesteps[0])
    return pipe(
        texts,
        latents=noise / unit,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        progress=False,
    ).images.float()


def count_right(pipe: StableDiffusion, latents, texts: list[str]) -> int:
    """How many of the pictures show what their prompt says."""
    judge = Judge()
    verdicts = (judge.read(np.asarray(image)) for image in pipe.decode(latents))
    return sum(satisfies(v, read_caption(t)) for v, t in zip(verdicts, texts))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What each sampler makes of steps.")
    parser.add_argument("--model", default="scenes", help="a name or a folder (scenes)")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind (8)")
    parser.add_argument("--seed", type=int, default=5, help="of the prompts (5)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--reference_steps", type=int, default=1000)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "data" / "runs" / "samplers"
    )
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    pipe = StableDiffusion.from_pretrained(options.model).to(options.device)
    model, scale = pipe.scheduler, options.guidance_scale
    # one prompt of each kind, then another of each: the first few are of all kinds
    of_kinds = [prompts(kind, options.prompts, options.seed) for kind in KINDS]
    texts = [text for row in zip(*of_kinds) for text in row]
    generators = [torch.Generator().manual_seed(k) for k in range(len(texts))]
    noise = noise_like(torch.empty(pipe.latent_shape(len(texts))), generators)

    few = len(KINDS)  # a thousand steps for all would take too long
    pipe.scheduler = scheduler_like(model, "euler", {})
    exact = draw(pipe, texts[:few], noise[:few], options.reference_steps, scale)
    rows = []
    for (label, (name, more)), steps in itertools.product(
        SAMPLERS.items(), options.steps
    ):
        pipe.scheduler = scheduler_like(model, name, more)
        latents = draw(pipe, texts, noise, steps, scale)
        error = ((latents[:few] - exact).norm() / exact.norm()).item()
        calls, right = len(pipe.scheduler.timesteps), count_right(pipe, latents, texts)
        row = {"scheduler": label, "steps": steps, "calls": calls, "right": right}
        rows.append({**row, "error": round(error, 5)})
        print(
            f"{label:18}{steps:4} steps{calls:4} calls   {right:3} of {len(texts)} "
            f"right   error {error:.4f}",
            flush=True,
        )

    record = {
        "command": shlex.join(
            ["python", "tools/experiments/compare_samplers.py", *given]
        ),
        "model": Path(options.model).name,
        "pictures": len(texts),
        "pictures_for_error": few,
        "seed": options.seed,
        "guidance_scale": scale,
        "reference": f"Euler, {options.reference_steps} steps",
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "errors.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
