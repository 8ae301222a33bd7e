"""How long a chapter takes to read, from its words and its code.

    tools/book/reading.py    the table, as text

Prose goes at 200 words a minute (Brysbaert, 2019, has 238, without formulas), code at
100. Counted is what a reader sees without a click: not folded
or removed cells, not solutions, not what cells printed. A formula on a line of its own
is ten words, one within a line one.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from proofs import cells_of, chapter_files, number_of  # noqa: E402

PROSE, CODE = 200, 100  # words a minute
UNSEEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
HURRY = re.compile(r"\*\*In a hurry\?\*\*\s*(.+?)(?:\n\s*\n|\Z)", re.DOTALL)
MEASURED = re.compile(r"<!-- measured -->(.*?) and .*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """A chapter's `words` and words of `code`; what to skip; seconds, as measured."""

    number: str
    docname: str
    title: str
    words: int
    code: int
    hurry: str
    runs: str

    @property
    def minutes(self) -> int:
        """To the next five minutes, at least five."""
        minutes = self.words / PROSE + self.code / CODE
        return max(5, 5 * round(minutes / 5))


def count_words(text: str) -> int:
    """Words of Markdown as a reader sees it."""
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text, formulas = re.subn(r"\$\$.*?\$\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$\n]*(?:\n[^$\n]+)?\$", " formula ", text)
    text = re.sub(r"^:[\w-]+:.*$|^(:::|```).*$|^\([\w-]+\)=$", " ", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)|\{[\w:]+\}|<[^>]+>", " ", text)
    return len(re.findall(r"\w[\w'’.,/-]*", text)) + 10 * formulas


def reading_of(path: Path) -> Reading:
    """One chapter, as its notebook stands."""
    words = code = 0
    solution = False
    text = ""
    for cell in cells_of(path):
        source = cell["source"]
        if cell["cell_type"] == "markdown":
            text += source + "\n\n"
            seen = re.sub(r":::\{solution\}.*?^:::$", "", source, flags=re.S | re.M)
            if "{solution-end}" in source:
                solution, seen = False, seen.split("{solution-end}")[1]
            words += 0 if solution else count_words(seen.split("{solution-start}")[0])
            solution = solution or "{solution-start}" in seen
        elif not solution and not UNSEEN & set(cell["metadata"].get("tags", ())):
            lines = [x for x in source.splitlines() if not x.startswith("#|")]
            code += len(" ".join(lines).split())
    hurry, runs = HURRY.search(text), MEASURED.search(text)
    return Reading(
        number=number_of(path), docname=f"chapters/{path.stem}",
        title=re.search(r"^# (.+)", text, re.MULTILINE)[1], words=words, code=code,
        hurry=" ".join(hurry[1].split()) if hurry else "",
        runs=runs[1] if runs else "",
    )  # fmt: skip


def readings(root: Path | None = None) -> list[Reading]:
    files = chapter_files(root) if root else chapter_files()
    return [reading_of(path) for path in files]


if __name__ == "__main__":
    for row in readings():
        print(
            f"{row.number:3} {row.title:40} {row.words:6} words, {row.code:5} of code: "
            f"{row.minutes:3} minutes; runs in {row.runs}"
        )
    print(sum(row.minutes for row in readings()), "minutes in all")
