"""tools/book/export.py: what it writes, and everything that it refuses."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_tool

from sdbook.notebook import add_to, in_words

ROOT = Path(__file__).resolve().parents[2]
export = load_tool("export")

TITLE = "# Attention\n\nWho looks at whom."
DEFAULT = "#| default_exp attention"


@pytest.fixture
def book(tmp_path):
    """A book in a temporary folder: `write` adds a chapter, `run` exports it."""

    class Book:
        root = tmp_path
        package = tmp_path / "sdbook"

        def write(self, *code, name="01_attention", title=TITLE):
            cells = [] if title is None else [("markdown", "card", title)]
            cells += [("code", f"cell{n}", source) for n, source in enumerate(code)]
            notebook = {
                "cells": [
                    {"cell_type": kind, "id": id_, "metadata": {}, "source": source}
                    for kind, id_, source in cells
                ],
                "metadata": {},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
            path = tmp_path / "chapters" / f"{name}.ipynb"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(notebook), encoding="utf-8")
            return path

        def run(self, *arguments):
            return export.main(["--root", str(tmp_path), *map(str, arguments)])

    Book.package.mkdir()
    return Book()


def refusal(book, capsys, *code, **options):
    """Export a chapter that must be refused; what is said about it."""
    book.write(*code, **options)
    assert book.run() == 1
    assert book.run("--check") == 1
    return capsys.readouterr().err


def test_a_module_is_written_from_its_cells(book):
    book.write(
        DEFAULT,
        "#| export\nfrom torch import Tensor\nimport math\n\n# ours\n"
        "from sdbook.resblocks import (\n    ResBlock,\n)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])",
        '#| export\ndef root(x: Tensor) -> Tensor:\n    """from sdbook.x import y"""\n'
        "    return ResBlock(x) / math.sqrt(2)",
        "#| export\n_SECRET = 1\nA, B = 1, 2\n\n\nclass Last:\n    pass\n",
    )
    (book.package / "resblocks.py").write_text("class ResBlock: ...\n")
    assert book.run() == 0
    assert (book.package / "attention.py").read_text() == (
        '"""Attention\n\n'
        'Generated from chapters/01_attention.ipynb; do not edit.\n"""\n'
        "\n"
        "import math\n"
        "\n"
        "from torch import Tensor\n"
        "\n"
        "# ours\n"
        "from .resblocks import (\n"
        "    ResBlock,\n"
        ")\n"
        "\n"
        '__all__ = ["root", "A", "B", "Last"]\n'
        "\n\n"
        "def root(x: Tensor) -> Tensor:\n"
        '    """from sdbook.x import y"""\n'
        "    return ResBlock(x) / math.sqrt(2)\n"
        "\n\n"
        "_SECRET = 1\n"
        "A, B = 1, 2\n"
        "\n\n"
        "class Last:\n"
        "    pass\n"
    )


def test_a_second_export_changes_nothing(book, capsys):
    book.write(DEFAULT, "#| export\nx = 1")
    assert book.run() == 0
    before = (book.package / "attention.py").stat().st_mtime_ns
    capsys.readouterr()
    assert book.run() == 0
    assert capsys.readouterr().out == "1 modules: 0 changed\n"
    assert (book.package / "attention.py").stat().st_mtime_ns == before
    assert book.run("--check") == 0


def test_imports_inside_functions_become_relative(book):
    book.write(
        DEFAULT,
        "#| export\ndef f():\n    from sdbook.viz import show\n\n    return show",
    )
    (book.package / "viz.py").write_text("show = 1\n")
    assert book.run() == 0
    assert "    from .viz import show\n" in (book.package / "attention.py").read_text()


def test_a_later_chapter_may_add(book):
    book.write(DEFAULT, "#| export\nimport math\n\nx = math.pi")
    book.write(
        DEFAULT,
        "from sdbook.attention import x",
        "#| export\nimport math\n\ny = math.e",
        name="10_more",
        title="# More",
    )
    assert book.run() == 0
    text = (book.package / "attention.py").read_text()
    assert text.startswith('"""Attention\n')
    assert "chapters/01_attention.ipynb, chapters/10_more.ipynb; do not" in text
    assert text.count("import math\n") == 1
    assert '__all__ = ["x", "y"]' in text
    assert text.index("x = math.pi") < text.index("y = math.e")


