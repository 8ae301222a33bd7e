"""Weights as the world publishes them, read here and by diffusers, to the same end."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from helpers import load_tool, randomise, relative_error, small_pipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from sdbook.clip import CLIPTextModel
from sdbook.files import WeightsError, download, read_weights
from sdbook.formats import averaged_name, renamed_keys, to_original
from sdbook.pipeline import StableDiffusion
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

# Files that do not come from our own writer: the names and shapes of CompVis's
# classes, written down from their constructors, in the order of their loops.


class Original:
    """Named random tensors, as a file of the original code has them."""

    def __init__(self):
        self.tensors = {}
        self.generator = torch.Generator().manual_seed(5)

    def make(self, shape, scale):
        return scale * torch.randn(shape, generator=self.generator)

    def add(self, name, *shape, bias=True):
        scale = max(1, math.prod(shape[1:])) ** -0.5
        self.tensors[f"{name}.weight"] = self.make(shape, scale)
        if bias:
            self.tensors[f"{name}.bias"] = self.make(shape[:1], 0.3)

    def unet(self, widths, blocks, attends, context, channels=4):
        """openaimodel.UNetModel"""
        top, time = "model.diffusion_model", 4 * widths[0]
        self.add(f"{top}.time_embed.0", time, widths[0])
        self.add(f"{top}.time_embed.2", time, time)
        self.add(f"{top}.input_blocks.0.0", widths[0], channels, 3, 3)
        remembered, width, place = [widths[0]], widths[0], 1
        for level, out in enumerate(widths):
            for _ in range(blocks):
                name = f"{top}.input_blocks.{place}"
                self.unet_resnet(f"{name}.0", width, out, time)
                width, place = out, place + 1
                if attends[level]:
                    self.transformer(f"{name}.1", width, context)
                remembered.append(width)
            if level < len(widths) - 1:
                self.add(f"{top}.input_blocks.{place}.0.op", width, width, 3, 3)
                remembered.append(width)
                place += 1
        self.unet_resnet(f"{top}.middle_block.0", width, width, time)
        self.transformer(f"{top}.middle_block.1", width, context)
        self.unet_resnet(f"{top}.middle_block.2", width, width, time)
        place = 0
        for level, out in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                name, part = f"{top}.output_blocks.{place}", 1
                self.unet_resnet(f"{name}.0", width + remembered.pop(), out, time)
                width, place = out, place + 1
                if attends[level]:
                    self.transformer(f"{name}.1", width, context)
                    part = 2
                if level and block == blocks:
                    self.add(f"{name}.{part}.conv", width, width, 3, 3)
        self.add(f"{top}.out.0", width)
        self.add(f"{top}.out.2", channels, width, 3, 3)

    def unet_resnet(self, name, before, after, time):
        self.add(f"{name}.in_layers.0", before)
        self.add(f"{name}.in_layers.2", after, before, 3, 3)
        self.add(f"{name}.emb_layers.1", after, time)
        self.add(f"{name}.out_layers.0", after)
        self.add(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            self.add(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(self, name, width, context):
        self.add(f"{name}.norm", width)
        self.add(f"{name}.proj_in", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, source in (("attn1", width), ("attn2", context)):
            self.add(f"{block}.{attention}.to_q", width, width, bias=False)
            self.add(f"{block}.{attention}.to_k", width, source, bias=False)
            self.add(f"{block}.{attention}.to_v", width, source, bias=False)
            self.add(f"{block}.{attention}.to_out.0", width, width)
        self.add(f"{block}.ff.net.0.proj", 8 * width, width)
        self.add(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            self.add(f"{block}.{norm}", width)
        self.add(f"{name}.proj_out", width, width, 1, 1)

    def vae(self, widths, blocks, latent=4, top="first_stage_model."):
        """autoencoder.AutoencoderKL with diffusionmodules.model's two halves"""
        self.add(f"{top}encoder.conv_in", widths[0], 3, 3, 3)
        width = widths[0]
        for level, out in enumerate(widths):
            for block in range(blocks):
                name = f"{top}encoder.down.{level}.block.{block}"
                self.vae_resnet(name, width, out)
                width = out
            if level < len(widths) - 1:
                name = f"{top}encoder.down.{level}.downsample.conv"
                self.add(name, width, width, 3, 3)
        self.vae_middle(f"{top}encoder", width, 2 * latent)
        self.add(f"{top}decoder.conv_in", width, latent, 3, 3)
        for level, out in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                name = f"{top}decoder.up.{level}.block.{block}"
                self.vae_resnet(name, width, out)
                width = out
            if level:
                self.add(f"{top}decoder.up.{level}.upsample.conv", width, width, 3, 3)
        self.vae_middle(f"{top}decoder", widths[-1], 3, last=widths[0])
        self.add(f"{top}quant_conv", 2 * latent, 2 * latent, 1, 1)
        self.add(f"{top}post_quant_conv", latent, latent, 1, 1)

    def vae_middle(self, name, width, channels, last=None):
        self.vae_resnet(f"{name}.mid.block_1", width, width)
        self.add(f"{name}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.add(f"{name}.mid.attn_1.{part}", width, width, 1, 1)
        self.vae_resnet(f"{name}.mid.block_2", width, width)
        self.add(f"{name}.norm_out", last or width)
        self.add(f"{name}.conv_out", channels, last or width, 3, 3)

    def vae_resnet(self, name, before, after):
        self.add(f"{name}.norm1", before)
        self.add(f"{name}.conv1", after, before, 3, 3)
        self.add(f"{name}.norm2", after)
        self.add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            self.add(f"{name}.nin_shortcut", after, before, 1, 1)

    def text(self, config, top="cond_stage_model.transformer.text_model"):
        """transformers' CLIPTextModel, as version 4 named it"""
        width, inner = config.hidden_size, config.intermediate_size
        for name, rows in (
            ("token", config.vocab_size),
            ("position", config.max_position_embeddings),
        ):
            self.add(f"{top}.embeddings.{name}_embedding", rows, width, bias=False)
        for i in range(config.num_hidden_layers):
            layer = f"{top}.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.add(f"{layer}.self_attn.{part}", width, width)
            self.add(f"{layer}.mlp.fc1", inner, width)
            self.add(f"{layer}.mlp.fc2", width, inner)
            self.add(f"{layer}.layer_norm1", width)
            self.add(f"{layer}.layer_norm2", width)
        self.add(f"{top}.final_layer_norm", width)


@pytest.fixture(scope="module")
def pipe():
    pipe = small_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        randomise(part)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "small"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(pipe):
    """The tensors of an original file with the sizes of `pipe`, not made by us."""
    file = Original()
    file.unet((32, 64), 1, (True, False), context=32)
    file.vae((16, 32), 1)
    file.text(pipe.text_encoder.config)
    return file.tensors


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    save_file(original, path)
    return path


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype
        for key in first
    )


