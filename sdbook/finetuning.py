"""Fine-tuning: make it yours

Generated from chapters/12_fine_tuning.ipynb; do not edit.
"""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

# Names that once stood here, for whoever imports them from here.
from .adapters import (  # noqa: F401
    HALVES,
    LORA_FILE,
    LORA_PARTS,
    check_number,
    lora_config,
    part_of,
    read_lora,
    refuse_rest,
    save_lora,
    stem,
)
from .clip import Tokenizer
from .pipeline import StableDiffusion
from .run.configs import (
    FinetuningConfig,  # noqa: F401
    LoRATrainingConfig,
    WordTrainingConfig,
)
from .run.finetuning import (
    draw_class,
    empty_parts,
    open_model,
    say_finetuning,
    say_lora,
)  # fmt: skip
from .run.folder import owns_output_dir
from .run.processes import is_main_process
from .run.settings import open_dataset
from .schedulers import change_scheduler
from .training.cache import Encoded, as_it_is, caption_ids
from .training.loop import optimise
from .training.loss import DiffusionLoss
from .words import (
    WORD_FILE,  # noqa: F401
    check_words,
    number_of,
    read_word,
    save_word,
    spelled,
)

__all__ = [
    "LowRank", "ATTENTION_MAPS", "lora_layers", "LoRA", "take_pair", "load_lora",
    "WithText", "encode", "loss_for", "LatentsWithIds", "what_moves", "NewAndPrior",
    "PriorLoss", "train_lora", "add_rows", "add_word", "NewWords", "load_word",
    "train_word",
]


class LowRank(nn.Module):
    """A change of one layer through a bottleneck: `up(down(x)) · alpha / rank`.

    Takes what the layer takes and gives what the layer gives; it starts as zero,
    because `up` does. From Hu et al. (2022), section 4.1. Raises ValueError for a
    rank below 1, and for an alpha that is no number.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: int | float):
        super().__init__()
        check_number("rank", rank, at_least=1)
        check_number("alpha", alpha)
        self.rank, self.alpha = rank, alpha
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride,
                layer.padding, bias=False,
            )  # fmt: skip
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * (self.alpha / self.rank)

    def change(self) -> Tensor:
        """What this adds to the layer's weight, in that weight's shape."""
        up, down = self.up.weight, self.down.weight
        product = up.flatten(1) @ down.flatten(1) * (self.alpha / self.rank)
        return product.view(len(up), *down.shape[1:])


# The four maps of an attention, as UNet and text encoder call them.
ATTENTION_MAPS = (".to_q", ".to_k", ".to_v", ".to_out.0")
ATTENTION_MAPS += (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def lora_layers(model: nn.Module, layers: str = "attention") -> dict[str, nn.Module]:
    """The layers to change, by name.

    "attention" are the linear maps of every attention, "all" every linear and
    convolution layer. Raises ValueError for another word.
    """
    if layers not in ("attention", "all"):
        raise ValueError(f"layers {layers!r}: choose one of attention, all")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (layers == "all" or name.endswith(ATTENTION_MAPS))
    }


class LoRA(nn.Module):
    """Low-rank changes of a model's layers, beside the model (Hu et al., 2022).

    The model's own tree and weights stay as they are; each change counts `scale`
    times alpha / rank. `alpha` is `rank` by default, `layers` is for `lora_layers`;
    `pairs`, by layer, are ready ones in place of new ones. As a module it holds the
    pairs alone; called, it is the changed model. Several LoRAs may change one model.
    Raises ValueError for numbers that cannot be meant.
    """

    def __init__(
        self, model: nn.Module, rank: int = 4, alpha: int | float | None = None,
        layers: str = "attention", scale: int | float = 1.0,
        pairs: dict[str, LowRank] | None = None,
    ):  # fmt: skip
        super().__init__()
        check_number("scale", scale)
        self.scale, self.merged = scale, []
        # Behind a function, the model is no part of this module or of its copies.
        self.model = lambda: model
        self.names, self.pairs, self.hooks = [], nn.ModuleList(), []
        if pairs is None:
            alpha, chosen = alpha or rank, lora_layers(model, layers)
            full = max(min(one.weight.flatten(1).shape) for one in chosen.values())
            check_number("rank", rank, at_least=1, at_most=full)  # a matrix has no more
            pairs = {name: LowRank(one, rank, alpha) for name, one in chosen.items()}
        for name, pair in pairs.items():
            self.add(name, pair)

    def forward(self, *inputs) -> Tensor:
        return self.model()(*inputs)

    def add(self, name: str, pair: LowRank) -> None:
        """Let a pair change the layer of this name."""
        layer = self.model().get_submodule(name)

        def add_change(layer, inputs, output):
            if self.merged:
                return output
            x = inputs[0].to(pair.down.weight.dtype)
            return output + (self.scale * pair(x)).to(output.dtype)

        self.names.append(name)
        self.pairs.append(pair.to(layer.weight.device))
        self.hooks.append(layer.register_forward_hook(add_change))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the change into the model's weights: no cost per call any more.

        The old weights are kept aside. Raises ValueError if it is merged already.
        """
        if self.merged:
            raise ValueError("this LoRA is merged already; unmerge it first")
        for name, pair in zip(self.names, self.pairs, strict=True):
            layer = self.model().get_submodule(name)
            old = layer.weight
            new = old.float() + self.scale * pair.change().float()
            layer.weight = nn.Parameter(new.to(old.dtype), old.requires_grad)
            self.merged.append((layer, old, layer.weight))

    def unmerge(self) -> None:
        """Put the old weights back, bit for bit.

        Raises ValueError if the weights were exchanged since, as by another merge.
        """
        if any(layer.weight is not new for layer, _, new in self.merged):
            raise ValueError(
                "the model's weights were exchanged after this LoRA was merged; "
                "unmerge the one that was merged last first"
            )
        for layer, old, new in self.merged:
            old.data = old.data.to(new)  # the model may have been moved since
            layer.weight = old
        self.merged = []

    def remove(self) -> None:
        """Take the change away; the model is what it was before, bit for bit."""
        self.unmerge()
        for hook in self.hooks:
            hook.remove()


