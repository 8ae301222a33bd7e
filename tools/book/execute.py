"""Run the chapters from top to bottom and keep their outputs.

    tools/book/execute.py                              all chapters
    tools/book/execute.py chapters/01_attention.ipynb  one of them
    tools/book/execute.py --check                      keep nothing, name the
                                                       cells that would change
    tools/book/execute.py --measure chapters/01_…      and write onto the card how
                                                       long it ran, in how much memory

Each chapter runs in a fresh kernel. What differs from run to run without meaning
anything is taken out of the outputs (execution counts, progress bars, addresses,
random ids, dates, paths), so that a second run changes nothing. A chapter that
fails, or that shows more than 300 kB in one cell, is left as it was.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import struct
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LARGEST_OUTPUT = 300_000  # bytes in one cell: a page with ten of them still loads
# What editors and runners leave in the cells.
LEFT_BEHIND = {"execution", "ExecuteTime", "papermill", "collapsed", "scrolled"}
LEFT_BEHIND |= {"trusted", "vscode", "colab", "outputId"}

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"

BAR = re.compile(r"\d+%\|.*\|.*\[.*\]|\d+\s?\w* \[\d\d:\d\d.*\]")
# What %time, %%time and %timeit say, each on a line of its own.
TIMING = re.compile(r"\s*(CPU times: |Wall time: |.* per loop \(mean)")
KERNEL_FILE = re.compile(r"(?<![\w./~-])[\w./~-]*ipykernel_\d+/\d+\.py")
SITE_PACKAGES = re.compile(r"(?<![\w./~-])[\w./~-]*/site-packages/")
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")
SVG_ID = re.compile(r'\bid="([A-Za-z]+[0-9a-f]{10})"')
DATA_URI = re.compile(r"data:image/(png|svg\+xml);base64,([A-Za-z0-9+/=]+)")
# What the card says of time and memory; --measure writes it, and nobody else.
ON_THE_CARD = re.compile(r"(?<=- \*\*Runs in\*\* ).*?(?= on two CPU cores)", re.DOTALL)
PEAK_MEMORY = re.compile(r"VmHWM:\s*(\d+) kB")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"tIME")


class Refused(Exception):
    """A chapter that is not stored, and why."""


# Running ----------------------------------------------------------------------


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook whose cells all have ids."""
    try:
        text = path.read_text(encoding="utf-8")
        for number, cell in enumerate(json.loads(text)["cells"]):
            if not cell.get("id"):
                raise Refused(f"cell number {number} has no id; give it one")
        return nbformat.reads(text, as_version=4)
    except FileNotFoundError:
        raise Refused("there is no such file") from None
    except (ValueError, KeyError, TypeError, nbformat.ValidationError) as error:
        reason = str(error).split("\n")[0]
        raise Refused(
            f"not a notebook ({reason}); restore it from git or save it in Jupyter"
        ) from None


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: int) -> int | None:
    """Run all cells in a fresh kernel, in the chapter's folder, as readers do.

    Returns how many bytes of memory the kernel had at most, where Linux says so.
    """
    peak = None

    def look(**_) -> None:
        nonlocal peak
        status = Path(f"/proc/{client.km.provisioner.pid}/status")
        found = PEAK_MEMORY.search(status.read_text()) if status.exists() else None
        peak = int(found[1]) * 1024 if found else peak

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("widgets", None)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=look,
    )
    try:
        client.execute(env=kernel_environment())
    except CellExecutionError as error:
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        raise Refused(f"cell {failed(notebook)} fails:\n\n{traceback}\n") from None
    except CellTimeoutError:
        cell = failed(notebook)
        raise Refused(
            f"cell {cell} ran for more than {timeout} s; make it smaller, or give "
            "it longer with --timeout"
        ) from None
    except DeadKernelError:
        cell = failed(notebook)
        raise Refused(f"the kernel died in cell {cell}; is it out of memory?") from None
    return peak


