"""Give every chapter the cell that gets it ready in Colab.

    python tools/book/colab.py          write the cell into the chapters
    python tools/book/colab.py --check  change nothing, name the chapters without it

The cell comes right after the card. It asks whether it is in Colab, and does nothing
anywhere else; the pages leave it out. The repository's address comes from _config.yml,
the oldest versions of what chapters import from pyproject.toml.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
ID = "colab"
BESIDES = ("diffusers", "torchmetrics", "peft", "datasets")  # what chapters import

# What Colab has of these stays as it is: another torch or numpy would need a restart,
# and may not fit its GPU. What the package needs newer, pip brings up: transformers,
# above all. The folder must not be called sdbook, or `import sdbook`
# would find that instead of the package. After a restart everything is still there
# but the working directory.
CELL = """\
# Gets the chapter ready in Colab; anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    import importlib.util
    import os
    import subprocess
    from importlib.metadata import version

    folder = "/content/the-book"
    if not os.path.isdir(folder):
        url = "{url}"
        subprocess.run(["git", "clone", "-q", "--depth=1", url, folder], check=True)
    if importlib.util.find_spec("sdbook") is None:
        kept = [f"{{n}}=={{version(n)}}" for n in ("torch", "torchvision", "numpy")]
        with open("/content/kept.txt", "w") as file:
            file.write("\\n".join(kept))
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        pip += ["--constraint", "/content/kept.txt", folder]
        pip += {besides}
        subprocess.run(pip, check=True)
        importlib.invalidate_caches()
        if "transformers" in sys.modules:
            print("Restart the session (menu Runtime), then run this cell again.")
    os.chdir(f"{{folder}}/chapters")"""


def address() -> str:
    """The repository, as _config.yml has it."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return config["repository"]["url"]


def besides() -> list[str]:
    """What the cell installs besides the package, no older than the tests allow."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"].values()
    lines = [line for extra in extras for line in extra]
    return [line for name in BESIDES for line in lines if line.startswith(name)]


def cell() -> dict:
    """The cell as a notebook stores it: number 0, so that the others keep theirs."""
    listed = json.dumps(besides())
    source = CELL.format(url=address(), besides=listed).splitlines(keepends=True)
    return {
        "cell_type": "code",
        "execution_count": 0,
        "id": ID,
        "metadata": {"tags": ["remove-cell"]},
        "outputs": [],
        "source": source,
    }


def with_cell(notebook: dict) -> dict:
    """The notebook with the cell after the card."""
    cells = [c for c in notebook["cells"] if c.get("id") != ID]
    return notebook | {"cells": [*cells[:1], cell(), *cells[1:]]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The cell for Colab, in every chapter."
    )
    parser.add_argument("chapters", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    missing = 0
    for path in options.chapters or sorted((ROOT / "chapters").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        new = json.dumps(with_cell(json.loads(text)), indent=1, ensure_ascii=False)
        if new + "\n" == text:
            continue
        missing += 1
        if options.check:
            print(f"{path.name}: run `make export`, for Colab's cell", file=sys.stderr)
        else:
            path.write_text(new + "\n", encoding="utf-8")
            print(f"{path.name}: Colab's cell written")
    return 1 if options.check and missing else 0


if __name__ == "__main__":
    sys.exit(main())
