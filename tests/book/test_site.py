"""What the pages are made from: one address, Colab's cell, references, cross-links."""

import ast
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml
from helpers import load_tool
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
colab = load_tool("colab")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def markdown(path):
    """The prose of a chapter or page."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, 4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def everything(path):
    """The prose and the code of a chapter, or a page."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells)


PROSE = [*CHAPTERS, *sorted((ROOT / "pages").glob("*.md")), ROOT / "index.md"]


# The repository's address -----------------------------------------------------


def test_the_repository_has_one_address():
    url = colab.address()
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url)
    name = url.removeprefix("https://github.com/")
    known = rf"https://github\.com/{name}|research\.google\.com/github/{name}/blob/main"
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PROSE]:
        for found in re.findall(r"[^\s\"(]*from-scratch[^\s\")]*", everything(path)):
            if "/" in found:
                assert re.search(rf"({known})(?=$|/chapters/)", found), (path, found)


def test_every_chapter_can_be_opened_in_colab_from_the_readme():
    name = colab.address().removeprefix("https://github.com/")
    start = f"https://colab.research.google.com/github/{name}/blob/main/chapters/"
    rows = re.findall(
        r"^\| \[.*\]\(chapters/(\S+)\).*\[open\]\((\S+)\)", read("README.md"), re.M
    )
    assert dict(rows) == {path.name: start + path.name for path in CHAPTERS}
    assert start + CHAPTERS[0].name in read("index.md")


def test_the_readme_says_which_modules_a_chapter_writes():
    rows = r"^\| \[.*\]\(chapters/(\S+)\) \|.*\| (.*) \| \[open\]"
    for chapter, listed in re.findall(rows, read("README.md"), re.M):
        written = load_tool("export").read_chapter(ROOT / "chapters" / chapter).modules
        assert sorted(re.findall(r"`(.*?)`", listed)) == sorted(written), chapter


# Colab ------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_has_colabs_cell_after_its_card(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["cells"][1] == colab.cell(), "run `make export`"
    assert [c["id"] for c in notebook["cells"]].count(colab.ID) == 1


def test_a_new_chapter_gets_colabs_cell(tmp_path, capsys):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("# New")]
    notebook.cells += [nbformat.v4.new_code_cell("1")]
    path = tmp_path / "15_new.ipynb"
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    assert colab.main(["--check", str(path)]) == 1
    assert "run `make export`" in capsys.readouterr().err
    assert colab.main([str(path)]) == 0
    assert colab.main(["--check", str(path)]) == 0
    nbformat.validate(nbformat.read(path, 4))
    assert nbformat.read(path, 4).cells[1].id == colab.ID


@pytest.fixture
def run_cell(tmp_path, monkeypatch):
    """The cell, run with a folder of ours as `/content`; what it starts is noted."""
    source = "".join(colab.cell()["source"])
    source = source.replace("/content", tmp_path.as_posix())
    started = []

    def start(command, check):
        assert check, "a failure must be seen"
        started.append(command)
        if command[0] == "git":
            Path(command[-1], "chapters").mkdir(parents=True)

    def run():
        monkeypatch.chdir(tmp_path)  # where Colab begins, and begins again
        exec(compile(source, "cell", "exec"), {"__name__": "__main__"})
        return started

    monkeypatch.setattr(subprocess, "run", start)
    return run


def pretend(monkeypatch, installed):
    """Be in Colab, where sdbook is installed or not yet."""
    import importlib.util

    find = importlib.util.find_spec
    there = {"sdbook": object() if installed else None}
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: there[n] if n in there else find(n, *a),
    )


def test_outside_colab_the_cell_does_nothing(run_cell, tmp_path):
    assert run_cell() == []
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())


def test_in_colab_the_cell_fetches_and_installs(run_cell, tmp_path, monkeypatch):
    pretend(monkeypatch, installed=False)
    git, pip = run_cell()
    folder = tmp_path / "the-book"
    assert git[:2] == ["git", "clone"] and git[-2:] == [colab.address(), str(folder)]
    assert folder.name != "sdbook"
    assert pip[:4] == [sys.executable, "-m", "pip", "install"]
    assert str(folder) in pip and not {"-U", "--upgrade"} & set(pip)
    kept = Path(pip[pip.index("--constraint") + 1]).read_text().split("\n")
    assert kept == [f"{n}=={version(n)}" for n in ("torch", "torchvision", "numpy")]
    assert Path.cwd() == folder / "chapters"