def test_a_cell_may_go_into_another_module(book):
    book.write(
        "#| default_exp vae",
        '#| export weights\n"""Reading and writing weights."""\nimport math',
        "#| export weights\nx = math.pi",
        "#| export\nfrom sdbook.weights import x\n\ny = x",
        name="05_vae",
        title="# The VAE",
    )
    assert book.run() == 0
    weights = (book.package / "weights.py").read_text()
    assert weights.startswith('"""Reading and writing weights.\n')
    assert "from .weights import x" in (book.package / "vae.py").read_text()


# Classes that go on in later cells --------------------------------------------

CIRCLE = """\
#| export
import functools

import torch


class Circle:
    \"\"\"A circle.\"\"\"

    unit = "cm"

    def __init__(self, radius):
        self.radius = radius


PI = 3
"""
AREA = """\
#| export
@add_to(Circle)
# why this
def area(self):
    \"\"\"The area.

    In square centimetres.
    \"\"\"

    # Not quite.
    return PI * self.radius**2
    # and after


UNITS = ["cm"]


# how far it is across
@add_to(Circle)
@property
def diameter(self):
    text = \"\"\"twice
  the\"\"\"
    return 2 * self.radius, text


@add_to(Circle)
@Circle.diameter.setter
def diameter(self, diameter):
    self.radius = diameter / 2
"""
MORE = """\
#| export
@add_to(Circle)
@classmethod
@torch.no_grad()
def unit_circle(cls) -> "Circle":
    return cls(1)


@add_to(Circle)
@staticmethod
def print(*values):
    return values


@add_to(Circle)
@functools.cached_property
def length(self):
    from sdbook.resblocks import two

    return two * PI * self.radius
"""
WHOLE = """\
import functools

import torch

__all__ = ["Circle", "PI", "UNITS"]


class Circle:
    \"\"\"A circle.\"\"\"

    unit = "cm"

    def __init__(self, radius):
        self.radius = radius

    # why this
    def area(self):
        \"\"\"The area.

        In square centimetres.
        \"\"\"

        # Not quite.
        return PI * self.radius**2
        # and after

    # how far it is across
    @property
    def diameter(self):
        text = \"\"\"twice
  the\"\"\"
        return 2 * self.radius, text

    @diameter.setter
    def diameter(self, diameter):
        self.radius = diameter / 2

    @classmethod
    @torch.no_grad()
    def unit_circle(cls) -> "Circle":
        return cls(1)

    @staticmethod
    def print(*values):
        return values

    @functools.cached_property
    def length(self):
        from .resblocks import two

        return two * PI * self.radius


PI = 3


UNITS = ["cm"]
"""
NOTEBOOK = "from sdbook.notebook import add_to"
NEWER = ("__firstlineno__", "__static_attributes__")  # Python 3.13


def test_a_class_goes_on_in_later_cells_and_is_one(book):
    book.write(DEFAULT, NOTEBOOK, CIRCLE, AREA, MORE)
    (book.package / "resblocks.py").write_text("two = 2\n")
    assert book.run() == 0
    text = (book.package / "attention.py").read_text()
    assert text.split('edit.\n"""\n\n')[1] == WHOLE


