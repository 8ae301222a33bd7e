"""The training of CLIP.

Generated from chapters/06_clip.ipynb; do not edit.
"""

import copy
import math

import torch
from torch import nn

from ..clip import (
    CLIP,
    CLIPTextConfig,
    CLIPTextModel,
    Tokenizer,
    contrastive_loss,
)
from ..features import BookCLIP
from ..run.configs import CLIPTrainingConfig
from ..run.folder import owns_output_dir
from ..run.memory import memory_needed
from ..run.plan import say_plan
from ..run.processes import is_main_process
from ..run.settings import open_dataset
from ..twins import Twins
from .cache import caption_ids, warn_about_long
from .loop import optimise

__all__ = [
    "start_apart", "new_text_encoder", "Tokenize", "say_clip_plan", "train_clip",
    "clip_loss",
]


def start_apart(clip: CLIP) -> None:
    """Let words differ more, and their fit count less, than in CLIP's own start."""
    embeddings = clip.text_encoder.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.3)
    nn.init.constant_(clip.logit_scale, math.log(4))


def new_text_encoder(config: CLIPTrainingConfig, tokenizer) -> CLIPTextModel:
    """A text model with random weights that fits a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.start_id,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.end_id,
        )
    )


class Tokenize:
    """Collation for CLIP: pictures in one tensor, captions as rows of token ids."""

    def __init__(self, tokenizer: Tokenizer, twins: bool):
        self.tokenizer, self.twins = tokenizer, twins

    def __call__(self, items):
        pairs = [pair for item in items for pair in item] if self.twins else items
        pixels, captions = zip(*pairs, strict=True)
        return torch.stack(pixels), caption_ids(self.tokenizer, list(captions))


def say_clip_plan(config: CLIPTrainingConfig, dataset, clip: CLIP, twins: bool) -> None:
    """Say steps, sizes and memory of a training before it starts."""
    count, side = config.batch_size * (2 if twins else 1), config.image_size
    ids = torch.zeros(count, config.max_length, dtype=torch.int64, device="meta")
    pixels = torch.empty(count, 3, side, side, device="meta")
    empty = copy.deepcopy(clip).to("meta")
    say_plan(config, dataset, empty, memory_needed(config, empty, ids, pixels))


@owns_output_dir
def train_clip(config: CLIPTrainingConfig) -> CLIPTextModel | None:
    """Train text and picture towers to agree; save text model and tokenizer.

    Says the plan first; with `dry_run` that is all. Writes `text_encoder`,
    `tokenizer` and `clip.safetensors` (the rest) to `output_dir`. With
    several processes, or micro-batches, each compares its own pictures alone.
    """
    torch.manual_seed(config.seed)
    dataset = open_dataset(config)
    twins = config.twins and dataset.drawn
    texts = sorted(set(dataset.captions()))
    tokenizer = Tokenizer.train(texts, config.vocab_size, config.max_length)
    warn_about_long(tokenizer, texts)
    text_encoder = new_text_encoder(config, tokenizer)
    clip = CLIP(text_encoder, config.image_size, projection_dim=config.hidden_size)
    start_apart(clip)
    say_clip_plan(config, dataset, clip, twins)
    if config.dry_run:
        return None
    data, collate = Twins(dataset) if twins else dataset, Tokenize(tokenizer, twins)
    clip = optimise(config, clip, data, clip_loss, collate=collate).eval()
    if is_main_process():
        BookCLIP(clip, tokenizer).save_pretrained(config.output_dir)
    return clip.text_encoder


def clip_loss(module, batch, generator, rows):
    """The contrastive loss of a batch, and the share of texts that choose right."""
    pixels, ids = (tensor.to(generator.device) for tensor in batch)
    same = (ids[:, None] == ids[None]).all(-1)
    logits = module(ids, pixels)
    right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return contrastive_loss(logits, same), {"accuracy": right}
