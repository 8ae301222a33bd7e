"""LoRA files and words of others: read as their own libraries do, or refused."""

import json
import math
import time
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from helpers import relative_error, small_pipeline
from safetensors.torch import save_file
from torch import nn

from sdbook.adapters import LORA_FILE, check_number, globs_of, layer_names
from sdbook.files import WeightsError, read_weights
from sdbook.finetuning import (
    LoRA,
    LoRATrainingConfig,
    add_word,
    load_lora,
    load_word,
    save_lora,
    save_word,
)
from sdbook.vocabulary import expand_words

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2"
TEXT = "encoder.layers.1.self_attn"
GIVEN = {}


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline((8, 16), (8, 8), width=16)


@pytest.fixture(scope="module")
def theirs(pipe, tmp_path_factory):
    """The same pipeline, opened by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@torch.no_grad()
def answers(pipe):
    """What a UNet and a text model make of one input; ours or diffusers'."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context, t = torch.randn(2, 5, 16, generator=generator), torch.tensor([3, 700])
    ids = torch.arange(16)[None]
    answer, states = pipe.unet(x, t, context), pipe.text_encoder(ids)
    if hasattr(answer, "sample"):
        answer, states = answer.sample, states[0]
    return answer, states


def ours_with(pipe, path):
    """Our answers with a LoRA file, and then without again."""
    loras = load_lora(pipe, path)
    found = answers(pipe)
    for lora in loras:
        lora.remove()
    return found


def assert_same(one, other, bound=1e-5):
    for ours, reference in zip(one, other, strict=True):
        assert relative_error(ours, reference) < bound


def matrices(pipe, alpha=3.0):
    """{layer: (down, up)} of some layers of each part, and our answers with them."""
    torch.manual_seed(1)
    pairs = {}
    for part, names in (
        ("unet", [f"{BLOCK}.to_{one}" for one in ("q", "k", "v", "out.0")]),
        ("text_encoder", [f"{TEXT}.{one}_proj" for one in ("q", "k", "v", "out")]),
    ):
        lora = LoRA(getattr(pipe, part), rank=2, alpha=alpha)
        for pair in lora.pairs:
            keep = lora.names[[*lora.pairs].index(pair)] in names
            nn.init.normal_(pair.up.weight, std=0.3 * keep)
        pairs |= {
            (part, name): (pair.down.weight.detach(), pair.up.weight.detach())
            for name, pair in zip(lora.names, lora.pairs, strict=True)
            if name in names
        }
        GIVEN[part] = lora
    found = answers(pipe)
    for lora in GIVEN.values():
        lora.remove()
    return pairs, found


def write(path, pairs, name_of, ends=("lora_A", "lora_B"), **more):
    tensors = {}
    for (part, name), halves in pairs.items():
        for end, matrix in zip(ends, halves, strict=True):
            tensors[f"{name_of(part, name)}{end}.weight"] = matrix
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({**tensors, **more}, path)


def older(part, name):
    """`to_q_lora` behind a processor, as diffusers wrote before PEFT."""
    name = name.replace("_proj", "").replace(f"{TEXT}.", f"{TEXT}.to_")
    name = name.replace("to_out.0", "to_out")
    block, _, map_ = name.rpartition(".")
    processor = ".processor" if part == "unet" else ""
    start = "unet" if part == "unet" else "text_encoder.text_model"
    return f"{start}.{block}{processor}.{map_}_lora."


def kohya(part, name, te="te1"):
    start = "lora_unet_" if part == "unet" else f"lora_{te}_text_model_"
    return f"{start}{name}".replace(".", "_") + "."


