"""Saving whole or not at all, damaged and absurd files, and what single files tell."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from helpers import randomise, relative_error, small_pipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import sdbook.files
from sdbook.clip import CLIPTextModel
from sdbook.files import WeightsError, read_json, read_weights, save_weights
from sdbook.formats import describe, find_part, to_original, told_schedule
from sdbook.pipeline import StableDiffusion, find_scheduler
from sdbook.run.unet import check_schedule
from sdbook.run.unet import find_sizes as find_training_sizes
from sdbook.schedulers import PNDMScheduler
from sdbook.training import TrainingConfig
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe():
    pipe = small_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        randomise(part)
    return pipe


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "small"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other():
    return small_pipeline(seed=1)


@pytest.fixture(scope="module")
def original(pipe):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return {k: t.contiguous() for one in parts for k, t in to_original(one).items()}


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def same(first, second):
    """Whether two models, or state dicts, have the same tensors."""
    first, second = (
        one if isinstance(one, dict) else dict(one.state_dict())
        for one in (first, second)
    )
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- a pipeline is saved as one ----


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


@pytest.mark.parametrize("moment", [-14, -6, 0, 1, 2, 8])
def test_an_interrupted_save_mixes_nothing(pipe, other, folder, monkeypatch, moment):
    """Killed at any rename, the folder opens as the old model or as the new.

    The rename at moment 0 is the one that decides.
    """
    (folder / "README.md").write_text("mine")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"mine, too")
    before, sources, replace = contents(folder), [], os.replace

    def counts(source, target):
        sources.append(Path(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counts)
        other.save_pretrained(folder.with_name("other"))
    left = sources.index(folder.with_name("other") / ".saving") + moment

    def dies(source, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        # As a kill, it leaves its folder behind.
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(Killed):
            other.save_pretrained(folder)
    committed = not (folder / ".saving").exists()
    assert committed == (moment > 0)
    if not committed:
        assert {k: v for k, v in contents(folder).items() if k[0] != "."} == before
    expected = other if committed else pipe
    copy = shutil.copytree(folder, folder.with_name("copy"))
    vae = AutoencoderKL.from_pretrained(find_part(copy, "vae"))
    assert same(vae, expected.vae)  # a part alone is as new
    again = StableDiffusion.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(again, part), getattr(expected, part))
    other.save_pretrained(folder)  # and the next save cleans up
    again = StableDiffusion.from_pretrained(folder)
    assert same(again.unet, other.unet) and same(again.vae, other.vae)
    assert not list(folder.rglob(".*"))
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "pictures" / "a.png").read_bytes() == b"mine, too"


def test_a_save_that_fails_leaves_the_old_model(other, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(other, "tokenizer", None)  # written after the networks
    with pytest.raises(AttributeError):
        other.save_pretrained(folder)
    assert contents(folder) == before


def test_no_program_opens_a_half_finished_folder(other, folder, monkeypatch):
    moves, replace = [], os.replace

    def dies(source, target):
        if folder / ".saved" in source.parents:
            moves.append(target)
        if len(moves) == 2:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            other.save_pretrained(folder)
    assert not (folder / "model_index.json").exists()  # without which none does
    again = StableDiffusion.from_pretrained(folder)  # but ours, which finishes it
    assert same(again.unet, other.unet)
    assert (folder / "model_index.json").exists()


def test_older_copies_of_the_weights_go(other, folder):
    """diffusers would take old shards before a new file; ours an old fp16 copy."""
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    reference.save_pretrained(folder / "unet", max_shard_size="150KB")
    reference.save_pretrained(folder / "unet", variant="fp16")
    mine = folder / "unet" / "diffusion_pytorch_model.mine.safetensors"
    shutil.copy(folder / UNET, mine)
    other.save_pretrained(folder)
    found = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    assert same(found, dict(other.unet.state_dict()))
    with pytest.raises(FileNotFoundError, match="fp16"):
        UNet.from_pretrained(folder / "unet", variant="fp16")
    assert sorted(path.name for path in (folder / "unet").iterdir()) == [
        "config.json", mine.name, "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_an_older_tokenizers_files_do_not_mix_with_the_new(pipe, folder):
    """A folder of 2022 says its padding apart: Stable Diffusion 2's is another."""
    for name, said in (
        ("special_tokens_map", {"pad_token": "!"}),
        ("added_tokens", {}),
    ):
        (folder / "tokenizer" / f"{name}.json").write_text(json.dumps(said))
    old = StableDiffusion.from_pretrained(folder).tokenizer
    assert old("a")[0, -1] == 0
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    again = StableDiffusion.from_pretrained(folder).tokenizer
    assert torch.equal(again("a"), pipe.tokenizer("a"))


