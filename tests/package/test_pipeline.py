"""The pipeline against diffusers', and every way to call it wrongly."""

import inspect
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import WORDS, relative_error, small_pipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from sdbook.clip import Tokenizer
from sdbook.files import as_path
from sdbook.formats import find_model, shipped_models
from sdbook.inputs import prepare_prompts
from sdbook.pipeline import StableDiffusion, guide
from sdbook.schedulers import DDIMScheduler, DDPMScheduler
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

SD = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
)


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(autouse=True)
def ddim_again(pipe):
    yield
    pipe.scheduler = "ddim"


def draw(pipe, prompt="a red star", n=2, **options):
    options = {"output_type": "np", "progress": False, **options}
    return pipe(prompt, num_inference_steps=n, **options).images


# ---- equal to diffusers ----


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("scale, count", [(1.0, 2), (4.0, 1), (4.0, 3)])
def test_pictures_after_20_steps_equal_diffusers(
    pipe, reference, name, size, scale, count
):
    pipe.scheduler = name
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[name]
    reference.scheduler = kind.from_config(reference.scheduler.config)
    options = dict(
        height=size[0], width=size[1], num_inference_steps=20, guidance_scale=scale
    )
    prompts = ["a red star", "two green fish", "a boat"][:count]
    negatives = (["blue", "a house", ""] if scale > 1 else [""] * 3)[:count]
    ours = pipe(
        prompts, negatives, seed=3, output_type="np", progress=False, **options
    ).images
    theirs = reference(
        prompts,
        negative_prompt=negatives,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)[:count]],
        output_type="np",
        **options,
    ).images
    assert relative_error(ours, theirs) < 1e-4


def test_eta_and_latents_equal_diffusers(pipe, reference):
    reference.scheduler = diffusers.DDIMScheduler.from_config(
        reference.scheduler.config
    )
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    options = dict(num_inference_steps=6, guidance_scale=2.0, eta=0.7, output_type="np")
    ours = pipe("a boat", latents=latents, seed=5, progress=False, **options).images
    theirs = reference(
        "a boat",
        latents=latents,
        height=16,
        width=24,
        generator=torch.Generator().manual_seed(5),
        **options,
    ).images
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "channels, vae_channels",
    [((32,), (16,)), ((16, 24, 32), (16, 32)), ((16, 16, 24, 32), (8, 16, 24))],
    ids=["one level", "three", "four"],
)
def test_other_depths_equal_diffusers(channels, vae_channels, tmp_path):
    pipe = small_pipeline(channels, vae_channels, image_size=32, seed=1)
    pipe.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    options = dict(height=32, width=64, num_inference_steps=20, output_type="np")
    options["guidance_scale"] = 3.0
    ours = pipe("two fish", seed=1, progress=False, **options).images
    generator = torch.Generator().manual_seed(1)
    theirs = reference("two fish", generator=generator, **options).images
    assert relative_error(ours, theirs) < 1e-4


# ---- files, both ways ----


