"""File formats of the world

Generated from chapters/B_file_formats.ipynb; do not edit.
"""

import importlib.resources
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import (
    INDEX,
    WeightsError,
    as_path,
    download,
    finish_saving,
    is_hub_id,
    list_folder,
    no_file,
    read_facts,
    read_json,
    read_weights,
    some,
    write_json,
)
from .weights import family

__all__ = [
    "UNET_RULES", "VAE_RULES", "OLD_VAE_RULES", "OPENCLIP_RULES", "as_pattern",
    "count_places", "rename", "NAMINGS", "renamed_keys", "HARMLESS", "prefixes",
    "averaged_name", "split_projections", "fit_kernels", "bare_text_names",
    "text_half", "rename_all", "own_weights", "to_original", "PARTS", "write_index",
    "check_index", "model_folders", "shipped_models", "find_model", "check_checkpoint",
    "TASKS", "check_task", "told_schedule", "describe", "find_part", "CLIP_TOKENIZER",
    "find_tokenizer",
]


UNET_RULES = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("resnets.{layer}.norm1.", "resnets.{layer}.in_layers.0."),
    ("resnets.{layer}.conv1.", "resnets.{layer}.in_layers.2."),
    ("resnets.{layer}.time_emb_proj.", "resnets.{layer}.emb_layers.1."),
    ("resnets.{layer}.norm2.", "resnets.{layer}.out_layers.0."),
    ("resnets.{layer}.conv2.", "resnets.{layer}.out_layers.3."),
    ("resnets.{layer}.conv_shortcut.", "resnets.{layer}.skip_connection."),
    ("down_blocks.{level}.resnets.{layer}.", "input_blocks.{after}.0."),
    ("down_blocks.{level}.attentions.{layer}.", "input_blocks.{after}.1."),
    ("down_blocks.{level}.downsamplers.0.conv.", "input_blocks.{after}.0.op."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
    ("up_blocks.{level}.resnets.{layer}.", "output_blocks.{place}.0."),
    ("up_blocks.{level}.attentions.{layer}.", "output_blocks.{place}.1."),
    ("up_blocks.{level}.upsamplers.0.conv.", "output_blocks.{place}.{last}.conv."),
)