@pytest.mark.skipif(os.name != "posix", reason="sets the limit of a file's size")
def test_a_disk_that_takes_no_more_is_said(other, folder):
    import resource

    before = contents(folder)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large.*make room") as caught:
            other.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert f"{folder} could not be written" in str(caught.value)
    assert contents(folder) == before


def test_a_full_disk_is_named_for_one_file(tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sdbook.files, "save_file", full)
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left.*make room") as caught:
        save_weights({"a": torch.ones(1)}, path)
    assert caught.value.errno == 28 and str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


# ---- check sums ----


def test_every_flipped_bit_is_noticed(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, 7), "b": torch.randn(300).bfloat16(), "c": torch.ones(()),
        "d": torch.empty(0), "e": torch.arange(9), "f": torch.rand(3) > 0.5,
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_weights(tensors, path, more="facts")
    assert same(read_weights(path), tensors)
    whole = path.read_bytes()
    size = sum(tensor.nbytes for tensor in tensors.values())
    for place in torch.randint(1, size + 1, (12,)).tolist():
        broken = bytearray(whole)
        broken[-place] ^= 1 << place % 8
        path.write_bytes(broken)
        os.utime(path, ns=(0, place))
        with pytest.raises(
            WeightsError, match="model.safetensors is damaged .wrong check"
        ):
            read_weights(path)