def test_the_cells_and_the_module_make_the_same_class(book):
    book.write(DEFAULT, NOTEBOOK, CIRCLE, AREA, MORE)
    (book.package / "resblocks.py").write_text("two = 2\n")
    assert book.run() == 0
    live, module = {"__name__": "a"}, {"__name__": "a", "__package__": "a"}
    for code in (NOTEBOOK, CIRCLE, AREA, AREA, MORE):  # a cell may run twice
        exec(code, live)
    assert live["print"] is print and live["area"] is None
    exec((book.package / "attention.py").read_text(), module)

    def described(cls):
        """Every member: its name, kind, docstring, and its functions."""
        for name, member in vars(cls).items():
            if name not in ("__dict__", "__weakref__", *NEWER):
                yield name, type(member), inspect.getdoc(member), *functions(member)

    def functions(member):
        parts = [getattr(member, n, None) for n in ("fget", "fset", "func", "__func__")]
        for part in (member, *parts):
            while inspect.isfunction(part):
                yield part.__qualname__, part.__module__, str(inspect.signature(part))
                part = getattr(part, "__wrapped__", None)

    assert [*described(live["Circle"])] == [*described(module["Circle"])]
    assert str([*described(live["Circle"])]).count("'Circle.unit_circle'") == 2
    for namespace in (live, module):
        circle = namespace["Circle"].unit_circle()
        circle.diameter = 4
        assert (circle.radius, circle.area(), circle.print(1)) == (2, 12, (1,))
        assert circle.diameter == (4, "twice\n  the")


def test_a_later_chapter_may_go_on_with_a_class(book):
    book.write(DEFAULT, "#| export\nclass A:\n    x = 1")
    method = "#| export attention\n@add_to(A)\ndef f(self):\n    return 1"
    book.write(method, name="10_more", title="# More")
    assert book.run() == 0
    text = (book.package / "attention.py").read_text()
    assert text.endswith("    x = 1\n\n    def f(self):\n        return 1\n")


@pytest.mark.parametrize(
    ("cell", "line", "expected"),
    [
        ("@add_to(B)\ndef f(self): ...", 3, "has no class `B` up to here"),
        ("@add_to(Other)\ndef f(self): ...", 3, "has no class `Other` up to here"),
        ("@add_to(A)\ndef old(self): ...", 3, "`A.old` is already defined by"),
        ("@add_to(A)\ndef word(self): ...", 3, "cell cell2; export only the finished"),
        ("@add_to(A)\ndef f(self):\n    super().f()", 4, "write `super(A, self)`"),
        ("@add_to(A)\ndef f(self):\n    __class__", 4, "works only inside a class"),
        ("@add_to(A)\ndef f(self):\n    self.__x", 4, "`__x` means something else"),
        ("@add_to(A)\ndef __new__(cls): ...", 3, "Python needs it from the start"),
        ("@add_to(A)\nclass C: ...", 2, "`@add_to(Class)` belongs above a `def`"),
        ("add_to(A)(len)", 2, "`@add_to(Class)` belongs above a `def`"),
        ("@property\n@add_to(A)\ndef f(self): ...", 3, "above its other decorators"),
        ("if Other:\n    @add_to(A)\n    def f(self): ...", 3, "not indented"),
        (NOTEBOOK, 2, "import it in a cell without `#| export`"),
        ("def f(self):\n    " + NOTEBOOK, 3, "a help for notebooks"),
        ("@add_to(A)\ndef f(self, x=LATER): ...\n\n\nLATER = 1", 3, "further below"),
        ("@add_to(A)\ndef f(self):\n    return lost", 4, "Undefined name `lost`"),
        ("@add_to(A)\ndef f(self) -> A: ...", 3, "Undefined name `A` at this place"),
    ],
)
def test_unfit_methods_are_refused(book, capsys, cell, line, expected):
    (book.package / "resblocks.py").write_text("class Other: ...\n")
    said = refusal(
        book, capsys, DEFAULT, "#| export\nfrom sdbook.resblocks import Other",
        "#| export\nclass A(Other):\n    word = 1\n\n    def old(self): ...",
        f"#| export\n{cell}",
        "#| export\nclass B: ...",
    )  # fmt: skip
    assert f"chapters/01_attention.ipynb, cell cell3, line {line}: " in said
    assert expected in said


def test_a_method_added_twice_is_refused(book, capsys):
    method = "#| export\n@add_to(A)\ndef f(self):\n    return 1"
    said = refusal(book, capsys, DEFAULT, "#| export\nclass A: ...", method, method)
    assert "cell cell3, line 3: `A.f` is already defined by" in said
    assert "cell cell2; export only the finished form" in said