def test_in_colab_the_cell_brings_up_what_is_too_old(run_cell, monkeypatch, capsys):
    """Colab's transformers is of series 4, which writes no tokenizer that we read."""
    pretend(monkeypatch, installed=False)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    _, pip = run_cell()
    lines = load_toml("pyproject.toml")["project"]["dependencies"]
    floors = {r.name: r.specifier for r in map(Requirement, lines)}
    assert "5.0.0" in floors["transformers"] and "4.57.6" not in floors["transformers"]
    beside = {r.name: r.specifier for r in map(Requirement, pip[-4:])}
    assert set(beside) == set(colab.BESIDES) and "0.35.2" not in beside["diffusers"]
    assert "ipywidgets" not in floors, "another version than Colab's breaks its sliders"
    assert "Restart the session" in capsys.readouterr().out


def test_in_colab_the_cell_works_after_a_restart(run_cell, tmp_path, monkeypatch):
    pretend(monkeypatch, installed=False)
    assert len(run_cell()) == 2
    pretend(monkeypatch, installed=True)
    assert len(run_cell()) == 2, "nothing is fetched or installed a second time"
    assert Path.cwd() == tmp_path / "the-book" / "chapters"


def test_chapters_import_nothing_that_colabs_cell_does_not_install():
    project = load_toml("pyproject.toml")["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    names |= {*colab.BESIDES, "IPython", "PIL", "yaml", "sdbook"}
    names |= {"ipywidgets"}  # Colab's own; chapter 9 does without it, too
    names |= {"draw_u"}  # tools/book is beside chapters/, in Colab as well
    names |= sys.stdlib_module_names
    for path in CHAPTERS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != "code" or cell.source.lstrip().startswith("%%"):
                continue
            for node in ast.walk(ast.parse(cell.source)):
                given = (
                    [a.name for a in node.names] if isinstance(node, ast.Import) else []
                )
                given += [node.module] if isinstance(node, ast.ImportFrom) else []
                for module in given:
                    top = module.split(".")[0]
                    assert top in names or top == "google", (path.stem, cell.id, module)


def test_a_chapter_without_ipywidgets_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as if it were not there
    (cell,) = (
        cell
        for path in CHAPTERS
        for cell in nbformat.read(path, 4).cells
        if "import" in cell.source and "ipywidgets" in cell.source
    )
    names = {"prompts": ["a star"], "pipe": None, "quiet": {}}
    exec(cell.source + "\nplay()", names)
    assert "pip install ipywidgets" in capsys.readouterr().out


def load_toml(name):
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(read(name))


# References, words, links -----------------------------------------------------


def test_every_reference_is_cited_and_has_an_identifier():
    entries = dict(re.findall(r"@\w+\{([^,]+),(.*?)\n\}", read("references.bib"), re.S))
    cited = set()
    for path in PROSE:
        for keys in re.findall(r"\{cite:?\w*\}`([^`]+)`", markdown(path)):
            cited |= {key.strip() for key in keys.split(",")}
    assert cited == set(entries)
    for key, fields in entries.items():
        year = re.search(r"year\s*=\s*\{(\d{4})\}", fields)[1]
        assert re.search(rf"[a-z]+{year}[a-z]+$", key), f"{key}, but the year is {year}"
        urls = re.findall(r"url\s*=\s*\{([^}]*)\}", fields)
        dois = re.findall(r"doi\s*=\s*\{([^}]*)\}", fields)
        assert urls + dois, f"{key} has no identifier"
        for url in urls:
            if "arxiv" in url:
                assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", url), key
        assert all(re.fullmatch(r"10\.\d{4,9}/\S+", doi) for doi in dois), key


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_links_to_elsewhere_are_well_formed(path):
    for link in re.findall(
        r"\]\((https?:[^)\s]*)\)|<(https?:[^>\s]*)>", markdown(path)
    ):
        parts = urlsplit("".join(link))
        assert parts.scheme == "https" or parts.hostname == "localhost", link
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.hostname), link
        assert not re.search(r"[\s\"'{}|\\^`]", "".join(link)), link


def test_a_word_links_to_the_glossary_once_in_a_chapter():
    glossary = read("pages/glossary.md")
    terms = set(re.findall(r"^(\S.*)\n  \S", glossary, re.M))
    used = Counter()
    for path in CHAPTERS:
        found = re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", markdown(path))
        assert set(found) <= terms and len(found) == len(set(found)), path.stem
        used.update(found)
    assert len(used) >= 10
    assert sorted(terms, key=str.lower) == re.findall(r"^(\S.*)\n  \S", glossary, re.M)


# The package's reference --------------------------------------------------------


def test_every_module_has_its_page_of_the_reference():
    api = load_tool("sphinx_api")
    pages = {api.page_of(name) for name in api.modules() if api.public_names(name)}
    found = [path.relative_to(ROOT) for path in (ROOT / "pages/api").rglob("*.md")]
    assert {path.with_suffix("").as_posix() for path in found} == pages
    assert pages == set(re.findall(r"pages/api/[\w/]+", read("_toc.yml")))
    listed = re.findall(r"\((api/.*?)\)", read("pages/api.md"))
    assert pages == {f"pages/{page}" for page in listed}


