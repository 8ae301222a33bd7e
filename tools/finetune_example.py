"""Teach the shipped model a shape that it never saw, and measure what it cost.

    python tools/finetune_example.py --output_dir data/runs/finetuning

Eight pictures of rings, each with a caption, train a LoRA (chapter 12). Before and
after it, chapter 11's judge, which knows rings here, reads what the model draws: rings
in colours that the pictures had and in others, rings together with known things, and
the old prompts, to see what was forgotten. Writes result.json, log.jsonl and
rings.png; the run itself, which can be stopped and goes on, lies in --run_dir.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sdbook import StableDiffusion
from sdbook.data import SHAPES, Group, Request, arrange, describe, draw, read_caption
from sdbook.evaluation import (
    Judge,
    labelled_grid,
    prompts,
    satisfies,
    templates,
    wilson,
)
from sdbook.finetuning import LoRATrainingConfig, train_lora

RING = [("plain", (-0.95, -0.95, 0.95, 0.95)), ("hole", (-0.5, -0.5, 0.5, 0.5))]
SHOWN = ("red", "green", "blue", "yellow")  # colours of the rings in the pictures
OTHERS = ("orange", "purple", "pink", "brown")
PLACES = ("paper", "sky", "meadow", "sand", "dusk")


def ring(colour, size=None):
    return Group(1, "ring", colour, size)


def write_pictures(folder: Path, count: int) -> None:
    """Rings in four colours and both sizes, each beside its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        colour, place = SHOWN[number % len(SHOWN)], PLACES[number % len(PLACES)]
        size = ("big", "small")[number // len(SHOWN) % 2]
        request = Request((ring(colour, size),), background=place)
        picture = draw(arrange(request, rng), place)
        Image.fromarray(picture).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(describe(request))


def known_questions(count: int) -> list[tuple[str, Request]]:
    """Prompts that the model was trained for, with what they ask for."""
    texts = prompts("colours", count // 2) + prompts("position", count - count // 2)
    return [(text, read_caption(text)) for text in texts]


def new_questions(count: int) -> dict[str, list[tuple[str, Request]]]:
    """Prompts about rings, kind by kind, with what they ask for."""
    rng = np.random.default_rng(1)
    things = [shape for shape in SHAPES if shape != "ring"]

    def alone(colours, number):
        return Request((ring(colours[number % 4]),), background=PLACES[number % 5])

    def with_known():
        colours = (str(rng.choice(SHOWN + OTHERS)) for _ in range(2))
        thing = Group(1, str(rng.choice(things)), next(colours))
        relation = str(rng.choice(("above", "below", "left", "right")))
        return Request((ring(next(colours)), thing), relation)

    kinds = {
        "ring, colours shown": [alone(SHOWN, number) for number in range(count)],
        "ring, other colours": [alone(OTHERS, number) for number in range(count)],
        "ring and a known thing": [with_known() for _ in range(count)],
    }
    return {k: [(describe(r), r) for r in requests] for k, requests in kinds.items()}


def score(pipe, asked, steps: int) -> tuple[dict, list]:
    """Share right of each kind, and some pictures with what was seen."""
    judge, table, shown = Judge(), {}, []
    for kind, pairs in asked.items():
        right = 0
        for start in range(0, len(pairs), 24):
            part = pairs[start : start + 24]
            images = pipe(
                [text for text, _ in part], num_inference_steps=steps, seed=start,
                progress=False,
            ).images  # fmt: skip
            verdicts = [judge.read(np.asarray(image)) for image in images]
            right += sum(satisfies(v, r) for v, (_, r) in zip(verdicts, part))
            if not start:
                shown += [(text, im) for (text, _), im in zip(part[:4], images)]
        low, high = wilson(right, len(pairs))
        row = {"right": right, "total": len(pairs)}
        row |= {"low": round(low, 4), "high": round(high, 4)}
        table[kind] = row
        print(f"{kind:24} {right} of {len(pairs)}", flush=True)
    return table, shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default="data/runs/finetuning")
    parser.add_argument("--run_dir", type=Path, default="runs/finetuning")
    parser.add_argument("--checkpoint_path", default="scenes")
    parser.add_argument("--num_pictures", type=int, default=8)
    parser.add_argument("--num_prompts", type=int, default=48)
    parser.add_argument("--num_class_pictures", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    options = parser.parse_args()

    class_prompts = prompts("colours", 32, seed=7) + prompts("position", 32, seed=7)
    known = known_questions(options.num_prompts)  # before there are rings
    SHAPES["ring"] = RING  # from here on the judge knows them
    templates.cache_clear()
    asked = new_questions(options.num_prompts) | {"known prompts": known}
    write_pictures(options.run_dir / "pictures", options.num_pictures)
    pipe = StableDiffusion.from_pretrained(options.checkpoint_path)
    before, _ = score(pipe, asked, options.num_inference_steps)
    config = LoRATrainingConfig(
        dataset_path=str(options.run_dir / "pictures"),
        pretrained=options.checkpoint_path,
        output_dir=str(options.run_dir / "lora"),
        rank=options.rank,
        layers="all",
        class_prompts=tuple(class_prompts),
        num_class_pictures=options.num_class_pictures,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        log_every=20,
    )
    started = time.perf_counter()
    pipe = train_lora(config)
    seconds = round(time.perf_counter() - started)
    after, shown = score(pipe, asked, options.num_inference_steps)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {k: v for k, v in vars(options).items() if not k.endswith("_dir")}
    result = {"settings": facts, "seconds": seconds, "before": before, "after": after}
    text = json.dumps(result, indent=1) + "\n"
    (options.output_dir / "result.json").write_text(text)
    shutil.copy(options.run_dir / "lora" / "log.jsonl", options.output_dir)
    texts, images = zip(*shown, strict=True)
    labelled_grid(list(images), list(texts), 4).save(options.output_dir / "rings.png")
    print(f"trained in {seconds} s; wrote {options.output_dir}")


if __name__ == "__main__":
    main()
