"""`sdbook check`: right parts are right, wrong ones are named, bad files are told."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdbook.__main__ import main
from sdbook.run import grading
from sdbook.run.grading import CheckConfig, find_parts, numbered

PACKAGE = Path(grading.__file__).parents[1]


def source_of(module: str) -> str:
    """A module of the package as a file of one's own, which imports what it needs."""
    text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    text = text.replace("from ..", "from sdbook.")
    return re.sub(r"^(\s*)from \.(\w)", r"\1from sdbook.\2", text, flags=re.M)


def told_of(folder: Path, files: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """{file: {part's name: what is said of it}} for {file: (code, chapter or "all")}.

    In one process for them all, since PyTorch takes its time, and without the tests'
    own types.
    """
    calls = []
    for name, (code, asked) in files.items():
        file, report = folder / f"{name}.py", folder / f"{name}.report"
        file.write_text(code, encoding="utf-8")
        numbers = list(numbered()) if asked == "all" else find_parts(asked)
        calls.append({"file": str(file), "report": str(report), "numbers": numbers})
    code = "import json, sys; from sdbook.run.examining import main; "
    code += "[main(**call) for call in json.loads(sys.argv[1])]"
    given = [sys.executable, "-c", code, json.dumps(calls)]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = {}
    for name, call in zip(files, calls):
        lines = Path(call["report"]).read_text(encoding="utf-8").splitlines()
        results = [one for one in map(json.loads, lines) if "lines" in one]
        told[name] = {
            numbered()[one["number"]][1]: "\n".join(one["lines"]) for one in results
        }
    return told


def refused(capsys, *words: str) -> str:
    """What the command says to words that it cannot follow."""
    with pytest.raises(SystemExit) as stopped:
        main(["check", *map(str, words)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---- the list --------------------------------------------------------------------


def test_a_part_has_one_number():
    names = [name for _, name in numbered().values()]
    assert len(names) == len(set(names)) > 60


def test_parts_are_what_their_chapters_export():
    """Under the number of the chapter that builds them."""
    for chapter, (_, names) in grading.PARTS.items():
        start = chapter if chapter.isalpha() else f"{int(chapter):02}"
        (path,) = (PACKAGE.parent / "chapters").glob(f"{start}_*.ipynb")
        text = path.read_text(encoding="utf-8")
        for name in names.split():
            assert re.search(rf"(class|def) {name}\b", text), f"{name} in {path.name}"


def test_what_can_be_asked_for():
    assert find_parts("3.2") == find_parts("UNet") == ["3.2"]
    assert find_parts("3") == find_parts("03") == [f"3.{i}" for i in range(1, 6)]
    assert find_parts("d.2") == ["D.2"] and find_parts("10")[-1] == "10.17"
    for wrong, said in (
        ("unet", "mean UNet"), ("3.9", "chapter 3 has 1 to 5"), ("ResBlok", "ResBlock"),
        ("dragon", "lists them"), ("4x", "lists them"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            find_parts(wrong)


def test_alone_it_lists_what_there_is(capsys):
    main(["check"])
    said = capsys.readouterr().out
    assert all(name in said for _, name in numbered().values())
    main(["check", "2"])
    said = capsys.readouterr().out
    assert "ResBlock" in said and "sdbook check 2.1 my.py" in said
    assert "UNet" not in said


# ---- right and wrong parts ----------------------------------------------------------


# In a chapter's module: what becomes what; and then what is said of which part.
WRONG = {
    "1": (
        [("eps=1e-6", "eps=1e-5"), ("value, gate =", "gate, value ="),
         ("(query * query.shape[-1] ** -0.5) @", "query @")],
        {"SpatialTransformer": r"faint map: .*\(allow", "GEGLU": "first half is the",
         "FeedForward": "first half is the value", "attention": "divided by √d",
         "Attention": "right"},
    ),
    "2": (
        [("angles.cos(), angles.sin()", "angles.sin(), angles.cos()"),
         ("F.silu(time)", "time"), ("(0, 1, 0, 1)", "(1, 1, 1, 1)"),
         ('mode="nearest"', 'mode="bilinear"')],
        {"timestep_embedding": "cosines come first", "ResBlock": "SiLU before time_emb",
         "Downsample": r"symmetric=False: .*[\s\S]*on the right and below only",
         "Upsample": "not bilinear", "TimestepMLP": "right"},
    ),
    "3": (
        [("torch.cat([x, skips.pop()]", "torch.cat([skips.pop(), x]")],
        {"UpBlock": "map from below", "UNet": "map from below", "DownBlock": "right"},
    ),
    "5": (
        [("torch.exp(0.5 * self.logvar)", "torch.exp(self.logvar)"),
         ("eps=1e-6", "eps=1e-5")],
        {"DiagonalGaussian": r"exp\(logvar / 2\)", "AutoencoderKL": "wrong",
         "ImageAttention": r"eps looks like 1e-5; here it is 1e-6"},
    ),
    "6": (
        [("self.say(quick_gelu(self.neighbours(x)))", "self.say(self.neighbours(x))"),
         ("device=device).tril()", "device=device).tril(-1)")],
        {"ImageTower": "between the block and `say`", "causal_mask": "look at itself",
         "quick_gelu": "right"},
    ),
}  # fmt: skip


SAMPLERS = """
from sdbook import schedulers as book
from sdbook.schedulers import *

class DDIMScheduler(book.DDIMScheduler):
    defaults = book.DDIMScheduler.defaults | dict(set_alpha_to_one=False)

def ddim_step(x0, noise, before, std):
    return before.sqrt() * x0 + (1 - before).sqrt() * noise

class DDPMScheduler(book.DDPMScheduler):
    def step(self, model_output, t, sample, generator=None):
        return 0.5 * sample

def make_betas(schedule, count, start, end):
    raise KeyError("no such schedule")
"""


EXPECTED = {
    "DDIMScheduler": "set_alpha_to_one is True where nothing else is said",
    "ddim_step": "fresh noise is taken off",
    "DDPMScheduler": r"10 steps: largest relative difference .* \(allowed 1e-05\)",
    "make_betas": "linear: line 16: KeyError: 'no such schedule'",
}


BY_HAND = """
import math
import torch
from torch import nn
from torch.nn import functional as F

def guide(a, b, scale):
    return (1 - scale) * a + scale * b

def wilson(right, total, z=1.96):
    p, n = right / total, total
    root = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    return [max(0, (middle - root) / scale), min(1, (middle + root) / scale)]

def attention(q, k, v, mask=None):
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return torch.einsum("bhnm,bhmv->bhnv", scores.softmax(-1), v)

class TimestepMLP(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)
    def forward(self, x):
        x = self.linear_1(x)
        return self.linear_2(x * torch.sigmoid(x))
"""
STRANGE = """
import torch
from torch import nn
from sdbook.attention import GEGLU

def guide(uncond, cond):
    return uncond

def ddim_step(x0, noise, before, std):
    return (before.sqrt() * x0).sum()

def posterior_variance(now, before):
    return 2 * (1 - before) / (1 - now) * (1 - now / before)

def lean_to_noise(place, share):
    return None

def cubic_kernel(x, y):
    return (x @ y.T * float("nan"))

class TimestepMLP(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_out)
    def forward(self, x):
        return self.fc1(x)

class FeedForward(nn.Module):
    def __init__(self, dim, mult=4):
        super().__init__()
        last = nn.Linear(2 * dim, dim)
        self.net = nn.Sequential(GEGLU(dim, 2 * dim), nn.Identity(), last)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What is said of the book's own modules, of wrong ones, and of the files above."""
    files = {"by_hand": (BY_HAND, "all"), "strange": (STRANGE, "all")}
    files["samplers"] = SAMPLERS, "7"
    for chapter, (module, _) in grading.PARTS.items():
        files[f"own_{chapter}"] = source_of(module), chapter
    for chapter, (changes, _) in WRONG.items():
        code = source_of(grading.PARTS[chapter][0])
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        files[f"wrong_{chapter}"] = code, chapter
    return told_of(tmp_path_factory.mktemp("files"), files)


@pytest.mark.slow
def test_the_books_own_source_is_right(told):
    right = r"\S+ (\w+): right, largest relative difference 0.0e\+00 \(allowed 1e-05\)"
    for chapter, (_, names) in grading.PARTS.items():
        said = told[f"own_{chapter}"]
        assert list(said) == names.split()
        for name, line in said.items():
            assert re.fullmatch(right, line)[1] == name


@pytest.mark.slow
def test_a_usual_mistake_is_named(told):
    expected = {f"wrong_{chapter}": words for chapter, (_, words) in WRONG.items()}
    for file, parts in (expected | {"samplers": EXPECTED}).items():
        for name, words in parts.items():
            said = told[file][name]
            assert f" {name}: {'right' if words == 'right' else 'wrong'}" in said
            assert re.search(words, said), said
    assert "posterior_mean" not in told["samplers"]  # imported


@pytest.mark.slow
def test_another_way_to_write_it_is_right_too(told):
    said = told["by_hand"]
    assert list(said) == ["attention", "TimestepMLP", "guide", "wilson"]
    assert all(f" {name}: right, " in line for name, line in said.items()), said


@pytest.mark.slow
def test_what_is_strange_is_said(told):
    said = told["strange"]
    assert "GEGLU" not in said  # imported
    takes = "Yours takes (uncond, cond); the book's takes (uncond, cond, scale)"
    assert "too many positional arguments" in said["guide"] and takes in said["guide"]
    assert "gives shape (), not (2, 3)" in said["ddim_step"]
    assert "yours is 2 times the book's, everywhere" in said["posterior_variance"]
    assert "gives None, not numbers of shape (21,)" in said["lean_to_noise"]
    assert "gives NaN" in said["cubic_kernel"]
    assert "lacks linear_1.weight, linear_1.bias, linear_2.w" in said["TimestepMLP"]
    assert "has fc1.weight, fc1.bias, which the book's has not" in said["TimestepMLP"]
    shapes = "net.0.proj.weight has shape (48, 12), not (96, 12)"
    assert shapes in said["FeedForward"]


CAUGHT = """
import importlib
from sdbook.run.comparing import Maker, alike, answers
from sdbook.run.grading import numbered
from sdbook.run.mistakes import MODULES, mistakes_of
from sdbook.run.trials import TRIALS

used, count = set(), 0
for module, name in numbered().values():
    book = getattr(importlib.import_module("sdbook." + module), name)
    trial = TRIALS[name]
    right = [value for _, value in answers(trial, Maker(book, book))]
    assert not [one for one in right if isinstance(one, Exception)], (name, right)
    for words, version, change in mistakes_of(name, book):
        if change and words in used:  # caught in a smaller part
            continue
        maker = Maker(version, book, change=change)
        found = (value for _, value in answers(trial, maker))
        same = all(alike(*pair) for pair in zip(right, found))
        if maker.changed:
            used.add(words)
            count += 1
            if same:
                print("not caught:", name, "-", words)
for words, _ in MODULES:
    if words not in used:
        print("never made:", words)
print(count, "mistakes")
"""
@pytest.mark.slow
def test_every_known_mistake_is_caught():
    """In the first part that it can be made in; without the tests' own types."""
    done = subprocess.run(
        [sys.executable, "-c", CAUGHT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *missed, last = done.stdout.splitlines()
    assert not missed
    assert int(last.split()[0]) > 100


# ---- the command ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_and_its_exit_status(tmp_path, capsys):
    file = tmp_path / "mine.py"
    wrong = "def guide(u, c, s):\n    return c + s * (c - u)\n"
    file.write_text("print('hello')\n" + wrong)
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(file)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "9.1 guide: wrong" and "scale 0: largest relative" in said[1]
    assert said[-1] == "    hint: start from uncond: uncond + scale * (cond - uncond)"


def test_a_right_part_ends_well(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.py"
    file.touch()
    found = [{"right": True, "lines": [f"{i}: right"]} for i in (1, 2)]
    monkeypatch.setattr(grading, "examine", lambda *given: found)
    assert main(["check", "3", str(file)]) is None
    assert capsys.readouterr().out == "1: right\n2: right\n2 of 2 right\n"


@pytest.mark.parametrize(
    "code, words",
    [
        ("1 +", "is no Python: line 1: invalid syntax"),
        ("x = 1\ny = x.size", "fails when it is run: line 2: AttributeError: 'int'"),
        ("import sys\nsys.exit()", "ends with sys.exit()"),
        ("import os\nprint('so far', flush=True)\nos._exit(3)",
         r"ended by itself \(exit status 3\); it had printed: so far"),
        ("while True: pass", "still running after 2 seconds.*loop without an end"),
        ("def Guide(u, c, s): pass", "no guide, which is part 9.1; is it your Guide"),
        ("def other(): pass", "no guide, .*; it defines other. .An exercise has"),
        ("", "no guide, .*; it defines nothing"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_checked(tmp_path, capsys, code, words):
    file = tmp_path / "mine.py"
    file.write_text(code)
    seconds = ("--seconds", "2") if code.startswith("while") else ()
    said = refused(capsys, "guide", file, *seconds)
    assert str(file) in said and re.search(words, said), said


def test_what_cannot_be_asked(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    notes = tmp_path / "mine.ipynb"
    notes.write_text("{}")
    assert "there is no file my_unet.py" in refused(capsys, "3.2", "my_unet.py")
    assert "there is no file my_unet" in refused(capsys, "3.2", "my_unet")
    assert "no Python file" in refused(capsys, "3.2", notes)
    assert "3 words are too many" in refused(capsys, "3.2", file, "more")
    assert "nothing to check called 'nine'" in refused(capsys, "nine", file)
    assert "has none of the parts" in refused(capsys, "3", file)
    assert "another file" in refused(capsys, file, tmp_path / "other.py")
    assert "there is no part 3.99" in refused(capsys, "3.99", file)
    with pytest.raises(ValueError, match="seconds is 0"):
        CheckConfig(seconds=0.0)


def test_nothing_heavy_is_imported_for_the_list():
    code = "import sys; from sdbook.__main__ import main; main(['check']); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_process_needs_nothing_of_the_books_folder():
    """It works where only the package is installed."""
    for name in ("grading", "examining", "comparing", "trials", "mistakes"):
        text = (PACKAGE / "run" / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\.ipynb|chapters/", node.value), name
