"""Train four small UNets: one as it should be, and three in which something is wrong.

    tools/experiments/record_failures.py              15 minutes on two CPU cores
    tools/experiments/record_failures.py --only deaf  one of them again

Each is `sdbook train --config sdbook/configs/cpu-minutes.yaml` with one flag changed.
Chapter 13 shows what they wrote: data/runs/failures/NAME.jsonl is the log, NAME.png
the last sheet of pictures, and hearing.json says how much the captions matter to each.
"""

import argparse
import json
import shlex
import shutil
from pathlib import Path

import torch

from sdbook import StableDiffusion
from sdbook.__main__ import main as sdbook
from sdbook.data import Scenes

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "good": (),
    "too-fast": ("--learning_rate", "0.05"),
    "too-few": ("--num_pictures", "24"),
    "deaf": ("--caption_dropout", "1"),
}


@torch.no_grad()
def hearing(pipe: StableDiffusion, count: int = 64) -> float:
    """The error in the noise with other captions, over that with the right ones.

    On unseen scenes, in the noisiest quarter of the timesteps; 1 is a UNet that does
    not listen.
    """
    world = Scenes(split="validation", kinds=("single", "colours"))
    pixels, captions = zip(*(world[i] for i in range(count)), strict=True)
    x0 = pipe.vae.encode(torch.stack(pixels)).mean * pipe.vae.config.scaling_factor
    context = pipe.text_encoder(pipe.tokenizer(list(captions)))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(750, 999, count).long()
    x = pipe.scheduler.add_noise(x0, noise, t)
    right, exchanged = (
        (pipe.unet(x, t, text) - noise).square().mean().item()
        for text in (context, context.roll(1, 0))
    )
    return exchanged / right


def record(name: str, runs: Path, data: Path, more: list[str]) -> None:
    """Train one of them from zero, and keep its log and its last pictures."""
    output = runs / name
    command = ["train", "--config", str(ROOT / "sdbook/configs/cpu-minutes.yaml")]
    command += ["--output_dir", str(output), "--resume", "none", *RUNS[name], *more]
    print("\nsdbook", shlex.join(command), flush=True)
    sdbook(command)
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "log.jsonl", data / f"{name}.jsonl")
    shutil.copyfile(max(output.glob("samples/*.png")), data / f"{name}.png")
    file = data / "hearing.json"
    heard = json.loads(file.read_text()) if file.is_file() else {}
    heard[name] = round(hearing(StableDiffusion.from_pretrained(output)), 4)
    file.write_text(json.dumps(heard, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "failures")
    parser.add_argument("--data", type=Path, default=ROOT / "data/runs/failures")
    parser.add_argument("more", nargs="*", help="flags for every training, after --")
    options = parser.parse_args(arguments)
    for name in options.only:
        record(name, options.runs, options.data, options.more)


if __name__ == "__main__":
    main()