def draw(pipe, **options):
    options = {"progress": False, **options} if "seed" in options else options
    return pipe(
        "a red star", num_inference_steps=3, guidance_scale=3.0, output_type="np",
        height=16, width=16, **options,
    ).images  # fmt: skip


# ---- the map ----


@pytest.mark.parametrize(
    "widths, blocks, attends",
    [
        ((320, 640, 1280, 1280), 2, (True, True, True, False)),
        ((32, 64), 1, (True, False)),
        ((32, 32, 64), 3, (False, True, False)),
    ],
)
def test_the_map_of_the_unet_is_that_of_the_original_code(widths, blocks, attends):
    kinds = [("CrossAttn" * attend, "Block2D") for attend in attends]
    config = UNetConfig(
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple(f"{a}Down{b}" for a, b in kinds),
        up_block_types=tuple(f"{a}Up{b}" for a, b in kinds[::-1]),
    )
    with torch.device("meta"):
        unet = UNet(config)
    file = Original()
    file.make = lambda shape, scale: shape
    file.unet(widths, blocks, attends, 768)
    shapes = {name: tuple(t.shape) for name, t in to_original(unet).items()}
    assert shapes == file.tensors


@pytest.mark.parametrize("widths, blocks", [((128, 256, 512, 512), 2), ((8,), 3)])
def test_the_map_of_the_vae_is_that_of_the_original_code(widths, blocks):
    config = VAEConfig(
        block_out_channels=widths, layers_per_block=blocks, norm_num_groups=8
    )
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    file = Original()
    file.make = lambda shape, scale: shape
    file.vae(widths, blocks)
    shapes = {name: tuple(t.shape) for name, t in to_original(vae).items()}
    assert shapes == file.tensors


def test_no_two_names_fall_together(pipe):
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        names = renamed_keys(model)
        assert len(set(names.values())) == len(names) == len(model.state_dict())


def test_diffusers_conversion_reads_the_original_the_same(original, checkpoint, folder):
    ours = StableDiffusion.from_pretrained(checkpoint, config=folder)
    configs = {
        part: json.loads((folder / part / "config.json").read_text())
        for part in ("unet", "vae")
    }
    unet = theirs.convert_ldm_unet_checkpoint(dict(original), configs["unet"])
    assert equal(unet, ours.unet.state_dict())
    vae = theirs.convert_ldm_vae_checkpoint(dict(original), configs["vae"])
    assert equal(vae, ours.vae.state_dict())
    text = theirs.convert_ldm_clip_checkpoint(dict(original))
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    assert equal(text, ours.text_encoder.state_dict())


