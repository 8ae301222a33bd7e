"""What accuracy costs: guidance, averaged weights, hours of training.

    tools/experiments/measure_tradeoffs.py  guidance
    tools/experiments/measure_tradeoffs.py --only ema --ema_run runs/unet
    tools/experiments/measure_tradeoffs.py --only training \
        --stages 270=data/runs/evaluation

Writes guidance.json, ema.json and training.json to data/runs/tradeoffs/, which chapter
11 draws. Accuracy is chapter 11's: prompts of each kind, read by the judge. Diversity
is the mean distance between several pictures of one prompt. `--ema_run` is an
`output_dir` of `sdbook train`; a stage is the
minutes that a model had been trained and a report of `sdbook evaluate` on it. Steps
and samplers have their own script, compare_samplers.py.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from sdbook import StableDiffusion
from sdbook.data import KINDS, read_caption
from sdbook.evaluation import evaluate, imagine, mean_distance, prompts, sign_test
from sdbook.features import extract_features, open_clip
from sdbook.reports import read_report
from sdbook.training import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCALES = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0]


def rights(pipe: StableDiffusion, options, scale: float) -> list[bool]:
    """Which of the prompts, kind after kind, come out right."""
    records = evaluate(
        pipe,
        num_prompts=options.prompts,
        seed=options.seed,
        num_inference_steps=options.steps,
        guidance_scale=scale,
    )
    return [row["right"] for rows in records.values() for row in rows]


def diversity(draw, tower: torch.nn.Module, texts: list[str]) -> float:
    """The mean over prompts of how different a prompt's pictures are."""
    distances = [mean_distance(extract_features(tower, draw(text))) for text in texts]
    return round(sum(distances) / len(distances), 4)


def measure_guidance(options) -> dict:
    """A row for each guidance scale, and how different real pictures would be."""
    pipe = StableDiffusion.from_pretrained(options.model).to(options.device)
    tower = open_clip().clip.image_encoder
    texts = [prompts(kind, 1, options.seed + 1)[0] for kind in KINDS]
    rows = []
    for scale in options.scales:
        right = rights(pipe, options, scale)

        def draw(text, scale=scale):
            return pipe(
                text,
                num_images_per_prompt=options.pictures,
                num_inference_steps=options.steps,
                guidance_scale=scale,
                seed=options.seed,
                progress=False,
            ).images

        row = {"guidance_scale": scale, "right": sum(right), "total": len(right)}
        rows.append(row | {"diversity": diversity(draw, tower, texts)})
        print(rows[-1], flush=True)
    rng = np.random.default_rng(options.seed)

    def real(text):
        return [imagine(read_caption(text), rng) for _ in range(options.pictures)]

    facts = {"model": Path(options.model).name, "seed": options.seed}
    return {**facts, "rows": rows, "diversity_of_real": diversity(real, tower, texts)}


def measure_ema(options) -> dict:
    """The averaged weights of a run's checkpoint against those that were averaged."""
    run = options.ema_run
    pipe = StableDiffusion.from_pretrained(run).to(options.device)
    path = max(run.glob("checkpoints/step-*.pt"))
    state = read_checkpoint(path)
    if "ema" not in state:
        raise ValueError(f"{path} has no averaged weights (ema_decay: 0)")
    rows, answers = [], []
    for name, weights in (("averaged", state["ema"]), ("raw", state["model"])):
        pipe.unet.load_state_dict(weights)
        answers.append(rights(pipe, options, options.guidance_scale))
        right, total = sum(answers[-1]), len(answers[-1])
        rows.append({"weights": name, "right": right, "total": total})
        print(rows[-1], flush=True)
    pairs = list(zip(*answers, strict=True))
    return {
        "rows": rows,
        "only_first": sum(a and not b for a, b in pairs),
        "only_second": sum(b and not a for a, b in pairs),
        "P": sign_test(*answers),
        "note": f"Step {state['step']} of a run, guidance {options.guidance_scale:g}.",
    }


def gather_training(options) -> dict:
    """One row for each stage: minutes, and its report's scores of each kind."""
    rows = []
    for stage in options.stages:
        minutes, _, folder = stage.partition("=")
        kinds = {
            kind: {"right": row["right"], "total": row["total"]}
            for kind, row in read_report(folder)["scores"].items()
        }
        rows.append({"minutes": float(minutes), "kinds": kinds})
    total = rows[0]["kinds"]["single"]["total"]
    note = f"Training time against accuracy: {total} prompts of each kind."
    return {"rows": sorted(rows, key=lambda row: row["minutes"]), "note": note}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What accuracy costs.")
    jobs = {"guidance": measure_guidance, "ema": measure_ema}
    jobs["training"] = gather_training
    parser.add_argument("--only", choices=jobs, default="guidance")
    parser.add_argument("--model", default="scenes", help="a name or a folder (scenes)")
    parser.add_argument("--prompts", type=int, default=25, help="of each kind (25)")
    parser.add_argument("--pictures", type=int, default=8, help="of one prompt (8)")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="for ema (3)")
    parser.add_argument("--steps", type=int, default=25, help="of sampling (25)")
    parser.add_argument("--seed", type=int, default=5, help="of the prompts (5)")
    parser.add_argument("--ema_run", type=Path, help="an output_dir of sdbook train")
    parser.add_argument("--stages", nargs="+", help="MINUTES=REPORT, one or more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "data" / "runs" / "tradeoffs"
    )
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    for job, flag in (("ema", "ema_run"), ("training", "stages")):
        if options.only == job and not getattr(options, flag):
            parser.error(f"--only {job} needs --{flag}")

    command = shlex.join(["python", "tools/experiments/measure_tradeoffs.py", *given])
    record = {"command": command, **jobs[options.only](options)}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.only}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
