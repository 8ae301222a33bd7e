"""What the chapters prove, collected from what their cells printed.

    tools/book/proofs.py    the whole table, as text

A line that a cell of the section *Proof* printed, and that has the form

    ResBlock  largest relative difference 3.1e-07 (allowed 1e-05)

is a row of the table of parts: what was compared, with which library (the one that the
cell imports), how far it was off at most, and how far it might have been. It begins
with a name that the package exports, or says that it is a difference; after the name
and a comma, a colon or two spaces there may be a detail.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"-?\d[\d.,]*(?:e[-+]?\d+)?"
PROVED = re.compile(
    rf"(?P<head>\S.*?)[\s:,]+(?P<gap>{NUMBER})(?: (?P<unit>[a-z]+))?(?: of \d+)?"
    rf"(?: \(|, )allowed (?P<bound>{NUMBER})\)?"
)
# What stands between a part's name and the number, and says only what a number is.
SAYS_WHAT = re.compile(
    r"[,:]?\s*\b(largest )?(relative( difference)?|difference|differs? by)$"
)
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


def known_by(code: str, known: dict[str, str]) -> dict[str, str]:
    """{name: library} of what a cell imports, or makes of what is `known` already."""
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a magic of IPython
        return known
    for node in statements:
        leaves = list(ast.walk(node))
        for leaf in leaves:
            if isinstance(leaf, ast.Import | ast.ImportFrom):
                for one in leaf.names:
                    module = getattr(leaf, "module", None) or one.name
                    if library := LIBRARIES.get(module.split(".")[0]):
                        known = known | {(one.asname or one.name): library}
        used = [x.id for x in leaves if isinstance(x, ast.Name) and x.id in known]
        made = [getattr(x, "id", getattr(x, "name", None)) for x in leaves if makes(x)]
        if used and known[used[0]] != "Pillow":  # pictures are everywhere
            known = known | dict.fromkeys(made, known[used[0]])
    return known


def makes(leaf: ast.AST) -> bool:
    """Does a node give something a name?"""
    stored = isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)
    return stored or isinstance(leaf, ast.FunctionDef)


def library_of(code: str, known: dict[str, str]) -> str:
    """The library that a cell asks: the one of the first name in it that has one."""
    found = [x for x in re.findall(r"\b[A-Za-z_]\w*", code) if x in known]
    return known[found[0]] if found else ""


@cache
def exported(root: Path = ROOT) -> frozenset[str]:
    """Every public name of the package."""
    names = set()
    for path in (root / "sdbook").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", ())
            if targets and ast.unparse(targets[0]) == "__all__":
                names |= {one.value for one in node.value.elts if hasattr(one, "value")}
    return frozenset(names)


def is_part(name: str, code: str) -> bool:
    """Does the package export it: a class, or a function that the chapter defines?"""
    word = re.split(r"[.\s]", name)[0]
    own = word[:1].isupper() or re.search(rf"^def {word}\b", code, re.MULTILINE)
    return word in exported() and bool(own)


def read_proof(line: str, path: Path, code: str, library: str) -> Proof | None:
    """The row that a printed line is, or None; `code` is the chapter's.

    The reference is the library that the line names, or else `library`.
    """
    found = PROVED.fullmatch(line.strip())
    if not found:
        return None
    head = SAYS_WHAT.sub("", found["head"].rstrip(" :,")).rstrip(" :,")
    name, *detail = re.split(r"[:,] |  +", head, maxsplit=1)
    first, _, more = name.partition(" ")
    if is_part(first, code) and more and not more.startswith("and "):
        name, detail = first, [", ".join([more, *detail])]
    if not name or not ("differ" in found["head"] or is_part(name, code)):
        return None
    named = next((said for said in LIBRARIES.values() if said in line), "")
    return Proof(
        chapter=number_of(path), docname=f"chapters/{path.stem}", name=name,
        detail="".join(detail).strip(), gap=found["gap"], bound=found["bound"],
        unit=found["unit"] or "", relative="relative" in found["head"],
        reference=named or library,
    )  # fmt: skip


def proofs_of(path: Path) -> list[Proof]:
    """The rows of one chapter, in its order; a line that stands twice counts once."""
    rows, section, known = {}, "", {}
    cells = cells_of(path)
    code = "\n".join(c["source"] for c in cells if c["cell_type"] == "code")
    for cell in cells:
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## (.+)", cell["source"], re.MULTILINE)
            section = headings[-1] if headings else section
            continue
        known = known_by(cell["source"], known)
        for line in printed(cell) if section == "Proof" else ():
            row = read_proof(line, path, code, library_of(cell["source"], known))
            if row:
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
    parts, chapters = {(x.chapter, x.name) for x in rows}, {x.chapter for x in rows}
    relative = [float(row.gap) for row in rows if row.relative]
    used = max(1, round(100 * max(map(share_of_bound, rows))))
    several = "s" * (len(chapters) > 1)
    return (
        f"{len(parts)} parts of {len(chapters)} chapter{several} in {len(rows)} "
        f"comparisons, largest relative difference {max(relative):.0e}; none uses more "
        f"than {used} % of what is allowed"
    )


if __name__ == "__main__":
    for row in all_proofs():
        print(
            f"{row.chapter:3} {row.name:32} {row.detail:24} {row.gap:>8} {row.unit:8} "
            f"allowed {row.bound:8} {'relative' if row.relative else '':9}"
            f"{row.reference}"
        )
    print(summary(all_proofs()))
