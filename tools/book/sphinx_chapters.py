"""What every chapter gets while the book is built, and pages that sum it up.

- On top, a strip of the pipeline that says where one is (draw_u.py).
- On the card, how long it takes to read (reading.py).
- Before further reading, the table of the parts that were compared (proofs.py), and how
  to compare one's own (`sdbook check`).
- `{reading-times}`, `{proofs}` and `{proofs-sum}` are such tables for the whole book.

The notebook's text is changed on its way in, before it is parsed, so that what is
written here is Markdown like the rest.
"""

import ast
import json
import os
import re
from hashlib import sha256
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from draw_u import draw_u
from proofs import all_proofs, chapter_files, proofs_of, summary
from reading import CODE, PROSE, reading_of, readings
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
QUESTION = re.compile(r'<div class="follow">.*?</div>', re.DOTALL)
# Which part of the pipeline a chapter is about; appendices A and B are about none.
PLACES = {
    "00": "pipeline", "01": "attention", "02": "resblocks", "03": "unet", "04": "data",
    "05": "vae", "06": "clip", "07": "schedulers", "08": "training", "09": "pipeline",
    "10": "schedulers", "11": "evaluation", "12": "finetuning", "13": "training",
    "14": "pipeline", "C": "data", "D": "evaluation",
}  # fmt: skip
# Where the parts of the strip lead; a scheduler has two chapters, and the first is it.
HOMES = {place: start for start, place in reversed(PLACES.items()) if start.isdigit()}
HOMES["pipeline"] = "09"


def default_config(path=ROOT / "sdbook" / "unet.py"):
    """UNetConfig's defaults, read from its source, so that PyTorch is not needed."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "UNetConfig":
            return {
                line.target.id: eval(ast.unparse(line.value), {})
                for line in node.body
                if isinstance(line, ast.AnnAssign) and line.target.id.islower()
                and not ast.unparse(line.annotation).startswith("ClassVar")
            }  # fmt: skip
    raise ValueError(f"{path} has no UNetConfig")


def checkable(path=ROOT / "sdbook" / "run" / "grading.py"):
    """{chapter: names of parts that `sdbook check` knows}, in its order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "PARTS":
            parts = ast.literal_eval(node.value)
            return {chapter: names.split() for chapter, (_, names) in parts.items()}
    raise ValueError(f"{path} has no PARTS")


def strip(path):
    """Where one is, as SVG in Markdown; nothing where there is no place."""
    place = PLACES.get(path.stem.split("_")[0])
    if place is None:
        return ""
    files = {file.stem.split("_")[0]: f"{file.stem}.html" for file in chapter_files()}
    links = {part: files[start] for part, start in HOMES.items() if start in files}
    drawn = draw_u(default_config(), here=place, links=links)
    return f'```{{raw}} html\n<div class="here">{drawn}</div>\n```\n\n'


def reads_in(path):
    """The line of the card."""
    row, how = reading_of(path), "{ref}`how that is counted <reading-times>`"
    return (
        f"- **Reads in** about {row.minutes} minutes, at {row.words:,} words and "
        f"{row.code:,} of code ({how}).\n"
    )


def mark_answers(question):
    """A question as the page shows it: answers have a class, choices a fair order.

    Whoever writes three choices rarely puts the right one first; here their order is
    that of a checksum, so that the place gives nothing away.
    """
    for word, kind in (("Right", "right"), ("No", "no")):
        pattern = rf"(</summary>\s*)<p>(?={word}\b)"
        question = re.sub(pattern, rf'\1<p class="{kind}">', question)
    choices = re.findall(r"<details>.*?</details>", question, re.DOTALL)
    choices.sort(key=lambda choice: sha256(choice.encode()).digest())
    fair = iter(choices)
    return re.sub(r"<details>.*?</details>", lambda _: next(fair), question, flags=re.S)


def table(rows, with_chapter, base):
    """Rows of proofs.py as a Markdown table."""
    numbers = {
        name: f"{chapter}.{place}"
        for chapter, names in checkable().items()
        for place, name in enumerate(names, start=1)
    }
    known = any(row.name in numbers for row in rows)
    heads = ["chapter"] * with_chapter + ["part", "beside", "largest difference"]
    heads += ["allowed"] + ["number"] * known
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        name = f"`{row.name}`" if row.name in numbers else row.name
        name += f" ({row.detail})" if row.detail else ""
        unit = ", relative" if row.relative else f" {row.unit}" if row.unit else ""
        cells = [f"[{row.chapter}]({link(row.docname, base)})"] * with_chapter
        cells += [name, row.reference, row.gap, f"{row.bound}{unit}"]
        cells += [numbers.get(row.name, "")] * known
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def link(docname, base):
    """A link in Markdown from one page to another."""
    return os.path.relpath(f"{docname}.ipynb", os.path.dirname(base) or ".")