def failed(notebook: nbformat.NotebookNode) -> str:
    """The id of the cell that ran last."""
    ran = [cell for cell in notebook.cells if cell.get("execution_count")]
    return ran[-1].id if ran else notebook.cells[0].id


def kernel_environment() -> dict[str, str]:
    """Settings without which numbers or their order would differ between runs."""
    cores = min(2, os.cpu_count() or 1)
    defaults = {
        "OMP_NUM_THREADS": str(cores),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the cores to others
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return defaults | dict(os.environ)


def write_on_card(notebook: nbformat.NotebookNode, seconds: float, peak: int) -> None:
    """Say on the card how long the chapter ran, and in how much memory.

    Rounded, so that the next run on the same machine mostly says the same.
    """
    card = notebook.cells[0]
    if not ON_THE_CARD.search(card.source):
        raise Refused(
            "the card has no line for what is measured; write "
            "`- **Runs in** … on two CPU cores` into its first cell"
        )
    five = max(1, round(seconds / 5))
    time_ = f"{5 * five} s" if five < 12 else f"{round(seconds / 30) / 2:g} min"
    facts = f"about {time_} and {peak / 1e9:.1f} GB of memory"
    marked = f"<!-- measured -->{facts}<!-- end -->"
    card.source = ON_THE_CARD.sub(marked, card.source, count=1)


# Normalising ------------------------------------------------------------------


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Take out of a notebook what differs from run to run."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
        | {k: v for k, v in notebook.metadata.items() if k in ("mystnb", "widgets")}
    )
    number = 0
    for cell in notebook.cells:
        kept = {k: v for k, v in cell.metadata.items() if k not in LEFT_BEHIND}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            # Without a number, nbval takes a cell for one never run. Colab's cell
            # (tools/book/colab.py) does nothing here, and is not counted.
            number += cell.id != "colab"
            cell.execution_count = number
            cell.outputs = normalise_outputs(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
    name_widgets(notebook)


def normalise_outputs(outputs: list) -> list:
    """The outputs of one cell, without progress bars and accidents."""
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            previous = kept[-1] if kept else None
            if previous and previous.get("name") == output.name:
                previous.text += output.text
            else:
                kept.append(output)
        elif output.output_type == "error":
            # The last line says it all, and names no path of this machine.
            output.traceback = [tidy_text(f"{output.ename}: {output.evalue}")]
            output.evalue = tidy_text(output.evalue)
            kept.append(output)
        elif not is_bar(output.data):
            output.metadata = nbformat.from_dict(dict(sorted(output.metadata.items())))
            for kind, value in output.data.items():
                output.data[kind] = normalise_data(kind, value)
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = tidy_stream(output.text)
            if output.name == "stderr":  # where a bar ends with an empty line
                output.text = output.text.lstrip("\n")
    return [output for output in kept if output.get("text") != ""]


def is_bar(data: dict) -> bool:
    """Whether an output is a progress bar of tqdm."""
    text = data.get("text/plain", "")
    return bool(BAR.search(text)) and (WIDGET_VIEW in data or len(data) == 1)


def tidy_stream(text: str) -> str:
    """Printed text as a terminal would leave it, without bars and timings."""
    lines = [line.rstrip("\r").split("\r")[-1] for line in text.split("\n")]
    kept = [line for line in lines if not BAR.search(line) and not TIMING.match(line)]
    return tidy_text("\n".join(kept)) if "".join(kept).strip() else ""


def tidy_text(text: str) -> str:
    """Text without addresses and without the paths of this machine."""
    text = KERNEL_FILE.sub("cell", text)
    text = SITE_PACKAGES.sub("site-packages/", text)
    text = text.replace(str(ROOT) + os.sep, "").replace(str(ROOT), ".")
    if len(Path.home().parts) > 1:
        text = text.replace(str(Path.home()) + os.sep, "~" + os.sep)
    return ADDRESS.sub("0x…", text)


def normalise_data(kind: str, value):
    """One representation of a displayed object."""
    if kind == "image/png":
        plain = strip_png(base64.b64decode(value))
        return base64.b64encode(plain).decode() + "\n"
    if kind == "image/svg+xml":
        return normalise_svg(value)
    if isinstance(value, str):
        embedded = DATA_URI.sub(normalise_uri, value)
        # Addresses and paths stand in text; base64 could look like either.
        return embedded if DATA_URI.search(value) else tidy_text(embedded)
    return value


def normalise_uri(match: re.Match) -> str:
    """A picture that is embedded in HTML."""
    kind, data = match[1], base64.b64decode(match[2])
    plain = strip_png(data) if kind == "png" else normalise_svg(data.decode()).encode()
    return f"data:image/{kind};base64,{base64.b64encode(plain).decode()}"


def strip_png(data: bytes) -> bytes:
    """A PNG without the chunks that hold dates and the names of programs."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if data[position + 4 : position + 8] not in PNG_NOTES:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def normalise_svg(text: str) -> str:
    """An SVG without date, whose ids follow from what it shows."""
    text = re.sub(r"\s*<dc:date>.*?</dc:date>", "", text, flags=re.DOTALL)
    ids = list(dict.fromkeys(SVG_ID.findall(text)))
    for number, id_ in enumerate(ids):
        text = re.sub(rf"\b{id_}\b", f"\0{number}\0", text)
    # Ids must differ between the figures of a page, so the figure is their seed.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return re.sub(r"\0(\d+)\0", lambda match: f"s{digest}-{match[1]}", text)


def name_widgets(notebook: nbformat.NotebookNode) -> None:
    """Number the widgets that are shown; forget the others."""
    widgets = notebook.metadata.pop("widgets", {}).get(WIDGET_STATE, {})
    states = widgets.get("state", {})
    shown = [
        output.data[WIDGET_VIEW]["model_id"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if WIDGET_VIEW in output.get("data", {})
    ]
    order: dict[str, str] = {}

    def visit(id_: str) -> None:
        if id_ in states and id_ not in order:
            order[id_] = f"{len(order):032x}"
            for child in re.findall(r"IPY_MODEL_(\w+)", json.dumps(states[id_])):
                visit(child)

    for id_ in shown:
        visit(id_)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(WIDGET_VIEW)
            if view:
                view["model_id"] = order.get(view["model_id"], view["model_id"])
    if order:
        text = json.dumps({id_: states[id_] for id_ in order})
        for old, new in order.items():
            text = text.replace(old, new)
        state = dict(widgets) | {"state": json.loads(text)}
        notebook.metadata["widgets"] = nbformat.from_dict({WIDGET_STATE: state})


# Storing ----------------------------------------------------------------------


def output_size(cell) -> int:
    """How many bytes a cell's outputs take in the file."""
    outputs = cell.get("outputs", [])
    return len(json.dumps(outputs, ensure_ascii=False).encode()) if outputs else 0


def check_sizes(notebook: nbformat.NotebookNode) -> None:
    """Refuse outputs that would make a page slow to load."""
    for cell in notebook.cells:
        size = output_size(cell)
        if size > LARGEST_OUTPUT:
            raise Refused(
                f"the outputs of cell {cell.id} take {size / 1000:.0f} kB, more than "
                f"{LARGEST_OUTPUT // 1000} kB; show fewer or smaller pictures"
            )


def to_text(notebook: nbformat.NotebookNode) -> str:
    """The notebook as it is stored."""
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def write(path: Path, text: str) -> bool:
    """Write a file in one step; say whether it changed."""
    if path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return True


def changed_cells(before: nbformat.NotebookNode, after: nbformat.NotebookNode) -> list:
    """The ids of the cells whose stored form changed, to the eye."""
    return [
        new.id
        for old, new in zip(before.cells, after.cells, strict=True)
        if not alike(json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True))
    ]


