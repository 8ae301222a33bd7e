"""tools/book/execute.py: outputs that stay the same, and what it refuses to store."""

import base64
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from helpers import MEASURED, load_tool
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parents[2]
execute = load_tool("execute")

# One cell for each thing that differs from run to run.
RESTLESS = {
    "print": "print('a fact', object())\nobject()",
    "bars": (
        "import sys\nfrom tqdm import tqdm\nfrom tqdm.auto import tqdm as auto\n"
        "for _ in tqdm(range(3)): pass\nfor _ in auto(range(3)): pass\n"
        "print('and a warning', file=sys.stderr)"
    ),
    "path": "import sdbook\nprint(sdbook.__file__)",
    "warning": "import warnings\nwarnings.warn('take care')",
    "widget": "import ipywidgets\nipywidgets.VBox([ipywidgets.Label('x')])",
    "timing": "%time 1 + 1",
    "error": "raise ValueError('what readers see')",
    "picture": (
        "import os, PIL.Image, PIL.PngImagePlugin\n"
        "from IPython.display import Image\n"
        "import io\n"
        "notes = PIL.PngImagePlugin.PngInfo()\n"
        "notes.add_text('when', os.urandom(8).hex())\n"
        "file = io.BytesIO()\n"
        "PIL.Image.new('RGB', (8, 8)).save(file, 'png', pnginfo=notes)\n"
        "Image(data=file.getvalue())"
    ),
}


def write(path, cells, **metadata):
    """A notebook of code cells: {id: source}."""
    notebook = nbformat.v4.new_notebook()
    for id_, source in cells.items():
        cell = nbformat.v4.new_code_cell(source)
        cell.id = id_
        cell.metadata = nbformat.from_dict(metadata.get(id_, {}))
        notebook.cells.append(cell)
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return path


