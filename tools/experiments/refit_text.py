"""Let a trained UNet read another text model, without training it anew.

    python tools/experiments/refit_text.py runs/unet runs/clip runs/refit

The maps that read the text (`to_k`, `to_v`) are multiplied by the matrix that best
turns the new model's states into the old one's, by least squares over the tokens of
many captions. What the old model did not say is in none of that, so a little of a
white start is added (chapter 8). Train the result on, with --pretrained.
"""

import argparse
from pathlib import Path

import torch

from sdbook import StableDiffusion
from sdbook.attention import TransformerBlock
from sdbook.clip import CLIPTextModel, Tokenizer
from sdbook.data import Scenes
from sdbook.training import start_white
from sdbook.unet import UNet

COUNT = 4000  # captions
WHITE = 0.3  # of the new weights' strength, as a share of the old ones'


def text_maps(unet: UNet) -> list[torch.nn.Linear]:
    """Every map that reads the text."""
    blocks = [m for m in unet.modules() if isinstance(m, TransformerBlock)]
    return [getattr(block.attn2, name) for block in blocks for name in ("to_k", "to_v")]


def fit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix A (d, d2) for which x A is closest to y, with a little ridge."""
    second = x.T @ x / len(x)
    ridge = 1e-3 * second.trace() / len(second) * torch.eye(len(second))
    return torch.linalg.solve(second + ridge, x.T @ y / len(x))


@torch.no_grad()
def refit(pipe: StableDiffusion, text_encoder, tokenizer) -> StableDiffusion:
    """The pipeline with the other text model, and a UNet that understands it.

    Raises ValueError when the two tokenizers cut captions differently.
    """
    captions = ["", *(Scenes().scene(i).caption for i in range(COUNT))]
    old, new = pipe.tokenizer(captions), tokenizer(captions)
    ends = [
        (ids == t.end_id).int().argmax(1)
        for ids, t in ((old, pipe.tokenizer), (new, tokenizer))
    ]
    same = ends[0] == ends[1]
    if old.shape != new.shape or same.float().mean() < 0.5:
        raise ValueError(
            "the two tokenizers cut most captions into different numbers of tokens; "
            "train the UNet from zero instead"
        )
    states = text_encoder(new[same])
    x, y = states.flatten(0, 1), pipe.text_encoder(old[same]).flatten(0, 1)
    turn = fit(x, y)
    torch.manual_seed(0)
    fresh = start_white(UNet(pipe.unet.config), states)
    for read, white in zip(text_maps(pipe.unet), text_maps(fresh), strict=True):
        weight = read.weight @ turn.T
        share = WHITE * (x @ weight.T).std() / (x @ white.weight.T).std()
        read.weight.copy_(weight + share * white.weight)
    return StableDiffusion(pipe.vae, text_encoder, tokenizer, pipe.unet, pipe.scheduler)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", help="a trained pipeline")
    parser.add_argument("text", type=Path, help="what train-clip wrote")
    parser.add_argument("output_dir", type=Path, help="gets pipeline/")
    options = parser.parse_args(arguments)
    pipe = refit(
        StableDiffusion.from_pretrained(options.pipeline),
        CLIPTextModel.from_pretrained(options.text / "text_encoder").eval(),
        Tokenizer.from_pretrained(options.text / "tokenizer"),
    )
    pipe.save_pretrained(options.output_dir / "pipeline")
    print(f"wrote {options.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main()
