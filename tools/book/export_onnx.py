"""The shipped model as ONNX files, which a web page can run.

    tools/book/export_onnx.py                    data/models/scenes into _build/onnx
    tools/book/export_onnx.py --model FOLDER --out FOLDER

Writes text.onnx, unet.onnx and vae.onnx (the decoder), model.json with all that
JavaScript needs besides (sizes, the scheduler's options, the words), and judge.json,
the drawings that chapter 11's judge compares with. `make book` does it by itself
(sphinx_play.py), and again only when the model, or this file, has changed. It needs the
packages onnx and onnxscript.

- Shapes are fixed: one picture of the size that the model was trained on.
- The UNet takes one latent and two contexts, the two halves of guidance, and answers
  twice. Its second output is where the words of the second text are heard: (tokens, h,
  w), the mean over heads and layers of the largest maps that listen to the text.
- Weights are float16 on disk, and all computing is float32: whatever float16 holds
  exactly is stored so, and a Cast turns it back when the file is opened. What it does
  not hold, such as the mask and the frequencies of the timesteps, stays as it is.
"""

import argparse
import base64
import json
import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import sdbook.attention
import sdbook.clip
import sdbook.vocabulary
from sdbook import StableDiffusion, evaluation, scenes

ROOT = Path(__file__).resolve().parents[2]
MODEL, OUT = ROOT / "data" / "models" / "scenes", ROOT / "_build" / "onnx"
OPSET = 18
SMALL = 64  # fewer numbers than that are not worth a Cast

# What the exporter needs besides the graph ---------------------------------------


@contextmanager
def written_out(maps: list[Tensor] | None = None):
    """Attention as chapter 1 writes it, in place of the fused kernel.

    `maps` collects the weights of every cross-attention: (b, heads, n, tokens).
    """

    def attention(query, key, value, mask=None):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        if maps is not None and key.shape[-2] != query.shape[-2]:
            maps.append(weights)
        return weights @ value

    before = sdbook.attention.fused_attention
    sdbook.attention.fused_attention = sdbook.clip.fused_attention = attention
    try:
        yield
    finally:
        sdbook.attention.fused_attention = sdbook.clip.fused_attention = before


class GuidedUNet(nn.Module):
    """One latent and two texts: both answers, and where the second text is heard.

    x (1, c, h, w), t (1,) and context (2, n, d) give (2, c, h, w) and (n, h2, w2).
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, context):
        maps: list[Tensor] = []
        with written_out(maps):
            answers = self.unet(torch.cat([x, x]), t, context)
        cells = max(weights.shape[2] for weights in maps)
        largest = [weights[1] for weights in maps if weights.shape[2] == cells]
        heard = torch.stack(largest).mean(dim=(0, 1)).T
        side = round(cells**0.5)
        return answers, heard.reshape(-1, side, side)


class Text(nn.Module):
    """Two texts at once: ids (2, n) give (2, n, d)."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids):
        with written_out():
            return self.text_encoder(ids)


class Decoder(nn.Module):
    """Latents, divided by the scaling factor, to pixels: (1, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        with written_out():
            return self.vae.decode(z)


def networks(pipe: StableDiffusion) -> dict[str, tuple]:
    """For each file: the module, examples of its inputs, their names, the outputs'."""
    tokens = pipe.tokenizer.max_length
    width, latent = pipe.text_encoder.config.hidden_size, pipe.latent_shape()
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    inputs = torch.zeros(latent), torch.zeros(1), torch.zeros(2, tokens, width)
    return {
        "text": (Text(pipe.text_encoder), (ids,), ["ids"], ["context"]),
        "unet": (
            GuidedUNet(pipe.unet), inputs, ["x", "t", "context"], ["answers", "heard"],
        ),
        "vae": (Decoder(pipe.vae), (torch.zeros(latent),), ["z"], ["pixels"]),
    }  # fmt: skip


# ONNX ------------------------------------------------------------------------------


