"""Chapter 14's tools at toy size, and its choice of weights."""

import json
import os
import sys
from importlib.metadata import version

import nbformat
import pytest
from helpers import ROOT, load_tool, small_pipeline

from sdbook.pipeline import StableDiffusion

CHAPTER = ROOT / "chapters" / "14_sample_on_a_gpu.ipynb"


def cell(name):
    """The source of one of the chapter's cells, by its id."""
    cells = nbformat.read(CHAPTER, 4).cells
    return next(one.source for one in cells if one.id == name)


def run_cells(*names):
    """The names that some of the chapter's cells define."""
    namespace = {}
    for name in names:
        exec(compile(cell(name), name, "exec"), namespace)
    return namespace


@pytest.fixture
def folder(tmp_path):
    small_pipeline((16, 24, 32), (8, 16), image_size=32).save_pretrained(tmp_path)
    return tmp_path


# The chapter ------------------------------------------------------------------


def test_the_chapter_opens_what_sdbook_weights_names(folder, monkeypatch):
    monkeypatch.setenv("SDBOOK_WEIGHTS", str(folder))
    found = run_cells("stand-in", "load")
    expected = StableDiffusion.from_pretrained(folder)
    assert found["pipe"].unet.config == expected.unet.config
    assert found["pipe"].unet.config.block_out_channels == (16, 24, 32)
    assert found["weights"] == str(folder)


def test_without_it_the_chapter_makes_a_stand_in(monkeypatch):
    monkeypatch.delenv("SDBOOK_WEIGHTS", raising=False)
    found = run_cells("stand-in", "load")
    widths = found["pipe"].unet.config.block_out_channels
    assert len(widths) == 4 and max(widths) < 100
    assert found["pipe"].vae.config.downscale == 8


def test_in_colab_it_installs_the_book_and_keeps_torch(folder, monkeypatch):
    import subprocess

    asked = []
    monkeypatch.setenv("SDBOOK_WEIGHTS", str(folder))
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    run_cells("stand-in", "load")
    ((python, *command),) = asked
    assert python == sys.executable and command[:3] == ["-m", "pip", "install"]
    assert f"torch=={version('torch')}" in command
    assert any(part.startswith("numpy==") for part in command)
    assert os.environ["SDBOOK_WEIGHTS"] == str(folder)  # a reader's own choice stays


def test_the_recorded_numbers_are_those_of_the_tools():
    full = ROOT / "data" / "runs" / "full_size" / "results.json"
    record = json.loads(full.read_text())
    assert record["parameters"] == {
        "unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
    }  # fmt: skip
    assert record["size"] == 512
    assert all(one["share_of_the_range"] < 1e-4 for one in record["equal"].values())
    assert record["command"].startswith("python tools/benchmarks/check_full_size.py")
    speed = ROOT / "data" / "runs" / "speedups" / "cpu.json"
    record = json.loads(speed.read_text())
    assert record["command"].startswith("python tools/benchmarks/bench_speedups.py")
    for result in record["results"]:
        assert result["rows"][0]["of_plain"] == 1.0


# The tools --------------------------------------------------------------------


@pytest.mark.slow
def test_ours_and_diffusers_beside_each_other(tmp_path):
    tool = load_tool("check_full_size")
    path = tmp_path / "results.json"
    options = ["--toy", "--size", "64", "--steps", "2", "--json", str(path)]
    assert tool.main(options) == 0
    record = json.loads(path.read_text())
    assert [row["who"] for row in record["rows"]] == ["ours", "diffusers"]
    for row in record["rows"]:
        peaks = list(row["peak_bytes"].values())
        assert peaks == sorted(peaks) and peaks[0] > 10**7
    assert set(record["equal"]) == {"latents", "picture"}
    for found in record["equal"].values():
        assert found["share_of_the_range"] < 1e-4 and found["range"] > 0.01


def test_the_ladder_draws_the_same_on_every_rung(folder, tmp_path, capsys):
    tool = load_tool("bench_speedups")
    path = tmp_path / "cpu.json"
    options = ["--model", str(folder), "--steps", "3", "--rounds", "1"]
    options += ["--batches", "2", "--dtype", "bf16", "--json", str(path)]
    assert tool.main(options) == 0
    assert "of plain" in capsys.readouterr().out
    record = json.loads(path.read_text())
    ((batch, rows),) = [(one["batch"], one["rows"]) for one in record["results"]]
    assert batch == 2 and len(rows) == 5
    for row in rows[:3]:
        assert row["difference"] < 1e-4, row["name"]
    assert rows[0]["of_plain"] == 1.0
    assert record["device"] == "cpu" and record["command"].endswith(str(path))
