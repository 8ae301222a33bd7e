"""The map on the front page: how the parts fit, each a link to its chapter.

`{parts-map}` draws it twice, wide and narrow, as SVG inside the page; the style sheet
shows the one that fits. Ink and paper are the page's own, in the light and in the dark.
"""

import html
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]

# Chapter: what stands in its box.
NAMES = {
    0: ("The whole picture", "start here"),
    1: ("Attention", ""),
    2: ("Residual blocks", ""),
    3: ("UNet", "what here is noise?"),
    4: ("Data", "a world to learn"),
    5: ("Autoencoder", "latents ⇄ pixels"),
    6: ("Text encoder", "words to vectors"),
    7: ("Noise, and back", ""),
    8: ("Training", "learn the weights"),
    9: ("From a prompt to a picture", ""),
    10: ("Faster samplers", ""),
    11: ("How good is it", "a judge that counts"),
    12: ("Fine-tuning", "your own things"),
    13: ("Train on a GPU", "for larger pictures"),
    14: ("On a GPU", "Stable Diffusion 1.5"),
}
LATER = (4, 8, 11, 12, 13, 14)  # what comes before and after the drawing itself

# Boxes as (x, y, width, height), arrows as paths, words as (x, y, text).
WIDE = {
    "size": (760, 372),
    "boxes": {
        0: (1, 4, 190, 44),
        9: (1, 66, 758, 194),
        6: (72, 132, 136, 70),
        3: (238, 92, 170, 150),
        1: (248, 142, 150, 40),
        2: (248, 190, 150, 40),
        7: (440, 112, 162, 50),
        10: (440, 172, 162, 50),
        5: (630, 132, 122, 70),
    },
    "arrows": [
        "M58 167H68",
        "M208 167H234",
        "M408 144H436",
        "M440 192H412",
        "M602 167H626",
        "M380 316V264",
    ],
    "words": [(32, 163, "“a red"), (32, 180, "star”"), (420, 294, "weights")],
    "later": (1, 320, 758, 48, 3),
}
NARROW = {
    "size": (350, 590),
    "boxes": {
        0: (1, 4, 180, 44),
        9: (1, 62, 348, 380),
        6: (100, 104, 150, 50),
        3: (6, 184, 160, 166),
        1: (13, 242, 146, 44),
        2: (13, 296, 146, 44),
        7: (194, 198, 150, 64),
        10: (194, 274, 150, 64),
        5: (100, 384, 150, 50),
    },
    "arrows": [
        "M70 129H96",
        "M132 154V180",
        "M166 230H190",
        "M194 306H170",
        "M222 338V380",
        "M175 478V446",
    ],
    "words": [(38, 126, "“a red"), (38, 143, "star”"), (222, 467, "weights")],
    "later": (1, 484, 348, 48, 2),
}


def placed(layout, existing):
    """The boxes of one layout; what comes later is spread over rows."""
    boxes = {n: box for n, box in layout["boxes"].items() if n in existing}
    later = [n for n in LATER if n in existing]
    x, y, width, height, columns = layout["later"]
    columns = min(columns, len(later)) or 1
    each = (width - 12 * (columns - 1)) / columns
    for i, n in enumerate(later):
        row, column = divmod(i, columns)
        boxes[n] = (x + column * (each + 12), y + row * (height + 10), each, height)
    return boxes


def drawn_box(number, box, target):
    """A box with a number, a name and a few words, which links to its chapter."""
    x, y, width, height = box
    name, words = (html.escape(text) for text in NAMES[number])
    small = number in (1, 2)
    frame = number in (3, 9)
    middle = y + (24 if frame else height / 2 + (-4 if words else 5))
    left = x + (8 if small else 10)
    text = f'<text x="{left}" y="{middle}"><tspan class="number">{number}</tspan>'
    text += f'<tspan dx="6" class="name">{name}</tspan></text>'
    if words:
        text += f'<text class="small" x="{left}" y="{middle + 18}">{words}</text>'
    kind = "frame" if number == 9 else "inner" if small else "box"
    return (
        f'<a href="{target}" class="{kind}">'
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7"/>'
        f"{text}</a>"
    )


def drawn(kind, layout, targets):
    """One SVG."""
    width, height = layout["size"]
    boxes = placed(layout, targets)
    height = max([height] + [int(y + h + 4) for _, y, _, h in boxes.values()])
    order = [9, 3] + [n for n in sorted(boxes) if n not in (9, 3)]
    links = [drawn_box(n, boxes[n], targets[n]) for n in order if n in boxes]
    arrows = "".join(
        f'<path d="{d}" marker-end="url(#map-{kind})"/>' for d in layout["arrows"]
    )
    words = "".join(
        f'<text class="small" x="{x}" y="{y}" text-anchor="middle">{text}</text>'
        for x, y, text in layout["words"]
    )
    return (
        f'<svg class="parts-map {kind}" viewBox="0 0 {width} {height}" role="group" '
        'aria-label="Map of the parts, each a link to its chapter">'
        f'<defs><marker id="map-{kind}" viewBox="0 0 8 8" refX="6" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z"/>'
        f"</marker></defs>{''.join(links)}"
        f'<g class="arrows">{arrows}</g>{words}</svg>'
    )


class PartsMap(SphinxDirective):
    """Both forms of the map."""

    def run(self):
        self.env.note_dependency(__file__)
        targets = {}
        for path in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"):
            uri = self.env.app.builder.get_relative_uri(
                self.env.docname, f"chapters/{path.stem}"
            )
            targets[int(path.stem[:2])] = uri
        both = [drawn("wide", WIDE, targets), drawn("narrow", NARROW, targets)]
        return [nodes.raw("", "\n".join(both), format="html")]


def setup(app):
    app.add_directive("parts-map", PartsMap)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
