"""The files of fine-tunings: what LoRA files call their layers and matrices.

Two layouts are read and written: that of diffusers, with PEFT's names, and kohya's.
Words of textual inversion have a layout that all share.
"""

import json
import re
from collections import Counter
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from .files import WeightsError, read_weights

LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks in a folder
# A pipeline's parts that can have a LoRA; and what kohya's files call them.
LORA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te"}
WORD_FILE = "learned_embeds.safetensors"
# What files call the two halves: PEFT, kohya, and diffusers' own scripts.
HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"))
HALVES += (("lora.down", "lora.up"),)
HALVES += (("lora_linear_layer.down", "lora_linear_layer.up"),)


def part_of(model: nn.Module) -> str:
    """What a pipeline calls this model: "unet" or "text_encoder"."""
    return "unet" if model.diffusers_class == "UNet2DConditionModel" else "text_encoder"


def stem(model: nn.Module, name: str, kohya: bool) -> str:
    """What a file calls one layer of a model.

    As `unet.mid_block.attentions.0.…` in diffusers' files, `lora_unet_mid_block_…`
    in kohya's, which say underscore for dot.
    """
    layer = model.get_submodule(name)
    (key,) = model.rename_on_save({name: layer.weight})
    part = part_of(model)
    if kohya:
        return f"{LORA_PARTS[part]}_{key}".replace(".", "_")
    return f"{part}.{key}"


def lora_config(lora: nn.Module) -> dict:
    """Ranks and alphas of a LoRA, as PEFT's LoraConfig has them."""
    config = {"target_modules": lora.names}
    for entry, pattern, values in (
        ("r", "rank_pattern", [pair.rank for pair in lora.pairs]),
        ("lora_alpha", "alpha_pattern", [pair.alpha for pair in lora.pairs]),
    ):
        (most, _), *_ = Counter(values).most_common(1)
        others = zip(lora.names, values, strict=True)
        config[entry] = most
        config[pattern] = {name: value for name, value in others if value != most}
    part = part_of(lora.model())
    return {f"{part}.{key}": value for key, value in config.items()}


def read_config(path: Path) -> dict:
    """PEFT's config in a LoRA file of diffusers; empty without one."""
    with safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
    config = json.loads(facts.get("lora_adapter_metadata", "{}"))
    for key, value in config.items():
        if key.endswith((".use_rslora", ".use_dora")) and value:
            raise WeightsError(
                f"{path} was made with {key}, another method than LoRA; train it "
                "again without, or merge it in the program that made it"
            )
    return config


def alpha_in(config: dict, key: str, otherwise: int | float) -> int | float:
    """The alpha of the layer that the file calls `key`, by PEFT's config."""
    part = key.split(".")[0]
    for pattern, alpha in config.get(f"{part}.alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", key):
            return alpha
    return config.get(f"{part}.lora_alpha", otherwise)


def take_matrices(
    key: str, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, int | float] | None:
    """Take down, up and alpha of a layer out of a file's tensors; None without them.

    Where the file names no alpha, it is the rank.
    """
    pairs = [[f"{key}.{half}.weight" for half in halves] for halves in HALVES]
    found = [pair for pair in pairs if all(name in tensors for name in pair)]
    if not found:
        return None
    down, up = (tensors.pop(name) for name in found[0])
    alpha = tensors.pop(f"{key}.alpha", None)
    return down, up, len(down) if alpha is None else alpha.item()


def copy_matrix(mine: nn.Module, theirs: Tensor, what: str) -> None:
    """Put a file's matrix into a layer. Raises WeightsError for another shape."""
    if mine.weight.shape != theirs.shape:
        raise WeightsError(
            f"{what} matrix is {tuple(theirs.shape)}, but this model "
            f"needs {tuple(mine.weight.shape)}; use the model it was made for"
        )
    mine.weight.data.copy_(theirs)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a LoRA file (or folder), and PEFT's config, if it has one."""
    path = Path(path)
    path = path / LORA_FILE if path.is_dir() else path
    start = r"^text_encoder\.(?!text_model\.)"  # newer transformers' names
    tensors = {
        re.sub(start, "text_encoder.text_model.", key): tensor
        for key, tensor in read_weights(path).items()
    }
    return tensors, read_config(path) if path.suffix == ".safetensors" else {}


def refuse_rest(path: str | Path, tensors: dict[str, Tensor], found: dict) -> None:
    """Raise WeightsError where tensors are left over, or none was of use."""
    if tensors or not found:
        path = Path(path) / LORA_FILE if Path(path).is_dir() else path
        some = ", ".join(list(tensors)[:5])
        raise WeightsError(
            f"{path} holds {len(tensors)} tensors that fit nothing here ({some}); give "
            "a LoRA for this model, with names such as unet.….lora_A.weight "
            "(diffusers) or lora_unet_….lora_down.weight (kohya)"
        )


def read_word(path: str | Path, width: int) -> tuple[str, Tensor]:
    """The word of a file (or folder) and its row (d,).

    Raises FileNotFoundError, and WeightsError for what is not one row of `width`.
    """
    path = Path(path)
    path = path / WORD_FILE if path.is_dir() else path
    tensors = read_weights(path)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(tensors) != 1 or [*found.values()][0] not in ((width,), (1, width)):
        raise WeightsError(
            f"{path} holds {found}, but one word with one row of {width} is expected; "
            "give a word that was trained for this text model"
        )
    ((name, row),) = tensors.items()
    return name, row.reshape(width)