def take_pair(layer: nn.Module, down: Tensor, up: Tensor, alpha) -> LowRank:
    """A pair for a layer, with the matrices and the alpha of a file."""
    pair = LowRank(layer, len(down), alpha)
    pair.load_state_dict({"down.weight": down, "up.weight": up})
    return pair


def load_lora(
    pipe: StableDiffusion, path: str | Path, scale: int | float = 1.0
) -> list[LoRA]:
    """Let a LoRA file change a pipeline; one LoRA for each model that it changes.

    `path` is a file or a folder, of diffusers, PEFT or kohya. Raises
    FileNotFoundError, and ValueError or WeightsError for a scale or a file that
    cannot be meant, before anything is changed.
    """
    check_number("scale", scale)
    models, loras = {part: getattr(pipe, part) for part in LORA_PARTS}, []
    for part, layers in read_lora(path, models).items():
        model = models[part]
        pairs = {
            name: take_pair(model.get_submodule(name), *matrices)
            for name, matrices in layers.items()
        }
        loras.append(LoRA(model, scale=scale, pairs=pairs))
    return loras


class WithText(nn.Module):
    """A UNet with the text model before it, which reads token ids (b, n).

    Called with noisy latents (b, c, h, w), timesteps (b,) and ids, it gives what the
    UNet gives. Either part may be a LoRA, or `NewWords`.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, t: Tensor, ids: Int64[Tensor, "b n"]) -> Tensor:
        return self.unet(x, t, self.text_encoder(ids))


def encode(config, pipe: StableDiffusion, dataset: Dataset, name: str) -> Encoded:
    """A dataset's latents and text states, once, in `output_dir/name`."""
    return Encoded(
        dataset, pipe.vae, pipe.text_encoder, pipe.tokenizer,
        Path(config.output_dir) / name, config.num_workers,
    )  # fmt: skip


def loss_for(config, pipe: StableDiffusion, empty: Tensor) -> DiffusionLoss:
    """Chapter 8's loss, with the noise schedule and the scale of a given model.

    Whichever sampler the model came with, noise is added as DDPM does. `empty` is
    what stands for the empty caption: its states (n, d), or ids (n,).
    """
    return DiffusionLoss(
        change_scheduler(pipe.scheduler, "ddpm"), pipe.vae.config.scaling_factor, empty,
        config.caption_dropout, config.snr_gamma,
    )  # fmt: skip


