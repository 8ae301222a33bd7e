"""The UNet as a drawing, made from its config and from nothing else.

`draw_u(config)` is the whole U, each block a link to the place that builds it; chapter
3 shows it. `draw_u(config, here="attention")` is a strip of the whole pipeline with one
part in colour, for the top of a chapter. Both are SVG for the inside of a page: ink is
the text's own colour, in the light and in the dark. Needs neither PyTorch nor sdbook.
"""

import html

# Where the blocks of the whole U lead, seen from a chapter.
LINKS = {
    "conv_in": "#unet-shelf",
    "residual": "02_resblocks.html#residual-block",
    "halve": "#unet-down",
    "double": "#unet-up",
    "reader": "#unet-up",
    "bottom": "#unet-middle",
    "attention": "01_attention.html#spatial-transformer",
    "shelf": "#unet-shelf",
    "out": "#unet-whole",
}

# Part of the pipeline: what a screen reader says of the place. In this order.
PARTS = {
    "attention": "attention, in the UNet",
    "resblocks": "residual blocks, in the UNet",
    "unet": "the UNet",
    "data": "the data that it learns from",
    "vae": "the autoencoder, from latents to pixels",
    "clip": "the text encoder",
    "schedulers": "the scheduler, which takes the noise off step by step",
    "training": "training",
    "pipeline": "the whole way from a prompt to a picture",
    "evaluation": "evaluation",
    "finetuning": "fine-tuning",
}

BLUE, ORANGE, PURPLE, GREY = "#3565bc", "#bf7d3a", "#9032e6", "#7f7a71"
# The whole U, in its own units; GAP is between two sizes.
WIDTH, ROW, GAP, BOX, LEFT, INDENT = 440, 28, 12, 118, 30, 13


def draw_u(config, here=None, links=None):
    """An SVG of the U, or with `here` a strip of the pipeline with that part marked.

    `config`: a `UNetConfig`, or what stands in its config.json as a dict. `here`: one
    of `PARTS`. `links`: where blocks of the U (`LINKS`), or the parts of the strip,
    lead. Raises ValueError for another part.
    """
    if here is None:
        return whole_u(config, LINKS if links is None else links)
    if here not in PARTS:
        raise ValueError(f"here={here!r}: expected one of {', '.join(PARTS)}")
    return strip(config, here, links or {})


def rows_of(config):
    """The U from the top: dicts of what is pushed, and of who takes it back.

    Keys: `kind` (conv_in, residual or halve), `level` (of the map's size), `pushed`
    (its channels), `attends`; on the way up `below` (channels from below), `width`
    (what the block gives) and `attends_up`.
    """
    config = config if isinstance(config, dict) else vars(config)
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    last = len(widths) - 1
    rows = [{"kind": "conv_in", "level": 0, "pushed": widths[0], "attends": False}]
    for level, width in enumerate(widths):
        attends = config["down_block_types"][level].startswith("CrossAttn")
        block = {"kind": "residual", "level": level, "pushed": width}
        rows += [block | {"attends": attends} for _ in range(layers)]
        if level < last:
            rows += [block | {"kind": "halve", "level": level + 1, "attends": False}]
    below = widths[-1]
    for row in reversed(rows):
        width = widths[row["level"]]
        way_up = config["up_block_types"][last - row["level"]]
        row |= {"below": below, "width": width}
        row["attends_up"] = way_up.startswith("CrossAttn")
        below = width
    return rows


# The whole U ----------------------------------------------------------------------


