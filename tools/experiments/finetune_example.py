"""Teach the shipped model something that it never saw, and measure what it cost.

    python tools/experiments/finetune_example.py                a colour: teal
    python tools/experiments/finetune_example.py --lesson ring  a shape

Ten pictures, each with a caption, teach it in three ways (chapter 12): a LoRA that
rehearses what the model drew before, a LoRA that does not, and a new word alone.
Before and after, chapter 11's judge, which knows the new thing here, reads what the
model draws: the new thing as it was shown and as it was not, beside things that the
model knows, and the old prompts, to see what was forgotten. Writes LESSON.json,
LESSON.png and LESSON.safetensors, the first LoRA, to --output_dir; the runs, which can
be stopped and go on, lie in --run_dir.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdbook import StableDiffusion
from sdbook.data import (
    COLOURS,
    SHAPES,
    Group,
    Request,
    arrange,
    describe,
    draw,
    read_caption,
)
from sdbook.evaluation import Judge, prompts, satisfies, templates, wilson
from sdbook.finetuning import (
    LORA_FILE,
    LoRATrainingConfig,
    WordTrainingConfig,
    train_lora,
    train_word,
)
from sdbook.images import labelled_grid

TEAL = (40, 130, 140)
RING = [("plain", (-0.95, -0.95, 0.95, 0.95)), ("hole", (-0.5, -0.5, 0.5, 0.5))]
PLACES = ("paper", "sky", "meadow", "sand", "dusk")
RELATIONS = ("above", "left", "below", "right")
KNOWN = {"shape": list(SHAPES), "colour": list(COLOURS)}
WAYS = ("rehearsed", "not rehearsed", "new word")


class Lesson:
    """A new shape or a new colour, shown with some of the known ones and not others."""

    def __init__(self, word: str):
        self.word, self.axis = word, {"ring": "shape", "teal": "colour"}[word]
        self.others = {"ring": KNOWN["colour"][-2:], "teal": ["heart", "boat"]}[word]
        known = KNOWN["colour" if word == "ring" else "shape"]
        self.shown = [name for name in known if name not in self.others]

    def teach_the_judge(self) -> None:
        if self.word == "ring":
            SHAPES["ring"] = RING
        else:
            COLOURS["teal"] = TEAL
        templates.cache_clear()

    def new(self, name: str, size: str | None = None) -> Group:
        """The new thing: a teal `name`, or a `name` ring."""
        pair = ("ring", name) if self.axis == "shape" else (name, "teal")
        return Group(1, *pair, size)

    def write_pictures(self, folder: Path, count: int, word: str) -> None:
        """Pictures beside their captions, every other one with a known thing in it."""
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(count):
            place, relation = PLACES[number % 5], None
            alone = number % 2 == 0
            size = "big" if alone and number % 4 == 0 else "small"
            groups = [self.new(self.shown[number % len(self.shown)], size)]
            if not alone:
                pair = KNOWN["shape"][(number + 3) % 8], KNOWN["colour"][number % 8]
                groups.append(Group(1, *pair, "small"))
                groups = groups[:: (1, -1)[number // 2 % 2]]
                relation = RELATIONS[number // 2 % 4]
            request = Request(tuple(groups), relation, place)
            picture = draw(arrange(request, rng), place)
            Image.fromarray(picture).save(folder / f"{number:03}.png")
            caption = describe(request).replace(self.word, word)
            (folder / f"{number:03}.txt").write_text(caption)

    def questions(self, count: int) -> dict[str, list[Request]]:
        """What to draw of the new thing, kind by kind."""
        rng = np.random.default_rng(1)

        def alone(names, number):
            return Request(
                (self.new(names[number % len(names)]),), background=PLACES[number % 5]
            )

        def with_known():
            new = self.new(str(rng.choice(self.shown + self.others)))
            shapes = [name for name in KNOWN["shape"] if name != new.shape]
            thing = Group(1, str(rng.choice(shapes)), str(rng.choice(KNOWN["colour"])))
            groups = (new, thing) if rng.random() < 0.5 else (thing, new)
            return Request(groups, str(rng.choice(RELATIONS)))

        return {
            "as shown": [alone(self.shown, number) for number in range(count)],
            "not as shown": [alone(self.others, number) for number in range(count)],
            "beside a known thing": [with_known() for _ in range(count)],
        }


def score(pipe, asked: dict, steps: int) -> tuple[dict, list]:
    """Share right of each kind, and the first four pictures of each."""
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


def train(way: str, lesson: Lesson, options, rehearsal: list[str]) -> StableDiffusion:
    """One of the three ways, from the shipped weights."""
    word = f"<{lesson.word}>" if way == "new word" else lesson.word
    folder = options.run_dir / lesson.word / way.replace(" ", "-")
    lesson.write_pictures(folder / "pictures", options.num_pictures, word)
    same = {
        "dataset_path": str(folder / "pictures"),
        "pretrained": options.checkpoint_path,
        "output_dir": str(folder / "run"),
        "max_steps": options.max_steps,
        "lr_scheduler": "constant",
        "log_every": 20,
    }
    if way == "new word":
        like = {"ring": "ball", "teal": "blue"}[lesson.word]
        return train_word(WordTrainingConfig(word=word, like=like, **same))
    pipe = train_lora(
        LoRATrainingConfig(
            rank=options.rank,
            layers=options.layers,
            learning_rate=options.learning_rate,
            class_prompts=tuple(rehearsal) if way == "rehearsed" else (),
            num_class_pictures=options.num_class_pictures,
            **same,
        )
    )
    if way == "rehearsed":
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path = options.output_dir / f"{lesson.word}.safetensors"
        shutil.copy(folder / "run" / LORA_FILE, path)
    return pipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lesson", choices=("teal", "ring"), default="teal")
    parser.add_argument("--output_dir", type=Path, default=Path("data/runs/finetuning"))
    parser.add_argument("--run_dir", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--checkpoint_path", default="scenes")
    parser.add_argument("--num_pictures", type=int, default=10)
    parser.add_argument("--num_prompts", type=int, default=48, help="of each kind (48)")
    parser.add_argument("--num_class_pictures", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=800)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", choices=("attention", "all"), default="attention")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)

    lesson, half = Lesson(options.lesson), options.num_prompts // 2
    rehearsal = prompts("colours", 32, seed=7) + prompts("position", 32, seed=7)
    old = prompts("colours", half) + prompts("position", options.num_prompts - half)
    old = [(text, read_caption(text)) for text in old]  # before the judge learns more
    lesson.teach_the_judge()
    asked = {
        kind: [(describe(request), request) for request in requests]
        for kind, requests in lesson.questions(options.num_prompts).items()
    } | {"old prompts": old}

    pipe = StableDiffusion.from_pretrained(options.checkpoint_path)
    print("before")
    tables = {"before": score(pipe, asked, options.num_inference_steps)[0]}
    seconds, sheet = {}, []
    for way in WAYS:
        started = time.perf_counter()
        pipe = train(way, lesson, options, rehearsal)
        seconds[way] = round(time.perf_counter() - started)
        if way == "new word":
            asked = {
                kind: [(t.replace(lesson.word, f"<{lesson.word}>"), r) for t, r in rows]
                for kind, rows in asked.items()
            }
        print(way)
        tables[way], shown = score(pipe, asked, options.num_inference_steps)
        sheet = sheet or shown
    options.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {k: v for k, v in vars(options).items() if not k.endswith("_dir")}
    result = {
        "command": " ".join(
            ["python", "tools/experiments/finetune_example.py", *given]
        ),
        "settings": facts,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "tables": tables,
    }
    text = json.dumps(result, indent=1) + "\n"
    (options.output_dir / f"{lesson.word}.json").write_text(text)
    texts, images = zip(*sheet, strict=True)
    picture = labelled_grid(list(images), list(texts), 4)
    picture.save(options.output_dir / f"{lesson.word}.png")
    print(f"wrote {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