def test_methods_of_later_cells_are_in_the_reference(monkeypatch):
    api = load_tool("sphinx_api")
    text = "class A:\n    def f(self):\n        'one'\n\n    def forward(self): ..."
    tree = ast.parse(text + "\n\n    def g(self): ...\n\n\ndef f(): ...")
    monkeypatch.setattr(api, "module", lambda name: (tree, []))
    for cached in (api.public_names, api.entries):
        cached.cache_clear()
    assert api.entries("invented.module") == ("A", "f", "A.f", "A.forward")
    cell = "@add_to(A)\ndef f(self): ...\n\n\n@add_to(A)\ndef g(self): ..."
    assert api.defined_in(cell, "invented.module") == ["A.f", "A"]
    assert api.page_of("training.loop") == "pages/api/training/loop"


def test_signatures_are_written_as_in_the_book():
    api = load_tool("sphinx_api")
    node = ast.parse(
        'def f(self, x: Float[Tensor, "b c"], *, n=1, **rest: int) -> Tensor: ...'
    ).body[0]
    assert api.signature(node) == (
        'f(x: Float[Tensor, "b c"], *, n=1, **rest: int) -> Tensor'
    )
    node = ast.parse("class A(B):\n    x: int = 1\n    y: ClassVar[int] = 2").body[0]
    assert api.signature(node) == "class A(B)\n\nA(x: int = 1)"
    long = ast.parse(f"def f({', '.join(f'argument{i}' for i in range(9))}): ...").body[
        0
    ]
    assert api.signature(long).count("\n") == 10


# Survival -----------------------------------------------------------------------

def as_pinned():
    """Whether what draws and counts here is of the very versions that we pin."""
    from packaging.requirements import Requirement

    for line in read("requirements.txt").splitlines():
        if re.match(r"(torch|numpy|matplotlib|pillow)==", line):
            pin = Requirement(line)
            here = pin.marker is None or pin.marker.evaluate()
            if here and version(pin.name).split("+")[0] not in pin.specifier:
                return False
    return sys.version_info >= (3, 11)


@pytest.mark.slow
def test_running_a_chapter_again_changes_nothing(monkeypatch):
    """Nothing at all with the pinned versions; else nothing but how plots are drawn."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as it was stored: with two
    execute = load_tool("execute")
    path = ROOT / "chapters" / "C_folders_and_shards.ipynb"
    stored, again = execute.read(path), execute.read(path)
    execute.run(again, path.parent, timeout=300)
    execute.normalise(again)
    if not as_pinned():
        for notebook in (stored, again):
            for cell in notebook.cells:
                for output in cell.get("outputs", []):
                    output.get("data", {}).pop("text/html", None)
    assert execute.changed_cells(stored, again) == []


def test_a_deprecation_in_our_own_code_is_an_error():
    code = "import warnings\nwarnings.warn('old', DeprecationWarning)"
    with pytest.raises(DeprecationWarning):
        exec(code, {"__name__": "sdbook.invented"})
    with pytest.warns(DeprecationWarning):
        exec(code, {"__name__": "somebody_else"})


def test_the_newest_versions_are_tried_every_week():
    workflow = yaml.safe_load(read(".github/workflows/versions.yml"))
    assert "schedule" in workflow[True]  # YAML takes the word `on` for a truth
    steps = workflow["jobs"]["test"]["steps"]
    assert any("--editable" in step.get("run", "") for step in steps)
    assert "requirements.txt" not in str(steps)


def test_every_cell_has_an_id_of_its_own():
    for path in CHAPTERS:
        ids = [cell["id"] for cell in json.loads(path.read_text("utf-8"))["cells"]]
        assert len(ids) == len(set(ids)), path.stem
        assert not [i for i in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", i)], (
            path
        )


def test_chapters_are_measured(tmp_path, capsys):
    measure, result = load_tool("measure_pages"), tmp_path / "pages.json"
    assert measure.main(["--json", str(result)]) == 0
    rows = json.loads(result.read_text())
    assert list(rows) == [path.stem for path in CHAPTERS]
    assert "01_attention" in capsys.readouterr().out
    row = rows["01_attention"]
    assert row["words"] > 1000 and row["cells"] > row["exports"] > 5
    with pytest.raises(SystemExit):
        measure.main(["--pages", "--root", str(tmp_path / "unbuilt")])


def test_contributing_names_what_exists():
    text = read("CONTRIBUTING.md")
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|tools|pages|chapters)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    assert len(text.split()) < 700, "one page"
    assert os.path.exists(ROOT / "pages" / "architecture.md")
