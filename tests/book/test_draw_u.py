"""The drawing of the U says what the UNet is."""

from dataclasses import asdict
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from helpers import ROOT, load_tool

from sdbook.unet import UNet, UNetConfig

drawing = load_tool("draw_u")
OURS = dict(
    block_out_channels=(48, 96, 128),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=16,
)


@pytest.mark.parametrize("config", [UNetConfig(), UNetConfig(**OURS)])
def test_rows_are_the_layers(config):
    with torch.device("meta"):
        unet = UNet(config)
    rows = drawing.rows_of(config)
    assert rows == drawing.rows_of(asdict(config))
    readers = [r for block in unet.up_blocks for r in block.resnets][::-1]
    reads = [reader.norm1.num_channels for reader in readers]
    assert [row["below"] + row["pushed"] for row in rows] == reads
    assert [row["width"] for row in rows] == [r.conv2.out_channels for r in readers]
    ups = [len(block.attentions) > 0 for b in unet.up_blocks for block in [b] * (
        config.layers_per_block + 1)]  # fmt: skip
    assert [row["attends_up"] for row in rows] == ups[::-1]
    downs = [bool(block.attentions) for block in unet.down_blocks]
    residual = [row for row in rows if row["kind"] == "residual"]
    assert [row["attends"] for row in residual] == [
        attends for attends in downs for _ in range(config.layers_per_block)
    ]


def test_svg_is_sound():
    config = UNetConfig()
    for here in (None, *drawing.PARTS):
        svg = drawing.draw_u(config, here)
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg" and root.get("aria-label")
    linked = drawing.draw_u(config, "vae", links={"vae": "05.html", "data": "04.html"})
    root = ElementTree.fromstring(linked)
    assert root.get("role") == "group"
    links = {a.get("href"): a.get("aria-label") for a in root.iter("a")}
    assert links["04.html"] == drawing.PARTS["data"]
    assert links["05.html"] == "latents to pixels, the autoencoder"
    whole = drawing.draw_u(config)
    assert whole.count("carried across") == 12 + 1  # the label says it, too
    assert whole.count('aria-label="attention"') == 6 + 9 + 1
    with pytest.raises(ValueError, match="here='text'.*clip"):
        drawing.draw_u(config, "text")


def test_blocks_lead_to_their_sections():
    for link in drawing.LINKS.values():
        page, anchor = link.split("#")
        notebook = nbformat.read(
            ROOT / "chapters" / f"{page[:-5] or '03_unet'}.ipynb", 4
        )
        lines = "\n".join(cell.source for cell in notebook.cells).splitlines()
        assert f"({anchor})=" in lines, link