def alike(one: str, other: str) -> bool:
    """Whether texts are equal, their pictures up to the rounding of another processor.

    A PNG may differ by 3 of 255 in a hundredth of its values, a number in an SVG by a
    hundredth of a point.
    """
    if one == other:
        return True
    if DATA_URI.sub("", one) != DATA_URI.sub("", other):
        return False
    pairs = zip(DATA_URI.findall(one), DATA_URI.findall(other), strict=True)
    look = {"png": alike_png, "svg+xml": alike_svg}
    return all(
        kind == other_kind and (here == there or look[kind](here, there))
        for (kind, here), (other_kind, there) in pairs
    )


def alike_png(one: str, other: str) -> bool:
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in (one, other)]
    here, there = (np.asarray(image.convert("RGBA"), dtype=int) for image in images)
    if here.shape != there.shape:
        return False
    apart = np.abs(here - there)
    return apart.max() <= 3 and (apart > 0).mean() <= 0.01


def alike_svg(one: str, other: str) -> bool:
    here, there = (
        re.split(r"(-?\d+\.\d+)", re.sub(r"s[0-9a-f]{8}-", "s-", text))
        for text in (base64.b64decode(text).decode() for text in (one, other))
    )
    if here[::2] != there[::2]:
        return False
    return all(abs(float(a) - float(b)) < 0.01 for a, b in zip(here[1::2], there[1::2]))