def whole_u(config, links):
    rows = rows_of(config)
    values = config if isinstance(config, dict) else vars(config)
    last = rows[-1]["level"]
    top = 38
    y = [top + ROW * i + GAP * row["level"] for i, row in enumerate(rows)]
    y.append(y[-1] + ROW)
    bands, boxes, arrows = [], [], []
    for level in range(last + 1):
        own = [i for i, row in enumerate(rows) if row["level"] == level]
        end = y[own[-1]] + ROW * (2 if level == last else 1)
        side = -(-values["sample_size"] // 2**level)
        bands.append(band(y[own[0]], end, f"{side} × {side}"))
    for i, row in enumerate(rows):
        a = LEFT + INDENT * row["level"]
        b = WIDTH - 4 - INDENT * row["level"] - BOX
        middle = y[i] + ROW / 2
        boxes.append(
            box(a, y[i], BOX, row["kind"], links[row["kind"]], row["attends"], links)
        )
        text = f"{row['below']} + {row['pushed']}"
        boxes.append(box(b, y[i], BOX, text, links["reader"], row["attends_up"], links))
        arrows.append(shelf(a + BOX, b, middle, row["pushed"], links["shelf"]))
        inner = INDENT * (rows[i + 1]["level"] if i + 1 < len(rows) else row["level"])
        down, up = LEFT + inner + 20, WIDTH - 4 - inner - 20
        arrows.append(line(down, y[i] + ROW - 4, down, y[i + 1] + 4))
        arrows.append(line(up, y[i + 1] + 4, up, y[i] + ROW - 4))
        if i + 1 < len(rows) and rows[i + 1]["kind"] == "halve":
            boxes.append(words(up - 7, y[i + 1] - 2, "double", links["double"], "end"))
    edge = LEFT + INDENT * last
    width = rows[-1]["width"]
    text = f"residual, attention, residual: {width}"
    boxes.append(
        box(
            edge, y[-1], WIDTH - 4 + LEFT - 2 * edge, text, links["bottom"], True, links
        )
    )
    ends = line(LEFT + 20, 22, LEFT + 20, top + 4)
    ends += line(WIDTH - 24, top + 4, WIDTH - 24, 22)
    channels = values["in_channels"], values["out_channels"]
    ends += words(LEFT, 15, f"noisy latents, {channels[0]} channels", None)
    ends += words(WIDTH - 4, 15, f"norm, conv_out: {channels[1]}", links["out"], "end")
    label = (
        f"The U, {last + 1} levels, {len(rows)} maps carried across; "
        "each block is a link to where it is built"
    )
    inside = "".join(bands) + "".join(arrows) + "".join(boxes) + ends
    return svg(WIDTH, y[-1] + ROW + 6, inside, label, 580)


def band(y, end, text):
    """The rows of one size, and the size."""
    middle = (y + end) / 2
    return (
        f'<rect x="2" y="{y + 1:g}" width="{WIDTH - 4}" height="{end - y - 2:g}" '
        f'rx="5" fill="{GREY}" fill-opacity="0.13"/>'
        f'<text transform="translate(18 {middle:g}) rotate(-90)" text-anchor="middle" '
        f'font-size="11">{text}</text>'
    )


def box(x, y, width, text, link, attends, links):
    """A block, and the mark of the attention after it."""
    drawn = (
        f'<rect x="{x:g}" y="{y + 4:g}" width="{width:g}" height="{ROW - 8}" rx="4" '
        f'fill="{BLUE}" fill-opacity="0.1" stroke="{BLUE}" stroke-width="1.4"/>'
        f'<text x="{x + 8:g}" y="{y + ROW / 2 + 4:g}">{text}</text>'
    )
    drawn = anchor(link, drawn, text)
    if attends:
        mark = (
            f'<circle cx="{x + width - 13:g}" cy="{y + ROW / 2:g}" r="7.5" '
            f'fill="{PURPLE}"/><text x="{x + width - 13:g}" y="{y + ROW / 2 + 4:g}" '
            'text-anchor="middle" font-size="10" font-weight="700" fill="#fff">A</text>'
        )
        drawn += anchor(links["attention"], mark, "attention")
    return drawn


def shelf(x, end, y, channels, link):
    """One map on its way across."""
    middle = (x + end) / 2
    drawn = (
        f'<path d="M{x:g} {y:g}H{end - 6:g}" stroke="{ORANGE}" stroke-width="1.8"/>'
        f'<path d="M{end - 1:g} {y:g}l-7 -3.5v7z" fill="{ORANGE}"/>'
        f'<text x="{middle:g}" y="{y - 3.5:g}" text-anchor="middle" '
        f'font-size="11">{channels}</text>'
    )
    return anchor(link, drawn, f"{channels} channels, carried across")


def line(x, y, x2, y2):
    """A short arrow, straight down or straight up."""
    way = 1 if y2 > y else -1
    return (
        f'<path d="M{x:g} {y:g}V{y2 - 5 * way:g}" stroke="{BLUE}" stroke-width="1.6"/>'
        f'<path d="M{x:g} {y2:g}l-3.5 {-6 * way:g}h7z" fill="{BLUE}"/>'
    )


def words(x, y, text, link, side="start"):
    drawn = (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{side}" font-size="11">{text}</text>'
    )
    return anchor(link, drawn, text)


def anchor(link, drawn, name):
    if not link:
        return drawn
    href, name = html.escape(link), html.escape(name)
    style = "text-decoration: none"
    return f'<a href="{href}" aria-label="{name}" style="{style}">{drawn}</a>'


def svg(width, height, inside, label, shown, kind="u", role="group"):
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="{role}" '
        f'aria-label="{html.escape(label)}" style="width: 100%; max-width: {shown}px; '
        'height: auto" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="currentColor">{inside}</svg>'
    )


# The strip ------------------------------------------------------------------------


