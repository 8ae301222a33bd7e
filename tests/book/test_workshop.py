"""The workshop: dependencies in step, commands listed, imports cheap and acyclic."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import load_tool

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "sdbook").glob("*.py"))

# The floors of the house: a module imports only from below.
FLOORS = {
    "__init__": 7,
    "__main__": 6,
    "training": 5,
    "finetuning": 5.5,  # on the same floor, but it uses the loop of `training`
    "evaluation": 5,
    "pipeline": 4,
    "unet": 3,
    "vae": 3,
    "clip": 3,
    "schedulers": 2,
    "data": 2.9,
    "scenes": 2.5,
    "images": 2,
    "formats": 2,
    "weights": 2,
    "files": 1,
    "attention": 1,
    "resblocks": 1,
    "viz": 0,
    "notebook": 0,
}


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def ranges():
    """{name: allowed versions} from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {name_of(r): r.specifier for r in map(Requirement, lines)}


def pins():
    """{name: [pinned requirement, ...]} from requirements.txt."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(name_of(requirement), []).append(requirement)
    return found


def conda():
    """{name: allowed versions} from environment.yml, under the names of PyPI."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    lines += environment["dependencies"][-1]["pip"]
    found = {}
    for line in lines:
        if line not in ("pip", "-e ."):
            requirement = Requirement(line)
            name = {"pytorch": "torch"}.get(name_of(requirement), name_of(requirement))
            found[name] = requirement.specifier
    return found


def test_the_three_lists_name_the_same_packages():
    assert set(pins()) == set(ranges())
    assert set(conda()) - {"python"} == set(ranges())


def test_the_ranges_are_the_same_in_both_files():
    assert {k: v for k, v in conda().items() if k != "python"} == ranges()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert conda()["python"] == SpecifierSet(project["requires-python"])


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_package_has_one_pin_for_each_python(version):
    for name, requirements in pins().items():
        valid = [
            requirement
            for requirement in requirements
            if requirement.marker is None
            or requirement.marker.evaluate({"python_version": version})
        ]
        assert len(valid) == 1, f"{name} for Python {version}"
        (pin,) = valid[0].specifier
        assert pin.operator == "==", f"{name}: pin one version"
        assert pin.version in ranges()[name], f"{name}: {pin} is out of range"


def test_the_version_is_written_once():
    import sdbook

    assert re.fullmatch(r"\d+\.\d+\.\d+", sdbook.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]


# Commands ---------------------------------------------------------------------


def make(*arguments, folder=ROOT):
    """Run make; quiet about folders, which it names when another make runs it."""
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_make_help_lists_every_command():
    text = (ROOT / "Makefile").read_text()
    commands = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    said = make("help")
    assert said.returncode == 0, said.stderr
    listed = re.findall(r"^make (\w+) ", said.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(commands)
    for command in ("sample", "test", "book", "export", "execute", "lint", "bench"):
        assert command in listed


def test_make_alone_is_help():
    said = make()
    assert said.stdout.startswith("make sample ")


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    said = make("lint", f"PYTHON={old}", folder=tmp_path)
    assert said.returncode != 0
    assert f"Python 3.10 or newer is needed, and {old} is not" in said.stdout
    assert not (tmp_path / ".venv").exists()


def test_the_workflows_are_yaml_and_call_what_exists():
    for name in ("tests", "book"):
        path = ROOT / ".github" / "workflows" / f"{name}.yml"
        jobs = yaml.safe_load(path.read_text())["jobs"]
        assert all("steps" in job for job in jobs.values())
    folder = ROOT / ".github" / "workflows"
    for name, call in (("tests", ".ci/run"), ("book", "make book")):
        (job,) = yaml.safe_load((folder / f"{name}.yml").read_text())["jobs"].values()
        assert any(call in step.get("run", "") for step in job["steps"])
    uploads = [s for s in job["steps"] if "upload-pages" in s.get("uses", "")]
    assert uploads[0]["with"]["path"] == "_build/html"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


def test_the_readme_names_what_exists():
    from dataclasses import fields
    from inspect import signature

    from sdbook import __main__ as cli
    from sdbook import training

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    chapters = {path.name for path in (ROOT / "chapters").glob("*.ipynb")}
    assert chapters <= set(re.findall(r"chapters/([\w.]+)", text))
    known = {*signature(cli.sample).parameters, "config", "print_config"}
    for kind in ("", "VAE", "CLIP"):
        known |= {f.name for f in fields(getattr(training, f"{kind}TrainingConfig"))}
    makefile = (ROOT / "Makefile").read_text().split("\nsample:")[1].split("\n\n")[0]
    assert set(re.findall(r"--(\w+)", text + makefile)) <= known


def test_bench_prints_its_table(monkeypatch, capsys):
    bench = load_tool("bench")
    monkeypatch.setattr(bench, "import_time", lambda: 0.1)
    monkeypatch.setattr(bench, "shipped_pipeline", lambda: None)
    assert bench.main(["--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert all(w in said for w in ("pictures/s", "training step", "decode", "ratio"))


def test_shapes_are_checked_while_the_tests_run():
    import jaxtyping
    import torch

    from sdbook.resblocks import Downsample

    with pytest.raises(jaxtyping.TypeCheckError):
        Downsample(4)(torch.zeros(4, 8, 8))


# Imports ----------------------------------------------------------------------


def in_a_fresh_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_is_cheap():
    code = (
        "import time, torch; start = time.process_time(); import sdbook; "
        "import sdbook.pipeline; sdbook.StableDiffusion; "
        "print(time.process_time() - start)"
    )
    seconds = min(float(in_a_fresh_python(code)) for _ in range(2))
    assert seconds < 0.3, f"{seconds:.2f} s more than `import torch`"


def test_no_module_imports_what_is_heavy():
    names = [name for name in MODULES if name != "__main__"]
    code = "import sys\n" + "".join(f"import sdbook.{name}\n" for name in names)
    code += (
        "heavy = {'transformers', 'diffusers', 'matplotlib', 'IPython', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert in_a_fresh_python(code) == "[]"


def test_an_unknown_name_is_an_attribute_error():
    import sdbook

    assert "StableDiffusion" in dir(sdbook)
    with pytest.raises(AttributeError, match="'sdbook' has no attribute 'Stable'"):
        _ = sdbook.Stable


def imported(module):
    """The modules of the package that a module imports when it is imported."""
    tree = ast.parse((ROOT / "sdbook" / f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [a.name for a in node.names]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in FLOORS, f"say on which floor sdbook/{module}.py stands"
    for other in imported(module):
        if other in FLOORS:
            assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"


def test_no_imports_go_in_circles():
    below = {module: set(imported(module)) & set(MODULES) for module in MODULES}
    while below:
        free = [module for module, needs in below.items() if not needs]
        assert free, f"in a circle: {sorted(below)}"
        below = {m: needs - set(free) for m, needs in below.items() if m not in free}


@pytest.mark.parametrize("module", MODULES)
def test_only_notebooks_and_the_evaluation_draw(module):
    if module not in ("evaluation", "viz"):
        assert "viz" not in imported(module)


def test_no_star_imports():
    for module in MODULES:
        text = (ROOT / "sdbook" / f"{module}.py").read_text(encoding="utf-8")
        assert "import *" not in text


def test_no_path_of_the_authors_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    assert "README.md" in tracked
    suffixes = {".py", ".ipynb", ".md", ".toml", ".yml", ".yaml", ".json", ".txt"}
    for name in filter(lambda name: Path(name).suffix in suffixes, tracked):
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = re.search(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+)/\w+", text)
        assert not found, f"{name}: {found[0]}"