VAE_RULES = (
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
    ("attentions.0.group_norm.", "attentions.0.norm."),
    ("attentions.0.to_q.", "attentions.0.q."),
    ("attentions.0.to_k.", "attentions.0.k."),
    ("attentions.0.to_v.", "attentions.0.v."),
    ("attentions.0.to_out.0.", "attentions.0.proj_out."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("down_blocks.{level}.resnets.{layer}.", "down.{level}.block.{layer}."),
    ("down_blocks.{level}.downsamplers.0.", "down.{level}.downsample."),
    ("up_blocks.{level}.resnets.{layer}.", "up.{mirror}.block.{layer}."),
    ("up_blocks.{level}.upsamplers.0.", "up.{mirror}.upsample."),
)
OLD_VAE_RULES = (
    (".attentions.0.to_q.", ".attentions.0.query."),
    (".attentions.0.to_k.", ".attentions.0.key."),
    (".attentions.0.to_v.", ".attentions.0.value."),
    (".attentions.0.to_out.0.", ".attentions.0.proj_attn."),
)

OPENCLIP_RULES = (
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.{layer}.", "transformer.resblocks.{layer}."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


@cache
def as_pattern(rule: str) -> re.Pattern:
    """`resnets.{layer}.` as a regular expression that finds the number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule)))


def count_places(config, level: int, layer: int) -> dict[str, int]:
    """The numbers that a rule may write, from where a block is in our tree."""
    levels = len(config.block_out_channels)
    place = (config.layers_per_block + 1) * level + layer
    kinds = getattr(config, "up_block_types", ("",) * levels)
    return {
        "level": level, "layer": layer, "place": place, "after": place + 1,
        "mirror": levels - 1 - level, "last": 1 + ("CrossAttn" in kinds[level]),
    }


def rename(key: str, rules: tuple, config) -> str:
    """One of our keys in the words of others: each rule in turn."""
    for ours, theirs in rules:
        found = as_pattern(ours).search(key)
        if found:
            numbers = {name: int(text) for name, text in found.groupdict().items()}
            if "level" in numbers:  # a sampler has no layer: it comes last
                layer = numbers.get("layer", config.layers_per_block)
                numbers = count_places(config, numbers["level"], layer)
            key = key[: found.start()] + theirs.format(**numbers) + key[found.end() :]
    return key


# Of each class, by diffusers' name for it: prefix and rules of the original first.
NAMINGS = {
    "UNet2DConditionModel": [("model.diffusion_model.", UNET_RULES)],
    "AutoencoderKL": [
        ("first_stage_model.", VAE_RULES), ("first_stage_model.", OLD_VAE_RULES),
    ],
    "CLIPTextModel": [
        ("cond_stage_model.transformer.", ()),
        ("cond_stage_model.model.", OPENCLIP_RULES),
    ],
}


def renamed_keys(model: nn.Module, naming: int = 0) -> dict[str, str]:
    """Each key of the model's file, and what others call it: {ours: theirs}."""
    prefix, rules = NAMINGS[model.diffusers_class][naming]
    keys = model.rename_on_save(model.state_dict())
    return {key: prefix + rename(key, rules, model.config) for key in keys}


# Names in single files on which no picture depends: what training, merging and other
# programs leave there, and what a whole CLIP has besides its layers.
HARMLESS = re.compile(
    r"(?!positional_embedding$)[^.]+$|model_ema\.(decay|num_updates)$"
    r"|(first_stage_model\.)?loss\.|(embedding_manager|bundle_emb|denoiser)\."
    r"|(.*\.)?(logit_scale|text_projection(\.weight)?|attn_mask)$"
)


def prefixes(diffusers_class: str) -> tuple[str, ...]:
    """What the names of a network's weights begin with in an original file."""
    return tuple(dict(NAMINGS[diffusers_class]))


def averaged_name(key: str) -> str:
    """Where an original checkpoint keeps the running average (EMA) of a weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def split_projections(
    state: dict[str, Tensor], layers: int | None
) -> dict[str, Tensor]:
    """OpenCLIP's query, key and value, one matrix in its files, as three.

    Stable Diffusion 2 leaves out the last layer, which its files still have: the one
    after our `layers`.
    """
    split = {}
    for key, tensor in state.items():
        start, found, kind = key.partition(".attn.in_proj_")
        pieces = zip("qkv", tensor.chunk(3), strict=True) if found else ()
        names = {f"{start}.attn.{one}_proj.{kind}": piece for one, piece in pieces}
        split |= names or {key: tensor}
    unused = f"transformer.resblocks.{layers}."
    return {key: tensor for key, tensor in split.items() if unused not in key}


def fit_kernels(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and 1 × 1 convolutions, which are the same, as the model has them."""
    expected = model.state_dict()

    def fit(tensor: Tensor, shape: torch.Size) -> Tensor:
        rest = {*tensor.shape[2:], *shape[2:]}
        is_same = tensor.ndim > 1 and tensor.shape[:2] == shape[:2] and rest == {1}
        return tensor.reshape(shape) if is_same else tensor

    return {k: fit(t, expected[k].shape) if k in expected else t
            for k, t in state.items()}


def bare_text_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights without `text_model.`; of a whole CLIP, its half."""
    if any(key.startswith("vision_model.") for key in state):
        state = {k: t for k, t in state.items() if k.startswith("text_model.")}
    rest = ("visual.", "vision_model.")  # which sees pictures
    state = {k: t for k, t in state.items() if not k.startswith(rest)}
    state = {k: t for k, t in state.items() if not k.endswith("position_ids")}
    return rename_all(state, lambda key: key.removeprefix("text_model."))


def text_half(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """A text encoder's config; of a whole CLIP's, the `known` options of its half."""
    half = values.get("text_config")
    if not isinstance(half, dict):
        return values
    return {key: value for key, value in half.items() if key in known}


def rename_all(
    state: dict[str, Tensor], new_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """Rename every key; WeightsError where two of them would get one name."""
    sources = {}
    for key in state:
        other = sources.setdefault(new_name(key), key)
        if other != key:
            raise WeightsError(
                f"{other} and {key} are two names of one weight, {new_name(key)}; "
                "remove the one that does not belong to the model"
            )
    return {name: state[key] for name, key in sources.items()}


def own_weights(
    model: nn.Module, state: dict[str, Tensor], ema: bool = True
) -> dict[str, Tensor]:
    """What of a file belongs to the model, with the names of the model's own file.

    Of an original checkpoint that holds the UNet twice it takes the averaged (EMA)
    copy, or with `ema=False` the other. Names that it does not know stay, so that
    strict loading can list them. Raises WeightsError for a weight with two names.
    """
    before, ours = prefixes(model.diffusers_class), {}
    for naming in range(len(NAMINGS[model.diffusers_class])):
        ours |= {name: key for key, name in renamed_keys(model, naming).items()}
    state = {key: t for key, t in state.items() if not HARMLESS.match(key)}
    state = split_projections(state, getattr(model.config, "num_hidden_layers", None))
    part = {key: t for key, t in state.items() if key.startswith(before)}
    averages = {averaged_name(name): name for name in ours}
    if ema and averages.keys() & state.keys():  # those, and what is left unknown
        part = {key: t for key, t in part.items() if key not in ours}
        copies = {key: t for key, t in state.items() if key.startswith("model_ema.")}
        part |= {averages.get(key, key): t for key, t in copies.items()}
    if not part:  # this network alone, with or without the original's names
        part = {k: t for k, t in state.items() if not k.startswith("model_ema.")}

    def our_name(key: str) -> str:
        found = [ours[start + key] for start in ("", *before) if start + key in ours]
        (bare,) = {key.removeprefix(s) for s in before if key.startswith(s)} or {key}
        return found[0] if found else bare

    return fit_kernels(model, rename_all(part, our_name))


def to_original(model: nn.Module) -> dict[str, Tensor]:
    """The weights as an original Stable Diffusion file has them, ready to be saved."""
    state_dict, original = model.rename_on_save(model.state_dict()), {}
    openclip = getattr(model.config, "hidden_act", None) == "gelu"  # as in SD 2.x
    for key, name in renamed_keys(model, naming=int(openclip)).items():
        tensor = state_dict[key]
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # there, a 1 × 1 convolution
        name = re.sub(r"\.attn\.[qkv]_proj\.", ".attn.in_proj_", name)
        first = [original[name]] if name in original else []
        original[name] = torch.cat([*first, tensor]) if first else tensor
    return original


PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "scheduler": ("diffusers", None),
}


def write_index(folder: Path, scheduler: str) -> None:
    """Write a folder's model_index.json; `scheduler` is the name of its class."""
    index = {part: list(names) for part, names in PARTS.items()}
    index["scheduler"][1] = scheduler
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    index |= {part: [None, None] for part in unused}
    index |= {"_class_name": "StableDiffusionPipeline"}
    index |= {"_diffusers_version": "0.42.1"}  # that this layout was tested with
    index |= {"requires_safety_checker": False}
    write_json(index, folder / INDEX)


def check_index(folder: Path, given: tuple[str, ...] = ()) -> None:
    """Raise WeightsError for the folder of another kind of model.

    Parts that are `given` otherwise, such as "vae", do not matter.
    """
    path = folder / INDEX
    index = read_json(path)
    for part, (_, expected) in PARTS.items():
        entry = index.get(part)
        is_pair = isinstance(entry, list) and len(entry) == 2
        found = entry[1] if is_pair else entry
        known = (expected, f"{expected}Fast") if expected else (found,)
        fits = is_pair and isinstance(found, str) and found in known
        if not fits and part not in given:
            raise WeightsError(
                f"{path} ({index.get('_class_name')}) has {part} = {found}, "
                f"expected {expected or 'a scheduler'}; "
                "give a Stable Diffusion 1.x or 2.x model"
            )


def model_folders() -> list[Path]:
    """Where shipped models may lie: $SDBOOK_MODELS, the package, the book's data/."""
    package = Path(str(importlib.resources.files("sdbook")))
    folders = [package / "models", package.parent / "data" / "models"]
    if os.environ.get("SDBOOK_MODELS"):
        folders.insert(0, Path(os.environ["SDBOOK_MODELS"]))
    return folders


def shipped_models() -> dict[str, Path]:
    """What needs no download, by name: whole models, and CLIPs."""
    found = {}
    for folder in model_folders():
        for file in ("model_index.json", "clip.safetensors"):
            for path in sorted(folder.glob(f"*/{file}")):
                found.setdefault(path.parent.name, path.parent)
    return found


def find_model(
    name: str | os.PathLike, revision: str | None = None, variant: str | None = None,
    weights: bool = True,
) -> Path:
    """Where a model is: a folder, a file, a shipped model's name, a Hugging Face id.

    Raises FileNotFoundError, saying what there is, when it is none of them.
    """
    shipped, path = shipped_models(), as_path(name, "a model")
    whole = [one for one, folder in shipped.items() if (folder / INDEX).is_file()]
    known = f"shipped with the book: {', '.join(whole) or 'none found'}"
    finish_saving(path)
    if (path / INDEX).is_file() or path.is_file():
        return path
    if str(name) in whole:
        return shipped[str(name)]
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} has no {INDEX} (it has: {list_folder(path)}); "
            f"give the folder that save_pretrained wrote, or a name ({known})"
        )
    if path.exists():
        raise FileNotFoundError(f"{no_file(path)}; give a model ({known})")
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"there is no model {str(name)!r}; give a folder, an id like "
            f"owner/model, or a name ({known})"
        )
    return download(str(name), tuple(PARTS), revision, variant, weights)


