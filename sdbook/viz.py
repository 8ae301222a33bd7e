"""Pictures on the page

Generated from chapters/A_pictures_on_the_page.ipynb; do not edit.
"""

import base64
import html
import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = [
    "Figure", "to_picture", "show_images", "heatmap", "Palette", "PALETTE", "PAPER",
    "INK", "use_style", "subplots", "LARGEST_SVG", "show_figure", "frame_slider",
]


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _data_url("image/png", buffer.getvalue())


def _data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _img(url, width, alt, crisp=False, hidden=False):
    """One <img>. The class keeps the dark theme from dimming it."""
    look = "max-width: 100%; height: auto"
    look += "; image-rendering: pixelated" * crisp
    look += "; display: none" * hidden
    return (
        f'<img class="dark-light" src="{url}" width="{width}" '
        f'alt="{html.escape(alt)}" style="{look}">'
    )


class Figure:
    """A picture and its caption: HTML on a page, the alt text elsewhere.

    Raises ValueError without an alt text.
    """

    def __init__(self, body, alt, caption=None):
        self.alt = _described(alt)
        caption = html.escape(caption or "", quote=False)
        caption = re.sub(r"`([^`]+)`", r"<code>\1</code>", caption)
        if caption:
            style = "margin-top: .5em"
            caption = f'<figcaption style="{style}">{caption}</figcaption>\n'
        self.html = (
            '<figure class="sdbook" style="margin: 1em 0; text-align: center">'
            f"\n{body}\n{caption}</figure>"
        )

    def _repr_html_(self):
        return self.html

    def __repr__(self):
        return f"[Figure: {self.alt}]"

    def show(self):
        from IPython.display import display

        display(self)


def _described(alt):
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(
            f"alt={alt!r}: expected a sentence that says what the picture "
            "shows, for readers who cannot see it; pass alt='...'"
        )
    return alt.strip()