def assert_same_weights(ours, other):
    """Bit for bit. Pictures need not be: MKL rounds by where weights lie in memory."""
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = (getattr(p, part).state_dict() for p in (ours, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert relative_error(draw(ours), draw(other)) < 1e-5


def test_diffusers_folder_opens_here(pipe, reference, tmp_path):
    reference.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert_same_weights(again, pipe)
    assert again.scheduler.config == pipe.scheduler.config


def test_our_folder_opens_here(pipe, folder):
    again = StableDiffusion.from_pretrained(folder)
    assert_same_weights(again, pipe)
    assert not again.unet.training and again.dtype == torch.float32


def test_half_files_and_half_models(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, dtype=torch.float16)
    full = StableDiffusion.from_pretrained(tmp_path)
    half = StableDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert np.abs(draw(full) - draw(pipe)).max() < 0.02
    assert np.abs(draw(half) - draw(pipe)).max() < 0.2
    back = half.to("cpu", torch.float32)
    assert back is half and back.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", 16, np.float16])
def test_a_dtype_is_one_of_torch(folder, dtype):
    with pytest.raises(ValueError, match="dtype=.*torch.float16"):
        inspect.unwrap(StableDiffusion.from_pretrained)(StableDiffusion, folder, dtype)


def test_a_scheduler_that_we_lack_gives_ddim_with_a_warning(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    values = {k: v for k, v in SD.items() if k != "clip_sample"}
    config = {"_class_name": "DPMSolverSDEScheduler", **values}
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(config))
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="DPMSolverSDEScheduler.*using ddim"):
        pipe = StableDiffusion.from_pretrained(tmp_path / "model")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.beta_end == 0.012


def test_shipped_models_are_found_by_name(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SDBOOK_MODELS", str(folder.parent))
    assert shipped_models()["small"] == folder
    assert find_model("small") == folder
    monkeypatch.setenv("SDBOOK_MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no model 'small'"):
        find_model("small")


# ---- what a call does ----


def test_output_types(pipe):
    array = draw(pipe)
    assert array.shape == (1, 16, 16, 3) and 0 <= array.min() and array.max() <= 1
    tensor = draw(pipe, output_type="pt")
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    (picture,) = draw(pipe, output_type="pil")
    assert isinstance(picture, Image.Image) and picture.size == (16, 16)
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round())
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (1, 4, 8, 8)
    assert np.array_equal(pipe.decode(latents, "np"), array)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(pipe, name):
    pipe.scheduler = name
    together = draw(pipe, ["a boat", "a red star", "two fish"], seed=10)
    for k, prompt in enumerate(["a boat", "a red star", "two fish"]):
        alone = draw(pipe, prompt, seed=10 + k)
        assert np.abs(together[k] - alone[0]).max() < 1e-5


def test_seeds_one_by_one_and_drawn(pipe):
    out = pipe("a boat", num_images_per_prompt=3, num_inference_steps=1, progress=False)
    assert out.seeds == [0, 1, 2] and len(out.images) == 3
    three = draw(pipe, "a boat", num_images_per_prompt=3, seed=[7, 0, 7])
    assert np.abs(three[0] - three[2]).max() < 1e-5
    assert np.abs(three[0] - three[1]).max() > 1e-2
    out = pipe("a boat", seed=None, num_inference_steps=2, progress=False)
    again = pipe("a boat", seed=out.seeds, num_inference_steps=2, progress=False)
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(again.images[0]))


def test_pictures_of_each_prompt_stand_together(pipe):
    images = draw(
        pipe, ["a boat", "two fish"], num_images_per_prompt=2, seed=[1, 2] * 2
    )
    boats = draw(pipe, ["a boat"] * 2, seed=1)
    assert np.abs(images[:2] - boats).max() < 1e-5


