"""Figures in prose that come from a record, so that they cannot age.

    tools/book/records.py          fill them in
    tools/book/records.py --check  change nothing, name those that are out of date

In README.md, on a page, in a chapter's text or on the model's card such a figure
stands between two comments, which no reader sees:

    two things in <!-- = right("two") -->165<!-- end --> of 200

The first says where it comes from, in Python: the functions below, over data/runs. What
stands on lines of its own, as a table, is filled in so.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("README.md", "index.md", "pages/*.md", "data/models/*/README.md")
FIGURE = re.compile(r"(<!-- = (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)
WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()


class Records:
    """What an expression may ask; each method is a name in it."""

    def __init__(self, root: Path = ROOT):
        self.runs = root / "data" / "runs"

    def text(self, name: str) -> str:
        """A file of data/runs as it is."""
        return (self.runs / name).read_text(encoding="utf-8")

    def read(self, name: str):
        """A record, `samplers/errors.json`."""
        return json.loads(self.text(name))

    def log(self, run: str) -> list[dict]:
        """The lines of a run's log."""
        return [json.loads(x) for x in self.text(f"{run}/log.jsonl").splitlines()]

    def right(self, kind: str, run: str = "evaluation") -> int:
        """How many prompts of a kind came out right."""
        return self.read(f"{run}/scores.json")["scores"][kind]["right"]

    def per_cent(self, kind: str, run: str = "evaluation") -> str:
        """The same as a share, as a report says it: 82.5."""
        return f"{100 * self.read(f'{run}/scores.json')['scores'][kind]['share']:.1f}"

    def prompts(self) -> int:
        """How many prompts of each kind there were."""
        return self.read("evaluation/scores.json")["facts"]["num_prompts"]

    def gains(self, run: str) -> dict[str, float]:
        """For each kind, by how many points the last run is above an earlier one."""
        scores = self.read("evaluation/scores.json")["scores"]
        earlier = {kind: self.right(kind, run) for kind in scores}
        return {
            kind: 100 * (row["right"] - earlier[kind]) / row["total"]
            for kind, row in scores.items()
        }

    def tried(self, weight: str, number: str, digits: int) -> str:
        """Of chapter 5's experiment: a number of one autoencoder, as "walk longer"."""
        rows = self.read("kl/kl.json")["rows"]
        value = next(row for row in rows if row["variant"] == weight)
        for name in number.split():
            value = sum(value) / len(value) if name == "mean" else value[name]
        return f"{value:.{digits}f}"

    def hours(self, row: int = -1) -> float:
        """How long the shipped model has trained, or one before it."""
        return self.read("tradeoffs/training.json")["rows"][row]["minutes"] / 60

    def minutes(self, run: str) -> str:
        """How long a recorded run took."""
        return f"{sum(line['seconds'] for line in self.log(run)) / 60:.0f}"

    def nearer(self, sampler: str, steps: int) -> int:
        """Chapter 10: how many times nearer to the true end than Euler."""
        rows = self.read("samplers/errors.json")["rows"]
        off = {r["scheduler"]: r["error"] for r in rows if r["steps"] == steps}
        return round(off["Euler"] / off[sampler])

    def taught(self, lesson: str, way: str, kind: str) -> int:
        """Of chapter 12's example: how many prompts of a kind came out right."""
        return self.read(f"finetuning/{lesson}.json")["tables"][way][kind]["right"]

    def rung(self, number: int) -> float:
        """Of chapter 14's record: a rung's share of the plain loop's time."""
        result = self.read("speedups/cpu.json")["results"][0]
        return result["rows"][number]["of_plain"]

    def step(self, batch: int, precision: str = "no", compiled: bool = False) -> dict:
        """Of chapter 13's record: the training step in one form."""
        wanted = {"batch": batch, "precision": precision, "compiled": compiled}
        rows = self.read("throughput/cpu.json")["rows"]
        return next(r for r in rows if all(r[k] == v for k, v in wanted.items()))

    def peak(self, precision: str) -> float:
        """The operations a second that chapter 13's machine reaches at best."""
        return self.read("throughput/cpu.json")["peaks"][precision]

    def faster(self, batch: int) -> float:
        """How many times as fast a step is with bf16."""
        half, full = self.step(batch, "bf16"), self.step(batch)
        return half["pictures_per_second"] / full["pictures_per_second"]

    def compiling(self, precision: str) -> str:
        """What it brings, in per cent, for 4, 16 and 64 pictures: `34, 30 and 26`."""
        speeds = [
            [self.step(batch, precision, how)["pictures_per_second"] for how in (1, 0)]
            for batch in (4, 16, 64)
        ]
        first, second, third = (f"{100 * (a / b - 1):.0f}" for a, b in speeds)
        return f"{first}, {second} and {third}"

    def names(self) -> dict:
        """All of these, a few of Python's, and numbers in words."""
        plain = {"round": round, "min": min, "max": max, "sum": sum, "median": median}
        mine = {k: getattr(self, k) for k in dir(self) if not k.startswith("_")}
        return plain | mine | {"words": WORDS, "__builtins__": {}}


def fill(text: str, records: Records) -> str:
    """A text with every figure as the records have it."""

    def figure(match: re.Match) -> str:
        opening, source, told, closing = match.groups()
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if not before.strip() and not told.startswith("\n"):
            raise ValueError(
                f"{source}: Markdown ends a paragraph here; begin the line with a word"
            )
        try:
            value = eval(source, records.names())
            value = f"{value:g}" if isinstance(value, float) else str(value)
        except Exception as error:
            raise ValueError(f"{source}: {type(error).__name__}: {error}") from error
        return opening + (f"\n{value}\n" if told.startswith("\n") else value) + closing

    return FIGURE.sub(figure, text)


def fill_notebook(text: str, records: Records) -> str:
    """A notebook with every figure of its text filled in, stored as it was."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = fill("".join(cell["source"]), records)
            cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures that come from a record.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    options = parser.parse_args(arguments)
    root, records, old = options.root, Records(options.root), []
    chapters = sorted(root.glob("chapters/*.ipynb"))
    for path in [*(p for place in PLACES for p in sorted(root.glob(place))), *chapters]:
        before = path.read_text(encoding="utf-8")
        if "<!-- = " not in before:
            continue
        try:
            change = fill_notebook if path.suffix == ".ipynb" else fill
            after = change(before, records)
        except ValueError as error:
            raise SystemExit(f"{path.relative_to(root)}: {error}") from None
        if after != before:
            old.append(str(path.relative_to(root)))
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if old:
        print("figures out of date in" if options.check else "filled in:", *old)
    return bool(old and options.check)


if __name__ == "__main__":
    sys.exit(main())