def to_picture(image):
    """Turn one image into a PIL picture (mode L or RGB).

    Takes a tensor or float array in [-1, 1] (values outside are clipped),
    an array of bytes (uint8, 0 to 255), a mask (bool) or a PIL picture, of
    shape (h, w), (c, h, w) or (h, w, c), where c is 1 or 3. Raises
    ValueError for NaN, for other kinds of numbers and for other shapes.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "L" else image.convert("RGB")
    if hasattr(image, "detach"):  # a tensor, without importing torch
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    array = _channels_last(np.asarray(image))
    if array.dtype == bool:
        array = np.where(array, 1.0, -1.0)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(
                "the image has NaN or infinite values: expected floats in "
                "[-1, 1]; look for an overflow where it was made"
            )
        array = (array.clip(-1, 1).astype(np.float64) + 1) * 127.5
        array = np.round(array).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"an image of {array.dtype}: expected floats in [-1, 1] or uint8 "
            "in [0, 255]; convert it first"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_last(array):
    """(h, w), (c, h, w) or (h, w, c) as (h, w) or (h, w, 3)."""
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ValueError(
            f"an image of shape {tuple(shape)}: expected (h, w), (c, h, w) or "
            "(h, w, c) with c = 1 or 3; pass a batch as the list of its images"
        )
    return array


def _as_list(images):
    """A batch, a list or a single image, as a list of images."""
    single = isinstance(images, Image.Image)
    if single or getattr(images, "ndim", None) in (2, 3):
        images = [images]
    images = list(images)
    if not images:
        raise ValueError("no images: expected at least one, or a batch")
    return images


def _mosaic(pictures, columns, gap=2):
    """Lay pictures out row by row on one transparent canvas."""
    if len(pictures) == 1:
        return pictures[0]
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)
    size = columns * (width + gap) - gap, rows * (height + gap) - gap
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    for n, picture in enumerate(pictures):
        row, column = divmod(n, columns)
        canvas.paste(picture, (column * (width + gap), row * (height + gap)))
    return canvas


def _best_columns(count):
    """Up to five in a row; then as few empty places as possible."""
    if count <= 5:
        return count
    if count > 25:
        return 8
    return min((5, 4, 3), key=lambda columns: -count % columns)


def _best_scale(width, total, widest=680):
    """Enlarge a picture to about 256 pixels, and the row to `widest`."""
    halves = int(2 * min(256 / width, widest / total))
    return halves // 2 if halves >= 4 else max(1, halves / 2)


def show_images(
    images, titles=None, *, alt, caption=None, columns=None, scale=None
):
    """Show images in a grid, small ones enlarged pixel by pixel.

    `images`: one image, a list or a batch, of what `to_picture` takes.
    `titles`: one short text per image, written under it. `alt`: what a
    reader who cannot see it should know (required). `columns` and `scale`
    fit the page unless given. Displays the figure and returns nothing.
    """
    alt = _described(alt)
    pictures = [to_picture(image) for image in _as_list(images)]
    columns = columns or _best_columns(len(pictures))
    if titles is None:
        picture = _mosaic(pictures, columns)
        scale = scale or _best_scale(pictures[0].width, picture.width)
        width = round(picture.width * scale)
        body = _img(_png(picture), width, alt, crisp=scale > 1)
    else:
        titles = [str(title) for title in titles]
        if len(titles) != len(pictures):
            raise ValueError(
                f"{len(titles)} titles for {len(pictures)} images; "
                "pass one title per image"
            )
        width = pictures[0].width
        scale = scale or _best_scale(width, columns * (width + 8))
        body = _titled_grid(pictures, titles, alt, columns, scale)
    Figure(body, alt, caption).show()


def _titled_grid(pictures, titles, alt, columns, scale):
    cells = []
    for picture, title in zip(pictures, titles, strict=True):
        width = round(picture.width * scale)
        cells.append(
            '<div style="min-width: 0">'
            + _img(_png(picture), width, title or alt, scale > 1)
            + '<div aria-hidden="true" style="font-size: .85em; '
            + f'line-height: 1.3">{html.escape(title)}</div></div>'
        )
    widest = round(max(picture.width for picture in pictures) * scale)
    return (
        f'<div role="group" aria-label="{html.escape(alt)}" style="display: '
        f"grid; grid-template-columns: repeat({columns}, "
        f'minmax(0, {widest}px)); gap: .8em .6em; justify-content: center">\n'
        + "\n".join(cells)
        + "\n</div>"
    )


def heatmap(values, limits=None, signed=False):
    """Colour a (h, w) map of numbers; returns (h, w, 3) bytes.

    `limits` are the numbers at the two ends of the colour scale (default:
    the map's own extremes). `signed` puts zero in the middle of the scale.
    """
    from matplotlib import colormaps

    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(
            f"values of shape {values.shape}: expected (h, w); pass one map "
            "at a time"
        )
    if limits is None:
        largest = np.abs(values).max()
        lowest, highest = values.min(), values.max()
        limits = (-largest, largest) if signed else (lowest, highest)
    low, high = limits
    scaled = (values - low) / max(high - low, 1e-12)
    colours = colormaps["PuOr_r" if signed else "cividis"](scaled.clip(0, 1))
    return np.round(colours[:, :, :3] * 255).astype(np.uint8)


class Palette(NamedTuple):
    """Line colours, by name (`PALETTE.blue`) or in order (`PALETTE[0]`).

    Each has a contrast of at least 3:1 on light and dark pages; the first
    five stay apart with any of the three kinds of colour blindness.
    """

    blue: str = "#3565bc"
    orange: str = "#bf7d3a"
    teal: str = "#1c9c8c"
    red: str = "#b9485c"
    purple: str = "#9032e6"
    grey: str = "#7f7a71"


PALETTE = Palette()
PAPER, INK = "#f7f4ed", "#2b2a27"  # the card behind a plot, its text


def use_style():
    """Give matplotlib the book's look: paper, ink, palette, few lines."""
    import matplotlib as mpl

    paper = ("figure.facecolor", "savefig.facecolor", "axes.facecolor")
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    mpl.rcParams.update(dict.fromkeys(paper, PAPER) | dict.fromkeys(ink, INK))
    mpl.rcParams.update(
        {
            "axes.edgecolor": PALETTE.grey,
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "font.size": 10.5,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "svg.fonttype": "path",
            "svg.hashsalt": "sdbook",
        }
    )


def subplots(rows=1, columns=1, width=6.8, height=2.8, **options):
    """A matplotlib figure in the book's style, and its axes; in inches."""
    import matplotlib.pyplot as plt

    use_style()
    return plt.subplots(rows, columns, figsize=(width, height), **options)


LARGEST_SVG = 120_000  # bytes; a drawing with more becomes a PNG


def show_figure(fig, alt, caption=None):
    """Show a matplotlib figure as a drawing, and close it.

    It is embedded as SVG, or as PNG where the SVG would be large, on a card
    that suits light and dark pages.
    """
    alt = _described(alt)
    data, kind = _plot_bytes(fig, "svg"), "image/svg+xml"
    if len(data) > LARGEST_SVG:
        data, kind = _plot_bytes(fig, "png"), "image/png"
    width = round(fig.get_figwidth() * 100)
    Figure(_img(_data_url(kind, data), width, alt), alt, caption).show()


def _plot_bytes(fig, kind):
    """The figure's file, the same bytes every time; closes the figure."""
    import matplotlib.pyplot as plt

    use_style()
    fig.set_facecolor(PAPER)
    dated = ("Date", "Creator") if kind == "svg" else ("Software",)
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, dpi=144, metadata=dict.fromkeys(dated))
    plt.close(fig)  # or the notebook shows it a second time
    return buffer.getvalue()