def test_add_to_refuses_what_is_no_class_and_no_function():
    with pytest.raises(TypeError, match="needs a class, not 3"):
        add_to(3)
    with pytest.raises(TypeError, match="needs a function, not"):
        add_to(type("A", (), {}))(len)


# Modules in folders -----------------------------------------------------------


def test_modules_in_folders(book, capsys):
    book.write(
        "#| default_exp training.loop",
        '#| export training.loss\n"""Losses."""\nONE = 1',
        "#| export\n"
        "from sdbook import viz\n"
        "from sdbook.attention import TWO\n"
        "from sdbook.run.settings import read\n"
        "from sdbook.training.loss import ONE\n"
        "from sdbook.run import logs",
        "#| export\nthree = read(ONE, TWO, viz, logs)",
        "#| export attention\nTWO = 2",
        "#| export attention\ndef f():\n    from sdbook.run.settings import read\n\n"
        "    return read",
        name="08_training",
        title="# Training",
    )
    by_hand = ["__init__", "notebook", "data", "viz", "run/__init__", "run/logs"]
    for name in [*by_hand, "run/settings", "training/__init__"]:
        path = book.package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("from .other import read\n")
    assert book.run() == 0
    said = capsys.readouterr()
    assert "wrote sdbook/training/loop.py" in said.out
    assert said.err.count("note: ") == said.err.count("sdbook/viz.py: no chapter") == 1
    text = (book.package / "training" / "loop.py").read_text()
    assert text.split('"""')[2].strip().splitlines()[:5] == [
        "from .. import viz",
        "from ..attention import TWO",
        "from ..run import logs",
        "from ..run.settings import read",
        "from .loss import ONE",
    ]
    assert (book.package / "training" / "loss.py").read_text().startswith('"""Losses.')
    attention = (book.package / "attention.py").read_text()
    assert "    from .run.settings import read\n" in attention
    (book.package / "viz.py").unlink()
    book.run()
    assert "from sdbook.viz, which" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from sdbook.training.nowhere import x", "imports from sdbook.training.now"),
        ("from sdbook.training.loop import x", "the module that it is exported to"),
        ("from sdbook.training.loss import x", "imports `x` from sdbook.training.loss"),
        ("from sdbook.nowhere import x", "imports from sdbook.nowhere, which no"),
    ],
)
def test_wrong_imports_in_folders_are_refused(book, capsys, line, expected):
    (book.package / "training").mkdir()
    for name in ("__init__", "loss"):
        (book.package / "training" / f"{name}.py").write_text("")
    default = "#| default_exp training.loop"
    said = refusal(book, capsys, default, f"#| export\n{line}\n\ny = x")
    assert expected in said


def test_a_module_written_by_hand_is_not_overwritten(book, capsys):
    (book.package / "data.py").write_text("x = 1\n")
    said = refusal(book, capsys, "#| default_exp data", "#| export\nx = 2")
    assert "sdbook/data.py is written by hand; chapters/01_attention.ipynb must" in said
    assert (book.package / "data.py").read_text() == "x = 1\n"


def test_one_chapter_alone(book, capsys):
    path = book.write(DEFAULT, "#| export\nx = 1")
    book.write("#| export\nx = 1", name="02_broken")
    assert book.run(path) == 0
    assert (book.package / "attention.py").exists()
    assert book.run() == 1
    assert "02_broken" in capsys.readouterr().err


def test_shapes_are_no_names(book):
    book.write(
        DEFAULT,
        "#| export\nfrom jaxtyping import Float\nfrom torch import Tensor",
        '#| export\ndef f(x: Float[Tensor, "b"], y: Float[Tensor, "b c *h"])'
        ' -> Float[Tensor, "b"]:\n    return x + y.sum()',
    )
    assert book.run() == 0


