"""The live parts of the pages: `{play}` puts a component of assets/play there.

    :::{play} draw
    :prompt: a red star above a blue house
    :seed: 17

    What stands here without JavaScript: a picture and its caption.
    :::

The model is exported for the browser once for each state of its weights, into
_build/play, and packed into _static/play/pack, twice: as gzip for pages that are
served, and as scripts for pages that are opened as files, which may load nothing else.
Without the packages onnx and onnxscript the pages stay still.
"""

import base64
import functools
import gzip
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from filelock import FileLock
from PIL import Image
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).with_name("export_onnx.py")
MODEL, OUT = ROOT / "data" / "models" / "scenes", ROOT / "_build" / "play"
PLAY = ROOT / "assets" / "play"
RUNTIME = PLAY / "vendor" / "ort-wasm-simd-threaded.wasm"
COMPONENTS = ("draw",)
CELLS = 8  # pictures in the film strip, as in assets/play/draw.js
log = logging.getLogger(__name__)

# The model --------------------------------------------------------------------------


@functools.cache
def fingerprint() -> str:
    """A short name for what would be exported: the model's files and the tools."""
    digest = hashlib.sha256()
    world = [ROOT / "sdbook" / name for name in ("scenes.py", "evaluation.py")]
    for path in [TOOL, RUNTIME, *world, *sorted(MODEL.rglob("*"))]:
        if path.is_file() and path.suffix != ".md":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def exported() -> Path | None:
    """The folder of the exported model, made if there is none; None without onnx."""
    folder = OUT / fingerprint()
    if not importlib.util.find_spec("onnxscript"):
        return None
    OUT.mkdir(parents=True, exist_ok=True)
    with FileLock(OUT / "lock"):  # tests build the book, and ask for the model as well
        if not (folder / "model.json").exists():  # it is written last
            command = [sys.executable, TOOL, "--model", MODEL, "--out", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{TOOL.name} failed:\n{done.stderr[-3000:]}")
        pack(folder)
    return folder


def pack(folder: Path) -> None:
    """Write what a browser loads: each file as gzip, and as a script."""
    out = folder / "pack"
    names = ["model.json", "judge.json", "text.onnx", "unet.onnx", "vae.onnx"]
    files = {name: folder / name for name in names} | {"ort.wasm": RUNTIME}
    if all((out / f"{name}.js").exists() for name in files):
        return
    out.mkdir(exist_ok=True)
    for name, path in files.items():
        packed = gzip.compress(path.read_bytes(), mtime=0)
        (out / f"{name}.gz").write_bytes(packed)
        text = base64.b64encode(packed).decode()
        (out / f"{name}.js").write_text(f'sdbookPlay.keep({{"{name}": "{text}"}})\n')


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes to load} of the packed files, the largest last."""
    found = {path.stem: path.stat().st_size for path in (folder / "pack").glob("*.gz")}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def frames(steps: int) -> list[int]:
    """After which steps the film strip shows a picture, as in assets/play/draw.js."""
    cells = min(CELLS, steps)
    return [int((k + 1) * steps / cells + 0.5) for k in range(cells)]


def film(folder: Path, prompt: str, seed: int, guidance: float, steps: int) -> str:
    """The name of a strip that the package draws: what stands there at first."""
    wish = f"{prompt} {seed} {guidance} {steps}"
    name = f"film-{hashlib.sha256(wish.encode()).hexdigest()[:8]}.png"
    path = folder / "pack" / name
    if not path.exists():
        from sdbook import StableDiffusion

        pipe, pictures = StableDiffusion.from_pretrained(MODEL), []
        wanted = frames(steps)

        def look(i, t, x):
            if i + 1 in wanted:
                pictures.append(pipe.decode(x)[0])

        pipe(
            prompt, seed=seed, guidance_scale=guidance, num_inference_steps=steps,
            progress=False, callback=look,
        )  # fmt: skip
        width, height = pictures[0].size
        strip = Image.new("RGB", (width * len(pictures), height))
        for k, picture in enumerate(pictures):
            strip.paste(picture, (k * width, 0))
        strip.save(path, optimize=True)
    return name


# The world's things as icons --------------------------------------------------------


def outline(part) -> str:
    """A part of a thing as an SVG element: an ellipse's box, or a polygon."""
    if isinstance(part, tuple):
        left, top, right, bottom = part
        middle = f'cx="{(left + right) / 2:.2f}" cy="{(top + bottom) / 2:.2f}"'
        radii = f'rx="{(right - left) / 2:.2f}" ry="{(bottom - top) / 2:.2f}"'
        return f"<ellipse {middle} {radii}"
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in part)
    return f'<polygon points="{points}"'


