"""Tables that are made while the book is built: proofs, reading times, strips."""

import json
import re

import pytest
from helpers import ROOT, load_tool

proofs, reading = load_tool("proofs"), load_tool("reading")


def notebook(tmp_path, *cells, name="02_blocks"):
    """A chapter of these cells: a text, or (code, what it printed, tags)."""
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append({"cell_type": "markdown", "source": [cell], "metadata": {}})
            continue
        code, said, *tags = cell
        outputs = [{"output_type": "stream", "text": [said]}] if said else []
        made.append(
            {"cell_type": "code", "source": [code], "outputs": outputs,
             "metadata": {"tags": tags}}
        )  # fmt: skip
    folder = tmp_path / "chapters"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": made}), encoding="utf-8")
    return path


SAID = """\
ResBlock           largest relative difference 3.1e-07 (allowed 1e-05)
ddpm: 9 trajectories, largest relative difference 0e+00 (allowed 1e-05)
our loop   differs by 0 levels (allowed 1)
vectors differ by 2e-06, allowed 1e-05
wilson, 190 of 200: 9e-07 (allowed 1e-05)
PNDMScheduler, relative: 3e-07 (allowed 1e-05)
pushed_channels   numbers that differ from theirs: 0 (allowed 0)
our loop 2  largest difference of 255 levels: 0 (allowed 1)
largest difference from SciPy: 0 levels of 255 (allowed 0)
train      held-out scenes in 1000: 0 (allowed 0)
train_vae, of another chapter: 0 (allowed 0)
dividing first is 6e-05 off (allowed 1e-05)
no line of a proof
ResBlock           largest relative difference 3.1e-07 (allowed 1e-05)
"""


def test_printed_lines_become_rows(tmp_path):
    path = notebook(
        tmp_path, "## Build", ("", "Early differs by 1 (allowed 2)\n"), "## Proof",
        ("import diffusers\ndef wilson(): ...\ntheirs = diffusers.UNet()", SAID),
        ("x = 1", "late differs by 1e-09 (allowed 1e-08)"),
        "## Break it", ("", "eps 1e-5 differs by 7e-02 (allowed 1e-05)\n"),
    )  # fmt: skip
    rows = proofs.proofs_of(path)
    assert [(row.name, row.detail, row.gap, row.bound) for row in rows] == [
        ("ResBlock", "", "3.1e-07", "1e-05"),
        ("ddpm", "9 trajectories", "0e+00", "1e-05"),
        ("our loop", "", "0", "1"),
        ("vectors", "", "2e-06", "1e-05"),
        ("wilson", "190 of 200", "9e-07", "1e-05"),
        ("PNDMScheduler", "", "3e-07", "1e-05"),
        ("pushed_channels", "numbers that differ from theirs", "0", "0"),
        ("our loop 2", "largest difference of 255 levels", "0", "1"),
        ("largest difference from SciPy", "", "0", "0"),
        ("late", "", "1e-09", "1e-08"),
    ]
    assert [row.name for row in rows if row.relative] == [
        "ResBlock", "ddpm", "PNDMScheduler"
    ]  # fmt: skip
    assert rows[2].unit == "levels"
    assert {row.reference for row in rows[:-2]} == {"diffusers"}
    assert [row.reference for row in rows[-2:]] == ["SciPy", ""]
    assert {row.chapter for row in rows} == {"2"}
    assert proofs.summary(rows) == (
        "10 parts of 1 chapter in 10 comparisons, largest relative difference 3e-07; "
        "none uses more than 20 % of what is allowed"
    )


def test_no_part_of_the_book_is_beyond_its_bound():
    rows = proofs.all_proofs()
    assert len(rows) >= 35
    for row in rows:
        assert proofs.share_of_bound(row) <= 1, row