class LatentsWithIds(Dataset):
    """Latents with the token ids (n,) of their captions, in whole batches."""

    def __init__(self, encoded: Encoded, tokenizer: Tokenizer):
        self.encoded, self.ids = encoded, caption_ids(tokenizer, encoded.captions)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.encoded.__getitems__(indices)[0], self.ids[indices]


def what_moves(config: LoRATrainingConfig, unet: nn.Module, text_encoder: nn.Module):
    """What `train_lora` trains: LoRAs of the models, or, with rank 0, themselves."""
    parts = [unet, text_encoder] if config.train_text_encoder else [unet]
    for model in parts:
        model.requires_grad_(not config.rank)
    if config.rank:
        sizes = config.rank, config.alpha, config.layers
        parts = [LoRA(model, *sizes) for model in parts]
    return WithText(*parts) if config.train_text_encoder else parts[0]


class NewAndPrior(Dataset):
    """New pictures and class pictures, as many of each in every batch."""

    def __init__(self, new: Dataset, prior: Dataset):
        self.new, self.prior = new, prior

    def __len__(self) -> int:
        return max(len(self.new), len(self.prior))

    def __getitems__(self, indices: list[int]) -> tuple:
        return tuple(
            half.__getitems__([index % len(half) for index in indices])
            for half in (self.new, self.prior)
        )


class PriorLoss:
    """The loss of the new pictures, plus `weight` times that of the class pictures.

    From Ruiz et al. (2023), eq. 2.
    """

    def __init__(self, loss, weight: int | float):
        self.loss, self.weight = loss, weight

    def __call__(self, unet, batch, generator, *rows):
        new, prior = batch
        loss, numbers = self.loss(unet, new, generator, *rows)
        kept, _ = self.loss(unet, prior, generator, *rows)
        return loss + self.weight * kept, numbers | {"new": loss, "prior": kept}


@owns_output_dir
def train_lora(config: LoRATrainingConfig) -> StableDiffusion | None:
    """Fine-tune a UNet (and its text model) and return the changed pipeline.

    Says the plan first; with `dry_run` that is all. Writes
    `output_dir/pytorch_lora_weights.safetensors`, or with rank 0 the whole
    `output_dir/pipeline`. Errors and resuming are those of `optimise`.
    """
    dataset, pipe = open_dataset(config), open_model(config)
    parts = empty_parts(pipe)
    say_lora(config, pipe, dataset, WithText(*parts), what_moves(config, *parts))
    if config.dry_run:
        return None

    def prepare(dataset: Dataset, name: str) -> Dataset:
        encoded = encode(config, pipe, dataset, name)
        if config.train_text_encoder:
            return LatentsWithIds(encoded, pipe.tokenizer)
        return encoded

    ids = pipe.tokenizer([""])[0].to(pipe.device)
    empty = ids if config.train_text_encoder else pipe.encode_prompt([""])[0].float()
    data, loss = prepare(dataset, "cache"), loss_for(config, pipe, empty)
    if config.class_prompts:
        kept = prepare(draw_class(config, pipe), "class-cache")
        data, loss = NewAndPrior(data, kept), PriorLoss(loss, config.prior_weight)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    module = what_moves(config, pipe.unet, pipe.text_encoder)
    trained = optimise(config, module, data, loss, collate=as_it_is)
    module.load_state_dict(trained.state_dict())
    pipe.unet.eval()
    if is_main_process() and config.rank:
        loras = module.children() if config.train_text_encoder else [module]
        save_lora(config.output_dir, *loras)
    elif is_main_process():
        pipe.save_pretrained(Path(config.output_dir) / "pipeline")
    return pipe


def add_rows(
    pipe: StableDiffusion, words: list[str], rows: Float[Tensor, "n d"]
) -> list[int]:
    """Teach a pipeline's tokenizer new words and give each a row; their numbers.

    Raises ValueError for a word that cannot be new, before anything is changed.
    """
    check_words(pipe.tokenizer, words)
    backend, text_encoder = pipe.tokenizer.backend, pipe.text_encoder
    backend.add_tokens(words)
    numbers = backend.convert_tokens_to_ids(words)
    table = text_encoder.embeddings.token_embedding.weight.detach()
    table = torch.cat([table[: numbers[0]], rows.to(table), table[numbers[-1] + 1 :]])
    text_encoder.embeddings.token_embedding = nn.Embedding.from_pretrained(table)
    text_encoder.config = replace(text_encoder.config, vocab_size=len(table))
    return numbers