def test_diffusers_draws_the_same_from_the_same_file(checkpoint, folder):
    ours = StableDiffusion.from_pretrained(checkpoint, config=folder)
    reference = diffusers.StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True
    )
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    expected = draw(reference, generator=torch.Generator().manual_seed(1))
    assert relative_error(draw(ours, seed=1), expected) < 1e-5


def test_diffusers_reads_what_we_write(pipe, folder, tmp_path):
    pipe.save_original(tmp_path / "ours.safetensors")
    reference = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "ours.safetensors"), config=str(folder), local_files_only=True
    )
    assert equal(reference.unet.state_dict(), dict(pipe.unet.state_dict()))
    assert equal(reference.vae.state_dict(), dict(pipe.vae.state_dict()))


# ---- there and back ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_original_file_comes_back_bit_for_bit(original, folder, tmp_path, dtype):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in original.items()}, first)
    pipe = StableDiffusion.from_pretrained(first, dtype=dtype, config=folder)
    pipe.save_original(second)
    assert equal(load_file(first), load_file(second))


def test_our_own_file_comes_back_bit_for_bit(pipe, folder, tmp_path):
    pipe.save_original(tmp_path / "first.safetensors")
    again = StableDiffusion.from_pretrained(
        tmp_path / "first.safetensors", config=folder
    )
    again.save_original(tmp_path / "second.safetensors")
    first, second = (tmp_path / f"{n}.safetensors" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    pipe.scheduler = again.scheduler = "ddim"
    # A mapped tensor lies elsewhere in memory: the same numbers, other rounding.
    assert relative_error(draw(pipe, seed=2), draw(again, seed=2)) < 1e-5
    half = tmp_path / "half.safetensors"
    pipe.save_original(half, dtype=torch.float16)
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}


def test_a_file_may_be_a_pickle_with_a_trainers_rest(
    original, folder, tmp_path, monkeypatch
):
    """A Lightning .ckpt: tensors under state_dict, callbacks, NumPy numbers."""
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type(
        "ModelCheckpoint", (), {"__module__": module.__name__}
    )
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    ids = torch.arange(16)[None]
    schedule = {"betas": torch.rand(9), "model_ema.decay": torch.ones(())}
    places = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    content = {
        "state_dict": {**original, **schedule, places: ids},
        "callbacks": {
            module.ModelCheckpoint: {"best": np.float64(0.1), "path": "x.ckpt"}
        },
        "hook": module.ModelCheckpoint(),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "model.ckpt", pickle_protocol=2)
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    pipe = StableDiffusion.from_pretrained(tmp_path / "model.ckpt", config=folder)
    pipe.save_original(tmp_path / "again.safetensors")
    assert equal(load_file(tmp_path / "again.safetensors"), original)
    half = StableDiffusion.from_pretrained(
        tmp_path / "model.ckpt", dtype=torch.float16, config=folder
    )
    assert half.dtype == torch.float16
    old = tmp_path / "older.ckpt"
    torch.save({"state_dict": original}, old, _use_new_zipfile_serialization=False)
    assert equal(read_weights(old), original)


# ---- the averaged copy ----


def test_the_averaged_copy_is_taken_if_there_is_one(original, folder, tmp_path):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert averaged_name(key) == (
        "model_ema.diffusion_modelinput_blocks10in_layers2weight"
    )
    averages = {
        averaged_name(key): tensor + 1
        for key, tensor in original.items()
        if key.startswith("model.diffusion_model.")
    }
    path = tmp_path / "both.safetensors"
    rest = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    save_file({**original, **averages, **rest}, path)
    averaged = StableDiffusion.from_pretrained(path, config=folder)
    plain = StableDiffusion.from_pretrained(path, config=folder, ema=False)
    name = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(plain.unet.state_dict()[name], original[key])
    assert torch.equal(averaged.unet.state_dict()[name], original[key] + 1)
    first, second = plain.vae.state_dict(), averaged.vae.state_dict()
    assert equal(dict(first), dict(second))
    config = json.loads((folder / "unet" / "config.json").read_text())
    both = {**original, **averages}
    converted = theirs.convert_ldm_unet_checkpoint(both, config, extract_ema=True)
    assert equal(converted, averaged.unet.state_dict())
    del averages[averaged_name(key)]
    save_file({**original, **averages}, path)
    with pytest.raises(WeightsError, match=f"1 missing .{name}"):
        StableDiffusion.from_pretrained(path, config=folder)


# ---- one part alone ----