_MOVE = (
    "const f=this.closest('figure'),p=f.querySelectorAll('img');"
    "p.forEach((e,i)=>{e.style.display=i==this.value?'':'none'});"
    "const t=p[this.value].dataset.label;"
    "f.querySelector('output').value=t;this.setAttribute('aria-valuetext',t)"
)


def frame_slider(
    frames, labels, alt, caption=None, *, name="Step", start=None, scale=None
):
    """Show frames one at a time, chosen with a slider that needs no kernel.

    `frames`: each one image, a list or batch of images (shown as a grid),
    or a matplotlib figure. `labels`: one short text per frame. `name`: what
    the slider moves through. `start`: the frame shown first (default: the
    last one). Drag the handle, or use the arrow keys.
    """
    alt, frames = _described(alt), list(frames)
    labels = [html.escape(str(label)) for label in labels]
    if len(frames) < 2 or len(labels) != len(frames):
        raise ValueError(
            f"{len(frames)} frames and {len(labels)} labels; pass at least "
            "two frames and one label for each"
        )
    start = range(len(frames))[-1 if start is None else start]
    body = []
    for n, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        url, width, crisp = _frame(frame, scale)
        text = f"{alt} ({name}: {html.unescape(label)})"
        img = _img(url, width, text, crisp, hidden=n != start)
        body.append(img.replace("<img", f'<img data-label="{label}"', 1))
    body.append(_slider(name, labels, start))
    Figure("\n".join(body), alt, caption).show()


def _slider(name, labels, start):
    return (
        '<label style="display: block; margin-top: .5em">'
        f'{html.escape(name)} <input type="range" min="0" '
        f'max="{len(labels) - 1}" value="{start}" autocomplete="off" '
        f'aria-valuetext="{labels[start]}" oninput="{_MOVE}" '
        'style="width: min(22em, 60%); vertical-align: middle"> '
        f"<output>{labels[start]}</output></label>"
    )


def _frame(frame, scale):
    """One frame as a data URL, its width on the page, and if it is crisp."""
    if hasattr(frame, "savefig"):
        url = _data_url("image/png", _plot_bytes(frame, "png"))
        return url, round(frame.get_figwidth() * 100), False
    pictures = [to_picture(image) for image in _as_list(frame)]
    picture = _mosaic(pictures, _best_columns(len(pictures)))
    scale = scale or _best_scale(pictures[0].width, picture.width)
    return _png(picture), round(picture.width * scale), scale > 1
