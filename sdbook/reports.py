"""Reports of an evaluation: tables and sheets of pictures; and GenEval's folders."""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .files import no_file, write_atomically
from .folders import text_of
from .images import labelled_grid
from .pipeline import StableDiffusion

Records = dict[str, list[dict]]  # for each kind of prompt, what `evaluate` returns


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_atomically(path, lambda file: file.write_bytes(text.encode()))


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture, whole or not at all."""
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def markdown_table(heads: list[str], rows: Iterable[list]) -> str:
    """A Markdown table; all but its first column are to the right."""
    first, *lines = [f"| {' | '.join(map(str, row))} |" for row in (heads, *rows)]
    ruler = "|---|" + "---:|" * (len(heads) - 1)
    return "\n".join([first, ruler, *lines]) + "\n"


def scores_table(scores: dict[str, dict[str, int | float]]) -> str:
    """What `evaluation.scores` returns as a Markdown table."""
    rows = [
        [
            kind.replace("_", " "),
            row["right"],
            row["total"],
            f"{row['share']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
        ]
        for kind, row in scores.items()
    ]
    heads = ["kind of prompt", "right", "of", "share", "95 % interval"]
    return markdown_table(heads, rows)


def measures_table(measures: dict[str, dict[str, float]]) -> str:
    """What `evaluation.measure` returns as a Markdown table; nothing for nothing."""
    if not measures:
        return ""
    rows = [
        [name, f"{row['model']:.4g}", f"{row['real']:.4g}"]
        for name, row in measures.items()
    ]
    return markdown_table(["measure", "pictures of the model", "real pictures"], rows)


def write_report(
    folder: str | Path, records: Records, scores: dict, measures: dict, facts: dict
) -> None:
    """Write scores.json, scores.md, and pictures of right and wrong answers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        kind: [{k: v for k, v in row.items() if k != "image"} for row in kind_rows]
        for kind, kind_rows in records.items()
    }
    report = {"facts": facts, "scores": scores, "measures": measures, "records": rows}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_text(folder / "scores.json", text + "\n")
    text = "\n".join(filter(None, [scores_table(scores), measures_table(measures)]))
    write_text(folder / "scores.md", text)
    by_turns = [row for turn in zip(*records.values(), strict=False) for row in turn]
    for name, wanted in (("right", True), ("wrong", False)):
        chosen = [row for row in by_turns if row["right"] is wanted][:24]
        if chosen:
            labels = [f"{row['prompt']}; seen: {row['seen']}" for row in chosen]
            sheet = labelled_grid([row["image"] for row in chosen], labels, 6)
            write_png(folder / f"{name}.png", sheet)


def read_report(folder: str | Path) -> dict:
    """What `write_report` wrote to a folder; ValueError where that cannot be read."""
    path = Path(folder) / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; give a folder that `sdbook evaluate` wrote"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["records"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no report of `sdbook evaluate` ({error}); "
            "evaluate that model again"
        ) from error
    return report


# GenEval ----------------------------------------------------------------------


def read_geneval(path: str | Path) -> list[dict]:
    """GenEval's evaluation_metadata.jsonl: one prompt a line, with what to check.

    Raises FileNotFoundError without it, ValueError, naming the line, for what is none.
    """
    path, prompts = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(
            f"{no_file(path)}; give GenEval's evaluation_metadata.jsonl"
        )
    lines = text_of(path.read_bytes(), path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
            prompt["prompt"], prompt["tag"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} is no prompt of GenEval ({error}); give its "
                "evaluation_metadata.jsonl"
            ) from error
        prompts.append(prompt)
    return prompts


def write_geneval(
    pipe: StableDiffusion,
    prompts: list[dict],
    folder: str | Path,
    seed: int = 0,
    num_images: int = 4,
    **options,
) -> None:
    """Draw GenEval's prompts into the folders that its evaluate_images.py reads.

    00000/metadata.jsonl has the prompt's line, 00000/samples/0000.png and so on its
    pictures, drawn from `seed` on. `options` go to the pipeline.
    """
    for number, prompt in enumerate(tqdm(prompts, unit="prompt")):
        place = Path(folder) / f"{number:05}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps(prompt, ensure_ascii=False) + "\n"
        write_text(place / "metadata.jsonl", line)
        images = pipe(
            prompt["prompt"],
            num_images_per_prompt=num_images,
            seed=seed,
            progress=False,
            **options,
        ).images
        for k, image in enumerate(images):
            write_png(place / "samples" / f"{k:04}.png", image)