def strip(config, here, links):
    """Prompt, text encoder, UNet and scheduler, autoencoder; below, how it learns."""
    parts = {
        "clip": lit(here == "clip", 30, 26, 62, "words", "to vectors"),
        "schedulers": lit(here == "schedulers", 268, 26, 68, "scheduler", "n steps"),
        "vae": lit(here == "vae", 362, 26, 62, "latents", "to pixels"),
    }
    arrows = "".join(
        f'<path d="M{x} {y}h{length - 5}" stroke="{GREY}" stroke-width="1.5"/>'
        f'<path d="M{x + length} {y}l-6 -3v6z" fill="{GREY}"/>'
        for x, y, length in (
            (8, 44, 22),
            (92, 44, 22),
            (243, 35, 25),
            (336, 44, 26),
            (424, 44, 16),
        )
    ) + (
        f'<path d="M268 53h-20" stroke="{GREY}" stroke-width="1.5"/>'
        f'<path d="M243 53l6 -3v6z" fill="{GREY}"/>'
    )
    frame = ""
    if here == "pipeline":
        frame = (
            f'<rect x="22" y="3" width="410" height="81" rx="7" fill="{ORANGE}" '
            f'fill-opacity="0.14" stroke="{ORANGE}" stroke-width="2"/>'
        )
    below, x = "", 117
    names = {"data": "data", "training": "training", "evaluation": "evaluation",
             "finetuning": "fine-tuning"}  # fmt: skip
    for part, name in names.items():
        size = 6.3 * len(name) + 12
        drawn = pill(part == here, x, 92, size, name)
        below += anchor(links.get(part), drawn, PARTS[part])
        x += size + 10
    parts["unet"] = small_u(config, here)
    boxes = "".join(anchor(links.get(k), v, link_name(k)) for k, v in parts.items())
    inside = frame + arrows + boxes + below
    label = f"You are here: {PARTS[here]}"
    role = "group" if links else "img"
    return svg(444, 114, inside, label, 460, "here", role)


def link_name(part):
    """What a link is called: what is written on it, and what that is."""
    written = {"clip": "words to vectors, ", "vae": "latents to pixels, "}
    written["schedulers"] = "scheduler n steps, "
    return written.get(part, "") + PARTS[part].split(",")[0]


def lit(on, x, y, width, *lines):
    """A box of two short lines, in colour if it is the place."""
    text = " ".join(
        f'<text x="{x + width / 2:g}" y="{y + 15 + 13 * i}" text-anchor="middle" '
        f'font-size="11"{weight(on)}>{line}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="36" rx="5" {paint(on)}/>{text}'
    )


def pill(on, x, y, width, name):
    return (
        f'<rect x="{x:g}" y="{y}" width="{width:g}" height="19" rx="9.5" {paint(on)}/>'
        f'<text x="{x + width / 2:g}" y="{y + 13.5:g}" text-anchor="middle" '
        f'font-size="11"{weight(on)}>{name}</text>'
    )


def paint(on):
    if on:
        return f'fill="{ORANGE}" fill-opacity="0.28" stroke="{ORANGE}" stroke-width="2"'
    return f'fill="none" stroke="{GREY}" stroke-width="1.2"'


def weight(on):
    return ' font-weight="700"' if on else ""


def small_u(config, here):
    """The U without words: bars are blocks, dots are attention, lines the shelf."""
    rows = rows_of(config)
    last = rows[-1]["level"]
    step = 66 / (len(rows) + 1)
    whole = (
        f'<rect x="114" y="7" width="129" height="74" rx="6" {paint(here == "unet")}/>'
    )
    bars, dots, shelves = "", "", ""
    strong = here in ("resblocks", "unet")
    tint = f'fill="{ORANGE if strong else BLUE}" fill-opacity="{1 if strong else 0.55}"'
    mark = here in ("attention", "unet")
    for i, row in enumerate(rows):
        y, a = 11 + step * i, 121 + 8 * row["level"]
        b = 236 - 8 * row["level"] - 30
        high = max(step - 1.2, 1.2)
        if here != "resblocks" or row["kind"] == "residual":
            bars += f'<rect x="{a}" y="{y:.3g}" width="30" height="{high:.3g}" {tint}/>'
        else:
            bars += (
                f'<rect x="{a}" y="{y:.3g}" width="30" height="{high:.3g}" '
                f'fill="{BLUE}" fill-opacity="0.55"/>'
            )
        bars += f'<rect x="{b}" y="{y:.3g}" width="30" height="{high:.3g}" {tint}/>'
        middle = y + high / 2
        shelves += (
            f'<path d="M{a + 30} {middle:.3g}H{b}" stroke="{GREY}" stroke-width="0.8"/>'
        )
        for on, x in ((row["attends"], a + 24), (row["attends_up"], b + 24)):
            if on:
                dots += dot(mark, x, middle, high)
    a, y = 121 + 8 * last, 11 + step * len(rows)
    high = max(step - 1.2, 1.2)
    bars += (
        f'<rect x="{a}" y="{y:.3g}" width="{357 - 2 * a}" height="{high:.3g}" {tint}/>'
    )
    dots += dot(mark, 178.5, y + high / 2, high)
    return whole + shelves + bars + dots


def dot(on, x, y, high):
    r = high * (0.85 if on else 0.5)
    colour = ORANGE if on else PURPLE
    return f'<circle cx="{x:g}" cy="{y:.3g}" r="{r:.2g}" fill="{colour}"/>'