def test_a_vae_alone_in_every_dress(pipe, original, folder, tmp_path):
    config = pipe.vae.config
    whole = {k: t for k, t in original.items() if k.startswith("first_stage_model.")}
    bare = {key.removeprefix("first_stage_model."): t for key, t in whole.items()}
    training = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
    expected = None
    for name, tensors in (
        ("everything", original),
        ("prefixed", whole),
        ("bare", {**bare, **training}),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        vae = AutoencoderKL.from_pretrained(path, config=config)
        expected = expected or dict(vae.state_dict())
        assert equal(dict(vae.state_dict()), expected)
    # stabilityai/sd-vae-ft-mse: a folder, and the attention's old names
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in expected.items():
        for new_name, old_name in names.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        old[key] = tensor.contiguous()
    shutil.copytree(folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / AutoencoderKL.weights_name
    save_file(old, path)
    assert equal(dict(AutoencoderKL.from_pretrained(path).state_dict()), expected)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert equal(dict(vae.state_dict()), expected)
    reference = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(x).mean
        assert relative_error(mean, reference.encode(x).latent_dist.mean) < 1e-5
        assert relative_error(vae.decode(mean), reference.decode(mean).sample) < 1e-5


def test_the_text_half_of_a_whole_clip(tmp_path):
    """The layout of openai/clip-vit-large-patch14, and its config of 2022."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.CLIPConfig(text_config=sizes, vision_config=vision)
    reference = transformers.CLIPModel(config).eval()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["text_config"] |= {"add_cross_attention": False, "id2label": {"0": "A"}}
    values["text_config_dict"] = dict(sizes)
    path.write_text(json.dumps(values))
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert any(key.startswith("vision_model.") for key in state)
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, file)
    ids = torch.randint(0, 99, (2, 16))
    with torch.no_grad():
        expected = reference.text_model(ids).last_hidden_state
        for source in (tmp_path, file):
            ours = CLIPTextModel.from_pretrained(source)
            assert relative_error(ours(ids), expected) < 1e-5


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_weights_with_and_without_their_prefix(pipe, folder, tmp_path, prefix):
    shutil.copytree(folder / "text_encoder", tmp_path / "text")
    state = {
        f"{prefix}{key}": tensor
        for key, tensor in pipe.text_encoder.state_dict().items()
    }
    state[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, tmp_path / "text" / "model.safetensors")
    again = CLIPTextModel.from_pretrained(tmp_path / "text")
    assert equal(dict(again.state_dict()), dict(pipe.text_encoder.state_dict()))
    # within a whole checkpoint, as some tools that merge models write it
    whole = {f"cond_stage_model.transformer.{key}": t for key, t in state.items()}
    save_file({**whole, "betas": torch.ones(1)}, tmp_path / "merged.safetensors")
    again = CLIPTextModel.from_pretrained(
        tmp_path / "merged.safetensors", config=pipe.text_encoder.config
    )
    assert equal(dict(again.state_dict()), dict(pipe.text_encoder.state_dict()))


# ---- folders ----


def test_a_sharded_folder_of_diffusers(pipe, folder, tmp_path):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    unet = tmp_path / "shards" / "unet"
    assert len(list(unet.glob("*-of-*.safetensors"))) > 2
    again = StableDiffusion.from_pretrained(tmp_path / "shards")
    for part in ("unet", "vae", "text_encoder"):
        first, second = getattr(again, part), getattr(pipe, part)
        assert equal(dict(first.state_dict()), dict(second.state_dict()))
    shard = sorted(unet.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {shard.name}, but"):
        StableDiffusion.from_pretrained(tmp_path / "shards")


def test_a_folder_of_pickles_whole_and_sharded(pipe, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (tmp_path / "old" / part).glob("*.safetensors")
        name = "pytorch_model" if part == "text_encoder" else path.stem
        state = load_file(path)
        path.unlink()
        if part != "unet":
            torch.save(state, path.parent / f"{name}.bin")
            continue
        shards = [f"{name}-0000{i}-of-00002.bin" for i in (1, 2)]
        where = {key: shards[i % 2] for i, key in enumerate(state)}
        for shard in shards:
            half = {key: t for key, t in state.items() if where[key] == shard}
            torch.save(half, path.parent / shard)
        index = path.parent / f"{name}.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    again = StableDiffusion.from_pretrained(tmp_path / "old")
    assert equal(dict(again.unet.state_dict()), dict(pipe.unet.state_dict()))
    assert np.array_equal(draw(again, seed=1), draw(pipe, seed=1))


@pytest.mark.parametrize("shard_size", ["10GB", "150KB"])
def test_a_variant_beside_the_usual_files(pipe, folder, tmp_path, shard_size):
    shutil.copytree(folder, tmp_path / "model")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float16
    )
    reference.save_pretrained(
        tmp_path / "model", variant="fp16", max_shard_size=shard_size
    )
    full = StableDiffusion.from_pretrained(tmp_path / "model")
    half = StableDiffusion.from_pretrained(
        tmp_path / "model", dtype=torch.float16, variant="fp16"
    )
    key = "conv_in.weight"
    weight = pipe.unet.state_dict()[key]
    assert torch.equal(full.unet.state_dict()[key], weight)
    assert torch.equal(half.unet.state_dict()[key], weight.half())
    wide = StableDiffusion.from_pretrained(tmp_path / "model", variant="fp16")
    assert torch.equal(wide.unet.state_dict()[key], weight.half().float())
    with pytest.raises(FileNotFoundError, match=r"no diffusion_.*bf16.safetensors"):
        StableDiffusion.from_pretrained(tmp_path / "model", variant="bf16")


def test_tensors_of_every_kind_and_size_are_mapped(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    tensors = {
        f"{size}.{kind}": (torch.rand(size) * 9).to(kind)
        for kind in kinds
        for size in ((), (0,), (3,), (2, 0, 3), (5, 7), (300,), (1, 1, 2))
    }
    save_file(tensors, tmp_path / "all.safetensors")
    assert equal(read_weights(tmp_path / "all.safetensors"), tensors)
    nothing = {"a": torch.empty(0)}
    save_file(nothing, tmp_path / "nothing.safetensors")
    assert equal(read_weights(tmp_path / "nothing.safetensors"), nothing)


def test_a_large_model_keeps_few_files_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts the files in /proc")
    tensors = {f"layer.{i}.weight": torch.rand(10) for i in range(2000)}
    save_file(tensors, tmp_path / "many.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    read = read_weights(tmp_path / "many.safetensors")
    assert len(read) == 2000 and len(os.listdir("/proc/self/fd")) < before + 10


# ---- the hub ----


def offline(cache, code):
    """Run code in a fresh Python that may not use the network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_a_hub_id_is_found_in_the_cache_without_a_network(pipe, folder, tmp_path):
    place = tmp_path / "models--owner--model"
    for revision, commit, source in (
        ("main", "0" * 40, folder),
        ("v2", "1" * 40, folder),
    ):
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    vae = place / "snapshots" / ("1" * 40) / "vae"
    state = load_file(vae / AutoencoderKL.weights_name)
    state["quant_conv.bias"] = torch.full_like(state["quant_conv.bias"], 7.0)
    save_file(state, vae / AutoencoderKL.weights_name)
    code = """
from sdbook import StableDiffusion
for revision in (None, "v2"):
    pipe = StableDiffusion.from_pretrained("owner/model", revision=revision)
    print(bool((pipe.vae.quant_conv.bias == 7).all()))
try:
    StableDiffusion.from_pretrained("owner/model", revision="v3")
except FileNotFoundError as error:
    print(error)
try:
    StableDiffusion.from_pretrained("owner/other")
except FileNotFoundError as error:
    print(error)
"""
    out = offline(tmp_path, code)
    assert out.returncode == 0, out.stderr
    first, second, third, fourth = out.stdout.splitlines()
    assert (first, second) == ("False", "True")
    assert "could not fetch 'owner/model' at revision 'v3'" in third
    assert "could not fetch 'owner/other' from the Hugging Face hub" in fourth


class Hub:
    """Stands for the hub and its cache: what fits the patterns is copied over."""

    def __init__(self, monkeypatch, repository, cache):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        self.repository, self.cache, self.asked = repository, cache, []

    def snapshot(self, name, revision=None, allow_patterns=None):
        self.asked.append((name, revision))
        files = [path for path in self.repository.rglob("*") if path.is_file()]
        names = [path.relative_to(self.repository).as_posix() for path in files]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.cache / name)
        return str(self.cache)

    def weights(self):
        """Which weights files were copied."""
        kinds = (".safetensors", ".bin")
        paths = [path for path in self.cache.rglob("*") if path.suffix in kinds]
        return sorted(path.relative_to(self.cache).as_posix() for path in paths)


@pytest.fixture
def hub(monkeypatch, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "repository")
    return Hub(monkeypatch, tmp_path / "repository", tmp_path / "cache")


WHERE = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}