def outputs(path):
    """{id: outputs} of a stored notebook."""
    notebook = nbformat.read(path, as_version=4)
    return {cell.id: cell.outputs for cell in notebook.cells}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A chapter of restless cells, run and stored."""
    path = tmp_path_factory.mktemp("chapters") / "01_restless.ipynb"
    write(
        path,
        RESTLESS,
        error={"tags": ["raises-exception"]},
        print={"execution": {"iopub.status.busy": "2020-01-01"}, "tags": ["x"]},
    )
    assert execute.main([str(path)]) == 0
    return path


def test_a_second_run_changes_nothing(stored, capsys):
    before = stored.read_bytes()
    assert execute.main(["--check", str(stored)]) == 0
    assert "as stored" in capsys.readouterr().out
    assert execute.main([str(stored)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert stored.read_bytes() == before


def test_what_means_something_is_kept(stored):
    kept = outputs(stored)
    assert kept["print"][0].text == "a fact <object object at 0x…>\n"
    assert kept["print"][1].data["text/plain"] == "<object at 0x…>"
    assert [output.text for output in kept["bars"]] == ["and a warning\n"]
    assert kept["warning"][0].text.startswith("cell:2: UserWarning: take care")
    assert kept["error"][0].traceback == ["ValueError: what readers see"]
    assert [output.output_type for output in kept["timing"]] == ["execute_result"]
    cells = json.loads(stored.read_text("utf-8"))["cells"]
    assert [cell["id"] for cell in cells] == list(RESTLESS)
    assert cells[0]["metadata"] == {"tags": ["x"]}
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]


def test_widgets_get_numbers_for_names(stored):
    view = outputs(stored)["widget"][0].data[execute.WIDGET_VIEW]
    assert view["model_id"] == "0" * 32
    metadata = json.loads(stored.read_text("utf-8"))["metadata"]
    state = metadata["widgets"][execute.WIDGET_STATE]["state"]
    assert view["model_id"] in state
    assert sorted(state) == [f"{n:032x}" for n in range(len(state))]


def test_no_path_of_this_machine_is_stored(stored):
    text = stored.read_text("utf-8")
    assert str(ROOT) not in text
    assert str(stored.parent) not in text


def test_paths_and_addresses_in_text():
    text = f"{ROOT}/sdbook/x.py, /opt/lib/site-packages/torch at 0x7fcafe123456"
    assert execute.tidy_text(text) == "sdbook/x.py, site-packages/torch at 0x…"


def test_png_notes_are_stripped_and_pixels_kept():
    picture = Image.effect_noise((16, 16), 50)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", "Matplotlib")
    notes.add_itxt("prompt", "ein roter Stern")
    file = io.BytesIO()
    picture.save(file, "png", pnginfo=notes)
    plain = execute.strip_png(file.getvalue())
    assert b"Matplotlib" not in plain and b"Stern" not in plain
    assert Image.open(io.BytesIO(plain)).tobytes() == picture.tobytes()
    assert execute.strip_png(b"no picture") == b"no picture"


def svg(id_, shape="M 0 0", date="2020"):
    return (
        f'<svg><dc:date>{date}</dc:date><clipPath id="{id_}"/>'
        f'<path d="{shape}" clip-path="url(#{id_})"/></svg>'
    )


def test_svg_ids_follow_from_the_figure():
    one = execute.normalise_svg(svg("p0123456789"))
    assert one == execute.normalise_svg(svg("pabcdef0123", date="2021"))
    other = execute.normalise_svg(svg("p0123456789", shape="M 1 1"))
    first, second = (text.split('id="')[1].split('"')[0] for text in (one, other))
    assert first != second
    assert f"url(#{first})" in one


def test_pictures_inside_html_are_normalised():
    def html(id_):
        data = base64.b64encode(svg(id_).encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}">'

    one = execute.normalise_data("text/html", html("p0123456789"))
    assert one == execute.normalise_data("text/html", html("pabcdef0123"))
    assert one.startswith('<img src="data:image/svg+xml;base64,')


def test_a_failing_cell_is_named_and_nothing_stored(tmp_path, capsys):
    path = write(tmp_path / "01_x.ipynb", {"good": "1", "bad": "1 / 0"})
    before = path.read_bytes()
    assert execute.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "01_x.ipynb: cell bad fails" in said
    assert "ZeroDivisionError: division by zero" in said
    assert path.read_bytes() == before


def test_a_large_output_is_named_and_nothing_stored(tmp_path, capsys):
    path = write(tmp_path / "01_x.ipynb", {"good": "1", "big": "print('x' * 400_000)"})
    before = path.read_bytes()
    assert execute.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "the outputs of cell big take 400 kB, more than 300 kB" in said
    assert "show fewer or smaller pictures" in said
    assert path.read_bytes() == before


def test_random_output_is_found_by_check(tmp_path, capsys):
    cells = {"same": "print(1)", "random": "import random\nprint(random.random())"}
    path = write(tmp_path / "01_x.ipynb", cells)
    assert execute.main([str(path)]) == 0
    assert execute.main(["--check", str(path)]) == 1
    said = capsys.readouterr().err
    assert "running it changes what is stored (cells: random)" in said


def test_a_slow_cell_is_named(tmp_path, capsys):
    cells = {"quick": "1", "slow": "import time\ntime.sleep(60)"}
    path = write(tmp_path / "01_x.ipynb", cells)
    assert execute.main(["--timeout", "2", str(path)]) == 1
    assert "cell slow ran for more than 2 s" in capsys.readouterr().err


CARD = "# A chapter\n\n- **Runs in** about {} on two CPU cores; no GPU is needed."


def test_time_and_memory_are_written_onto_the_card(tmp_path, capsys):
    path = write(tmp_path / "01_x.ipynb", {"big": "held = b'x' * 300_000_000"})
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(CARD.format("a week")))
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    assert execute.main([str(path)]) == 0
    assert "a week" in path.read_text("utf-8"), "nobody asked for it"
    assert execute.main(["--measure", str(path)]) == 0
    card = nbformat.read(path, 4).cells[0].source
    written = execute.ON_THE_CARD.search(card)[0]
    found = re.fullmatch(MEASURED, written)
    assert found and card == CARD.replace("about {}", written)
    assert 0.3 <= float(found["gigabytes"]) < 1 and float(found["time"]) > 0
    assert execute.main(["--measure", str(path)]) == 0
    assert nbformat.read(path, 4).cells[0].source.count("measured") == 1


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(1, "5 s"), (23, "25 s"), (51, "50 s"), (58, "1 min"), (88, "1.5 min")],
)
def test_what_is_measured_is_rounded(seconds, says):
    card = nbformat.v4.new_markdown_cell(CARD.format("a week"))
    notebook = nbformat.v4.new_notebook(cells=[card])
    execute.write_on_card(notebook, seconds, 1_234_000_000)
    assert f"about {says} and 1.2 GB of memory" in card.source


def test_a_card_without_a_line_for_it_is_refused(tmp_path, capsys):
    path = write(tmp_path / "01_x.ipynb", {"one": "1"})
    assert execute.main(["--measure", str(path)]) == 1
    assert "the card has no line for what is measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "there is no such file"),
        ("{", "not a notebook"),
        ('{"cells": [{"cell_type": "code"}]}', "cell number 0 has no id"),
    ],
)
def test_files_that_are_no_chapters(tmp_path, capsys, text, expected):
    path = tmp_path / "01_x.ipynb"
    if text is not None:
        path.write_text(text)
    assert execute.main([str(path)]) == 1
    assert f"01_x.ipynb: {expected}" in capsys.readouterr().err


CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_chapters_are_normal_and_small(path):
    notebook = execute.read(path)
    execute.normalise(notebook)
    execute.check_sizes(notebook)
    assert execute.to_text(notebook) == path.read_text("utf-8"), "run `make execute`"


def test_pictures_of_another_processor_are_the_same():
    """A cosine's last bit is no change; a picture that one can tell apart is."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    def png(array):
        file = io.BytesIO()
        Image.fromarray(array.astype("uint8")).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def svg(text):
        return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"

    grey = np.full((20, 20, 3), 128)
    near, far, other = grey.copy(), grey.copy(), grey + 2
    near[3, 3], far[3, 3] = 130, 140
    assert execute.alike(png(grey), png(near))
    for changed in (far, other, grey[:10]):
        assert not execute.alike(png(grey), png(changed))
    line = svg('<path id="s01234567-0" d="M 1.000000 2.500000"/>')
    assert execute.alike(line, svg('<path id="s89abcdef-0" d="M 1.000001 2.5"/>'))
    assert not execute.alike(line, svg('<path id="s01234567-0" d="M 1.1 2.500000"/>'))
    assert not execute.alike(line, line + " and a word")
    assert not execute.alike(line, png(grey))