def to_onnx(module: nn.Module, examples: tuple, inputs: list, outputs: list) -> bytes:
    """A module as the bytes of an ONNX file, its weights as float16."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(), examples, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=inputs, output_names=outputs,
        )  # fmt: skip
    model = program.model_proto
    halve_weights(model.graph)
    strip(model)
    return model.SerializeToString(deterministic=True)


def halve_weights(graph) -> None:
    """Store as float16 what it holds exactly; a Cast makes float32 of it again."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < SMALL or not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts += [helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT)]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def strip(model) -> None:
    """Take out what only says where each node came from: up to a megabyte of it."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    for thing in (*model.graph.node, *model.graph.initializer, *model.graph.input,
                  *model.graph.output):  # fmt: skip
        del thing.metadata_props[:]
        thing.doc_string = ""


# What JavaScript needs besides the files --------------------------------------------


def describe(pipe: StableDiffusion, heard: list[int]) -> dict:
    """model.json: everything about the model that is not a weight."""
    backend = json.loads(pipe.tokenizer.backend.backend_tokenizer.to_str())
    scheduler, (_, *latent) = pipe.scheduler, pipe.latent_shape()
    up = pipe.vae.config.downscale
    return {
        "latent": latent,
        "picture": [pipe.vae.config.out_channels, *(up * side for side in latent[1:])],
        "heard": heard,
        "scaling_factor": pipe.vae.config.scaling_factor,
        "width": pipe.text_encoder.config.hidden_size,
        "tokenizer": {
            "vocab": backend["model"]["vocab"],
            "merges": [list(pair) for pair in sdbook.vocabulary.merges_of(
                pipe.tokenizer.backend.backend_tokenizer)],
            "special": {t["content"]: t["id"] for t in backend["added_tokens"]},
            "start": pipe.tokenizer.start_id,
            "end": pipe.tokenizer.end_id,
            "padding": pipe.tokenizer.backend.pad_token_id,
            "length": pipe.tokenizer.max_length,
        },
        # As the pipeline does it: latents have no range to be clipped to.
        "scheduler": {
            "clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": True,
            **vars(scheduler.config),
        },
        "world": world(),
    }  # fmt: skip


def world() -> dict:
    """The words of chapter 4's world, for those who write prompts."""
    return {
        "colours": {
            name: f"#{bytes(rgb).hex()}" for name, rgb in scenes.COLOURS.items()
        },
        "things": {name: scenes.plural(name, 2) for name in scenes.SHAPES},
        "sizes": list(scenes.SIZES),
        "counts": {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3},
        "relations": {name: list(words) for name, words in scenes.RELATIONS.items()},
        "places": dict(scenes.PLACES),
        "opening": next(filter(None, scenes.OPENINGS)).strip(),
        "held_out": [list(pair) for pair in sorted(scenes.HELD_OUT_PAIRS)],
    }


def judge() -> dict:
    """judge.json: what chapter 11's judge compares with, drawn once."""
    side = evaluation.SIDE
    grounds = {
        name: scenes.draw_background(name, side)[:, 0].tolist()
        for name in scenes.BACKGROUNDS
    }
    names, _, _, offsets = evaluation.templates()
    things, sprites = [], b""
    for (shape, colour, size), offset in zip(names, offsets.tolist(), strict=True):
        pixels = scenes.SIZES[size]
        sprites += scenes.draw_thing(shape, colour, pixels).tobytes()
        middle = [round(pixels / 2 - away) for away in offset]
        things.append({"shape": shape, "colour": colour, "size": size, "side": pixels,
                       "middle": middle})  # fmt: skip
    return {
        "side": side, "grounds": grounds, "things": things,
        "sprites": base64.b64encode(sprites).decode(),
    }  # fmt: skip


# Commands ---------------------------------------------------------------------------


def export(model: str | Path, out: str | Path) -> dict:
    """Write all files into a folder; returns what model.json says.

    Weights are rounded to float16 first, as those that ship are.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusion.from_pretrained(model).to(dtype=torch.float16)
    pipe = pipe.to(dtype=torch.float32)
    with torch.no_grad():
        parts = networks(pipe)
        module, examples, _, _ = parts["unet"]
        heard = list(module(*examples)[1].shape)
        for name, part in parts.items():
            (out / f"{name}.onnx").write_bytes(to_onnx(*part))
    facts = describe(pipe, heard)
    for name, values in (("judge", judge()), ("model", facts)):
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder of weights")
    parser.add_argument("--out", type=Path, default=OUT, help="where the files go")
    options = parser.parse_args(arguments)
    export(options.model, options.out)
    for path in sorted(options.out.iterdir()):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