def store(hub, part, name, change=lambda tensor: tensor):
    """Put the weights of a part into the repository as another file."""
    path = hub.repository / f"{WHERE[part]}.safetensors"
    state = {key: change(tensor) for key, tensor in load_file(path).items()}
    save = torch.save if name.endswith(".bin") else save_file
    save(state, path.parent / name)


def remove(hub, part):
    (hub.repository / f"{WHERE[part]}.safetensors").unlink()


def test_only_what_is_needed_is_asked_of_the_hub(hub):
    for part, name in WHERE.items():
        store(hub, part, f"{name.split('/')[1]}.fp16.safetensors", torch.Tensor.half)
        store(hub, part, f"{name.split('/')[1]}.bin")
    StableDiffusion.from_pretrained("owner/model", revision="v2")
    assert hub.asked == [("owner/model", "v2")]
    assert hub.weights() == sorted(f"{name}.safetensors" for name in WHERE.values())
    download("owner/model", tuple(WHERE), variant="fp16")
    assert len(hub.asked) == 2 and len(hub.weights()) == 6
    download("owner/model", weights=False)
    assert len(hub.asked) == 3 and len(hub.weights()) == 6


def test_one_network_is_asked_of_the_hub(monkeypatch, folder, tmp_path):
    hub = Hub(monkeypatch, folder / "vae", tmp_path)
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse", revision="v1")
    assert vae.config.block_out_channels == (16, 32)
    assert hub.asked == [("stabilityai/sd-vae-ft-mse", "v1")]