def check_checkpoint(path: Path, given: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a file; WeightsError unless they are all three networks.

    Parts that are `given` otherwise, such as "vae", may be missing.
    """
    state = read_weights(path)
    before = {name: prefixes(name) for name in NAMINGS}
    missing = [
        f"no {name} (its keys begin with {starts[0]})"
        for name, starts in before.items()
        if not any(key.startswith(starts) for key in state)
        and name not in [PARTS[part][1] for part in given]
    ]
    if missing:
        raise WeightsError(
            f"{path} is not one whole Stable Diffusion checkpoint: "
            f"{'; '.join(missing)}. By its names it looks like {family(state)}. Give a "
            "checkpoint of SD 1.x or 2.x, or a folder in the diffusers layout; only a "
            "VAE may come from elsewhere, as vae="
        )
    known = ("model_ema.", *(start for starts in before.values() for start in starts))
    others = [k for k in state if not k.startswith(known) and not HARMLESS.match(k)]
    if others:
        raise WeightsError(
            f"{path}: {len(others)} unexpected ({some(others)}), which none of the "
            "three networks has; remove them, or save the model without them"
        )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    second = "first_stage_model.decoder.conv_in.weight"
    if first in state and second in state:
        check_task(state[first].shape[1], state[second].shape[1], path)
    return state


# What a UNet with more input channels than latents have is for.
TASKS = {
    5: "a depth-to-image model", 7: "an upscaler",
    8: "an instruct-pix2pix model", 9: "an inpainting model",
}


def check_task(channels: int, latents: int, where: str | Path) -> None:
    """Raise WeightsError for a UNet that reads more than latents; say what it is."""
    if channels in TASKS and channels != latents:
        raise WeightsError(
            f"{where} is {TASKS[channels]}: its UNet reads {channels} channels, of "
            f"which latents are {latents}, and needs another pipeline; give a "
            "text-to-image model, which paints into pictures with image= and mask="
        )


def told_schedule(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """A scheduler's options that a single file tells of its training.

    Trainers mark v-prediction and zero terminal SNR with empty tensors, or in the
    facts of the header. Stable Diffusion 2 without a mark: v, with a warning.
    """
    told = read_facts(path).get("modelspec.prediction_type", "")
    if "v_pred" in state or told.startswith("v"):
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {"prediction_type": "v_prediction", **(zero if "ztsnr" in state else {})}
    if family(state) != "SD 2.x" or told:
        return {}
    warnings.warn(
        f"{path} does not say what its UNet predicts; taken for v, as of SD 2.1 at "
        "768 pixels. If all is noise, give as config= a folder whose scheduler says so",
        stacklevel=3,
    )
    return {"prediction_type": "v_prediction"}


def describe(path: str | Path) -> str:
    """What a file of weights is, in a line; raises what `read_weights` raises."""
    state = read_weights(path)
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    fit = "crc32" in read_facts(Path(path))
    return (
        f"{Path(path).name}: {family(state)}; {len(state)} tensors, {size:,.1f} MB of "
        f"{', '.join(sorted(types))}; {'check sums fit' if fit else 'no check sums'}"
    )


def find_part(name: str | os.PathLike, part: str, weights: bool = True) -> Path:
    """Where a part of a model is, such as its `vae`: a folder, or one file.

    `name` is that folder or file, a model that has the part, the name of one that ships
    with the book, or a hub id. Raises FileNotFoundError, saying what there is.
    """
    path, shipped = as_path(name, f"a {part}"), shipped_models()
    finish_saving(path)
    here = path.is_file() or (path / part).is_dir() or any(path.glob("*config.json"))
    if not here and str(name) in shipped:
        path = shipped[str(name)]
    elif is_hub_id(name):
        path = download(str(name), (part, ""), weights=weights)
    elif not path.exists():
        raise FileNotFoundError(
            f"there is no model {str(name)!r} (shipped with the book: "
            f"{', '.join(shipped) or 'none found'}); give one of these names, an id "
            "like owner/model, or a folder"
        )
    return path / part if (path / part).is_dir() else path


CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # which all SD 1.x models share


def find_tokenizer(source: str | os.PathLike | None) -> Path:
    """The folder of a tokenizer, as `find_part` finds it; by default CLIP's own."""
    name = CLIP_TOKENIZER if source is None else source
    try:
        return find_part(name, "tokenizer", weights=False)
    except FileNotFoundError as error:
        why = "" if source else "a single file holds no tokenizer, and "
        raise FileNotFoundError(f"{why}{error} as tokenizer=") from error