def test_latents_in_and_out(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert np.array_equal(draw(pipe, latents=noise), draw(pipe, seed=4))
    wide = torch.cat([noise, noise], dim=3)
    assert draw(pipe, latents=wide).shape == (1, 16, 32, 3)


def test_callback_sees_every_step(pipe):
    seen = []
    final = draw(
        pipe,
        n=5,
        output_type="latent",
        callback=lambda step, t, latents: seen.append((step, t, latents)),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in seen] == [801, 601, 401, 201, 1]
    assert torch.equal(seen[-1][2], final)


def test_progress_bar_can_be_switched_off(pipe, capfd):
    draw(pipe, progress=True)
    assert "2/2" in capfd.readouterr().err
    draw(pipe, progress=False)
    assert capfd.readouterr().err == ""


def test_guidance_goes_from_uncond_through_cond(pipe):
    torch.manual_seed(0)
    uncond, cond = torch.randn(2, 1, 4, 8, 8)
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(guide(uncond, cond, 1.0), cond)
    torch.testing.assert_close(guide(uncond, cond, 3.0), 3 * cond - 2 * uncond)


def test_no_guidance_asks_the_unet_half_as_much(pipe):
    sizes = []
    hook = pipe.unet.register_forward_hook(
        lambda module, given, answers: sizes.append(len(answers))
    )
    plain = draw(pipe, guidance_scale=1.0)
    guided = draw(pipe, guidance_scale=1.0001)
    hook.remove()
    assert sizes == [1, 1, 2, 2]
    assert np.abs(plain - guided).max() < 1e-3


def test_negative_prompt_changes_the_picture_and_empty_means_none(pipe):
    plain = draw(pipe, guidance_scale=4.0)
    assert not np.array_equal(draw(pipe, negative_prompt="blue"), plain)
    assert np.array_equal(draw(pipe, negative_prompt=None), draw(pipe))
    two = draw(pipe, ["a boat"] * 2, negative_prompt=["blue"] * 2, seed=[0, 0])
    one = draw(pipe, "a boat", negative_prompt="blue")
    assert np.abs(two - one).max() < 1e-5


def test_scheduler_by_name_or_object_keeps_the_noise_schedule(pipe):
    pipe.scheduler = "ddpm"
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.scheduler.config.beta_end == 0.012
    pipe.scheduler = other = DDIMScheduler(**SD)
    assert pipe.scheduler is other
    pipe.scheduler = "ddim"
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    with pytest.raises(ValueError, match="'eulr'; there are ddpm, ddim"):
        pipe.scheduler = "eulr"


def test_gradients_are_off_inside_only(pipe):
    images = draw(pipe, output_type="pt")
    assert not images.requires_grad and torch.is_grad_enabled()


def test_an_overflowing_half_decoder_is_retried_in_float32(folder):
    pipe = StableDiffusion.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.vae.decoder.register_forward_hook(
        lambda module, given, out: (
            out * torch.inf if out.dtype == torch.bfloat16 else out
        )
    )
    with pytest.warns(UserWarning, match="overflowed in torch.bfloat16"):
        images = draw(pipe)
    assert np.isfinite(images).all() and images.std() > 0.01
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16


# ---- bad input ----


def test_empty_prompt_is_a_prompt(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(draw(pipe, "")).all()


def test_ten_thousand_words_are_cut_with_a_warning(pipe):
    words = "a red star " * 3334
    with pytest.warns(UserWarning):
        long = draw(pipe, words)
    with pytest.warns(UserWarning):
        assert np.array_equal(draw(pipe, words[:400]), long)


@pytest.mark.parametrize("steps", [0, 1001])
def test_number_of_steps(pipe, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}: .* 1 to 1000"):
        draw(pipe, n=steps)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(height=17), "height=17: .* try 16 or 18"),
        (dict(width=19), "width=19: .* try 18 or 20"),
        (dict(width=0), "width=0: .* try 2 or 4"),
        (dict(height=-16), "height=-16"),
        (dict(prompt=[]), "empty list of prompts"),
        (dict(negative_prompt=["a", "b"]), "2 negative prompts"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
        (dict(output_type="png"), "output_type='png': .* latent"),
        (dict(seed=[1, 2]), "2 seeds"),
        (dict(seed=2**64), "seed=18446744073709551616: .* 64 bits"),
        (dict(guidance_scale=math.nan), "guidance_scale=nan"),
        (dict(guidance_scale=math.inf), "guidance_scale=inf"),
        (dict(eta=2.0), "eta=2.0"),
        (
            dict(prompt=["a"] * 3, latents=torch.zeros(2, 4, 8, 8)),
            "batch of 3 but latents for 2",
        ),
        (
            dict(latents=torch.zeros(1, 3, 8, 8)),
            r"latents of shape \(1, 3, 8, 8\), expected \(1, 4, 8, 8\)",
        ),
        (
            dict(latents=torch.zeros(1, 4, 8, 8), height=24),
            "leave out height and width",
        ),
    ],
)
def test_calls_that_cannot_be_drawn(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe.unet, "forward", None)  # nothing may be computed
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


def call(pipe, **options):
    """A call as everybody makes it: only in the tests annotations are checked."""
    with torch.no_grad():
        options = {"prompt": "a boat", "num_inference_steps": 1} | options
        return inspect.unwrap(StableDiffusion.__call__)(pipe, progress=False, **options)