def test_words_are_counted_as_they_are_seen(tmp_path):
    assert reading.count_words("Three plain *words*.") == 3
    assert reading.count_words("$x_0$ and [a link](a/b.html) <!-- no -->") == 4
    assert reading.count_words("$$\na b c d\n$$\nafter") == 11
    assert reading.count_words(":::{exercise} Two words\n:label: x\nhere\n:::") == 1
    path = notebook(
        tmp_path, "# A title\n\n- **Runs in** <!-- measured -->about 9 s and 1 GB"
        "<!-- end -->\n\n**In a hurry?** Skip\n*this*.\n\nMore " + "word " * 1000,
        ("one two three four", ""), ("seen by nobody", "", "hide-input"),
        ":::{solution-start} x\n:::", "never " * 999, ("never = 1", ""),
        "hidden\n\n:::{solution-end}\n:::\n\nthree words more",
        "```{solution} y\n```",
    )  # fmt: skip
    row = reading.reading_of(path)
    assert row.code == 4 and 1010 <= row.words <= 1030
    assert (row.hurry, row.runs, row.minutes) == ("Skip *this*.", "about 9 s", 5)


def test_every_chapter_can_be_read_in_an_hour():
    rows = reading.readings()
    assert len(rows) == 19
    for row in rows:
        assert 5 <= row.minutes <= 60, row
        assert row.runs, row.docname


# While the pages are built -------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("sphinx", reason="pip install -r requirements.txt")
    return load_tool("sphinx_chapters")


def test_the_strips_config_is_the_real_one(pages):
    from dataclasses import asdict

    from sdbook.run.grading import PARTS
    from sdbook.unet import UNetConfig

    assert pages.default_config() == asdict(UNetConfig())
    assert pages.checkable() == {k: names.split() for k, (_, names) in PARTS.items()}


def test_every_chapter_gets_its_strip_and_its_tables(pages):
    """Appendices A and B are about no part of the pipeline."""
    for path in proofs.chapter_files():
        docname, start = f"chapters/{path.stem}", path.stem.split("_")[0]
        source = [path.read_text(encoding="utf-8")]
        pages.add_to_chapter(None, docname, source)
        cells = json.loads(source[0])["cells"]
        texts = ["".join(x["source"]) for x in cells if x["cell_type"] == "markdown"]
        assert texts[0].count('aria-label="You are here') == (start not in "AB")
        for target in re.findall(r'<a href="([^"]+)"', texts[0]):
            assert (path.parent / target.replace(".html", ".ipynb")).exists(), target
        assert texts[0].count("- **Reads in** about ") == 1
        whole = "\n\n".join(texts)
        rows, known = proofs.proofs_of(path), pages.checkable().get(start.lstrip("0"))
        assert whole.count("## Parts") == bool(rows or known), path.name
        if rows:
            assert "| part | beside | largest difference | allowed |" in whole
        if "## Further reading" in whole:
            assert whole.index("## Summary") < whole.rindex("## Further reading")
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        before = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert code == [cell for cell in before if cell["cell_type"] == "code"]


def test_questions_are_marked_and_in_a_fair_order(pages):
    """An answer has its class, and the right one no place of its own."""
    places = []
    for number in range(60):
        choices = [
            f"<details><summary>{number}, {i}</summary><p>{word}: why.</p></details>"
            for i, word in enumerate(("No", "Right", "No"))
        ]
        lines = ['<div class="follow">', "<p>Which?</p>", *choices, "</div>"]
        marked = pages.mark_answers("\n".join(lines)).splitlines()
        assert marked[:2] == lines[:2] and marked[-1] == lines[-1]
        plain = [re.sub(' class="(right|no)"', "", line) for line in marked[2:-1]]
        assert sorted(plain) == sorted(choices)
        right = ['<p class="right">Right: why.' in line for line in marked[2:-1]]
        assert sum('<p class="no">No: why.' in line for line in marked) == 2
        places.append(right.index(True))
    assert all(10 <= places.count(place) <= 30 for place in range(3))


def test_other_pages_are_left_alone(pages):
    source = ["# Notation"]
    pages.add_to_chapter(None, "pages/notation", source)
    assert source == ["# Notation"]
    assert (ROOT / "pages" / "reading.md").exists()
