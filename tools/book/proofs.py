"""What the chapters prove, collected from what their cells printed.

    tools/book/proofs.py    the whole table, as text

A line that a cell of the section *Proof* printed, and that has the form

    ResBlock  largest relative difference 3.1e-07 (allowed 1e-05)

is a row of the table of parts: what was compared, with which library (the one that the
cell imports), how far it was off at most, and how far it might have been.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"-?\d[\d.,]*(?:e[-+]?\d+)?"
PROVED = re.compile(
    rf"(?P<head>.*\bdiffer.*?)\s(?P<gap>{NUMBER})(?P<unit> [a-z]\w*)?[^()]*"
    rf"(?:\(|, )allowed (?P<bound>{NUMBER})"
)
NAME_ENDS = re.compile(r"[:,]?\s*\b(largest|relative|differ)")
LIBRARIES = {
    "diffusers": "diffusers", "transformers": "transformers", "peft": "peft",
    "open_clip": "open_clip", "torchmetrics": "torchmetrics", "scipy": "SciPy",
    "PIL": "Pillow",
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """One row: `gap` and `bound` as printed, with their unit; `relative` or not."""

    chapter: str  # 3, or A
    docname: str
    name: str
    detail: str
    gap: str
    bound: str
    unit: str
    relative: bool
    reference: str


def chapter_files(root: Path = ROOT) -> list[Path]:
    return sorted((root / "chapters").glob("*.ipynb"))


def number_of(path: Path) -> str:
    """A chapter's number, or an appendix's letter, as one says it."""
    number = path.stem.split("_")[0]
    return str(int(number)) if number.isdigit() else number


def cells_of(path: Path) -> list[dict]:
    """A notebook's cells, their sources as text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def printed(cell: dict) -> list[str]:
    """The lines that a cell printed."""
    streams = (output for output in cell.get("outputs", ()) if "text" in output)
    return "".join("".join(output["text"]) for output in streams).splitlines()


def library_of(*sources: str) -> str:
    """The first library that the first source that names one imports."""
    for source in sources:
        for name, said in LIBRARIES.items():
            if re.search(rf"^\s*(?:from|import) {name}\b", source, re.MULTILINE):
                return said
    return ""


def read_proof(line: str, path: Path, *sources: str) -> Proof | None:
    """The row that a printed line is, or None."""
    found = PROVED.match(line.strip())
    if not found:
        return None
    name = found["head"][: NAME_ENDS.search(found["head"]).start()].strip(" :,")
    if not name:
        return None
    name, _, detail = name.partition(": ")
    named = next((said for said in LIBRARIES.values() if said in found["head"]), "")
    return Proof(
        chapter=number_of(path), docname=f"chapters/{path.stem}", name=name,
        detail=detail, gap=found["gap"], bound=found["bound"],
        unit=(found["unit"] or "").strip(), relative="relative" in found["head"],
        reference=named or library_of(*sources),
    )  # fmt: skip


def proofs_of(path: Path) -> list[Proof]:
    """The rows of one chapter, in its order; a line that stands twice counts once."""
    rows, proof, section = {}, [], ""
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## (.+)", cell["source"], re.MULTILINE)
            section = headings[-1] if headings else section
        elif section == "Proof":
            proof.append(cell)
    every = "\n".join(cell["source"] for cell in proof)
    for cell in proof:
        for line in printed(cell):
            if row := read_proof(line, path, cell["source"], every):
                rows.setdefault((row.name, row.detail), row)
    return list(rows.values())


def all_proofs(root: Path = ROOT) -> list[Proof]:
    return [row for path in chapter_files(root) for row in proofs_of(path)]


def share_of_bound(row: Proof) -> float:
    """How much of what is allowed was used: 0 to 1 (1, if nothing is allowed)."""
    gap, bound = (float(text.replace(",", "")) for text in (row.gap, row.bound))
    return gap / bound if bound else float(gap > 0)


def summary(rows: list[Proof]) -> str:
    """The rows in one sentence, in Markdown."""
    chapters = len({row.chapter for row in rows})
    relative = [float(row.gap) for row in rows if row.relative]
    most = max(share_of_bound(row) for row in rows)
    several = "s" * (chapters > 1)
    used = max(1, round(100 * most))
    return (
        f"{len(rows)} parts of {chapters} chapter{several}, largest relative "
        f"difference {max(relative):.0e}; none uses more than {used} % of what is "
        "allowed"
    )


if __name__ == "__main__":
    for row in all_proofs():
        print(
            f"{row.chapter:3} {row.name:32} {row.detail:24} {row.gap:>8} {row.unit:8} "
            f"allowed {row.bound:8} {'relative' if row.relative else '':9}"
            f"{row.reference}"
        )
    print(summary(all_proofs()))