LAYOUTS = {
    "older diffusers": (older, ("down", "up")),
    "older, no unet.": (
        lambda part, name: older(part, name).removeprefix("unet."), ("down", "up"),
    ),
    "diffusers with PEFT": (
        lambda part, name: f"{part}.{name}.".replace(".encoder", ".text_model.encoder"),
        ("lora_A", "lora_B"),
    ),
    "its own scripts": (
        lambda part, name: f"{part}.text_model.{name}.lora_linear_layer."
        if part == "text_encoder" else f"{part}.{name}.lora.", ("down", "up"),
    ),
    "lora_te1": (kohya, ("lora_down", "lora_up")),
    "adapter's name": (
        lambda part, name: f"{part}.{name}.", ("lora_A.default", "lora_B.default"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_of_the_world(layout, pipe, theirs, tmp_path):
    """Where neither metadata nor a tensor says alpha, it is the rank."""
    pairs, expected = matrices(pipe, alpha=2)
    path = tmp_path / "lora.safetensors"
    write(path, pairs, *LAYOUTS[layout])
    assert_same(ours_with(pipe, path), expected)
    if layout not in ("older, no unet.", "adapter's name"):  # theirs says: no keys
        theirs.load_lora_weights(path)
        try:
            assert_same(answers(theirs), expected)
        finally:
            theirs.unload_lora_weights()


@pytest.mark.parametrize("ours", ["input_blocks_1_1", "down_blocks_0_attentions_0"])
def test_names_of_the_original_unet(ours, pipe, tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    for path, key in (
        ("a", f"lora_unet_{ours}_transformer_blocks_0_attn1_to_q"),
        ("b", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
    ):
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        save_file(tensors, tmp_path / f"{path}.safetensors")
        (lora,) = load_lora(pipe, tmp_path / f"{path}.safetensors")
        lora.remove()
        assert lora.names == [name]


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", LORA_FILE])
def test_a_folder_of_diffusers(name, pipe, theirs, tmp_path):
    pairs, expected = matrices(pipe, alpha=2)
    write(tmp_path / name, pairs, *LAYOUTS["older diffusers"])
    assert_same(ours_with(pipe, tmp_path), expected)
    theirs.load_lora_weights(tmp_path, weight_name=name)
    try:
        assert_same(answers(theirs), expected)
    finally:
        theirs.unload_lora_weights()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_what_peft_saves(rslora, safe, pipe, theirs, tmp_path):
    """One folder for each part, ranks and alphas by name and by pattern."""
    from peft import LoraConfig, get_peft_model

    for part, targets, ranks, alphas in (
        ("unet", ["to_q", "to_k", "to_out.0", "conv1"], {"attn2.to_k": 3},
         {f"^{BLOCK}.to_q": 7, r"down_blocks.*attn1\.to_k": 4}),
        ("text_encoder", ["q_proj", "fc1"], {"fc1": 4},
         {r"layers.1.mlp.fc1|layers.\d.self_attn.q_proj": 5}),
    ):  # fmt: skip
        config = LoraConfig(
            r=2, lora_alpha=3, target_modules=targets, rank_pattern=ranks,
            alpha_pattern=alphas, use_rslora=rslora, init_lora_weights=False,
        )  # fmt: skip
        model = get_peft_model(getattr(theirs, part), config)
        model.save_pretrained(tmp_path / part, safe_serialization=safe)
        setattr(theirs, part, model)
    try:
        expected = answers(theirs)
    finally:
        for part in ("unet", "text_encoder"):
            setattr(theirs, part, getattr(theirs, part).unload())
    ours = ours_with(pipe, tmp_path)
    assert_same(ours, expected)
    assert relative_error(ours[0], answers(pipe)[0]) > 1e-2
    both = [ours_with(pipe, tmp_path / part) for part in ("unet", "text_encoder")]
    assert_same((both[0][0], both[1][1]), expected)
    (file,) = (tmp_path / "unet").glob("adapter_model.*")
    assert_same(ours_with(pipe, file), both[0])
    settings = tmp_path / "unet/adapter_config.json"
    for text in ("[" * 100_000, "[]", '{"lora_alpha": "8"}', '{"alpha_pattern": 5}'):
        settings.write_text(text)
        with pytest.raises(WeightsError, match=r"adapter_config\.json"):
            load_lora(pipe, file)
    settings.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_lora(pipe, file)


def test_rslora_goes_on_into_our_files(pipe, tmp_path):
    path = tmp_path / "a.safetensors"
    lora = LoRA(pipe.text_encoder, rank=3, alpha=2)
    save_lora(path, lora)
    lora.remove()
    facts = {"text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    save_file(read_weights(path), path, {"lora_adapter_metadata": json.dumps(facts)})
    (lora,) = load_lora(pipe, path)
    lora.remove()
    assert lora.pairs[0].alpha / 3 == pytest.approx(2 / math.sqrt(3))
    save_lora(path, lora, kohya=True)
    (again,) = load_lora(pipe, path)
    again.remove()
    assert again.pairs[0].alpha == pytest.approx(lora.pairs[0].alpha)


KEY = "lora_unet_conv_in"
RELATIVES = {
    "DoRA": [f"{KEY}.dora_scale", "unet.conv_in.lora_magnitude_vector"],
    "Tucker": [f"{KEY}.lora_mid.weight"],
    "LoHa": [f"{KEY}.hada_w1_a", f"{KEY}.hada_t1"],
    "LoKr": [f"{KEY}.lokr_w1", f"{KEY}.lokr_t2"],
    "OFT": [f"{KEY}.oft_blocks", "base_model.model.conv_in.oft_R"],
    "BOFT": ["base_model.model.conv_in.boft_R"],
    "IA3": [f"{KEY}.on_input", "base_model.model.conv_in.ia3_l"],
    "GLoRA": [f"{KEY}.a1.weight", f"{KEY}.bm2.weight"],
    "full difference": [f"{KEY}.diff", f"{KEY}.diff_b", f"{KEY}.w_norm"],
    "biases": ["unet.conv_in.lora_B.bias"],
    "embeddings": ["text_encoder.x.lora_embedding_A"],
}


@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_of_lora_are_named(kind, pipe, tmp_path):
    path = tmp_path / "other.safetensors"
    pair = {f"{KEY}.lora_down.weight": torch.zeros(1, 4, 3, 3),
            f"{KEY}.lora_up.weight": torch.zeros(8, 1, 1, 1)}  # fmt: skip
    for key in RELATIVES[kind]:
        save_file({**pair, key: torch.zeros(2, 2, 2)}, path)
        with pytest.raises(WeightsError, match=rf"other\.safetensors is .*{kind}"):
            load_lora(pipe, path)
    save_file({f"{KEY}.oft_blocks": torch.zeros(2, 2, 2, 2)}, path)
    with pytest.raises(WeightsError, match="BOFT"):
        load_lora(pipe, path)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "BOFT", "IA3"])
def test_what_peft_saves_of_relatives_is_named(kind, pipe, theirs, tmp_path):
    import peft

    config = getattr(peft, f"{kind}Config")
    more = {"BOFT": {"boft_block_size": 2}, "IA3": {"feedforward_modules": []}}
    config = config(target_modules=["conv_in"], **more.get(kind, {}))
    model = peft.get_peft_model(theirs.unet, config)
    model.save_pretrained(tmp_path)
    model.unload()
    with pytest.raises(WeightsError, match=f"is {kind}"):
        load_lora(pipe, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    save_file({"base_model.model.conv_in.new": torch.zeros(1)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(WeightsError, match=f"{kind.upper()}"):
        load_lora(pipe, tmp_path)


@pytest.mark.parametrize(
    "key, words",
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "XL"),
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer"),
        ("unet:0:up", "fits? nothing"),
        ("model.diffusion_model.out.2.weight", "fits? nothing"),
    ],
)
def test_files_for_other_models(key, words, pipe, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsError, match=rf"other\.safetensors .*{words}"):
        load_lora(pipe, path)


# What a file says is not trusted


def lora_file(path, facts=None, **tensors):
    """A LoRA of one layer in diffusers' layout, with something else in it."""
    good = {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": torch.ones(16, 2)}
    every = {f"unet.{BLOCK}.to_q.{end}": t for end, t in {**good, **tensors}.items()}
    if facts is not None and not isinstance(facts, str):
        facts = json.dumps(facts)
    save_file(
        {key: tensor for key, tensor in every.items() if tensor is not None}, path,
        {} if facts is None else {"lora_adapter_metadata": facts},
    )  # fmt: skip
    return path


BAD_FACTS = {
    "a list": [],
    "null": None,
    "text": "5",
    "no JSON": "{",
    "a deep hole": "[" * 100_000,
    "a long number": '{"unet.lora_alpha": ' + "9" * 6000 + "}",
    "alpha as text": {"unet.lora_alpha": "8"},
    "alpha null": {"unet.lora_alpha": None},
    "three alphas": {"unet.lora_alpha": [1, 2, 3]},
    "alpha NaN": {"unet.lora_alpha": float("nan")},
    "a huge alpha": {"unet.lora_alpha": 10**400},
    "alpha true": {"unet.lora_alpha": True},
    "patterns as a list": {"unet.alpha_pattern": ["to_q"]},
    "a pattern's alpha as text": {"unet.alpha_pattern": {"to_q": "8"}},
    "a group": {"unet.alpha_pattern": {"(to_q)": 8}},
    "a hang": {"unet.alpha_pattern": {"([a-z_.0-9]+)+X": 8}},
    "another hang": {"unet.alpha_pattern": {"(.*a){25}": 8}},
    "an open bracket": {"unet.alpha_pattern": {"[": 8}},
    "an empty pattern": {"unet.alpha_pattern": {"": 8}},
    "a long pattern": {"unet.alpha_pattern": {".*" * 1000: 8}},
    "too many": {"unet.alpha_pattern": {f"to_q{i}": 8 for i in range(1000)}},
    "a kind that is none": {"unet.peft_type": ["LORA"]},
}


@pytest.mark.parametrize("what", BAD_FACTS)
def test_settings_that_no_lora_has(what, pipe, tmp_path):
    facts = BAD_FACTS[what]
    text = facts if isinstance(facts, str) else json.dumps(facts)
    path = lora_file(tmp_path / "bad.safetensors", text)
    began = time.perf_counter()
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        load_lora(pipe, path)
    assert time.perf_counter() - began < 2


def test_the_worst_pattern_that_is_followed_ends(pipe, tmp_path):
    facts = {"unet.alpha_pattern": {".*_" * 30 + "X": 8, "^mid.*to_q$": 6}}
    began = time.perf_counter()
    (lora,) = load_lora(pipe, lora_file(tmp_path / "a.safetensors", facts))
    lora.remove()
    assert time.perf_counter() - began < 2
    assert lora.pairs[0].alpha == 6


@pytest.mark.parametrize(
    "pattern",
    ["to_q", "attn2.to_q", r"^mid_block\.attentions", r"attn\d\.to_[kq]", "attn1|to_v",
     "^to_q", "o_q", ".*to_q", f"^{BLOCK}.to_q$", "to_[a-k]"],
)  # fmt: skip
def test_patterns_mean_what_peft_means(pattern, pipe):
    """The first that matches counts, for whole names behind a dot."""
    other = pytest.importorskip("peft.utils.other")
    if not hasattr(other, "get_pattern_key"):
        pytest.skip("this version of PEFT has another place for it")
    from fnmatch import fnmatchcase

    for part, name in set(layer_names({"unet": pipe.unet}).values()):
        theirs = other.get_pattern_key([pattern], name) == pattern
        ours = any(fnmatchcase(name, glob) for glob in globs_of(pattern))
        assert ours == theirs, (part, name)


BAD_TENSORS = {
    "three alphas": {"alpha": torch.ones(3)},
    "no alpha": {"alpha": torch.ones(0)},
    "alpha NaN": {"alpha": torch.tensor(float("nan"))},
    "no up": {"lora_B.weight": None},
    "no down": {"lora_A.weight": None},
    "alpha alone": {"lora_A.weight": None, "lora_B.weight": None,
                    "alpha": torch.tensor(1.0)},
    "rank 0": {"lora_A.weight": torch.ones(0, 16), "lora_B.weight": torch.ones(16, 0)},
    "a number": {"lora_A.weight": torch.tensor(1.0)},
    "a row": {"lora_A.weight": torch.ones(16)},
    "another rank": {"lora_B.weight": torch.ones(16, 3)},
    "whole numbers": {"lora_A.weight": torch.ones(2, 16, dtype=torch.int64)},
    "NaN": {"lora_B.weight": torch.full((16, 2), float("nan"))},
    "two names": {"lora_down.weight": torch.ones(2, 16)},
    "a bias": {"bias": torch.ones(16)},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_no_lora_has(what, pipe, tmp_path):
    before = answers(pipe)
    path = lora_file(tmp_path / "bad.safetensors", **BAD_TENSORS[what])
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        load_lora(pipe, path)
    for one, other in zip(answers(pipe), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x02X", b"PK\x03\x04"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
def test_files_that_are_none(kind, content, pipe, tmp_path):
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(content)
    for load in (load_lora, load_word):
        with pytest.raises(WeightsError, match=rf"bad\.{kind}"):
            load(pipe, path)


@pytest.mark.parametrize("path", ["", None, 5])
def test_a_path_that_is_none(path, pipe, tmp_path):
    from sdbook.files import as_path

    with pytest.raises(ValueError, match="give a file or a folder"):
        as_path(path, "a LoRA")
    if path == "":
        for load in (load_lora, load_word):
            with pytest.raises(ValueError, match="path of a .* is ''"):
                load(pipe, path)
        with pytest.raises(ValueError, match="is ''"):
            save_lora(path, LoRA(small_pipeline((8, 16), (8, 8), width=16).unet))


@pytest.mark.parametrize("name", ["a.bin", "a.PT", "a.ckpt"])
def test_no_pickle_is_written(name, pipe, tmp_path):
    for save in (lambda path: save_lora(path), lambda path: save_word(path, pipe, "x")):
        with pytest.raises(ValueError, match="would be a pickle"):
            save(tmp_path / name)


def test_a_folder_without_one_says_what_it_has(pipe, tmp_path):
    (tmp_path / "notes.txt").touch()
    for load in (load_lora, load_word):
        with pytest.raises(FileNotFoundError, match=r"it has: notes\.txt"):
            load(pipe, tmp_path)


@pytest.mark.parametrize("value", ["1", None, True, math.nan, math.inf, 10**400])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match="scale is .*; give a finite number"):
        check_number("scale", value)
    with pytest.raises(ValueError, match="rank is .*; give a whole number"):
        check_number("rank", 1.5 if value is None else value, at_least=1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "rank is 0; give at least 1"),
        ({"rank": 2**63}, "rank is .*; give at most"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"scale": float("inf")}, "scale is inf"),
    ],
)
def test_a_lora_of_numbers_that_cannot_be_meant(options, words, pipe, tmp_path):
    with pytest.raises(ValueError, match=words):
        LoRA(pipe.unet, **options)
    if "scale" in options:
        with pytest.raises(ValueError, match=words):
            load_lora(pipe, lora_file(tmp_path / "a.safetensors"), **options)


def test_an_alpha_of_zero_in_a_file_is_zero(pipe, tmp_path):
    path = lora_file(tmp_path / "a.safetensors", alpha=torch.tensor(0.0))
    (lora,) = load_lora(pipe, path)
    lora.remove()
    assert lora.pairs[0].alpha == 0 and not lora.pairs[0].change().any()
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha is"):
            LoRATrainingConfig(alpha=alpha)


# Words


@pytest.fixture
def taught():
    """A pipeline that may learn words."""
    return small_pipeline((8, 16), (8, 8), width=16)


@pytest.mark.parametrize(
    "word, why",
    [
        ("pi", "knows"), ("e", "knows"), ("red", "knows"), ("Red", "knows"),
        ("red</w>", "knows"), ("<|endoftext|>", "knows"), ("*", "knows"),
        ("tar", "tear.*star"), ("OUS", "tear.*house"), ("", "one word"),
        (" ", "one word"), ("a word", "one word"), (" <x>", "one word"),
        ("<x>\n", "one word"), ("\ud800", "no text"),
        pytest.param("y" * 10**6, "one word", id="long"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_new(word, why, pipe):
    if word == "pi":  # a piece of the vocabulary, whether or not this one learned it
        word = next(
            token for token in pipe.tokenizer.backend.get_vocab()
            if token.isalpha() and token.isascii() and len(token) > 1
        )  # fmt: skip
    table = pipe.text_encoder.embeddings.token_embedding.weight.clone()
    ids = pipe.tokenizer(["a red star above a blue house"])
    with pytest.raises(ValueError, match=why):
        add_word(pipe, word)
    assert torch.equal(pipe.text_encoder.embeddings.token_embedding.weight, table)
    assert torch.equal(pipe.tokenizer(["a red star above a blue house"]), ids)


def test_words_that_can_be_new(taught):
    """Each gets a row of its own and is found again, and tears no other."""
    pipe = taught
    prompts = ["a red star above a blue house", "two green fish"]
    before, size = pipe.tokenizer(prompts), len(pipe.tokenizer)
    words = ["Glorp", "🍎", "<teal>", "glorp-2", "glor", "über", "bad-5", "👩\u200d🚀"]
    numbers = [add_word(pipe, word) for word in words]
    assert numbers == [*range(size, size + len(words))]
    assert len(pipe.text_encoder.embeddings.token_embedding.weight) == numbers[-1] + 1
    for number, word in zip(numbers, words, strict=True):
        for text in (word, word.upper(), f"a {word} star", f"({word})"):
            assert number in pipe.tokenizer([text])
    assert torch.equal(pipe.tokenizer(prompts), before)
    for word in ("glorp", "GLORP", "u\u0308ber", "🍎", "<TEAL>"):
        with pytest.raises(ValueError, match="knows"):
            add_word(pipe, word)


def test_a_word_that_would_be_a_row_of_another(taught):
    add_word(taught, "<x>")
    with pytest.raises(ValueError, match="several rows"):
        add_word(taught, "<x>_1")
    add_word(taught, "<y>_1")
    with pytest.raises(ValueError, match="several rows"):
        add_word(taught, "<y>")


ROWS = torch.linspace(-1, 1, 48).view(3, 16)
WORDS = {
    "diffusers": ("learned_embeds.bin", {"<x>": ROWS}),
    "one row of diffusers": ("learned_embeds.safetensors", {"<x>": ROWS[0]}),
    "emb_params": ("<x>.safetensors", {"emb_params": ROWS}),
    "A1111": (
        "<x>.pt",
        {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS},
         "name": "<x>", "step": 3, "sd_checkpoint": None},
    ),
    "the first ones": (
        "<x>.pt",
        {"string_to_token": {"*": torch.tensor(265)},
         "string_to_param": nn.ParameterDict({"*": nn.Parameter(ROWS[:1])})},
    ),
    "half precision": ("<x>.safetensors", {"emb_params": ROWS.half()}),
}  # fmt: skip


@pytest.mark.parametrize("layout", WORDS)
def test_words_of_others(layout, taught, theirs, tmp_path):
    """In a folder or a file, with the rows and the ids that diffusers has."""
    name, content = WORDS[layout]
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    source = tmp_path if name.startswith("learned") else path
    assert load_word(taught, source) == "<x>"
    prompt = "a <x> star, <x>"
    ids = taught.tokenizer([prompt])
    if layout != "the first ones":  # which diffusers refuses
        tokenizer, text_encoder = map(deepcopy, (theirs.tokenizer, theirs.text_encoder))
        theirs.load_textual_inversion(
            source, "<x>", tokenizer, text_encoder, weight_name=name
        )
        text = theirs.maybe_convert_prompt(prompt, tokenizer)
        given = tokenizer(text, padding="max_length", max_length=16)
        assert given["input_ids"] == ids[0].tolist()
        with torch.no_grad():
            expected = text_encoder(ids)[0]
            assert relative_error(taught.text_encoder(ids), expected) < 1e-5
    taught.save_pretrained(tmp_path / "again")  # the rows are one word there, too
    again = type(taught).from_pretrained(tmp_path / "again")
    assert torch.equal(again.tokenizer([prompt]), ids)
    save_word(tmp_path / "saved", again, "<x>")
    assert torch.equal(
        read_weights(tmp_path / "saved/learned_embeds.safetensors")["<x>"],
        (ROWS if "one" not in layout and "first" not in layout else ROWS[:1])
        .to(content["emb_params"] if "half" in layout else ROWS).float(),
    )  # fmt: skip


def test_a_word_by_another_name(taught, tmp_path):
    path = tmp_path / "red.safetensors"
    save_file({"emb_params": ROWS}, path)
    with pytest.raises(ValueError, match=r"red\.safetensors.*knows 'red'"):
        load_word(taught, path)
    with pytest.raises(ValueError, match="one word"):
        load_word(taught, path, "")
    assert load_word(taught, path, "<red>") == "<red>"
    size = len(taught.tokenizer)
    assert taught.tokenizer(["<red>"])[0, 1:4].tolist() == [*range(size - 3, size)]
    tokens = taught.tokenizer.tokens("a <red> star")
    assert tokens[2:5] == ["<red>", "<red>_1", "<red>_2"]
    with pytest.raises(ValueError, match="knows"):
        load_word(taught, path, "<red>")
    assert len(taught.tokenizer) == size


BAD_WORDS = {
    "XL": {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32)},
    "one word": {"<a>": ROWS, "<b>": ROWS.clone()},
    "nothing": {},
    "SD 2.x": {"<a>": torch.ones(1, 1024)},
    "rows of 16": {"<a>": torch.ones(1, 2, 16)},
    "but rows of 16": {"<a>": torch.tensor(1.0)},
    "expected": {"<a>": torch.ones(1, 16, dtype=torch.int64)},
    "1 to 14 rows": {"<a>": torch.ones(15, 16)},
    "1 to .* rows": {"<a>": torch.ones(0, 16)},
    "finite": {"<a>": torch.full((1, 16), float("inf"))},
}


@pytest.mark.parametrize("words", BAD_WORDS)
def test_files_that_hold_no_word(words, pipe, tmp_path):
    size = len(pipe.tokenizer)
    save_file(BAD_WORDS[words], tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=rf"bad\.safetensors.*{words}"):
        load_word(pipe, tmp_path / "bad.safetensors")
    assert len(pipe.tokenizer) == size


@pytest.mark.parametrize(
    "content",
    [[ROWS], ROWS, {"string_to_param": 5}, {"string_to_param": {"*": 5}},
     {"string_to_param": OrderedDict()}, {"name": "x"}],
)  # fmt: skip
def test_pickles_that_hold_no_word(content, pipe, tmp_path):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"bad\.pt"):
        load_word(pipe, tmp_path / "bad.pt")


def test_special_tokens_are_no_words(pipe, tmp_path):
    with pytest.raises(ValueError, match="no added word"):
        save_word(tmp_path, pipe, "<|endoftext|>")


def test_ids_without_added_words_stay_as_they_are(pipe):
    ids = pipe.tokenizer.backend("a red star")["input_ids"]
    assert expand_words(pipe.tokenizer.backend, ids) == ids