def add_word(pipe: StableDiffusion, word: str, like: str | None = None) -> int:
    """Teach a pipeline a new word of one row; returns its number.

    The row starts as that of the word `like`, or as the mean of all rows. Raises
    ValueError for a word that is known, or a `like` that is not one token.
    """
    table = pipe.text_encoder.embeddings.token_embedding.weight.detach()
    row = table.mean(0) if like is None else table[number_of(pipe.tokenizer, like)]
    return add_rows(pipe, [word], row[None])[0]


class NewWords(nn.Module):
    """Rows of the token embedding to be trained, beside the text model.

    As a module it holds these rows alone; called with token ids (b, n), it gives the
    text model's states (b, n, d) with them. `write` puts them into the model. From
    Gal et al. (2023).
    """

    def __init__(self, text_encoder: nn.Module, numbers: list[int]):
        super().__init__()
        self.text_encoder = lambda: text_encoder
        self.numbers = numbers
        table = text_encoder.embeddings.token_embedding.weight
        self.rows = nn.Parameter(table[numbers].detach().clone())

    def forward(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        def exchange(embedding, inputs, found):
            for number, row in zip(self.numbers, self.rows, strict=True):
                found = torch.where((inputs[0] == number)[..., None], row, found)
            return found

        embedding = self.text_encoder().embeddings.token_embedding
        hook = embedding.register_forward_hook(exchange)
        try:
            return self.text_encoder()(ids)
        finally:
            hook.remove()

    @torch.no_grad()
    def write(self) -> None:
        """Put the rows into the text model's table."""
        table = self.text_encoder().embeddings.token_embedding.weight
        table[self.numbers] = self.rows.to(table)


def load_word(pipe: StableDiffusion, path: str | Path, word: str | None = None) -> str:
    """Teach a pipeline the word of a file (or folder), or call it `word`.

    Reads diffusers' and A1111's files; a word may have several rows. Raises
    FileNotFoundError, ValueError for a word that is known, and WeightsError for what
    does not fit the text model.
    """
    width, room = pipe.text_encoder.config.hidden_size, pipe.tokenizer.max_length - 2
    name, rows = read_word(path, width, room)
    name = name if word is None else word
    try:
        add_rows(pipe, spelled(name, len(rows)), rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (give it as word)") from error
    return name


@owns_output_dir
def train_word(config: WordTrainingConfig) -> StableDiffusion | None:
    """Train one new row of the token embedding; returns the pipeline that knows it.

    Says the plan first; with `dry_run` that is all. Writes
    `output_dir/learned_embeds.safetensors`. Raises ValueError for captions without
    the word. Errors and resuming are those of `optimise`.
    """
    dataset, pipe = open_dataset(config), open_model(config)
    number = add_word(pipe, config.word, config.like)
    ids = caption_ids(pipe.tokenizer, dataset.captions())
    without = int((ids != number).all(1).sum())
    if without:
        raise ValueError(
            f"{without} of {len(ids)} captions in {config.dataset_path} do not say "
            f"{config.word!r}; write it where it belongs"
        )
    unet, text_encoder = empty_parts(pipe)
    words = NewWords(text_encoder, [number])
    say_finetuning(config, pipe, dataset, WithText(unet, words), words, text_encoder)
    if config.dry_run:
        return None

    encoded = encode(config, pipe, dataset, "cache")
    loss = loss_for(config, pipe, pipe.encode_prompt([""])[0].float())
    words = NewWords(pipe.text_encoder, [number])

    def loss_of(words, batch, generator, *rows):
        moments, ids = batch
        states = words(ids.to(generator.device))
        return loss(pipe.unet, (moments, states), generator, *rows)

    data = LatentsWithIds(encoded, pipe.tokenizer)
    trained = optimise(config, words, data, loss_of, collate=as_it_is)
    words.load_state_dict(trained.state_dict())
    words.write()
    if is_main_process():
        save_word(config.output_dir, pipe, config.word)
    return pipe
