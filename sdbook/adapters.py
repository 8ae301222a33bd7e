"""LoRA files, whoever wrote them: read in one set of names, and written.

Each holds two thin matrices for every layer that it changes, and what differs is the
names: those of diffusers and PEFT today, of diffusers before PEFT, and of kohya's
scripts. What a file says is not trusted: it costs bounded time, and what is not
understood is an error that names the file.
"""

import json
import math
import re
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from .counts import counted
from .files import (
    WeightsError,
    as_path,
    list_folder,
    read_facts,
    read_json,
    read_weights,
    save_weights,
)
from .formats import UNET_RULES, rename
from .kinds import cleaned

LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks in a folder
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # and where PEFT does
LORA_FILES = (LORA_FILE, "pytorch_lora_weights.bin", *PEFT_FILES)
# A pipeline's parts that can have a LoRA; and what kohya's files call them.
LORA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te"}
# What files call the two halves: PEFT, kohya, and diffusers' own scripts.
HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"))
HALVES += (("lora.down", "lora.up"),)
HALVES += (("lora_linear_layer.down", "lora_linear_layer.up"),)
# The ends of a file's keys, and which of a layer's tensors they mean. Older versions
# of PEFT wrote the adapter's name, too.
ENDS = {
    f".{half}{adapter}.weight": what
    for halves in HALVES
    for what, half in zip(("down", "up"), halves, strict=True)
    for adapter in ("", ".default")
} | {".alpha": "alpha"}
# Names of diffusers before PEFT, and today's.
OLDER_NAMES = (
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
)
# Relatives of LoRA, by what only their files hold: PEFT's and LyCORIS' names.
RELATIVES = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector\b",
    "LoRA in Tucker's form": r"\.lora_mid\.",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "BOFT": r"\.boft_",
    "OFT": r"\.oft_",
    "IA3": r"\.ia3_|\.on_input$",
    "GLoRA": r"\.([ab][12]|bm[12])\.weight$",
    "AdaLoRA": r"\.lora_E\b",
    "LoRA with biases": r"\.lora_(B|up)(\.default)?\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_[AB]\b",
    "a full difference": r"\.diff(_b)?$|\.[wb]_norm$",
}
# Options of PEFT's LoRA that make another method of it.
OTHER_METHODS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias")
OTHER_METHODS += ("alora_invocation_tokens", "arrow_config", "kasa_config")
OTHER_MODELS = {
    "Stable Diffusion XL": r"^lora_te2_|^text_encoder_2\.|(^|[._])add_embedding",
    "a model with a transformer in place of the UNet": r"^(lora_)?transformer[._]",
}
INSTEAD = "merge it in the program that made it, or use a plain LoRA"


def file_for(path, name: str, what: str) -> Path:
    """Where to write: a .safetensors file as given, or `name` in a folder.

    Raises ValueError for the name of a pickle, which we do not write.
    """
    path = as_path(path, what)
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"{path} would be a pickle; give a .safetensors file")
    return path if path.suffix.lower() == ".safetensors" else path / name


def check_number(
    name: str, value, at_least: int | None = None, at_most: int | None = None
) -> None:
    """Raise ValueError for what is not a finite number.

    With `at_least`, for what is not a whole one, or beyond these limits.
    """
    try:
        cleaned(value, float)
        cleaned(value, float if at_least is None else int)
    except (TypeError, OverflowError):  # the second: more than a float can hold
        what = "finite" if at_least is None else "whole"
        raise ValueError(f"{name} is {value!r:.60}; give a {what} number") from None
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} is {value!r:.60}; give at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} is {value!r:.60}; give at most {at_most}")


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


def save_lora(path: str | Path, *loras: nn.Module, kohya: bool = False) -> None:
    """Write LoRAs of a UNet, of a text encoder, or of both into one file.

    `path` is a .safetensors file or a folder. The layout is diffusers' (with PEFT's
    config) or kohya's. `scale` is not written: it belongs to the user. Raises
    ValueError for two LoRAs of the same model.
    """
    path, tensors, config = file_for(path, LORA_FILE, "a LoRA"), {}, {}
    parts = [part_of(lora.model()) for lora in loras]
    if len(set(parts)) != len(parts) or not parts:
        raise ValueError(
            f"LoRAs of {', '.join(parts) or 'nothing'}; a file holds at most one of "
            "each of unet, text_encoder"
        )
    for lora in loras:
        config |= lora_config(lora)
        for name, pair in zip(lora.names, lora.pairs, strict=True):
            key = stem(lora.model(), name, kohya)
            down, up = HALVES[kohya]
            tensors[f"{key}.{down}.weight"] = pair.down.weight
            tensors[f"{key}.{up}.weight"] = pair.up.weight
            if kohya:
                tensors[f"{key}.alpha"] = torch.tensor(float(pair.alpha))
    facts = {} if kohya else {"lora_adapter_metadata": json.dumps(config)}
    save_weights(tensors, path, **facts)