def execute(path: Path, timeout: int, check: bool, measure: bool = False) -> str:
    """Run one chapter, store it, and say in a line what happened."""
    before, notebook = read(path), read(path)
    start = time.perf_counter()
    peak = run(notebook, path.resolve().parent, timeout)
    seconds = time.perf_counter() - start
    if measure and peak is None:
        raise Refused("the kernel's memory can be measured on Linux only")
    if measure:
        write_on_card(notebook, seconds, peak)
    normalise(notebook)
    for old, new in zip(before.cells, notebook.cells, strict=True):
        outputs = [json.dumps(cell.get("outputs")) for cell in (old, new)]
        if old.get("outputs") and alike(*outputs):
            new.outputs = old.outputs  # as another processor drew them
    check_sizes(notebook)
    text = to_text(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    size = sum(output_size(cell) for cell in code) / 1000
    facts = f"{seconds:.0f} s, {len(code)} cells, {size:.0f} kB of outputs"
    facts += f", {peak / 1e9:.1f} GB of memory" if peak else ""
    if not check:
        return f"{facts}, {'stored' if write(path, text) else 'nothing changed'}"
    if path.read_text(encoding="utf-8") != text:
        cells = ", ".join(changed_cells(before, notebook)) or "none, but the file"
        raise Refused(
            f"running it changes what is stored (cells: {cells}); run `make execute`, "
            "and if it changes again, print only what is the same in every run"
        )
    return f"{facts}, as stored"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Run the chapters from top to bottom and keep their outputs."
    )
    parser.add_argument("chapters", nargs="*", type=Path, help="default: all of them")
    parser.add_argument(
        "--check", action="store_true", help="store nothing, fail if anything changes"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="write seconds and memory onto the card; on an idle machine",
    )
    parser.add_argument(
        "--timeout", type=int, default=600, help="seconds for one cell (600)"
    )
    options = parser.parse_args(arguments)
    paths = options.chapters or sorted((ROOT / "chapters").glob("*.ipynb"))
    if not paths:
        print(f"{ROOT / 'chapters'}: no chapters (*.ipynb)", file=sys.stderr)
        return 1
    failures = 0
    how = options.timeout, options.check, options.measure
    for path in paths:
        try:
            print(f"{path.name}: {execute(path, *how)}")
        except Refused as refused:
            print(f"error: {path.name}: {refused}", file=sys.stderr)
            failures += 1
        sys.stdout.flush()
    if failures:
        print(f"{failures} of {len(paths)} chapters not stored", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
