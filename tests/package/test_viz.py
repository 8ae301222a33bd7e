"""The tools for pictures: exact bytes, described figures, legible colours."""

import base64
import html as html_module
import io
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sdbook.viz import (
    INK,
    LARGEST_SVG,
    PALETTE,
    PAPER,
    Figure,
    frame_slider,
    heatmap,
    show_figure,
    show_images,
    subplots,
    to_picture,
)


@pytest.fixture
def shown(monkeypatch):
    """The figures that a call displayed."""
    figures = []
    monkeypatch.setattr("IPython.display.display", figures.append)
    return figures


def tags(figure, name="img"):
    """The tags of one kind in a figure, as dictionaries of attributes."""
    found = re.findall(rf"<{name} [^>]*>", figure.html)
    pairs = [re.findall(r'([\w-]+)="([^"]*)"', tag) for tag in found]
    return [{key: html_module.unescape(value) for key, value in p} for p in pairs]


def pixels(tag):
    data = tag["src"].split(",", 1)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# to_picture -------------------------------------------------------------------


def test_every_byte_survives_the_way_to_minus_one_and_one_and_back():
    values = torch.arange(256).reshape(16, 16)
    picture = to_picture(values / 127.5 - 1)
    assert np.array_equal(np.asarray(picture), values.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype):
    picture = to_picture(torch.tensor([[-1.0, 0.0, 1.0]], dtype=dtype))
    assert np.asarray(picture).tolist() == [[0, 128, 255]]


def test_layouts_agree():
    image = noise(3, 5, 7)
    expected = np.asarray(to_picture(image))
    assert expected.shape == (5, 7, 3)
    last = image.permute(1, 2, 0)
    for same in (image.numpy(), last, last.numpy(), expected, to_picture(image)):
        assert np.array_equal(np.asarray(to_picture(same)), expected)
    grey = noise(1, 5, 7)
    assert np.array_equal(to_picture(grey), to_picture(grey[0]))
    assert to_picture(grey).mode == "L"