def test_a_long_list_of_names_fills_its_lines(book):
    names = [f"a_rather_long_name_{n}" for n in range(9)]
    book.write(DEFAULT, "#| export\n" + "\n".join(f"{name} = 1" for name in names))
    assert book.run() == 0
    text = (book.package / "attention.py").read_text()
    lines = re.search(r"__all__ = \[\n(.*?)\n\]\n", text, re.DOTALL)[1].split("\n")
    assert [line.count('"a_rather_long_name_') for line in lines] == [3, 3, 3]
    assert all(len(line) <= 88 for line in lines)


def test_titles_with_quotes(book):
    title = '# The """ and the \\ of a rather long title, ' + "word " * 20
    book.write(DEFAULT, "#| export\nx = 1", title=title)
    assert book.run() == 0
    namespace = {}
    exec((book.package / "attention.py").read_text(), namespace)
    assert namespace["__doc__"].startswith('The """ and the \\ of a rather long')


@pytest.mark.parametrize(
    "line", ["%matplotlib inline", "!ls", "x = %time 1", "files = !ls", "print?"]
)
def test_magics_are_refused(book, capsys, line):
    said = refusal(book, capsys, DEFAULT, f"#| export\nx = 1\n{line}")
    assert "chapters/01_attention.ipynb, cell cell1, line 3" in said
    assert f"`{line}`: a magic" in said


def test_cell_magics_and_get_ipython_are_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, "#| export\n%%time\nx = 1")
    assert "cell cell1, line 2: `%%time`: a magic" in said
    said = refusal(book, capsys, DEFAULT, "#| export\nx = get_ipython()")
    assert "`get_ipython` exists only in a notebook" in said


def test_magics_are_welcome_elsewhere(book):
    book.write(DEFAULT, "%matplotlib inline", "#| export\nx = 5 \\\n  % 3")
    assert book.run() == 0


@pytest.mark.parametrize("before", ["", "# a comment", "import math"])
def test_a_directive_that_is_not_first_is_refused(book, capsys, before):
    said = refusal(book, capsys, DEFAULT, f"{before}\n#| export\nx = 1")
    assert "cell cell1, line 2: `#| export` must be the first line" in said


@pytest.mark.parametrize("line", ["#|export", "# | export", "#| exports", "#| hide"])
def test_unknown_directives_are_refused(book, capsys, line):
    said = refusal(book, capsys, DEFAULT, f"{line}\nx = 1", "#| export\ny = 1")
    assert f"unknown directive `{line}`; write `#| export`" in said


def test_export_before_default_exp_is_refused(book, capsys):
    said = refusal(book, capsys, "#| export\nx = 1", DEFAULT, "#| export\ny = 1")
    assert "cell cell0, line 1: `#| export` comes before `#| default_exp`" in said


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["#| default_exp"], "needs the name of a module"),
        (["#| default_exp Attention.py"], "`Attention.py` is no name for a module"),
        ([DEFAULT], "no cell is exported to it"),
        ([DEFAULT, "#| default_exp other"], "start the cells for the other module"),
        ([f"{DEFAULT}\nx = 1"], "move it to a cell of its own"),
    ],
)
def test_unfit_default_exp_is_refused(book, capsys, cells, expected):
    assert expected in refusal(book, capsys, *cells)


def test_undefined_names_are_refused(book, capsys):
    said = refusal(
        book,
        capsys,
        DEFAULT,
        "#| export\nimport math",
        "helper = 1",
        "#| export\ndef f():\n    return math.pi * helper",
    )
    assert "chapters/01_attention.ipynb, cell cell3, line 3" in said
    assert "Undefined name `helper`; sdbook/attention.py neither defines nor" in said


def test_unused_imports_are_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, "#| export\nimport math\n\nx = 1")
    assert "cell cell1: `math` imported but unused; import it in a cell" in said