WHOLE, NUMBER = "expected a whole number", "expected a number"


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("num_inference_steps", ("3", 1.5, 2.0, True, None, math.nan), WHOLE),
        ("num_images_per_prompt", ("2", 1.0, True, 2**63, [1]), WHOLE),
        ("height", ("16", 16.0, True, 2**63), WHOLE),
        ("width", (np.float32(16), [16], np.True_), WHOLE),
        ("seed", ("3", 3.0, math.nan, True, [1.0], [None], range(1)), WHOLE),
        ("guidance_scale", ("3", True, None, 3j, 10**400, [3]), NUMBER),
        ("eta", ("0", True, math.nan, None), NUMBER),
        ("clip_skip", ("1", 1.0, True), WHOLE),
        ("clip_skip", (2, -1, 2**63), "2 layers"),
        ("callback", (5, "print"), "expected a function"),
        ("output_type", (None, ["pil"], 1), "choose one of pil, np, pt, latent"),
        ("latents", ([0], np.zeros((1, 4, 8, 8))), "tensor of floats"),
        ("latents", (torch.zeros(1, 4, 8, 8, dtype=torch.int64),), "tensor of floats"),
        ("latents", (torch.full((1, 4, 8, 8), math.nan),), "NaN"),
        ("prompt", ("\ud800", ["a", "b \udcff c"]), "half of a character"),
        ("negative_prompt", ("\ud800",), "half of a character"),
    ],
)
def test_arguments_of_a_wrong_type(pipe, monkeypatch, name, values, words):
    for part in (pipe.unet, pipe.text_encoder):
        monkeypatch.setattr(part, "forward", None)  # nothing may be computed
    for value in values:
        with pytest.raises(ValueError, match=words) as caught:
            call(pipe, **{name: value})
        assert name in str(caught.value) or "prompt" in name


def test_numbers_of_numpy_are_numbers(pipe):
    plain = dict(num_inference_steps=2, height=16, width=16, seed=3, guidance_scale=2.5)
    numpy = dict(
        num_inference_steps=np.int64(2), height=np.int32(16), width=np.uint8(16),
        seed=np.uint16(3), guidance_scale=np.float32(2.5), eta=np.float64(0),
        num_images_per_prompt=np.int8(1), clip_skip=np.int64(0),
    )  # fmt: skip
    ours = call(pipe, output_type="np", **numpy)
    assert np.array_equal(ours.images, call(pipe, output_type="np", **plain).images)
    assert ours.seeds == [3] and type(ours.seeds[0]) is int
    again = call(pipe, output_type="np", **(plain | {"seed": [np.int64(3)]}))
    assert np.array_equal(ours.images, again.images)


@pytest.mark.parametrize("kind", [5, None, DDIMScheduler, diffusers.DDIMScheduler()])
def test_a_scheduler_is_one_of_ours(pipe, kind):
    before = pipe.scheduler
    with pytest.raises(ValueError, match="scheduler of type"):
        inspect.unwrap(StableDiffusion.scheduler.fset)(pipe, kind)
    assert pipe.scheduler is before


def test_halves_of_characters_are_named_by_the_tokenizer_too(pipe):
    with pytest.raises(ValueError, match="half of a character"):
        pipe.tokenizer(["a boat", "\udce9t\udce9"])


# ---- which layer reads ----


def test_clip_skip_equals_diffusers(tmp_path):
    """diffusers counts from the last layer, and reads the negative prompt with all."""
    pipe = small_pipeline()
    config = type(pipe.text_encoder.config)(
        **{**vars(pipe.text_encoder.config), "num_hidden_layers": 4}
    )
    pipe.text_encoder = type(pipe.text_encoder)(config).eval()
    pipe.save_pretrained(tmp_path)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(["a red star"])
    seen = reference.text_encoder(ids, output_hidden_states=True).hidden_states
    if not hasattr(reference.text_encoder, "text_model"):  # which diffusers asks
        reference.text_encoder.text_model = reference.text_encoder
    options = dict(num_inference_steps=3, guidance_scale=4.0, output_type="np")
    pictures = {}
    for skip in (0, 1, 3):
        context = pipe.encode_prompt(["a red star"], skip)
        last = reference.text_encoder.text_model.final_layer_norm(seen[-1 - skip])
        assert relative_error(context, last.detach()) < 1e-5
        ours = pictures[skip] = pipe(
            "a red star", "blue", seed=3, clip_skip=skip, progress=False, **options
        ).images
        theirs = reference(
            "a red star", negative_prompt="blue", clip_skip=skip,
            generator=torch.Generator().manual_seed(3), **options,
        ).images  # fmt: skip
        assert relative_error(ours, theirs) < 1e-4
    plain = pipe("a red star", "blue", seed=3, progress=False, **options).images
    assert np.array_equal(plain, pictures[0])
    assert np.abs(pictures[1] - pictures[0]).max() > 1e-4


