"""The workshop: dependencies in step, commands listed, imports cheap and acyclic."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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
PACKAGE = ROOT / "sdbook"


def module_of(path):
    """`training.loop` for sdbook/training/loop.py, `training` for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    inside = len(parts) > 1 and parts[-1] == "__init__"
    return ".".join(parts[:-1] if inside else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(FILES)

# The floors of the house: a module imports only from below. Neighbours on one floor
# that need each other stand on steps between two floors.
FLOORS = {
    "__main__": 6,
    "run.evaluating": 5.9,
    "run.sampling": 5.8,
    "evaluation": 5,
    "finetuning": 5.5,
    "training": 5.3,  # hands on the names of its modules
    "training.unet": 5,
    "training.vae": 5,
    "training.clip": 5,
    "training.validation": 4.8,
    "training.loop": 4.7,
    "training.cache": 4.6,
    "training.loss": 4.5,
    "run": 4.4,
    "run.finetuning": 4.35,
    "run.unet": 4.35,
    "run.plan": 4.3,
    "run.curves": 4.3,
    "run.grading": 4.3,
    "run.trials": 5.6,
    "run.mistakes": 5.6,
    "run.comparing": 5.7,
    "run.examining": 5.8,
    "run.next_steps": 4.3,
    "run.checkpoints": 4.2,
    "run.logs": 4.2,
    "run.tables": 4.2,
    "run.folder": 4.18,
    "run.progress": 4.16,
    "run.configs": 4.15,
    "run.processes": 4.14,
    "run.memory": 4.12,
    "run.settings": 4.1,
    "reports": 4.1,
    "features": 3.5,
    "inputs": 3.5,
    "twins": 2.6,
    "words": 3.2,
    "adapters": 2.4,
    "__init__": 4.1,  # hands on StableDiffusion
    "pipeline": 4,
    "unet": 3,
    "vae": 3,
    "clip": 3,
    "data": 2.9,  # hands on the names of scenes and images
    "scenes": 2.5,
    "images": 2.3,
    "scheduler_files": 2.4,
    "schedulers": 2.3,
    "scheduler_options": 2.2,
    "vocabulary": 2,
    "folders": 2,
    "formats": 2.3,
    "weights": 2,
    "files": 1,
    "tiles": 1,
    "counts": 0,
    "kinds": 0,
    "attention": 1,
    "resblocks": 1,
    "viz": 0,
    "notebook": 0,
}

# A base class with one child says *is a*, and why.
ONE_CHILD = {
    "attention.Attention": "whole by itself; its child adds a norm and a residual",
    "scenes.Scenes": "whole by itself; its child asks for more things in a picture",
}


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def requirements():
    """The lines of pyproject.toml that name a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(line for extra in extras for line in extra)]


def ranges():
    """{name: allowed versions} from pyproject.toml."""
    return {name_of(r): r.specifier for r in map(Requirement, requirements())}


def pins():
    """{name: [pinned requirement, ...]} from requirements.txt."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(name_of(requirement), []).append(requirement)
    return found


# What conda-forge calls otherwise; and what it has in place of jsonargparse's extra.
CONDA = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
CONDA |= {"playwright-python": "playwright"}
SIGNATURES = {"docstring-parser", "typeshed-client"}


def conda():
    """{name: allowed versions} from environment.yml, under the names of PyPI."""
    *lines, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-e ."]}
    found = {name_of(r): r.specifier for r in map(Requirement, lines)}
    assert SIGNATURES | {"pip"} <= set(found)
    others = {name: found[name] for name in set(found) - SIGNATURES - {"pip"}}
    return {CONDA.get(name, name): allowed for name, allowed in others.items()}


def test_conda_has_its_own_names():
    text = (ROOT / "environment.yml").read_text()
    assert all(re.search(rf"^  - {name}[>\n]", text, re.M) for name in CONDA)
    extras = [r.extras for r in map(Requirement, requirements()) if r.extras]
    assert extras == [{"signatures"}], "what an extra needs, conda is told by name"


def test_the_floors_are_what_the_oldest_versions_job_installs():
    lines = (ROOT / "requirements-floors.txt").read_text().splitlines()
    floors = [line for line in lines if line and not line.startswith("#")]
    oldest = [re.sub(r">=([^,]+).*", r"==\1", line) for line in requirements()]
    assert floors == oldest
    job = workflow("tests")["jobs"]["test"]
    assert job["env"]["REQUIREMENTS"] == "${{ matrix.requirements }}"
    (oldest,) = job["strategy"]["matrix"]["include"]
    assert oldest == {"python": "3.10", "requirements": "requirements-floors.txt"}
    said = make("-n", ".venv/.installed", "REQUIREMENTS=requirements-floors.txt", "-B")
    assert "--requirement requirements-floors.txt" in said.stdout


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


# The newest major versions: older ones run on a Node.js that GitHub has taken away.
ACTIONS = {"checkout": 7, "setup-python": 7, "upload-pages-artifact": 5}
ACTIONS |= {"deploy-pages": 5}


def workflow(name):
    path = ROOT / ".github" / "workflows" / f"{name}.yml"
    return yaml.safe_load(path.read_text())


def test_the_workflows_call_what_exists():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
    for name, call in (
        ("tests", ".ci/run"), ("versions", ".ci/run"), ("book", "make book"),
    ):  # fmt: skip
        (job,) = workflow(name)["jobs"].values()
        assert any(call in step.get("run", "") for step in job["steps"])
    uploads = [s for s in job["steps"] if "upload-pages" in s.get("uses", "")]
    assert uploads[0]["with"]["path"] == "_build/html"


def test_the_workflows_may_do_little_and_are_up_to_date():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        flow = workflow(path.stem)
        allowed = {"contents": "read"}
        if path.stem == "book":
            allowed |= {"pages": "write", "id-token": "write"}
        assert flow["permissions"] == allowed, path.name
        for job in flow["jobs"].values():
            for step in job["steps"]:
                if "uses" in step:
                    action, version = step["uses"].removeprefix("actions/").split("@")
                    assert version == f"v{ACTIONS[action]}", step["uses"]


def test_the_readme_names_what_exists():
    from dataclasses import fields

    from sdbook.__main__ import COMMANDS, find

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    chapters = {path.name for path in (ROOT / "chapters").glob("*.ipynb")}
    assert chapters <= set(re.findall(r"chapters/([\w.]+)", text))
    known = {"config", "print_config"}
    for _, settings, _ in COMMANDS.values():
        known |= {field.name for field in fields(find(settings))}
    makefile = (ROOT / "Makefile").read_text().split("\nsample:")[1].split("\n\n")[0]
    assert set(re.findall(r"--(\w+)", text + makefile)) <= known


@pytest.mark.slow
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
    names = [name for name in MODULES if name not in ("__init__", "__main__")]
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
    """The modules of the package that a module imports, inside functions, too."""
    path = FILES[module]
    folder = list(path.parent.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n.removeprefix("sdbook.") for n in names if "sdbook." in n)
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = node.module.split(".") if node.module else []
        if node.level:
            parts = folder[: len(folder) - node.level + 1] + parts
        elif parts[0] == "sdbook":
            parts = parts[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*parts, alias.name])
            if whole in FILES:
                yield whole
            elif alias.name != "__version__":
                yield ".".join(parts) or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in FLOORS, f"say on which floor sdbook/{module}.py stands"
    for other in imported(module):
        assert other in FLOORS, f"{module} imports {other}, which is not there"
        assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"