def parts(path, docname):
    """The section of a chapter with its table of parts, in Markdown."""
    rows = proofs_of(path)
    number = path.stem.split("_")[0]
    number = str(int(number)) if number.isdigit() else number
    names = checkable().get(number, [])
    text = ""
    if rows:
        text += f":::{{div}} told\n{table(rows, False, docname)}\n:::\n\n"
    if names:
        if len(names) > 6:
            said = f"own parts {number}.1 to {number}.{len(names)}"
            said += f" (`sdbook check {number}` lists them)"
        elif len(names) > 1:
            said = ", ".join(f"`{name}`" for name in names[:-1])
            last = f"{number}.{len(names)}"
            said = f"{said} and `{names[-1]}` (parts {number}.1 to {last})"
        else:
            said = f"`{names[0]}` (part {number}.1)"
        text += (
            f"Written them anew? `sdbook check {number} my.py` compares your {said} "
            "with the book's, the same weights inside, and says what is wrong.\n\n"
        )
    return f"## Parts\n\n{text}" if text else ""


def add_to_chapter(app, docname, source):
    """Put strip, reading time and table of parts into a notebook's text."""
    path = ROOT / f"{docname}.ipynb"
    if not docname.startswith("chapters/") or not path.exists():
        return
    notebook = json.loads(source[0])
    texts = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    first = "".join(texts[0]["source"])
    first = re.sub(r"^(# .+\n+)", lambda m: m[1] + strip(path), first, count=1)
    line = r"(?m)^(- \*\*Runs in\*\*.*\n(?:  .*\n)*)"
    first = re.sub(line, lambda m: m[1] + reads_in(path), first, count=1)
    texts[0]["source"] = first
    for cell in texts[1:]:
        text = "".join(cell["source"])
        cell["source"] = QUESTION.sub(lambda found: mark_answers(found[0]), text)
    last = next(
        (cell for cell in texts if "## Further reading" in "".join(cell["source"])),
        texts[-1],
    )
    before, heading, after = "".join(last["source"]).partition("## Further reading")
    last["source"] = f"{before.rstrip()}\n\n{parts(path, docname)}{heading}{after}"
    source[0] = json.dumps(notebook)


class FromMarkdown(SphinxDirective):
    """A directive that writes Markdown; every chapter is what it depends on."""

    def run(self):
        self.env.note_dependency(__file__)
        for path in chapter_files():
            self.env.note_dependency(str(path))
        where = self.env.doc2path(self.env.docname)
        holder = nodes.container(classes=["told"])
        lines = StringList(self.text().splitlines(), source=where)
        self.state.nested_parse(lines, self.content_offset, holder)
        return [holder]


class ReadingTimes(FromMarkdown):
    """Each chapter: minutes to read and to run, and what to skip in a hurry."""

    def text(self):
        base, rows = self.env.docname, readings()
        known = any(row.hurry for row in rows)
        lines = ["| chapter | reads in | runs in |", "|---|--:|--:|"]
        if known:
            lines = [lines[0] + " in a hurry |", lines[1] + "---|"]
        for row in rows:
            name = f"[{row.number} · {row.title}]({link(row.docname, base)})"
            runs = row.runs.removeprefix("about ").replace(" ", "\u00a0")
            hurry = re.sub(r"\]\(#[^)]*\)", "]", row.hurry).replace("|", "\\|")
            hurry = re.sub(r"\[([^\]]*)\](?!\()", r"\1", hurry)
            line = f"| {name} | {row.minutes}\u00a0min | {runs} |"
            lines.append(line + f" {hurry} |" * known)
        hours = sum(row.minutes for row in rows) / 60
        return "\n".join(lines) + (
            f"\n\nThat is {hours:.0f} hours in all. Prose is counted at {PROSE} words "
            f"a minute and code at {CODE}, as it stands on the page: without "
            "solutions, folded cells and what cells print. The seconds are measured, "
            "on two CPU cores."
        )


class Proofs(FromMarkdown):
    """Every part of the book that was compared."""

    def text(self):
        return table(all_proofs(), True, self.env.docname)


class ProofsSum(FromMarkdown):
    """The same in one sentence."""

    def text(self):
        base = os.path.dirname(self.env.docname)
        target = os.path.relpath("pages/proofs.md", base or ".")
        return (
            "Beside diffusers, transformers and others, with the same weights inside: "
            f"**{summary(all_proofs())}**. [The table of parts]({target}) has them all."
        )


def setup(app):
    app.connect("source-read", add_to_chapter)
    app.add_directive("reading-times", ReadingTimes)
    app.add_directive("proofs", Proofs)
    app.add_directive("proofs-sum", ProofsSum)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