# ---- a VAE from elsewhere, and the way to the hub ----


def without_vae(pipe, path):
    """An original file of a model, but for its VAE."""
    pipe.save_original(path)
    tensors = {k: t for k, t in load_file(path).items() if "first_stage" not in k}
    save_file(tensors, path)
    return path


def test_a_vae_for_a_file_without_one(folder, tmp_path):
    pipe = StableDiffusion.from_pretrained(folder)
    file = without_vae(pipe, tmp_path / "no_vae.safetensors")
    options = dict(config=folder, tokenizer=folder)
    with pytest.raises(ValueError, match="no AutoencoderKL.*vae="):
        StableDiffusion.from_pretrained(file, **options)
    pipe.vae.save_pretrained(tmp_path / "alone")
    for source in (folder, folder / "vae", tmp_path / "alone"):
        again = StableDiffusion.from_pretrained(file, vae=source, **options)
        assert_same_weights(again, pipe)
    weights = tmp_path / "alone" / AutoencoderKL.weights_name  # its config beside it
    again = StableDiffusion.from_pretrained(file, vae=weights, **options)
    assert_same_weights(again, pipe)
    with pytest.raises(ValueError, match="no UNet2DConditionModel"):
        StableDiffusion.from_pretrained(weights, vae=weights, **options)


def test_a_vae_in_place_of_a_folders_own(pipe, folder, tmp_path):
    torch.manual_seed(8)
    other = AutoencoderKL(pipe.vae.config)
    other.save_pretrained(tmp_path / "vae")
    model = copy_of(folder, tmp_path)
    own = StableDiffusion.from_pretrained(model)
    shutil.rmtree(model / "vae")  # nobody needs it
    again = StableDiffusion.from_pretrained(model, vae=tmp_path / "vae")
    for key, tensor in again.vae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    assert relative_error(draw(again, output_type="latent"),
                          draw(own, output_type="latent")) < 1e-5  # fmt: skip
    narrow = {**vars(pipe.vae.config), "latent_channels": 3}
    AutoencoderKL(VAEConfig(**narrow)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="latent_channels is 3"):
        StableDiffusion.from_pretrained(model, vae=tmp_path / "narrow")
    with pytest.raises(ValueError, match="path of a vae is ''"):
        StableDiffusion.from_pretrained(model, vae="")
    with pytest.raises(ValueError, match="(?s)path of a vae is Auto.{,80}; give"):
        as_path(other, "a vae")


def test_push_to_hub_uploads_the_whole_folder(pipe, folder, monkeypatch):
    asked, uploaded = {}, []

    class Made(str):
        repo_id = "me/stars"

    def create_repo(self, repo_id, **options):
        asked.update(repo_id=repo_id, **options)
        return Made("https://huggingface.co/me/stars")

    def upload_folder(self, *, repo_id, folder_path):
        assert repo_id == "me/stars"
        StableDiffusion.from_pretrained(folder_path)
        found = (p for p in Path(folder_path).rglob("*") if p.is_file())
        uploaded.extend(sorted(str(p.relative_to(folder_path)) for p in found))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert pipe.push_to_hub("stars", private=True) == "https://huggingface.co/me/stars"
    assert asked == {"repo_id": "stars", "private": True, "exist_ok": True}
    kept = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert uploaded == kept


def test_push_to_hub_fits_the_library():
    for name, given in (
        ("create_repo", ("repo_id", "private", "exist_ok")),
        ("upload_folder", ("repo_id", "folder_path")),
    ):
        assert set(given) <= inspect.signature(getattr(HfApi, name)).parameters.keys()


def test_push_to_hub_says_what_is_in_the_way(pipe, monkeypatch):
    def offline(*given, **options):
        raise ConnectionError("no route to host\nfor ever")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(OSError, match="'me/x'.*no route to host.*hf auth login"):
        pipe.push_to_hub("me/x")
    monkeypatch.undo()
    with pytest.raises(OSError, match="a b.*owner/model"):  # refused by the library
        pipe.push_to_hub("a b")


