"""The networks that measure pictures: CLIP, ours or anybody's, and Inception."""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from .clip import CLIP, CLIPTextModel, Tokenizer
from .files import WeightsError, as_path, read_weights, save_weights
from .formats import shipped_models
from .images import to_pixels


@torch.no_grad()
def extract_features(
    network: nn.Module, pictures: list, batch_size: int = 50
) -> Float64[Tensor, "n d"]:
    """What a network makes of pictures (PIL images, or arrays of bytes) of one size.

    `network` takes pixels (b, 3, h, w) in [-1, 1] and gives (b, d).
    """
    device = next(network.parameters()).device
    rows = []
    for start in range(0, len(pictures), batch_size):
        batch = [to_pixels(np.asarray(p)) for p in pictures[start : start + batch_size]]
        rows.append(network(torch.stack(batch).to(device)).double().cpu())
    return torch.cat(rows)


# CLIP -------------------------------------------------------------------------


class BookCLIP:
    """Chapter 6's CLIP with its tokenizer: vectors of length 1, (n, p)."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer):
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "BookCLIP":
        """Open what `save_pretrained` wrote, or the output of `sdbook train-clip`.

        Raises FileNotFoundError, and WeightsError for parts that do not fit together.
        """
        folder = Path(folder)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        state = read_weights(path := folder / "clip.safetensors")
        state |= {f"text_encoder.{k}": t for k, t in text_encoder.state_dict().items()}
        try:
            width = len(state["image_encoder.final_layer_norm.weight"])
            cells = state["image_encoder.row.weight"].shape[1] // (width // 4)
            size, wide = 8 * math.isqrt(cells), len(state["text_projection.weight"])
            clip = CLIP(text_encoder, size, width, projection_dim=wide)
            clip.load_state_dict(state)
        except (KeyError, IndexError, ArithmeticError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise WeightsError(
                f"{path} does not fit the text_encoder beside it ({reason:.200}); "
                "copy all of what `sdbook train-clip` wrote"
            ) from error
        return cls(clip, Tokenizer.from_pretrained(folder / "tokenizer"))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        """Write text model and tokenizer, and clip.safetensors with all the rest."""
        folder, text_encoder = Path(folder), self.clip.text_encoder
        text_encoder.save_pretrained(folder / "text_encoder", dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        state = self.clip.state_dict().items()
        rest = {k: t for k, t in state if not k.startswith("text_encoder.")}
        rest = {key: tensor.to(dtype or tensor.dtype) for key, tensor in rest.items()}
        save_weights(rest, folder / "clip.safetensors")

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "n p"]:
        """Vectors of sentences."""
        return self.clip.encode_text(self.tokenizer(texts))

    @torch.no_grad()
    def pictures(self, pictures: list) -> Float[Tensor, "n p"]:
        """Vectors of pictures of the size that the picture tower was trained on."""
        seen = extract_features(self.clip.image_encoder, pictures).float()
        return F.normalize(self.clip.visual_projection(seen), dim=-1)


class TransformersCLIP:
    """A folder that holds transformers' `CLIPModel` and `CLIPProcessor`.

    The processor knows how this CLIP wants pictures resized and normalised.
    """

    def __init__(self, folder: str | Path):
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(str(folder)).eval()
        self.processor = CLIPProcessor.from_pretrained(str(folder))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "n p"]:
        """Vectors of sentences."""
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        said = self.model.text_model(**self.processor(text=texts, **options))
        return F.normalize(self.model.text_projection(said.pooler_output), dim=-1)

    @torch.no_grad()
    def pictures(self, pictures: list, batch_size: int = 50) -> Float[Tensor, "n p"]:
        """Vectors of pictures of any size."""
        rows = []
        for start in range(0, len(pictures), batch_size):
            batch = [np.asarray(p) for p in pictures[start : start + batch_size]]
            pixels = self.processor(images=batch, return_tensors="pt")
            rows.append(self.model.vision_model(**pixels).pooler_output)
        return F.normalize(self.model.visual_projection(torch.cat(rows)), dim=-1)


def open_clip(name: str | Path = "clip") -> BookCLIP | TransformersCLIP:
    """A CLIP: the shipped one, a folder of `sdbook train-clip`, or one of transformers.

    Raises FileNotFoundError, naming the three, for anything else.
    """
    path = as_path(name, "a CLIP")
    for folder in (path, shipped_models().get(str(name), path)):
        if (folder / "clip.safetensors").is_file():
            return BookCLIP.from_pretrained(folder)
        if (folder / "preprocessor_config.json").is_file() or (
            folder / "processor_config.json"
        ).is_file():
            return TransformersCLIP(folder)
    raise FileNotFoundError(
        f"there is no CLIP {str(name)!r}; give `clip` (it ships with the book), a "
        "folder that `sdbook train-clip` wrote, or one with transformers' CLIPModel "
        "and CLIPProcessor"
    )


# Inception --------------------------------------------------------------------


class Inception(nn.Module):
    """Inception v3 up to its last layer: pixels in [-1, 1] to 2048 features.

    Pictures of any size are resized to 299×299, cubic and anti-aliased.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        pixels = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)
        return self.network(pixels.clamp(-1, 1))


def pool_as_in_2015(block: nn.Module, pool) -> None:
    """Let the last branch of an Inception block pool in another way."""
    branches = block._forward
    block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]


def open_inception(path: str | Path) -> Inception:
    """The network of a weights file: torchvision's, or the FID's own of 2015.

    The latter (`pt_inception-2015-12-05-….pth`, with 1008 classes) does not count
    padding when it averages, and its last block takes the maximum. Only its numbers
    compare with published ones. Raises ValueError for weights of another network.
    """
    from torchvision.models import inception_v3

    state = read_weights(path)
    classes = len(state.get("fc.weight", ()))
    aux = any(key.startswith("AuxLogits.") for key in state)
    network = inception_v3(
        weights=None, num_classes=classes, aux_logits=aux, init_weights=False
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds no Inception v3 ({str(error).splitlines()[1].strip()}); "
            "give torchvision's inception_v3 or pytorch-fid's pt_inception file"
        ) from error
    network.fc = nn.Identity()
    if classes == 1008:
        options = {"kernel_size": 3, "stride": 1, "padding": 1}
        average = functools.partial(F.avg_pool2d, count_include_pad=False, **options)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            pool_as_in_2015(network.get_submodule(f"Mixed_{name}"), average)
        largest = functools.partial(F.max_pool2d, **options)
        pool_as_in_2015(network.Mixed_7c, largest)
    return Inception(network).eval()