def test_equal_weights_are_equal_bytes(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in paths:
        save_weights({"a": torch.ones(3)}, path, b="1", c="2", d="ü\x01")
    assert len({path.read_bytes() for path in paths}) == 1
    assert load_file(paths[0])["a"].tolist() == read_weights(paths[0])["a"].tolist()


def test_others_open_files_with_check_sums(pipe, saved):
    assert b'"crc32"' in (saved / UNET).read_bytes()[:20_000]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(saved / "unet")
    assert same(theirs, dict(pipe.unet.state_dict()))
    theirs = transformers.CLIPTextModel.from_pretrained(saved / "text_encoder")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        found = theirs(ids).last_hidden_state
        assert relative_error(pipe.text_encoder(ids), found) < 1e-5


@pytest.mark.parametrize("theirs", ["3610a686", "[1]", "null", ""])
def test_sums_of_other_programs_are_left_alone(tmp_path, theirs):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"crc32": theirs})
    assert read_weights(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_what_is_in_runs_is_no_hub_id(tmp_path, monkeypatch):
    """A training that was not run yet is not asked for on the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no model 'runs/unet'"):
        StableDiffusion.from_pretrained("runs/unet")
    with pytest.raises(FileNotFoundError, match="no model 'runs/my-vae'.*train-vae"):
        find_training_sizes(TrainingConfig(vae_weights_path="runs/my-vae"))


@pytest.mark.parametrize("path", ["", " "])
def test_a_file_to_save_has_a_name(pipe, path):
    with pytest.raises(ValueError, match="the path of what to save"):
        pipe.save_original(path)


def test_describe_says_whether_a_file_can_be_checked(saved, tmp_path):
    said = describe(saved / UNET)
    assert "check sums fit" in said and "float32" in said and "tensors" in said
    path = tmp_path / "plain.safetensors"
    save_file({"decoder.conv_in.weight": torch.ones(2).half()}, path)
    said = describe(path)
    assert "no check sums" in said and "float16" in said and "autoencoder" in said


# ---- absurd files ----


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("text_encoder", "hidden_size", 10**9),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "vocab_size", -1),
        ("text_encoder", "layer_norm_eps", float("nan")),
        ("text_encoder", "layer_norm_eps", 10**400),
        ("unet", "block_out_channels", [32] * 1000),
        ("unet", "transformer_layers_per_block", 10**6),
        ("unet", "sample_size", 10**6),
        ("vae", "scaling_factor", float("inf")),
        ("vae", "layers_per_block", "2" * 10**6),
        ("vae", "wings", [[[[[[[[0]]]]]]]]),
    ],
)
def test_absurd_sizes_are_named_before_memory_is_taken(folder, part, key, value):
    path = folder / part / "config.json"
    edit(path, **{key: value})
    with pytest.raises(WeightsError, match=f"{part}.config.json.*{key}=") as caught:
        StableDiffusion.from_pretrained(folder)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_json_that_is_nested_too_deeply_or_too_long(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")  # as Notepad saves it
    assert read_json(path) == {"a": 1}
    path.write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="config.json is not valid JSON"):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(WeightsError, match="config.json .*100 MB"):
        read_json(path)


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_named(folder, tmp_path, kind):
    path = tmp_path / "strange.ckpt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"strange.ckpt.* {kind}"):
        read_weights(path)
    with pytest.raises(FileNotFoundError, match=str(path)):
        StableDiffusion.from_pretrained(path)
    for name in (UNET, "unet/config.json", "model_index.json"):
        (folder / name).unlink()
        path.rename(folder / name)
        with pytest.raises((FileNotFoundError, WeightsError), match=str(folder)):
            StableDiffusion.from_pretrained(folder)
        (folder / name).rename(path)


# ---- single files ----

HARMLESS = (
    "embedding_manager.embedder.transformer.weight", "embedding_manager.string_to.x",
    "cond_stage_model.logit_scale", "cond_stage_model.transformer.logit_scale",
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.text_projection", "first_stage_model.loss.logvar",
    "first_stage_model.loss.discriminator.main.0.weight", "model_ema.decay",
    "model_ema.num_updates", "denoiser.sigmas", "global_step", "betas",
    "bundle_emb.style.string_to_param.*", "loss.logvar",
)  # fmt: skip


def test_keys_that_are_known_to_be_harmless_are_ignored(
    pipe, original, saved, tmp_path
):
    path = tmp_path / "model.safetensors"
    save_file({**original, **{key: torch.ones(2) for key in HARMLESS}}, path)
    again = StableDiffusion.from_pretrained(path, config=saved)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(again, part), getattr(pipe, part))
    save_file({**original, "style.weight": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match=r"1 unexpected .style.weight.*remove"):
        StableDiffusion.from_pretrained(path, config=saved)


@pytest.mark.parametrize("zero", [False, True])
def test_marks_of_v_prediction_are_honoured(original, saved, tmp_path, zero):
    marks = {"v_pred": torch.tensor([])} | ({"ztsnr": torch.tensor([])} if zero else {})
    path = tmp_path / "model.safetensors"
    save_file({**original, **marks}, path)
    ours = StableDiffusion.from_pretrained(path, config=saved)
    assert ours.scheduler.config.prediction_type == "v_prediction"
    reference = diffusers.StableDiffusionPipeline.from_pretrained(saved)
    reference.set_progress_bar_config(disable=True)
    zsnr = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    reference.scheduler = diffusers.DDIMScheduler.from_config(
        reference.scheduler.config, prediction_type="v_prediction",
        **(zsnr if zero else {}),
    )  # fmt: skip
    options = dict(
        num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        latents=torch.randn(1, 4, 8, 8),
    )  # fmt: skip
    found = ours("a red star", **options, progress=False).images
    assert relative_error(found, reference("a red star", **options).images) < 1e-5


def test_other_marks_and_the_scheduler_without_a_folder(original, tmp_path):
    path = tmp_path / "model.safetensors"
    for told, expected in (("v", "v_prediction"), ("epsilon", None)):
        save_file(original, path, {"modelspec.prediction_type": told})
        found = told_schedule(path, read_weights(path))
        assert found.get("prediction_type") == expected
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**original, **marks}, path)
    assert find_scheduler(path).alphas_cumprod[-1].item() == 0  # DDIM for PNDM
    save_file({**original, "v_pred": marks["v_pred"]}, path)
    assert isinstance(find_scheduler(path), PNDMScheduler)
    assert find_scheduler(path).config.prediction_type == "v_prediction"
    with pytest.warns(
        UserWarning, match="prediction_type is epsilon, but .* trained with v_pr"
    ):
        check_schedule(TrainingConfig(pretrained=str(path)))


@pytest.mark.parametrize("channels, task", [(8, "pix2pix"), (9, "inpainting")])
def test_models_for_other_tasks_are_named(original, folder, tmp_path, channels, task):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {key: original[key].repeat(1, 3, 1, 1)[:, :channels].contiguous()}
    save_file({**original, **wide}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"model.safetensors is an .*{task} model"):
        StableDiffusion.from_pretrained(tmp_path / "model.safetensors", config=folder)
    edit(folder / "unet" / "config.json", in_channels=channels)
    with pytest.raises(WeightsError, match=f"an .*{task} model.*{channels} channels"):
        StableDiffusion.from_pretrained(folder)
    with pytest.raises(WeightsError, match=f"an .*{task} model"):
        find_training_sizes(TrainingConfig(pretrained=str(folder)))


@pytest.mark.parametrize("length", [None, 10**30])
def test_a_tokenizer_without_a_length_takes_the_models(pipe, folder, length):
    path = folder / "tokenizer" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("model_max_length")
    path.write_text(
        json.dumps(values | ({"model_max_length": length} if length else {}))
    )
    again = StableDiffusion.from_pretrained(folder)
    assert torch.equal(again.tokenizer("a red star"), pipe.tokenizer("a red star"))
    again.save_pretrained(folder)
    assert json.loads(path.read_text())["model_max_length"] == 16


@pytest.mark.parametrize("length", ["16", -1, True, [16]])
def test_a_tokenizer_with_an_absurd_length_is_named(folder, length):
    path = folder / "tokenizer" / "tokenizer_config.json"
    edit(path, model_max_length=length)
    with pytest.raises(ValueError, match=f"{path.parent}.*model_max_length="):
        StableDiffusion.from_pretrained(folder)


def test_parts_that_do_not_fit_are_named_before_weights_are_read(folder):
    (folder / UNET).unlink()
    path = folder / "unet" / "config.json"
    edit(path, cross_attention_dim=48)
    with pytest.raises(WeightsError, match=f"{folder}: .*not trained together"):
        StableDiffusion.from_pretrained(folder)


@pytest.mark.parametrize("key", ["attention_head_dim", "norm_num_groups"])
def test_sizes_that_cannot_be_built_name_the_folder(folder, key):
    edit(folder / "unet" / "config.json", **{key: 3})
    with pytest.raises(WeightsError, match=f"{folder}/unet: .*(3|divisible)"):
        StableDiffusion.from_pretrained(folder)


# ---- Stable Diffusion 2 ----


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A small Stable Diffusion 2, as diffusers and transformers write it."""
    folder = tmp_path_factory.mktemp("second") / "model"
    pipe = small_pipeline()
    pipe.save_pretrained(folder)
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        attention_head_dim=(2, 4), cross_attention_dim=32,
        use_linear_projection=True, upcast_attention=True,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
        hidden_act="gelu", bos_token_id=0, eos_token_id=2, projection_dim=32,
    ))  # fmt: skip
    randomise(unet).save_pretrained(folder / "unet")
    randomise(text).save_pretrained(folder / "text_encoder")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    edit(folder / "tokenizer" / "tokenizer_config.json", pad_token="!")
    return folder


