"""Train the model that ships with the book: VAE, CLIP, UNet, one after the other.

The UNet is trained twice: on scenes of one thing, then on all. In between it has to
learn 500 scenes by heart, as a check of all that comes before (gates.py).

    python tools/experiments/train_scenes.py        a computer without a GPU: some hours
    python tools/experiments/train_scenes.py --gpu  one GPU with bfloat16, larger

Started again, it goes on where it was stopped. Checkpoints and caches go to runs/.
At the end data/models/scenes/ holds the model in float16, data/runs/ the recorded
curves and the scores. Each step is a command that is printed first and could be
typed; further arguments after -- go to every training.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "sdbook" / "configs"


def sdbook(*arguments: str) -> None:
    """Run an `sdbook` command in this process, and show it."""
    from sdbook.__main__ import main

    print("\nsdbook", shlex.join(arguments), flush=True)
    main(list(arguments))


def check(*arguments: str) -> None:
    """Say whether a gate is passed; go on in any case."""
    gates = ROOT / "tools" / "experiments" / "gates.py"
    command = [sys.executable, str(gates), *arguments]
    print("\n" + shlex.join(command), flush=True)
    subprocess.run(command)


def train(
    configs: Path, runs: Path, gpu: bool, more: list[str], overfit: int = 500
) -> Path:
    """The trainings, in order; returns the folder of the finished pipeline."""
    wide = ["--mixed_precision", "bf16"] if gpu else []
    kind = "gpu" if gpu else "cpu"
    frozen = [
        f"--vae_weights_path={runs / 'vae'}",
        f"--text_encoder_path={runs / 'clip'}",
    ]

    def run(command: str, name: str, config: str, *flags: str) -> None:
        file, output = configs / f"scenes-{config}.yaml", runs / name
        sdbook(
            command, "--config", str(file), "--output_dir", str(output), *flags, *more
        )

    run("train-vae", "vae", "vae", *wide)
    run("train-clip", "clip", "clip", *wide)
    run("train", "singles", f"singles-{kind}", *frozen)
    frozen.append(f"--pretrained={runs / 'singles'}")
    if overfit:
        count = f"--num_pictures={overfit}"
        run("train", "overfit", f"overfit-{kind}", *frozen, count)
        learned = str(runs / "overfit")
        check("--gate", "3", "--count", str(overfit), learned)
    run("train", "unet", f"unet-{kind}", *frozen)
    return runs / "unet"


def record(runs: Path, data: Path) -> None:
    """Copy the logs to data/runs/."""
    for name in ("vae", "clip", "singles", "unet"):
        folder = data / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs / name / "log.jsonl", folder / "log.jsonl")


def ship(pipeline: Path, model: Path) -> None:
    """Write the pipeline in float16 to where `from_pretrained("scenes")` finds it."""
    import torch

    from sdbook import StableDiffusion

    pipe = StableDiffusion.from_pretrained(pipeline)
    pipe.save_pretrained(model, dtype=torch.float16)
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    print(f"wrote {model}: {size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="bfloat16, compiled, wide")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--num_prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--overfit", type=int, default=500, help="0 skips the check")
    parser.add_argument("more", nargs="*", help="flags for the trainings, after --")
    options = parser.parse_args(arguments)

    pipeline = train(
        options.configs, options.runs, options.gpu, options.more, options.overfit
    )
    record(options.runs, options.data)
    model = options.data / "models" / "scenes"
    ship(pipeline, model)
    sdbook(
        "evaluate", "--checkpoint_path", os.path.relpath(model),
        "--output_dir", str(options.data / "runs" / "evaluation"),
        "--num_prompts", str(options.num_prompts),
        "--guidance_scale", str(options.guidance_scale),
    )  # fmt: skip


if __name__ == "__main__":
    main()
