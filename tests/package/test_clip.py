"""The text model against transformers', the tokenizer, and contrastive learning."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdbook.clip import (
    CLIP,
    CLIPTextConfig,
    CLIPTextModel,
    Tokenizer,
    causal_mask,
    contrastive_loss,
    quick_gelu,
)
from sdbook.files import WeightsError, write_json
from sdbook.formats import bare_text_names

CAPTIONS = [
    f"{count} {colour} {shape}s {where} a {other} house"
    for count in ("two", "three")
    for colour in ("red", "blue", "green")
    for shape in ("star", "boat", "fish")
    for where in ("above", "left of")
    for other in ("yellow", "white")
]


def config(**values):
    small = {
        "vocab_size": 600,
        "hidden_size": 24,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 20,
        "bos_token_id": 598,
        "eos_token_id": 599,
        "pad_token_id": 599,
    }
    return CLIPTextConfig(**{**small, **values})


def reference_class(config):
    values = {k: v for k, v in config.to_dict().items() if k != "architectures"}
    reference = transformers.CLIPTextConfig(**values)
    return transformers.CLIPTextModel(reference).eval()


def ids_for(config, batch, n):
    ids = torch.randint(0, config.vocab_size - 2, (batch, n))
    ids[:, 0], ids[:, n // 2 :] = config.bos_token_id, config.eos_token_id
    return ids


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=600, max_length=20)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_hidden_layers": 1, "hidden_size": 15, "layer_norm_eps": 1e-3},
        {"num_attention_heads": 1, "hidden_act": "gelu"},
        {"num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 8},
    ],
)
@pytest.mark.parametrize("batch, n", [(1, 20), (3, 7)])
@torch.no_grad()
def test_equals_transformers(given, batch, n):
    torch.manual_seed(0)
    shape = config(**given)
    reference, ours = reference_class(shape), CLIPTextModel(shape).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.3)
    ours.load_state_dict(bare_text_names(reference.state_dict()), strict=True)
    ids = ids_for(shape, batch, n)
    expected = reference(ids).last_hidden_state
    error = (ours(ids) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


def test_stable_diffusion_shape():
    shape = CLIPTextConfig()
    with torch.device("meta"):
        ours, reference = CLIPTextModel(shape), reference_class(shape)
    theirs = bare_text_names(reference.state_dict())  # older ones have text_model.
    expected = {key: tensor.shape for key, tensor in theirs.items()}
    assert {k: t.shape for k, t in ours.state_dict().items()} == expected
    assert sum(p.numel() for p in ours.parameters()) == 123_060_480


def test_later_tokens_change_nothing_before_them():
    torch.manual_seed(0)
    model = CLIPTextModel(config()).eval()
    ids = ids_for(config(), 2, 12)
    changed = ids.clone()
    changed[:, 5:] = 3
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_causal_mask_and_quick_gelu():
    assert causal_mask(3).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    x = torch.linspace(-4, 4, 9)
    expected = transformers.activations.ACT2FN["quick_gelu"](x)
    assert torch.allclose(quick_gelu(x), expected, atol=1e-6)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="21 tokens, but the text model has 20"):
        CLIPTextModel(config())(torch.zeros(1, 21, dtype=torch.int64))


def test_folders_are_read_in_both_directions(tmp_path):
    torch.manual_seed(0)
    ours = CLIPTextModel(config()).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs, said = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(said.values()), said
    assert theirs.config.eos_token_id == 599
    theirs.save_pretrained(tmp_path / "theirs")
    again = CLIPTextModel.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    ids = ids_for(config(), 2, 20)
    with torch.no_grad():
        expected = theirs.eval()(ids).last_hidden_state
        assert torch.allclose(ours(ids), expected, atol=1e-5)
        assert torch.equal(again(ids), ours(ids))


def test_both_kinds_of_keys_are_read(tmp_path):
    ours = CLIPTextModel(config())
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert all(key.startswith("text_model.") for key in state)
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    bare["embeddings.position_ids"] = torch.arange(20)[None]
    save_file(bare, path)
    again = CLIPTextModel.from_pretrained(tmp_path)
    assert torch.equal(
        again.final_layer_norm.weight, ours.final_layer_norm.weight
    )
    with_stray = {f"text_model.{key}": tensor for key, tensor in bare.items()}
    save_file(with_stray, path)
    CLIPTextModel.from_pretrained(tmp_path)
    del with_stray["text_model.final_layer_norm.bias"]
    save_file(with_stray, path)
    with pytest.raises(WeightsError, match=r"1 missing \(final_layer_norm.bias\)"):
        CLIPTextModel.from_pretrained(tmp_path)


def test_published_config_is_read(tmp_path):
    published = {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    }
    read = CLIPTextConfig.from_dict(published)
    assert (read.hidden_size, read.num_hidden_layers) == (768, 12)
    with pytest.raises(WeightsError, match="model_type='bert'"):
        CLIPTextConfig.from_dict({**published, "model_type": "bert"})
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPTextConfig.from_dict({**published, "hidden_act": "relu"})
    with pytest.raises(ValueError, match="num_attention_heads=7"):
        CLIPTextConfig(num_attention_heads=7)


# The tokenizer


def test_rows_are_padded_with_the_end_token(tokenizer):
    ids = tokenizer(["", "two red stars"])
    assert ids.shape == (2, 20) and ids.dtype == torch.int64
    assert ids[0].tolist() == [tokenizer.start_id] + [tokenizer.end_id] * 19
    assert tokenizer.decode(ids[1]) == "two red stars"
    assert torch.equal(tokenizer("two red stars"), ids[1:])
    assert (tokenizer.start_id, tokenizer.end_id) == (
        len(tokenizer) - 2,
        len(tokenizer) - 1,
    )


def test_frequent_words_are_one_token(tokenizer):
    assert tokenizer.tokens("three red") == [
        "<|startoftext|>",
        "three</w>",
        "red</w>",
        "<|endoftext|>",
    ]


@pytest.mark.parametrize(
    "text", ["café", "鱼 and 🐟", "Ünïcödé", "a\tb\n c", "don't 42!"]
)
def test_any_text_can_be_spelled(tokenizer, text):
    pieces = tokenizer.tokens(text)
    assert "<|endoftext|>" not in pieces[1:-1]
    spelled = tokenizer.decode(tokenizer(text)[0]).replace(" ", "")
    assert spelled == "".join(text.lower().split())


def test_cut_words_are_named(tokenizer):
    with pytest.warns(UserWarning, match="does not see its last .*three blue fishs"):
        ids = tokenizer("two red stars " * 6 + "three blue fishs")
    assert ids.shape == (1, 20) and ids[0, -1] == tokenizer.end_id
    with pytest.warns(UserWarning, match=r"last 9,982 words: .* …'. Shorten"):
        assert tokenizer("red " * 10_000).shape == (1, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("red " * 18)


def test_training_is_repeatable_and_bounded(tokenizer):
    again = Tokenizer.train(iter(CAPTIONS), vocab_size=600, max_length=20)
    assert torch.equal(again(CAPTIONS), tokenizer(CAPTIONS))
    assert len(Tokenizer.train(CAPTIONS, vocab_size=520)) == 520
    with pytest.raises(ValueError, match="vocab_size=300.*514 or more"):
        Tokenizer.train(CAPTIONS, vocab_size=300)


def test_tokenizer_folder_opens_in_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokenizer(CAPTIONS), expected)
    # the files of older versions alone give the same tokenizer
    (tmp_path / "tokenizer.json").unlink()
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.max_length == 20 and len(again) == len(tokenizer)
    assert torch.equal(again(CAPTIONS), expected)


def test_bad_input_to_the_tokenizer(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="must be text|Type-check"):
        tokenizer(["fine", None])
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


# Contrastive learning


def test_contrastive_loss():
    assert contrastive_loss(100 * torch.eye(4)).item() < 1e-6
    assert torch.isclose(contrastive_loss(torch.zeros(8, 8)), torch.tensor(8.0).log())
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    rows = -logits.log_softmax(dim=1).diagonal().mean()
    columns = -logits.log_softmax(dim=0).diagonal().mean()
    assert torch.isclose(contrastive_loss(logits), (rows + columns) / 2)
    # pictures 0 and 1 have the same caption: confusing them costs nothing more
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    confused = 100 * same.float()
    assert torch.isclose(
        contrastive_loss(confused, same), 2 * torch.tensor(2.0).log() / 3
    )


def test_pair_learns_to_match(tokenizer):
    torch.manual_seed(0)
    shape = config(vocab_size=len(tokenizer), eos_token_id=tokenizer.end_id)
    clip = CLIP(CLIPTextModel(shape), image_size=16, image_width=32, projection_dim=16)
    pixels = torch.rand(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    ids = tokenizer(CAPTIONS[::4][:8])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    for _ in range(120):
        loss = contrastive_loss(clip(ids, pixels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert clip(ids, pixels).argmax(dim=1).tolist() == list(range(8))
    assert all(p.grad is not None for p in clip.parameters())
    for vectors in (clip.encode_text(ids), clip.encode_image(pixels)):
        assert vectors.shape == (8, 16)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(8), atol=1e-5)


def test_text_is_read_at_its_first_end_token(tokenizer):
    torch.manual_seed(0)
    shape = config(vocab_size=len(tokenizer), eos_token_id=tokenizer.end_id)
    clip = CLIP(CLIPTextModel(shape), 16, 32, 16).eval()
    ids = tokenizer("two red stars")
    end = ids[0].tolist().index(tokenizer.end_id)
    with torch.no_grad():
        whole, cut = clip.encode_text(ids), clip.encode_text(ids[:, : end + 1])
    assert torch.allclose(whole, cut, atol=1e-6)


def test_config_file_is_plain(tmp_path):
    CLIPTextModel(config()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["CLIPTextModel"] and "_class_name" not in values
    write_json({**values, "_class_name": "AutoencoderKL"}, tmp_path / "config.json")
    with pytest.raises(WeightsError, match="belongs to AutoencoderKL"):
        CLIPTextModel.from_pretrained(tmp_path)
