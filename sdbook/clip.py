"""The text encoder

Generated from chapters/06_clip.ipynb; do not edit.
"""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import fused_attention
from .files import saving_together
from .formats import bare_text_names, own_weights, text_half
from .resblocks import ResBlock
from .vocabulary import (  # noqa: F401 (some once stood here)
    END,
    START,
    byte_symbols,
    check_text,
    expand_words,
    learn_merges,
    learn_vocabulary,
    merges_of,
    open_tokenizer,
    warn_about_cut_words,
    write_older_files,
    write_vocabulary,
)
from .weights import Config, Pretrained

__all__ = [
    "Tokenizer", "fit_to_length", "CLIPTextConfig", "CLIPEmbeddings", "causal_mask",
    "CLIPAttention", "quick_gelu", "CLIPMLP", "CLIPEncoder", "CLIPLayer",
    "CLIPTextModel", "ImageTower", "contrastive_loss", "CLIP",
]


class Tokenizer:
    """Texts to rows of token ids: CLIP's byte-pair encoding, padded to one length.

    A face for `transformers.CLIPTokenizer`, which is `.backend`.
    """

    def __init__(self, backend):
        self.backend = backend
        self.max_length: int = backend.model_max_length
        self.start_id: int = backend.bos_token_id
        self.end_id: int = backend.eos_token_id

    def take_length(self, places: int) -> None:
        """Take the text model's places where the tokenizer's files name no length."""
        if self.max_length > 10**20:  # which is how transformers says so
            self.max_length = self.backend.model_max_length = places

    def __len__(self) -> int:
        return len(self.backend)

    def __call__(self, texts: str | list[str]) -> Int64[Tensor, "b n"]:
        """Ids `(b, max_length)`; warns, naming the words, where a text is cut."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise TypeError(f"a prompt must be text, not {type(text).__name__}")
            check_text(text)
            rows.append(fit_to_length(self.backend, text, self.max_length))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.max_length)

    def tokens(self, text: str) -> list[str]:
        """The pieces of a text, from start to end, without padding."""
        ids = expand_words(self.backend, self.backend(text, verbose=False)["input_ids"])
        return self.backend.convert_ids_to_tokens(ids)

    def decode(self, ids: Int64[Tensor, "n"]) -> str:
        """Ids back to text, in lower case, without start, end and padding."""
        return self.backend.decode(ids.tolist(), skip_special_tokens=True)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int = 1024, max_length: int = 77
    ) -> "Tokenizer":
        """Learn at most `vocab_size` tokens from captions.

        514 or more, so that every text can be spelled; else ValueError.
        """
        with tempfile.TemporaryDirectory() as folder:
            learn_vocabulary(captions, vocab_size, max_length, folder)
            return cls(open_tokenizer(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder: ours, transformers' or diffusers'."""
        return cls(open_tokenizer(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of transformers' newer and older versions."""
        with saving_together(folder) as side:
            self.backend.save_pretrained(str(side))
            write_older_files(self.backend, side)


def fit_to_length(backend, text: str, max_length: int) -> list[int]:
    """The ids of a text, cut (with a warning) or filled up to `max_length`."""
    end = backend.eos_token_id
    ids = expand_words(backend, backend(text, verbose=False)["input_ids"])
    if len(ids) > max_length:
        lost = backend.decode(ids[max_length - 1 : -1])
        warn_about_cut_words(lost, max_length - 2)
        ids = ids[: max_length - 1] + [end]
    padding = backend.pad_token_id  # CLIP's is the end token, SD 2's is "!"
    return ids + [end if padding is None else padding] * (max_length - len(ids))


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """The text model's sizes, named as in transformers; the defaults are SD 1.5's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407

    fixed: ClassVar[dict[str, Any]] = {"model_type": "clip_text_model"}
    ignored: ClassVar[tuple[str, ...]] = (
        "architectures", "attention_dropout", "dropout", "dtype", "torch_dtype",
        "initializer_factor", "initializer_range", "projection_dim",
        "transformers_version",
    )
    families: ClassVar[dict[str, dict[str, Any]]] = {"SD 2.x": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, hidden_act="gelu", pad_token_id=0,
    )}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the config"):
        """Read config.json; of a whole CLIP, the half that reads."""
        known = {field.name for field in fields(cls)} | cls.fixed.keys()
        return super().from_dict(text_half(values, known), where)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {**super().to_dict(), **self.fixed, "architectures": ["CLIPTextModel"]}

    def check(self) -> None:
        """Raise ValueError for heads that do not fit, and an unknown bend."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not split into "
                f"num_attention_heads={self.num_attention_heads} heads"
            )
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(
                f"hidden_act={self.hidden_act!r}; use 'quick_gelu' or 'gelu'"
            )


class CLIPEmbeddings(nn.Module):
    """A learned vector for each token plus one for each place: (b, n) -> (b, n, d)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        n, limit = ids.shape[1], self.position_embedding.num_embeddings
        if n > limit:
            raise ValueError(
                f"{n} tokens, but the text model has {limit} positions; "
                "use the tokenizer that belongs to it"
            )
        places = torch.arange(n, device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(places)


def causal_mask(n: int, device: torch.device | None = None) -> Bool[Tensor, "n n"]:
    """True where token i (row) may look at token j (column): j is not after i."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


class CLIPAttention(nn.Module):
    """Multi-head self-attention with transformers' names; every map has a bias."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        query, key, value = (
            rearrange(project(x), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = fused_attention(query, key, value, mask)
        return self.out_proj(rearrange(mixed, "b heads n d -> b n (heads d)"))


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x · sigmoid(1.702 x)`: the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class CLIPMLP(nn.Module):
    """Two linear layers with the activation in between, for each token alone."""

    def __init__(self, width: int, inner: int, activation: str = "quick_gelu"):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = quick_gelu if activation == "quick_gelu" else nn.GELU()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"] | None = None,
        skip: int = 0,
    ) -> Float[Tensor, "b n d"]:
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x, mask)
        return x


class CLIPLayer(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to it."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = CLIPAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act)

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(Pretrained, nn.Module):
    """CLIP's text tower (Radford et al., 2021): ids to one vector for every token."""

    config_class = CLIPTextConfig
    weights_name = "model.safetensors"
    diffusers_class = "CLIPTextModel"

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__()
        self.config = config = config or CLIPTextConfig()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )

    def forward(
        self, ids: Int64[Tensor, "b n"], skip: int = 0
    ) -> Float[Tensor, "b n d"]:
        """Token ids to context vectors; each has seen the tokens up to its own.

        The last `skip` layers are left out. Raises ValueError for more tokens than the
        model has positions.
        """
        mask = causal_mask(ids.shape[1], ids.device)
        x = self.encoder(self.embeddings(ids), mask, skip)
        return self.final_layer_norm(x)

    def config_file(self) -> dict[str, Any]:
        """What config.json holds; transformers has no `_class_name`."""
        return self.config.to_dict()

    def rename_on_load(
        self, state: dict[str, Tensor], ema: bool = True
    ) -> dict[str, Tensor]:
        """Take keys with and without `text_model.`; drop `position_ids`."""
        return bare_text_names(own_weights(self, state, ema))

    def rename_on_save(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write `text_model.` before each key."""
        return {f"text_model.{key}": tensor for key, tensor in state.items()}


class ImageTower(nn.Module):
    """A small picture encoder for training: `(b, 3, H, W)` to one vector `(b, d)`.

    Each cell of 8×8 pixels writes what it saw to its own place in a row, so that where
    a thing stands is not lost. Raises ValueError for pictures of another side than
    `image_size`; it and `width` are multiples of 8.
    """

    def __init__(self, image_size: int = 64, width: int = 128):
        super().__init__()
        if image_size % 8 or width % 8:
            raise ValueError(
                f"image_size={image_size} and width={width} must be multiples of 8"
            )
        self.image_size = image_size
        widths = (3, width // 4, width // 2, width)
        self.stem = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.neighbours = ResBlock(width, num_groups=8)
        self.say = nn.Conv2d(width, width // 4, 1)
        cells = (image_size // 8) ** 2
        self.row = nn.Linear(cells * width // 4, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = "×".join(map(str, pixels.shape[-2:]))
            raise ValueError(
                f"pictures of {size}, but this tower was built for image_size="
                f"{self.image_size}; resize them"
            )
        x = self.stem[0](pixels)
        for conv in self.stem[1:]:
            x = conv(quick_gelu(x))
        said = self.say(quick_gelu(self.neighbours(x)))
        return self.final_layer_norm(self.row(said.flatten(1)))


def contrastive_loss(
    logits: Float[Tensor, "b b"], same: Bool[Tensor, "b b"] | None = None
) -> Float[Tensor, ""]:
    """Each text finds its picture, each picture its text (Radford et al., 2021).

    `same[i, j]` is True where picture j is a right answer for text i, as when two
    captions are equal; without it only the diagonal is.
    """
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    right = same.to(logits.dtype)
    for_text = right / right.sum(dim=1, keepdim=True)
    for_image = right.T / right.T.sum(dim=1, keepdim=True)
    losses = F.cross_entropy(logits, for_text), F.cross_entropy(logits.T, for_image)
    return sum(losses) / 2


class CLIP(nn.Module):
    """A text tower and a picture tower that learn to agree (Radford et al., 2021)."""

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        image_size: int = 64,
        image_width: int = 128,
        projection_dim: int = 128,
    ):
        super().__init__()
        self.text_encoder = text_encoder
        self.image_encoder = ImageTower(image_size, image_width)
        width = text_encoder.config.hidden_size
        self.text_projection = nn.Linear(width, projection_dim, bias=False)
        self.visual_projection = nn.Linear(image_width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """Texts to vectors of length 1, read at the first end token."""
        hidden = self.text_encoder(ids)
        end = (ids == self.text_encoder.config.eos_token_id).int().argmax(dim=1)
        sentence = hidden[torch.arange(len(ids), device=ids.device), end]
        return F.normalize(self.text_projection(sentence), dim=-1)

    def encode_image(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        """Pictures in [-1, 1] to vectors of length 1."""
        return F.normalize(self.visual_projection(self.image_encoder(pixels)), dim=-1)

    def forward(
        self, ids: Int64[Tensor, "b n"], pixels: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b b"]:
        """How well text i fits picture j, divided by the learned temperature."""
        scale = self.logit_scale.exp().clamp(max=100.0)
        return scale * self.encode_text(ids) @ self.encode_image(pixels).T