def find_lora(path: str | Path) -> list[Path]:
    """The files of a LoRA: a file, or a folder's, or one for each part in a folder.

    Raises FileNotFoundError, saying what a folder has instead.
    """
    path = as_path(path, "a LoRA")
    if not path.is_dir():
        return [path]
    places = [[path / name for name in LORA_FILES]]
    places += [[path / part / name for name in PEFT_FILES] for part in LORA_PARTS]
    found = [next(filter(Path.is_file, files), None) for files in places]
    if found[0]:
        return found[:1]  # diffusers' file, or PEFT's
    if not any(found):
        raise FileNotFoundError(
            f"{path} has no LoRA (it has: {list_folder(path)}); give a file, or a "
            f"folder with {LORA_FILE} or {PEFT_FILES[0]}"
        )
    return list(filter(None, found))


def layer_names(models: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """What files may call the layers of the models: {their name: (part, ours)}."""
    names = {}
    for part, model in models.items():
        kohya = [LORA_PARTS[part]] + ["lora_te1"] * (part == "text_encoder")
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            if part == "unet":  # or as the original Stable Diffusion calls it
                original = rename(f"{name}.", UNET_RULES, model.config)
                own = [name, original.removesuffix(".")]
            else:
                own = [name, f"text_model.{name}"]
            for one in own:
                flat = one.replace(".", "_")
                dotted = [one, f"{part}.{one}"]
                for theirs in dotted + [f"{start}_{flat}" for start in kohya]:
                    names[theirs] = part, name
    return names


def split_key(key: str) -> tuple[str, str]:
    """A file's key as the layer that it is for and what of it: down, up or alpha.

    What is none of the three is "".
    """
    key = key.replace("base_model.model.", "").removeprefix("diffusion_model.")
    for older, newer in OLDER_NAMES:
        key = re.sub(older, newer, key)
    for end, what in ENDS.items():
        if key.endswith(end):
            return key.removesuffix(end), what
    return key, ""


def read_lora(
    path: str | Path, models: dict[str, nn.Module]
) -> dict[str, dict[str, tuple[Tensor, Tensor, int | float]]]:
    """A LoRA's matrices, whoever wrote it: {part: {layer: (down, up, alpha)}}.

    `models` are what it may change, by part; shapes are those that the layers need.
    Raises FileNotFoundError, and WeightsError, naming the file, for what is no LoRA
    for these models.
    """
    names, found = layer_names(models), {}
    for file in find_lora(path):
        tensors = read_weights(file)
        refuse_relatives(file, tensors)
        settings, layers, rest = read_settings(file, tensors), {}, []
        for key, tensor in tensors.items():
            theirs, what = split_key(key)
            place = names.get(theirs) if what else None
            if place is None:
                rest.append(key)
            elif what in layers.setdefault(place, {}):
                raise WeightsError(f"{file} has {what} of {place[1]} under two names")
            else:
                layers[place][what] = tensor
        refuse_rest(file, rest, layers)
        for (part, name), given in layers.items():
            layer, where = models[part].get_submodule(name), f"{file}: {name}"
            down, up = fit_matrices(where, layer, given)
            alpha = alpha_of(where, part, name, given, settings, len(down))
            found.setdefault(part, {})[name] = down, up, alpha
    return found


def refuse_relatives(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise WeightsError for the file of another method than LoRA, naming it."""
    for kind, names in RELATIVES.items():
        pattern = re.compile(names)
        if key := next(filter(pattern.search, tensors), None):
            if kind == "OFT" and tensors[key].ndim == 4:
                kind = "BOFT"  # as LyCORIS has it
            raise WeightsError(
                f"{file} is {kind} ({key:.200}), which we cannot read; {INSTEAD}"
            )


def refuse_rest(file: Path, rest: list[str], found: dict) -> None:
    """Raise WeightsError where tensors are left over, or none was of use."""
    if rest or not found:
        made_for = [
            kind for kind, names in OTHER_MODELS.items()
            if any(re.search(names, key) for key in rest)
        ]  # fmt: skip
        guess = f", made for {made_for[0]}" if made_for else ""
        some = ", ".join(f"{key:.200}" for key in rest[:5])
        raise WeightsError(
            f"{file} holds what fits nothing here: {counted(len(rest), 'tensor')} "
            f"({some}){guess}; "
            "give a LoRA for this model, with names such as unet.….lora_A.weight "
            "(diffusers) or lora_unet_….lora_down.weight (kohya)"
        )


def fit_matrices(
    where: str, layer: nn.Module, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Down and up of a file, float32, in the shapes that a pair for the layer has.

    A kernel of 1 × 1 may be a matrix. Raises WeightsError for what cannot be meant.
    """
    rank = given["down"].shape[0] if "down" in given and given["down"].ndim else 0
    outputs, *inputs = layer.weight.shape
    fitted = []
    for what, wanted in (
        ("down", (rank, *inputs)),
        ("up", (outputs, rank, *[1] * (len(inputs) - 1))),
    ):
        matrix = given.get(what)
        if matrix is None:
            raise WeightsError(f"{where} has no {what} matrix; copy the file again")
        if matrix.shape[:2] != wanted[:2] or matrix.numel() != math.prod(wanted):
            raise WeightsError(
                f"{where}: its {what} matrix is {tuple(matrix.shape)}, but this model "
                f"needs {wanted}; use the model it was made for"
            )
        if not rank or not matrix.is_floating_point():
            raise WeightsError(
                f"{where}: its {what} matrix is {tuple(matrix.shape)} of "
                f"{matrix.dtype}, which is no LoRA's; copy the file again"
            )
        matrix = matrix.float().reshape(wanted)
        if not matrix.isfinite().all():
            raise WeightsError(
                f"{where}: its {what} matrix holds NaN or infinity; that training "
                "failed, use an earlier state of it"
            )
        fitted.append(matrix)
    return fitted[0], fitted[1]


def read_settings(file: Path, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """PEFT's settings for a LoRA file, by part; empty where there are none.

    In diffusers' files they are metadata, beside PEFT's own in adapter_config.json.
    Raises WeightsError for what is not understood, or is another method than LoRA.
    """
    by_part, where = {part: {} for part in LORA_PARTS}, file
    is_pefts = any(key.startswith("base_model.") for key in tensors)
    if is_pefts or file.name in PEFT_FILES:
        where = file.with_name("adapter_config.json")
        by_part = dict.fromkeys(LORA_PARTS, read_json(where))
    elif file.suffix.lower() == ".safetensors":
        where = f"lora_adapter_metadata in {file}"
        text = read_facts(file).get("lora_adapter_metadata", "{}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{where} is not valid JSON; save it again") from error
        if not isinstance(values, dict):
            raise WeightsError(f"{where} is {text:.40}, no JSON object; save it again")
        for key, value in values.items():
            part, _, name = key.partition(".")
            if part in by_part:
                by_part[part][name] = value
    for settings in by_part.values():
        check_lora_settings(where, settings, len(tensors))
    return by_part


def check_lora_settings(where: str | Path, settings: dict, count: int) -> None:
    """Raise WeightsError for settings that no LoRA of so many tensors has."""
    kind = settings.get("peft_type") or "LORA"
    others = [name for name in OTHER_METHODS if settings.get(name)]
    if kind != "LORA" or others:
        other = others[0] if others else f"peft_type {kind!r:.40}"
        raise WeightsError(f"{where} has {other}, another method than LoRA; {INSTEAD}")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > count:
        raise WeightsError(
            f"{where}: alpha_pattern must say of some layers which alpha they have, "
            f"not {patterns!r:.60}"
        )
    alphas = {f"alpha_pattern {name!r:.60}": alpha for name, alpha in patterns.items()}
    for name, alpha in {"lora_alpha": settings.get("lora_alpha", 1), **alphas}.items():
        try:
            check_number(name, alpha)
        except ValueError as error:
            raise WeightsError(f"{where}: {error}") from error
    for pattern in patterns:
        if not globs_of(pattern):
            raise WeightsError(
                f"{where}: alpha_pattern {pattern!r:.60} is more than layers' names "
                "with .* and |, which is all we follow; write the names out"
            )


def globs_of(pattern: str) -> list[str]:
    r"""What of PEFT's patterns we follow, as globs; none for any other.

    Those are regular expressions, which a stranger could write so that they never
    end. Globs always do. Names, `.` and `\.`, `.*`, `[0-9]`, `\d`, `^`, `$` and `|`
    are enough for layers.
    """
    piece, globs = r"\w|-|\\?\.|\.\*|\\d|\[\w+(-\w)?\]", []
    for one in pattern.split("|"):
        if len(pattern) > 500 or not re.fullmatch(rf"\^?({piece})+\$?", one):
            return []
        glob = one.removeprefix("^").removesuffix("$")
        glob = glob.replace(r"\d", "[0-9]").replace(r"\.", ".").replace(".*", "*")
        globs += [glob] if one.startswith("^") else [glob, f"*.{glob}"]
    return globs


def alpha_of(
    where: str, part: str, name: str, given: dict, settings: dict, rank: int
) -> int | float:
    """The alpha of a layer, of which alpha / rank counts.

    By the file's own tensor, or else PEFT's settings; without either it is the rank.
    """
    if "alpha" in given:
        alpha = given["alpha"]
        if alpha.numel() != 1 or alpha.is_complex() or not alpha.isfinite().all():
            some = alpha.flatten()[:4].tolist()
            raise WeightsError(
                f"{where}: its alpha is {some}, where one number is expected; "
                "copy the file again"
            )
        return alpha.item()
    settings = settings[part]
    names = [name] + [f"text_model.{name}"] * (part == "text_encoder")
    # 8 is what PEFT takes where its settings name none.
    alpha = settings.get("lora_alpha", 8 if settings else rank)
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if any(fnmatchcase(one, glob) for glob in globs_of(pattern) for one in names):
            alpha = other
            break
    # rsLoRA (Kalajdzievski, 2023) counts alpha / √rank.
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