def test_clips_and_takes_masks_and_gradients():
    picture = to_picture(torch.tensor([[-9.0, 9.0]], requires_grad=True))
    assert np.asarray(picture).tolist() == [[0, 255]]
    mask = to_picture(torch.tensor([[False, True]]))
    assert np.asarray(mask).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    "image, says",
    [
        (torch.zeros(2, 3, 4, 4), "(2, 3, 4, 4)"),
        (torch.zeros(4, 8, 8), "c = 1 or 3"),
        (torch.full((3, 4, 4), float("nan")), "NaN"),
        (torch.full((3, 4, 4), float("inf")), "infinite"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
    ],
)
def test_refuses_what_is_no_picture(image, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        to_picture(image)


# Figures ----------------------------------------------------------------------


@pytest.mark.parametrize("alt", ["", "   ", None])
def test_nothing_is_shown_without_a_description(alt, shown):
    fig, _ = subplots()
    for show in (
        lambda: show_images(noise(3, 4, 4), alt=alt),
        lambda: show_images(noise(3, 4, 4), ["title"], alt=alt),
        lambda: frame_slider(noise(2, 3, 4, 4), "ab", alt),
        lambda: show_figure(fig, alt),
    ):
        with pytest.raises(ValueError, match="alt=.*pass alt="):
            show()
    assert shown == []


def test_a_figure_is_html_on_a_page_and_words_in_a_terminal():
    figure = Figure("<hr>", alt="a line", caption="`code` & <tag>")
    assert "<code>code</code> &amp; &lt;tag&gt;" in figure._repr_html_()
    assert repr(figure) == "[Figure: a line]"


def test_a_grid_is_one_png_that_the_browser_enlarges(shown):
    images = noise(6, 3, 8, 10)
    show_images(images, alt='six "noisy" squares')
    (tag,) = tags(shown[0])
    assert tag["alt"] == 'six "noisy" squares'
    assert "dark-light" in tag["class"] and "pixelated" in tag["style"]
    picture = pixels(tag)
    assert picture.size == (3 * 10 + 2 * 2, 2 * 8 + 2)
    assert int(tag["width"]) % picture.width == 0
    corner = np.asarray(picture)[10:18, 12:22, :3]
    assert np.array_equal(corner, np.asarray(to_picture(images[4])))


def test_titles_are_text_one_for_each_image(shown):
    show_images(list(noise(2, 3, 8, 8)), titles=["<a>", ""], alt="two squares")
    assert [tag["alt"] for tag in tags(shown[0])] == ["<a>", "two squares"]
    assert "&lt;a&gt;</div>" in shown[0].html
    with pytest.raises(ValueError, match="3 titles for 2 images"):
        show_images(noise(2, 3, 8, 8), titles="abc", alt="two")


def test_one_image_needs_no_list_and_none_is_an_error(shown):
    show_images(to_picture(noise(3, 4, 4)), alt="one")
    show_images(noise(4, 4), alt="one")
    assert [len(tags(figure)) for figure in shown] == [1, 1]
    with pytest.raises(ValueError, match="at least one"):
        show_images([], alt="none")


def test_large_pictures_are_not_enlarged_and_fit_the_page(shown):
    show_images(noise(3, 300, 700), alt="large")
    (tag,) = tags(shown[0])
    assert tag["width"] == "700" and "max-width: 100%" in tag["style"]
    assert "pixelated" not in tag["style"]


def test_five_scenes_in_a_row_are_enlarged_by_one_and_a_half(shown):
    show_images(noise(5, 3, 64, 64), list("abcde"), alt="five")
    assert {tag["width"] for tag in tags(shown[0])} == {"96"}
    show_images(noise(3, 3, 64, 64), list("abc"), alt="three")
    assert {tag["width"] for tag in tags(shown[1])} == {"192"}


def test_a_plot_is_the_same_bytes_every_time(shown):
    for _ in range(2):
        fig, ax = subplots(columns=1)
        ax.plot([0, 1, 2], [0, 1, 4], label="squares")
        ax.legend()
        show_figure(fig, "a curve", "It rises.")
    assert shown[0].html == shown[1].html
    (tag,) = tags(shown[0])
    assert tag["src"].startswith("data:image/svg+xml;base64,")
    assert "dark-light" in tag["class"]
    svg = base64.b64decode(tag["src"].split(",")[1]).decode()
    assert PAPER in svg and "<dc:date>" not in svg


def test_a_shown_plot_is_closed_and_a_heavy_one_becomes_png(shown):
    import matplotlib.pyplot as plt

    plt.close("all")
    fig, ax = subplots()
    ax.scatter(*noise(2, 4000))
    show_figure(fig, "many dots")
    assert plt.get_fignums() == []
    assert tags(shown[0])[0]["src"].startswith("data:image/png;base64,")
    assert len(tags(shown[0])[0]["src"]) < LARGEST_SVG


# The slider -------------------------------------------------------------------


def test_a_slider_shows_one_frame_and_names_it(shown):
    frame_slider(noise(3, 3, 8, 8), [900, "<500>", 1], "a square", name="Timestep")
    images = tags(shown[0])
    assert ["none" in tag["style"] for tag in images] == [True, True, False]
    assert images[1]["data-label"] == "<500>"
    assert images[1]["alt"] == "a square (Timestep: <500>)"
    (handle,) = tags(shown[0], "input")
    assert handle["type"] == "range" and handle["max"] == "2"
    assert handle["value"] == "2" and handle["aria-valuetext"] == "1"
    assert "<script" not in shown[0].html and "http" not in shown[0].html


def test_a_slider_takes_grids_plots_and_a_start(shown):
    def plot():
        fig, ax = subplots()
        ax.plot([0, 1])
        return fig

    frame_slider([noise(4, 3, 8, 8)] * 2, "ab", "grids", start=0)
    frame_slider([plot(), plot()], "ab", "plots")
    assert "none" not in tags(shown[0])[0]["style"]
    assert pixels(tags(shown[0])[0]).size == (4 * 8 + 3 * 2, 8)
    assert tags(shown[1])[1]["width"] == "680"


@pytest.mark.parametrize("labels", ["a", "abc", ""])
def test_a_slider_needs_a_label_for_each_of_two_frames(labels, shown):
    with pytest.raises(ValueError, match=f"2 frames and {len(labels)} labels"):
        frame_slider(noise(2, 3, 8, 8), labels, "a square")


# Colours ----------------------------------------------------------------------


def test_heatmap_scales():
    grey = heatmap(torch.tensor([[0.0, 1.0, 2.0]])).astype(float).mean(-1)[0]
    assert grey[0] < grey[1] < grey[2]
    signed = heatmap(np.array([[-1.0, 0.0, 0.5]]), signed=True).astype(int)
    assert signed[0, 1].min() > 240  # zero is white
    assert heatmap(np.ones((2, 2))).shape == (2, 2, 3)  # a flat map divides by no 0
    same = heatmap(np.array([[0.0, 1.0]]), limits=(0, 2))
    assert np.array_equal(same[0, 1], heatmap(np.array([[0.0, 1.0, 2.0]]))[0, 1])
    with pytest.raises(ValueError, match="one map"):
        heatmap(torch.zeros(2, 3, 3))


def linear_light(colour):
    v = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    light = [linear_light(c) @ [0.2126, 0.7152, 0.0722] for c in (first, second)]
    return (max(light) + 0.05) / (min(light) + 0.05)


DARK_PAGE, LIGHT_PAGE = "#1b1c1e", "#fdfcf8"  # as in assets/book.css


def test_lines_and_text_are_legible():
    for colour in PALETTE:
        assert contrast(colour, PAPER) >= 3
        assert contrast(colour, LIGHT_PAGE) >= 3
        assert contrast(colour, DARK_PAGE) >= 3
    assert contrast(INK, PAPER) >= 7


# What a colour looks like to a dichromat, in linear light (Machado et al. 2009).
SIGHT = {
    "all cones": np.eye(3),
    "no long": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no medium": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no short": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(light):
    """CIE L*a*b*, where distances are about what an eye sees."""
    to_xyz = [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ]
    xyz = np.array(to_xyz) @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_line_colours_stay_apart(sight):
    seen = {
        name: lab(np.array(SIGHT[sight]) @ linear_light(colour))
        for name, colour in PALETTE._asdict().items()
        if name != "grey"
    }
    for (first, a), (second, b) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(a - b) > 18, f"{first} and {second} look alike"


def test_importing_viz_is_cheap():
    import subprocess
    import sys

    heavy = "{'torch', 'matplotlib', 'IPython'}"
    code = f"import sys, sdbook.viz; print({heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
