"""How far each sampler is from the exact path, on a trained model.

    python tools/compare_samplers.py                       writes data/runs/samplers/
    python tools/compare_samplers.py --pictures 4 --steps 5 10

All samplers start from the same noise. The error is the distance of their final
latents from those of a hundred steps of Heun with Karras' levels, as a share of these
latents' size. `errors.json` has one row for each sampler and number of steps, which
chapter 10 draws. The UNet is called about 1300 times, each time for 8 pictures, with
and without the prompt.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from sdbook import StableDiffusion
from sdbook.schedulers import SCHEDULERS, Scheduler, change_scheduler, noise_like

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "a red star",
    "two blue fish",
    "three yellow flowers",
    "an orange house",
    "a pink heart and a green tree",
    "a yellow moon and a blue boat",
    "a purple boat",
    "a green tree on a meadow",
)
KARRAS = {"use_karras_sigmas": True}
STEPS = [4, 5, 8, 10, 20, 25, 40]  # they divide 1000, or DDIM and PNDM miss timesteps
# Trailing timesteps, so that all begin at the noisiest level.
SAMPLERS = {
    "DDIM": ("ddim", {"set_alpha_to_one": True}),
    "PNDM": ("pndm", {"set_alpha_to_one": True, "skip_prk_steps": True}),
    "Euler": ("euler", {}),
    "Euler, Karras": ("euler", KARRAS),
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


def draw(pipe: StableDiffusion, noise: torch.Tensor, steps: int, scale: float):
    """Final latents; the network's first input is `noise`, whatever the sampler."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    start = torch.full((1,), float(scheduler.init_noise_sigma))
    unit = scheduler.scale_model_input(start, scheduler.timesteps[0])
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), len(noise)))
    return pipe(
        prompts,
        latents=noise / unit,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        progress=False,
    ).images.float()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How far off each sampler is.")
    parser.add_argument("--model", default="scenes", help="a name or a folder (scenes)")
    parser.add_argument("--pictures", type=int, default=8, help="how many (8)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--reference_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "data" / "runs" / "samplers"
    )
    options = parser.parse_args(arguments)
    pipe = StableDiffusion.from_pretrained(options.model).to(options.device)
    model, scale = pipe.scheduler, options.guidance_scale
    generators = [torch.Generator().manual_seed(k) for k in range(options.pictures)]
    noise = noise_like(torch.empty(pipe.latent_shape(options.pictures)), generators)

    pipe.scheduler = scheduler_like(model, "heun", KARRAS)
    exact = draw(pipe, noise, options.reference_steps, scale)
    rows = []
    for (label, (name, more)), steps in itertools.product(
        SAMPLERS.items(), options.steps
    ):
        pipe.scheduler = scheduler_like(model, name, more)
        error = (draw(pipe, noise, steps, scale) - exact).norm() / exact.norm()
        calls = len(pipe.scheduler.timesteps)
        row = {"scheduler": label, "steps": steps, "calls": calls}
        rows.append({**row, "error": round(error.item(), 5)})
        print(f"{label:18}{steps:4} steps{calls:4} calls   error {error:.4f}")

    record = {
        "model": Path(options.model).name,
        "pictures": options.pictures,
        "guidance_scale": scale,
        "reference": f"Heun with Karras' levels, {options.reference_steps} steps",
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "errors.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
