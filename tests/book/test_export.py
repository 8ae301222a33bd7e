"""tools/book/export.py: what it writes, and everything that it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_tool

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


def test_a_long_list_of_names_takes_a_line_each(book):
    names = [f"a_rather_long_name_{n}" for n in range(9)]
    book.write(DEFAULT, "#| export\n" + "\n".join(f"{name} = 1" for name in names))
    assert book.run() == 0
    text = (book.package / "attention.py").read_text()
    assert '__all__ = [\n    "a_rather_long_name_0",\n' in text


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