def test_star_imports_are_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, "#| export\nfrom math import *\n\nx = pi")
    assert "`from math import *`: a star import; name what you need" in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from .resblocks import x", "a relative import does not work in a notebook"),
        ("import sdbook.resblocks", "write `from sdbook.x import y`"),
        ("from sdbook.attention import x", "the module that it is exported to"),
        ("from sdbook.nowhere import x", "which no chapter writes"),
        ("from sdbook.resblocks import z", "imports `z` from sdbook.resblocks"),
        ("__all__ = ['x']", "`__all__` is written by the export"),
        ("def (", "correct the cell"),
    ],
)
def test_other_faults_are_refused(book, capsys, line, expected):
    (book.package / "resblocks.py").write_text("x = 1\n")
    said = refusal(book, capsys, DEFAULT, f"#| export\n{line}\n\nprint(x, z)")
    assert expected in said


def test_long_lines_are_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, f"#| export\nx = '{'y' * 90}'")
    assert "cell cell1, line 2: Line too long (96 > 88); break the line" in said


def test_a_name_exported_twice_is_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, "#| export\nx = 1", "#| export\nx = 2")
    assert "cell cell2: `x` is already exported to sdbook/attention.py by" in said
    assert "export only the finished form" in said


def test_a_chapter_without_a_title_is_refused(book, capsys):
    said = refusal(book, capsys, DEFAULT, "#| export\nx = 1", title="no heading")
    assert "needs a line `# Title`" in said


def test_a_file_that_is_no_notebook_is_refused(book, capsys):
    book.write(DEFAULT, "#| export\nx = 1").write_text("{")
    assert book.run() == 1
    said = capsys.readouterr().err
    assert "chapters/01_attention.ipynb: not a notebook" in said
    assert "restore it from git" in said


def test_a_missing_file_and_an_empty_book_are_named(book, capsys):
    assert book.run() == 1
    assert "no chapters" in capsys.readouterr().err
    assert book.run(book.root / "chapters" / "09_none.ipynb") == 1
    assert "09_none.ipynb: there is no such file" in capsys.readouterr().err


def test_check_names_what_differs(book, capsys):
    book.write(DEFAULT, "#| export\nx = 1")
    assert book.run("--check") == 1
    said = capsys.readouterr().err
    assert "sdbook/attention.py is missing; run `make export`" in said
    book.run()
    path = book.package / "attention.py"
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert book.run("--check") == 1
    said = capsys.readouterr().err
    assert "change the chapter, not the module" in said
    assert "-x = 2" in said and "+x = 1" in said
    assert "x = 2" in path.read_text()


def test_a_module_without_a_chapter_is_named_but_kept(book, capsys):
    book.write(DEFAULT, "#| export\nx = 1")
    for name in ("__init__.py", "__main__.py", "draft.py"):
        (book.package / name).write_text("x = 1\n")
    assert book.run() == 0
    assert "note: sdbook/draft.py: no chapter writes it" in capsys.readouterr().err
    assert book.run("--check") == 1
    said = capsys.readouterr().err
    assert "error: sdbook/draft.py: no chapter writes it; delete it, or" in said
    assert "__init__" not in said and "__main__" not in said
    assert (book.package / "draft.py").exists()


def test_a_broken_chapter_leaves_its_module_alone(book, capsys):
    book.write(DEFAULT, "#| export\nx = 1")
    book.run()
    book.write(DEFAULT, "#| export\nx = undefined")
    assert book.run() == 1
    assert "x = 1" in (book.package / "attention.py").read_text()


def test_from_the_command_line():
    command = [sys.executable, str(ROOT / "tools" / "book" / "export.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--check" in result.stdout


# The checks of exercises ---------------------------------------------------------


def test_a_check_says_its_finding_in_a_sentence():
    @in_words
    def check(answer):
        if answer > 2:  # pytest adds to the message of an assert
            raise AssertionError(*[f"{answer} is too large"][answer > 8 :])
        return "not yet: answer is 0" if answer == 0 else "right"

    said = [check(answer) for answer in (0, 2, 7, 9)]
    assert said[:2] == ["Not yet: answer is 0.", "Right."]
    assert said[2:] == ["Not yet: 7 is too large.", "Not yet: that is not it."]
    assert check.__name__ == "check"
    with pytest.raises(TypeError):
        check("seven")