def icon(name: str, parts: list) -> str:
    """A thing of chapter 4 as SVG; the style sheet knows its shades."""
    shapes = "".join(
        f'{outline(part)} class="{shade}"/>' for shade, part in parts if shade != "hole"
    )
    holes = [outline(part) for shade, part in parts if shade == "hole"]
    if holes:
        mask = '<rect x="-1" y="-1" width="2" height="2" fill="#fff"/>'
        mask += "".join(f'{hole} fill="#000"/>' for hole in holes)
        shapes = (
            f'<mask id="play-{name}">{mask}</mask>'
            f'<g mask="url(#play-{name})">{shapes}</g>'
        )
    return f'<svg viewBox="-1 -1 2 2" aria-hidden="true">{shapes}</svg>'


@functools.cache
def looks() -> dict:
    """The things as icons, the grounds as CSS."""
    from sdbook import scenes

    def css(rgb):
        return f"#{bytes(rgb).hex()}"

    return {
        "icons": {name: icon(name, parts) for name, parts in scenes.SHAPES.items()},
        "grounds": {
            name: f"linear-gradient({css(top)}, {css(bottom)})"
            for name, (top, bottom) in scenes.BACKGROUNDS.items()
        },
    }


# The pages --------------------------------------------------------------------------


class live(nodes.General, nodes.Element):
    """A component, with what stands there without JavaScript inside."""


class Play(SphinxDirective):
    """`{play}`: the name of a component, its options, and the still picture."""

    required_arguments = 1
    has_content = True
    option_spec = {
        "prompt": directives.unchanged_required,
        "seed": directives.nonnegative_int,
        "guidance": float,
        "steps": directives.positive_int,
    }

    def run(self):
        if self.arguments[0] not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise self.error(f"no component {self.arguments[0]!r}; there are {known}")
        for path in (TOOL, Path(__file__), *MODEL.rglob("*.safetensors")):
            self.env.note_dependency(str(path))
        wish = {"prompt": "", "seed": 0, "guidance": 3.0, "steps": 25} | self.options
        node = live(component=self.arguments[0], wish=wish)
        self.state.nested_parse(self.content, self.content_offset, node)
        return [node]


def begin(translator, node):
    """Write the start of a component: what it has to know, then the still picture."""
    folder, wish = exported(), node["wish"]
    if folder is None:
        log.info("onnxscript is not installed: the pages cannot draw")
        translator.body.append("<div>")
        return
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    facts = wish | looks() | {
        "film": film(folder, *wish.values()), "files": sizes(folder),
        "version": fingerprint(), "world": model["world"],
        "picture": model["picture"][1:],
    }  # fmt: skip
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", "<\\/")
    translator.body.append(
        f'<div class="play" data-play="{node["component"]}">'
        f'<script type="application/json" class="play-facts">{text}</script>'
        '<div class="still">'
    )


def end(translator, node):
    translator.body.append("</div>" if exported() is None else "</div></div>")


def add_code(app, pagename, templatename, context, doctree):
    """A page with a component loads the script that starts it."""
    if doctree and exported() and next(doctree.findall(live), None):
        app.add_js_file("play/play.js", loading_method="defer")
        app.add_css_file("play/play.css")


def leave_out(app, config):
    """The runtime as it was published is not for the page, which loads it packed."""
    config.exclude_patterns.append(f"play/vendor/{RUNTIME.name}")


def write_pack(app, exception):
    """Copy what was packed, and put all modules into one script for pages as files."""
    if exception or app.builder.format != "html" or not exported():
        return
    out = Path(app.outdir) / "_static" / "play" / "pack"
    shutil.copytree(exported() / "pack", out, dirs_exist_ok=True)
    paths = [*PLAY.glob("*.js"), *PLAY.glob("vendor/*.mjs")]
    texts = {
        path.relative_to(PLAY).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(paths)
        if path.name != "play.js"
    }
    code = f"sdbookPlay.keep({json.dumps(texts, ensure_ascii=False)})\n"
    (out / "code.js").write_text(code, encoding="utf-8")


def setup(app):
    app.add_directive("play", Play)
    app.add_node(live, html=(begin, end))
    app.connect("config-inited", leave_out)
    app.connect("html-page-context", add_code)
    app.connect("build-finished", write_pack)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