def test_a_hub_part_may_have_another_kind_of_file_than_the_rest(hub, pipe):
    store(hub, "text_encoder", "pytorch_model.bin")
    remove(hub, "text_encoder")
    again = StableDiffusion.from_pretrained("owner/model")
    expected = dict(pipe.text_encoder.state_dict())
    assert equal(dict(again.text_encoder.state_dict()), expected)
    assert "unet/diffusion_pytorch_model.bin" not in hub.weights()


def test_a_cached_half_copy_does_not_stand_for_the_full_weights(hub, pipe):
    for part, name in WHERE.items():
        stem = name.split("/")[1]
        store(hub, part, f"{stem}.fp16.safetensors", torch.Tensor.half)
        store(hub, part, f"{'pytorch_model' if stem == 'model' else stem}.bin")
        remove(hub, part)
    StableDiffusion.from_pretrained("owner/model", variant="fp16")
    assert all(".fp16." in name for name in hub.weights())
    again = StableDiffusion.from_pretrained("owner/model")
    assert equal(dict(again.unet.state_dict()), dict(pipe.unet.state_dict()))


def test_a_repository_of_half_copies_alone_opens_by_its_id(hub, pipe):
    for part, name in WHERE.items():
        stem = name.split("/")[1]
        store(hub, part, f"{stem}.fp16.safetensors", torch.Tensor.half)
        remove(hub, part)
    again = StableDiffusion.from_pretrained("owner/model")
    weight = pipe.unet.conv_in.weight.half().float()
    assert torch.equal(again.unet.conv_in.weight, weight)


def test_variants_in_shards_of_the_older_name_are_fetched(hub, pipe):
    unet = hub.repository / "unet"
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    names = [
        f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)
    ]
    where = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        half = {key: t.half() for key, t in state.items() if where[key] == name}
        save_file(half, unet / name)
    index = unet / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": where}))
    root = download("owner/model", ("unet",))
    assert not list(root.rglob("*fp16.safetensors"))
    root = download("owner/model", ("unet",), variant="fp16")
    again = UNet.from_pretrained(root / "unet", variant="fp16")
    assert torch.equal(again.conv_in.weight, pipe.unet.conv_in.weight.half().float())


def test_a_single_file_says_where_its_tokenizer_should_come_from(
    checkpoint, folder, monkeypatch
):
    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError,
        match="no tokenizer, and could not fetch 'openai/clip-vit-large-patch14'.*"
        "give the folder as tokenizer=",
    ):
        StableDiffusion.from_pretrained(checkpoint)
    for where in (folder, folder / "tokenizer"):  # found; then the sizes do not fit
        with pytest.raises(WeightsError, match=r"of another shape.*pass it as config="):
            StableDiffusion.from_pretrained(checkpoint, tokenizer=where)


# ---- what does not fit ----