def test_a_folder_of_stable_diffusion_2_draws_what_diffusers_draws(second, tmp_path):
    ours = StableDiffusion.from_pretrained(second)
    ids = ours.tokenizer("a star")[0]
    assert ids[-1] == 0 != ours.tokenizer.end_id  # filled up with "!"
    options = dict(
        num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        latents=torch.randn(1, 4, 8, 8),
    )  # fmt: skip
    found = ours("a red star", "blue", **options, progress=False).images
    ours.save_pretrained(tmp_path / "again")
    for folder in (second, tmp_path / "again"):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        expected = theirs("a red star", negative_prompt="blue", **options).images
        assert relative_error(found, expected) < 1e-5
    assert theirs.unet.config.use_linear_projection


def as_openclip(state, layers):
    """transformers' text weights in OpenCLIP's names, and what else it has there."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    state = {key.removeprefix("text_model."): t for key, t in state.items()}
    file = {new: state[old] for old, new in names.items()}
    for i in range(layers + 1):  # the last is not used
        ours = f"encoder.layers.{min(i, layers - 1)}"
        theirs = f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [state[f"{ours}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            file[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for old, new in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                file[f"{theirs}.{new}.{kind}"] = state[f"{ours}.{old}.{kind}"]
    file |= {"text_projection": torch.ones(32, 32), "logit_scale": torch.ones(())}
    return {f"cond_stage_model.model.{key}": t.clone() for key, t in file.items()}


def test_one_file_of_stable_diffusion_2(second, tmp_path):
    ours = StableDiffusion.from_pretrained(second)
    text = load_file(second / "text_encoder" / "model.safetensors")
    whole = as_openclip(text, 2)
    for part in (ours.unet, ours.vae):
        whole |= {key: tensor.contiguous() for key, tensor in to_original(part).items()}
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert whole[key].ndim == 2  # as in the published file
    path = tmp_path / "second.safetensors"
    save_file(whole, path)
    with pytest.warns(UserWarning, match="does not say what its UNet predicts"):
        again = StableDiffusion.from_pretrained(path, config=second)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(again, part), getattr(ours, part))
    again.save_original(tmp_path / "again.safetensors")
    written = load_file(tmp_path / "again.safetensors")
    for key, tensor in written.items():
        assert torch.equal(tensor, whole[key]), key
    assert {key for key in whole if key not in written} == {
        key
        for key in whole
        if ".resblocks.2." in key or key.endswith(("_scale", "ction"))
    }
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "again.safetensors"), config=str(second), local_files_only=True
    )
    assert same(theirs.unet, load_file(second / UNET))
    found = {
        k.removeprefix("text_model."): t
        for k, t in theirs.text_encoder.state_dict().items()
    }
    assert same(found, dict(ours.text_encoder.state_dict()))


def test_the_text_half_of_an_openclip_file(second, tmp_path):
    """open_clip_pytorch_model.safetensors: no prefix, and a half that sees pictures."""
    expected = CLIPTextModel.from_pretrained(second / "text_encoder")
    file = as_openclip(dict(expected.state_dict()), 2)
    bare = {key.removeprefix("cond_stage_model.model."): t for key, t in file.items()}
    bare |= {"visual.proj": torch.ones(2, 2), "visual.ln_post.bias": torch.ones(2)}
    save_file(bare, tmp_path / "openclip.safetensors")
    found = CLIPTextModel.from_pretrained(
        tmp_path / "openclip.safetensors", config=expected.config
    )
    assert same(found, expected)


def test_the_sizes_of_stable_diffusion_2_follow_from_a_file(tmp_path):
    with torch.device("meta"):
        unet = UNet(UNetConfig.of("SD 2.x"))
        text = CLIPTextModel(CLIPTextModel.config_class.of("SD 2.x"))
    # As published: 865,910,724 and, without the head, 340,387,840 parameters.
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert sum(p.numel() for p in text.parameters()) == 340_387_840
    path = tmp_path / "some.safetensors"
    key = (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    )
    save_file({key: torch.zeros(1, 1024)}, path)
    assert UNet.find_config(path) == UNetConfig.of("SD 2.x")
    assert AutoencoderKL.find_config(path) == VAEConfig()


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_no_path(path, tmp_path, monkeypatch):
    """Python reads it as "here", and here may well be a model."""
    from sdbook.clip import Tokenizer
    from sdbook.data import Scenes, write_folder
    from sdbook.features import open_clip
    from sdbook.formats import find_part, shipped_models
    from sdbook.images import open_pictures

    folders = shipped_models()
    write_folder(Scenes(), tmp_path, 1)
    for place, read in (
        (folders["scenes"], StableDiffusion.from_pretrained),
        (folders["scenes"], lambda path: find_part(path, "vae")),
        (folders["scenes"] / "unet", UNet.from_pretrained),
        (folders["scenes"] / "tokenizer", Tokenizer.from_pretrained),
        (folders["clip"], open_clip),
        (tmp_path, open_pictures),
    ):
        monkeypatch.chdir(place)
        with pytest.raises(ValueError, match="the path of .* is '"):
            read(path)
    with pytest.raises(ValueError, match="the path of a tokenizer is '"):
        StableDiffusion.from_pretrained("scenes", tokenizer=path)
