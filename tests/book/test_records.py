"""Figures that prose tells are those of the records (tools/book/records.py)."""

import json
import re
import shutil

import pytest
from helpers import ROOT, load_tool

records = load_tool("records")
TOLD = ("README.md", "index.md", "data/models/scenes/README.md")


def by_hand(text):
    """Scores outside of the comments that say where they come from."""
    rest = records.FIGURE.sub("", text)
    return re.findall(r"\b\d+ (?:of|in) (?:every )?[12]00\b|\b\d+ of them right", rest)


def test_every_figure_is_what_the_records_say(capsys):
    assert records.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", TOLD)
def test_no_score_is_typed_by_hand(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert records.FIGURE.search(text)
    assert by_hand(text) == []


def test_a_score_by_hand_is_seen():
    assert by_hand("in 95 of 100 cases") == ["95 of 100"]
    assert by_hand('<!-- = right("two") -->3 of 100<!-- end -->') == []


def test_another_record_makes_other_prose(tmp_path, capsys):
    shutil.copytree(ROOT / "data" / "runs", tmp_path / "data" / "runs")
    shutil.copy(ROOT / "README.md", tmp_path)
    place = tmp_path / "data" / "runs" / "evaluation" / "scores.json"
    report = json.loads(place.read_text(encoding="utf-8"))
    report["scores"]["two"]["right"] = 7
    place.write_text(json.dumps(report), encoding="utf-8")
    assert records.main(["--check", "--root", str(tmp_path)]) == 1
    assert "README.md" in capsys.readouterr().out
    assert records.main(["--root", str(tmp_path)]) == 0
    told = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert '<!-- = right("two") -->7<!-- end -->' in told
    assert records.main(["--check", "--root", str(tmp_path)]) == 0


def test_a_chapter_is_stored_as_it_was(tmp_path):
    """But for its figures: another indent would change every line."""
    text = (ROOT / "chapters" / "10_faster_samplers.ipynb").read_text(encoding="utf-8")
    assert records.fill_notebook(text, records.Records()) == text


@pytest.mark.parametrize(
    "source, reason", [("wrong()", "NameError"), ("1 / 0", "Zero")]
)
def test_what_cannot_be_told_is_named(source, reason):
    with pytest.raises(ValueError, match=reason):
        records.fill(f"in <!-- = {source} -->3<!-- end --> cases", records.Records())


def test_a_figure_does_not_begin_a_line():
    """There Markdown takes a comment, and all of its line, for HTML."""
    with pytest.raises(ValueError, match="begin the line"):
        records.fill("in\n<!-- = hours() -->3<!-- end --> hours", records.Records())


def test_a_table_keeps_its_lines():
    text = "<!-- = words[2] -->\nold\n<!-- end -->\n"
    expected = "<!-- = words[2] -->\ntwo\n<!-- end -->\n"
    assert records.fill(text, records.Records()) == expected