FAMILIES = {
    "SD 1.x": {"model.x.attn2.to_k.weight": (8, 768)},
    "SD 2.x": {"down_blocks.0.attn2.to_k.weight": (8, 1024)},
    "SDXL": {"conditioner.embedders.0.transformer.x.weight": (8,)},
    "SDXL ": {"down_blocks.1.attn2.to_k.weight": (8, 2048)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 8)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "a ControlNet, ": {"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)},
    "a LoRA, ": {"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 8)},
    "an autoencoder alone": {"decoder.conv_in.weight": (8, 4, 3, 3)},
    "no diffusion model": {"layer4.2.conv3.weight": (8, 8, 1, 1)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_another_family_is_recognised(family, folder, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({k: torch.zeros(s) for k, s in FAMILIES[family].items()}, path)
    with pytest.raises(WeightsError) as caught:
        StableDiffusion.from_pretrained(path, config=folder)
    for part in (str(path), family.strip(), "no UNet2DConditionModel"):
        assert part in str(caught.value)
    with pytest.raises(WeightsError) as caught:
        UNet.from_pretrained(path, config=UNetConfig(block_out_channels=(32,) * 4))
    for part in (str(path), family.strip(), "missing"):
        assert part in str(caught.value)


def test_a_checkpoint_that_does_not_fit_lists_the_keys(original, folder, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({**original, "control.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"1 unexpected \(control.conv.weight\)"):
        StableDiffusion.from_pretrained(path, config=folder)
    stray = {"model.diffusion_model.label.weight": torch.zeros(1)}
    rest = dict(original)
    del rest["model.diffusion_model.out.2.bias"]
    rest["model.diffusion_model.out.0.bias"] = torch.zeros(3)
    save_file({**rest, **stray}, path)
    with pytest.raises(WeightsError) as caught:
        StableDiffusion.from_pretrained(path, config=folder)
    for part in (
        "1 missing (conv_out.bias)",
        "1 unexpected (label.weight)",
        "1 of another shape (conv_norm_out.bias: file (3,), model (32,))",
    ):
        assert part in str(caught.value)


def test_the_averages_must_fit_too(original, folder, tmp_path):
    """Of a file with both copies, neither may hold what the model does not."""
    unet = [key for key in original if key.startswith("model.diffusion_model.")]
    both = {**original, **{averaged_name(key): original[key] + 1 for key in unet}}
    both |= {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    path = tmp_path / "both.safetensors"
    for stray, message in (
        ("model.diffusion_model.label.weight", r"1 unexpected \(label.weight\)"),
        (
            "model_ema.diffusion_modellabelweight",
            r"1 unexpected \(model_ema.diffusion_modellabelweight\)",
        ),
    ):
        save_file({**both, stray: torch.zeros(1)}, path)
        with pytest.raises(WeightsError, match=message):
            StableDiffusion.from_pretrained(path, config=folder)


def test_only_one_by_one_kernels_become_matrices(pipe, original, tmp_path):
    key = "first_stage_model.encoder.mid.attn_1.q.weight"
    wide = original[key].expand(-1, -1, 3, 3).contiguous()
    save_file({**original, key: wide}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"to_q.weight: file \(32, 32, 3, 3\)"):
        AutoencoderKL.from_pretrained(
            tmp_path / "model.safetensors", config=pipe.vae.config
        )


def test_two_names_of_one_weight_are_both_named(folder, tmp_path):
    for part, kind, first, second in (
        ("vae", AutoencoderKL, "attentions.0.to_q.", "attentions.0.query."),
        ("text_encoder", CLIPTextModel, "text_model.final", "final"),
    ):
        state = load_file(folder / f"{WHERE[part]}.safetensors")
        (key, *_) = [key for key in state if first in key]
        other = key.replace(first, second)
        state[other] = state[key] + 1
        shutil.copytree(folder / part, tmp_path / part)
        path = tmp_path / part / f"{WHERE[part].split('/')[1]}.safetensors"
        save_file(state, path)
        named = f"({key} and {other}|{other} and {key}) are two names of one weight"
        with pytest.raises(WeightsError, match=f"{path.name}: {named}"):
            kind.from_pretrained(path.parent)


@pytest.mark.parametrize("weight_map", [["a"], 5, {"conv_in.weight": 3}, {}, None])
def test_a_broken_index_of_shards_is_named(folder, tmp_path, weight_map):
    shutil.copytree(folder / "unet", tmp_path / "unet")
    (tmp_path / "unet" / UNet.weights_name).unlink()
    index = tmp_path / "unet" / f"{UNet.weights_name}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="index.json needs a weight_map that says"):
        UNet.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize("entry", ["x", ["diffusers"], {"a": 1}, 5, ["diffusers", 5]])
@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_broken_model_index_is_named(folder, tmp_path, entry, part):
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: entry}))
    with pytest.raises(WeightsError, match=f"model_index.json .*has {part} = .*expect"):
        StableDiffusion.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("vae", "block_out_channels", 32),
        ("vae", "block_out_channels", [16, "32"]),
        ("vae", "block_out_channels", []),
        ("vae", "layers_per_block", "2"),
        ("vae", "norm_num_groups", 0),
        ("vae", "norm_num_groups", 7),
        ("vae", "down_block_types", 4),
        ("vae", "scaling_factor", [1.0]),
        ("vae", "use_quant_conv", "yes"),
        ("unet", "cross_attention_dim", [32, 32]),
        ("unet", "attention_head_dim", {"a": 4}),
        ("unet", "block_out_channels", None),
        ("unet", "norm_num_groups", True),
        ("text_encoder", "hidden_size", 32.0),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "text_config", "small"),
    ],
)
def test_config_values_of_the_wrong_type_are_named(folder, tmp_path, part, key, value):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(WeightsError, match=f"{part}.config.json.*{key}"):
        StableDiffusion.from_pretrained(tmp_path / "model")


def test_options_of_another_kind_of_source_are_refused(checkpoint, folder):
    for source, options in (
        (folder, {"ema": False}),
        (folder, {"config": folder}),
        ("scenes", {"config": folder}),
        (checkpoint, {"variant": "fp16", "config": folder}),
        (checkpoint, {"revision": "v2", "config": folder}),
    ):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"^{name}=.*: only for a .*leave"):
            StableDiffusion.from_pretrained(source, **options)
    for option in ("variant", "revision"):
        with pytest.raises(ValueError, match=f"^{option}='fp16': only for a folder or"):
            UNet.from_pretrained(checkpoint, **{option: "fp16"})
    with pytest.raises(ValueError, match="is a file, but must be a folder"):
        StableDiffusion.from_pretrained(checkpoint, config=checkpoint)


def test_another_tokenizer_for_a_folder(folder, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer"))
    expected = StableDiffusion.from_pretrained(folder).tokenizer("a red star")
    hub = Hub(monkeypatch, folder / "tokenizer", tmp_path / "cache")
    for source in (folder, folder / "tokenizer", "owner/words"):
        again = StableDiffusion.from_pretrained(bare, tokenizer=source)
        assert torch.equal(again.tokenizer("a red star"), expected)
    assert hub.asked == [("owner/words", None)]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.ckpt", "unet/diffusion_pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_refused(original, folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "model")
    path, created = tmp_path / "model" / name, tmp_path / "created"
    torch.save({"state_dict": original, "trap": Trap(created)}, path)
    source = path if path.suffix == ".ckpt" else tmp_path / "model"
    if source != path:
        path.with_suffix(".safetensors").unlink()
    for dtype in (None, torch.float16):
        sizes = folder if source == path else None
        message = f"{path.name}.* asks for .*open.*nothing in it was run"
        with pytest.raises(WeightsError, match=message):
            StableDiffusion.from_pretrained(source, dtype=dtype, config=sizes)
    assert not created.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert created.exists()
    created.unlink()
    for protocol in (2, 4):  # a bare one, with no archive around it
        path.write_bytes(pickle.dumps(Trap(created), protocol))
        with pytest.raises(WeightsError, match="nothing in it was run") as caught:
            read_weights(path)
        assert "weights_only" not in str(caught.value)  # PyTorch would advise False
        assert not created.exists()


# ---- memory ----

MEASURE = """
import re, sys, torch, sdbook.pipeline, transformers
from sdbook import StableDiffusion
from transformers import CLIPTokenizer

def peak():  # of this program alone: getrusage also counts the one that started it
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])

before = peak()
pipe = StableDiffusion.from_pretrained(
    sys.argv[1], config=sys.argv[2], dtype=getattr(torch, sys.argv[3])
)
for part in (pipe.unet, pipe.vae, pipe.text_encoder):
    for parameter in part.parameters():
        parameter.detach().view(-1)[::256].sum().item()  # every page of it
print(peak() - before)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The folder of a model and its 110 MB in one file, as safetensors and pickle."""
    folder = tmp_path_factory.mktemp("larger")
    pipe = small_pipeline(channels=(256, 512), vae_channels=(16, 32), width=64)
    pipe.save_pretrained(folder / "model")
    pipe.save_original(folder / "one.safetensors")
    state = {"state_dict": load_file(folder / "one.safetensors")}
    torch.save(state, folder / "one.ckpt")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in KiB")
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("one.safetensors", "float32"),
        ("one.safetensors", "float16"),
        ("one.ckpt", "float16"),
    ],
)
def test_weights_are_in_memory_once(larger, name, dtype):
    path = larger / name
    size = path.stat().st_size
    assert size > 100e6
    arguments = [str(path), str(larger / "model"), dtype]
    command = [sys.executable, "-c", MEASURE, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    # Apart from the file, what Python needs to open a tokenizer and read the names.
    assert int(out.stdout) < 1.15 * size + 30e6, f"{int(out.stdout) / size:.2f}"


def test_the_benchmark_of_loading_prints_its_table(monkeypatch, tmp_path, capsys):
    bench = load_tool("bench_loading")
    (tmp_path / "file.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr(bench, "run", lambda *arguments: "1.0 2.5 100 1200\n")
    result = tmp_path / "result.json"
    assert bench.main(["--folder", str(tmp_path), "--json", str(result)]) == 0
    assert "one file, float16, diffusers" in capsys.readouterr().out
    rows = json.loads(result.read_text())["rows"]
    assert len(rows) == 8 and rows[0]["peak_over_file"] == 1.1
