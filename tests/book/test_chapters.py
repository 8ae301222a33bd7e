"""Every chapter has the skeleton that DESIGN.md promises its readers."""

import re

import nbformat
import pytest
from helpers import MEASURED, ROOT

CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


def sources(path, kind):
    notebook = nbformat.read(path, 4)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def headings(path):
    lines = "\n".join(sources(path, "markdown")).splitlines()
    return [line[3:] for line in lines if line.startswith("## ")]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_its_parts_in_order(path):
    found = headings(path)
    first = "Draw something" if path.stem.startswith("00") else "Why"
    assert found[0] == first
    assert any(heading.startswith("Look") for heading in found) or found[0] != "Why"
    last = [found.index(h) for h in ("Proof", "Break it", "Exercises", "Summary")]
    assert last == sorted(last)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_begins_with_its_card(path):
    card = sources(path, "markdown")[0]
    assert card.startswith("# ")
    for key in ("You build", "You need", "Exports", "Runs in"):
        assert f"- **{key}**" in card, key


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_card_says_what_was_measured(path):
    card = sources(path, "markdown")[0]
    line = re.search(r"- \*\*Runs in\*\* (.*?) on two CPU cores", card, re.DOTALL)
    assert line, "`tools/book/execute.py --measure` writes its findings there"
    assert re.fullmatch(MEASURED, line[1]), "run `tools/book/execute.py --measure`"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_drawing_is_compared(path):
    """Another matplotlib draws other paths, another PyTorch other pixels."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "# NBVAL_CHECK_OUTPUT" in cell.source:
            for output in cell.outputs:
                page = output.get("data", {}).get("text/html", "")
                assert len(page) < 2000, f"{cell.id}: draw in a cell of its own"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_can_be_checked_and_have_solutions(path):
    text, code = ("\n".join(sources(path, kind)) for kind in ("markdown", "code"))
    exercises = text.count(":::{exercise}")
    assert 3 <= exercises <= 5
    solutions = text.count("{solution-start}") + text.count("{solution} ")
    assert solutions >= exercises - 1  # an open one may go without
    assert code.count("\ndef check_") + code.startswith("def check_") >= 2


FOLLOW = re.compile(r'<div class="follow">(.*?)</div>', re.DOTALL)
CHOICE = re.compile(
    r"<summary>(.+?)</summary>\s*<p>((?:Right:|No[:,]) .+?)</p>", re.DOTALL
)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_asks_whether_one_follows(path):
    """Three questions with three choices, of which one is right."""
    questions = FOLLOW.findall("\n\n".join(sources(path, "markdown")))
    assert len(questions) >= 3
    for question in questions:
        assert question.strip().startswith("<p><b>Do you follow?</b> "), question
        assert "\n\n" not in question, "Markdown ends the block at an empty line"
        answers = [answer for _, answer in CHOICE.findall(question)]
        assert len(answers) == question.count("<details>") == 3, question
        assert sum(answer.startswith("Right: ") for answer in answers) == 1, question


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_told_in_one_minute(path):
    card = sources(path, "markdown")[0]
    told = re.search(r"^\*\*In one minute\.\*\* (.+?)(?:\n\n|\Z)", card, re.S | re.M)
    assert 45 <= len(told[1].split()) <= 100
    assert card.index(":::\n") < told.start() < card.index("\n**In a hurry?** ")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_checks_are_folded_and_answer_in_a_sentence(path):
    cells = nbformat.read(path, 4).cells
    heads = [i for i, cell in enumerate(cells) if "## Exercises" in cell.source]
    checks = [
        cell for cell in cells[heads[0] :]
        if cell.cell_type == "code" and re.search(r"^def check_", cell.source, re.M)
    ]  # fmt: skip
    for cell in checks:
        assert "hide-input" in cell.metadata.get("tags", ()), cell.id
        for output in cell.outputs:
            said = output.get("text", "")  # and no value, in quotes
            assert re.search(r"^[A-Z].*\.$", said.strip(), re.S), f"{cell.id}: {said!r}"