@pytest.mark.parametrize("prompt, kind", [(None, "NoneType"), (["a", 3], "int")])
def test_prompts_are_texts(prompt, kind):
    with pytest.raises(ValueError, match=f"prompt of type {kind}"):
        prepare_prompts(prompt, "", 1)


def test_eta_without_ddim(pipe):
    pipe.scheduler = "ddpm"
    with pytest.raises(ValueError, match="DDPMScheduler has no eta"):
        draw(pipe, eta=0.5)


def test_arguments_without_effect_warn(pipe):
    with pytest.warns(UserWarning, match="guidance_scale=0.5"):
        low = draw(pipe, guidance_scale=0.5)
    assert np.array_equal(low, draw(pipe, guidance_scale=1.0))
    with pytest.warns(UserWarning, match="negative_prompt has no effect"):
        draw(pipe, negative_prompt="blue", guidance_scale=1.0)


def test_parts_that_do_not_fit_together(pipe):
    wide = UNet(UNetConfig(**{**vars(pipe.unet.config), "cross_attention_dim": 48}))
    with pytest.raises(ValueError, match="cross_attention_dim.* 48 .* 32"):
        StableDiffusion(
            pipe.vae, pipe.text_encoder, pipe.tokenizer, wide, pipe.scheduler
        )


# ---- bad checkpoints ----


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


def test_missing_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model .*nowhere"):
        StableDiffusion.from_pretrained(tmp_path / "nowhere")


def test_folder_without_an_index(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="model_index.json .*notes.txt"):
        StableDiffusion.from_pretrained(tmp_path)


def test_an_empty_single_file(tmp_path):
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="model.ckpt is empty"):
        StableDiffusion.from_pretrained(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
)
def test_missing_part_is_named(folder, tmp_path, part):
    broken = copy_of(folder, tmp_path)
    shutil.rmtree(broken / part)
    with pytest.raises(FileNotFoundError, match=part):
        StableDiffusion.from_pretrained(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 40, 5000])
def test_truncated_weights_are_named(folder, tmp_path, part, keep):
    broken = copy_of(folder, tmp_path)
    (path,) = (broken / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=path.name):
        StableDiffusion.from_pretrained(broken)


def test_a_tokenizer_of_another_model_is_refused(pipe):
    longer = Tokenizer.train(WORDS, vocab_size=560, max_length=77)
    with pytest.raises(ValueError, match="rows of 77, .* 16 places"):
        StableDiffusion(pipe.vae, pipe.text_encoder, longer, pipe.unet, pipe.scheduler)


def test_latents_that_overflowed_are_not_drawn(pipe):
    with pytest.raises(ValueError, match="UNet overflowed in torch.float32"):
        pipe.decode(torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        pipe.decode(torch.full((1, 4, 8, 8), torch.inf), "latent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_that_overflows_in_float32_is_an_error(folder, dtype):
    pipe = StableDiffusion.from_pretrained(folder, dtype=dtype)
    pipe.vae.decoder.register_forward_hook(lambda module, given, out: out * torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is asked again
        with pytest.raises(ValueError, match="VAE overflowed in float32"):
            draw(pipe)
    assert next(pipe.vae.parameters()).dtype == dtype


def test_weights_of_another_model_list_the_keys(folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    small_pipeline((16, 24, 32)).unet.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/diffusion_pytorch_model.safetensors", broken / "unet")
    with pytest.raises(ValueError, match="unexpected"):
        StableDiffusion.from_pretrained(broken)


def test_foreign_pipelines_are_refused(folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    index = json.loads((broken / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "unet": [None, None]}
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="FluxPipeline.* has unet = None"):
        StableDiffusion.from_pretrained(broken)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_broken_json_is_named(folder, tmp_path, name):
    broken = copy_of(folder, tmp_path)
    (broken / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=name):
        StableDiffusion.from_pretrained(broken)


def test_hub_id_without_a_network_says_so(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="owner/model.*no route to host"):
        StableDiffusion.from_pretrained("owner/model")


def test_hub_id_with_a_network(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: str(folder)
    )
    assert StableDiffusion.from_pretrained("owner/model").dtype == torch.float32


# ---- imports ----


def test_importing_the_pipeline_stays_light():
    code = (
        "import sys, sdbook.pipeline; "
        "print([m for m in ('transformers', 'diffusers', 'matplotlib', "
        "'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