def test_the_drawing_of_the_house_shows_every_module_on_its_floor():
    tree = ElementTree.parse(ROOT / "assets" / "house.svg").getroot()
    names, said = tree.findall(".//{*}g[@font-weight]/{*}text"), {}
    labels = [t for t in tree.findall(".//{*}text") if t.get("text-anchor") == "end"]
    for line in names:
        above = [one for one in labels if int(one.get("y")) < int(line.get("y"))]
        floor = int(max(above, key=lambda one: int(one.get("y"))).text[-1])
        for name in "".join(line.itertext()).split(" · "):
            said[name] = floor, line
    tops = {module.split(".")[0] for module in MODULES}
    tops -= {"__init__", "__main__", "data"}  # the roof, and who hands on names
    assert {name: floor for name, (floor, _) in said.items()} == {
        name: int(FLOORS[name]) for name in tops
    }
    for name in tops - {"training"}:
        generated = name in FILES and "Generated from" in FILES[name].read_text()
        slanted = [tspan.text for tspan in said[name][1].findall("{*}tspan")]
        assert (name in slanted) == (not generated), name


@pytest.mark.parametrize("module", MODULES)
def test_only_notebooks_and_the_evaluation_draw(module):
    if module not in ("evaluation", "run.curves", "viz"):
        assert not {"viz", "notebook"} & set(imported(module))


def test_no_star_imports():
    for path in FILES.values():
        assert "import *" not in path.read_text(encoding="utf-8")


# Classes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes():
    """Every class of the package, by its full name; errors and warnings apart."""
    found = {}
    for module in sorted(set(MODULES) - {"__init__", "__main__"}):
        for thing in vars(importlib.import_module(f"sdbook.{module}")).values():
            if isinstance(thing, type) and is_ours(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


def is_ours(cls):
    return cls.__module__.startswith("sdbook.") and not issubclass(cls, BaseException)


def ladder(cls):
    """A class and its longest row of bases that are ours, too."""
    rows = [ladder(base) for base in cls.__bases__ if is_ours(base)]
    return [cls.__name__, *max(rows, key=len, default=[])]


def test_no_class_is_deeper_than_three(classes):
    deep = [row for row in map(ladder, classes.values()) if len(row) > 3]
    assert not deep, "; ".join(" < ".join(row) for row in deep)


def test_a_base_with_one_child_has_a_reason(classes):
    """A base that exists only to split a page does not: use `@add_to`."""
    children = {}
    for name, cls in classes.items():
        for base in filter(is_ours, cls.__bases__):
            full = f"{base.__module__}.{base.__qualname__}".removeprefix("sdbook.")
            children.setdefault(full, []).append(name)
    single = {base for base, names in children.items() if len(names) == 1}
    assert single == set(ONE_CHILD), {base: children[base] for base in single}


def test_nobody_asks_what_kind_of_dataset_it_is():
    """All datasets do the same things (sdbook.images.CaptionedDataset)."""
    kinds = r"\b(\w*Scenes|Captioned\w+)\b"
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asks = "isinstance", "hasattr", "getattr"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in asks:
                assert not re.search(kinds, ast.unparse(node)), (path, node.lineno)


# Paths ------------------------------------------------------------------------


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
