"""Pictures as a start, any size, and the cheaper loop: against diffusers' pipelines."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from helpers import load_tool, relative_error, small_pipeline
from PIL import Image

from sdbook.inputs import as_pixels, picture_size
from sdbook.pipeline import StableDiffusion
from sdbook.schedulers import SCHEDULERS, PNDMScheduler, make_scheduler
from sdbook.tiles import in_tiles, tile_starts
from sdbook.vae import AutoencoderKL

PROMPTS = ["a red star", "two green fish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    small_pipeline((16, 24, 32), (8, 16), image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return StableDiffusion.from_pretrained(folder)


@pytest.fixture(scope="module")
def references(folder):
    found = {}
    for kind in ("Img2Img", "Inpaint"):
        pipeline_class = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
        found[kind] = pipeline_class.from_pretrained(folder)
        found[kind].set_progress_bar_config(disable=True)
    return found


@pytest.fixture(autouse=True)
def ddim_again(pipe):
    yield
    pipe.scheduler = "ddim"


def some_pictures(*shape, seed=0):
    numbers = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    return [Image.fromarray(one) for one in numbers]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def use(pipe, reference, name):
    """Set both pipelines to the sampler of this name."""
    pipe.scheduler = name
    kind = getattr(diffusers, type(pipe.scheduler).__name__)
    options = dict(reference.scheduler.config)
    if name == "pndm":  # as in Stable Diffusion's own file
        options["skip_prk_steps"] = True
        ours = {**pipe.scheduler.options, "skip_prk_steps": True}
        pipe.scheduler = PNDMScheduler.from_options(ours, foreign=True)
    reference.scheduler = kind.from_config(options)


# ---- image to image, inpainting ----


# LMS that skips steps has a test of its own: diffusers is wrong there.
STRENGTHS = [(name, s) for name in SCHEDULERS for s in (0.3, 0.75, 1.0)]
STRENGTHS = [pair for pair in STRENGTHS if pair not in (("lms", 0.3), ("lms", 0.75))]


@pytest.mark.parametrize("name, strength", STRENGTHS)
def test_image_to_image_equals_diffusers(pipe, references, name, strength):
    use(pipe, references["Img2Img"], name)
    options = dict(
        strength=strength, num_inference_steps=8, guidance_scale=4.0, output_type="np"
    )
    pictures = some_pictures(2, 24, 40)
    ours = pipe(PROMPTS, image=pictures, seed=[5, 9], progress=False, **options).images
    theirs = references["Img2Img"](
        PROMPTS, image=pictures, generator=generators(5, 9), **options
    ).images
    assert ours.shape == (2, 24, 40, 3)
    assert relative_error(ours, theirs) < 1e-4


INPAINTING = [(name, s) for name in SCHEDULERS for s in (0.5, 1.0)]
INPAINTING.remove(("lms", 0.5))


@pytest.mark.parametrize("name, strength", INPAINTING)
def test_inpainting_equals_diffusers(pipe, references, name, strength):
    use(pipe, references["Inpaint"], name)
    picture, mask = some_pictures(1, 32, 48)[0], np.zeros((32, 48), np.uint8)
    mask[8:30, 5:33] = 255
    options = dict(
        strength=strength, num_inference_steps=6, guidance_scale=4.0, output_type="np"
    )
    ours = pipe(
        PROMPTS[0], image=picture, mask=Image.fromarray(mask), seed=5, progress=False,
        **options,
    ).images  # fmt: skip
    theirs = references["Inpaint"](
        PROMPTS[0], image=picture, mask_image=Image.fromarray(mask), height=32,
        width=48, generator=generators(5), **options,
    ).images  # fmt: skip
    assert relative_error(ours, theirs) < 1e-4


def test_inpainting_keeps_the_rest(pipe):
    picture, mask = some_pictures(1, 32, 32)[0], torch.zeros(32, 32)
    mask[:, 16:] = 1
    options = dict(num_inference_steps=4, output_type="latent", progress=False)
    out = pipe("a boat", image=picture, mask=mask, seed=3, **options).images
    x0 = pipe.encode(as_pixels(picture, 32, 32), generators(3))
    assert torch.allclose(out[..., :8], x0[..., :8], atol=1e-5)
    assert not torch.allclose(out[..., 8:], x0[..., 8:], atol=0.1)


def test_pictures_of_every_kind_are_the_same_picture(pipe):
    picture = some_pictures(1, 32, 32)[0]
    array = np.asarray(picture, np.float32) / 255
    tensor = torch.from_numpy(array).movedim(-1, 0)
    options = dict(num_inference_steps=2, output_type="np", progress=False)
    first = pipe("a boat", image=picture, **options).images
    for other in ([picture], array, array[None], tensor, tensor[None]):
        again = pipe("a boat", image=other, **options).images
        assert np.abs(first - again).max() < 1e-6
    mask = np.zeros((32, 32), np.float32)
    mask[4:20] = 1
    options |= dict(image=picture)
    first = pipe(
        "a boat", mask=Image.fromarray((mask * 255).astype(np.uint8)), **options
    )
    for other in (mask, mask[None, ..., None], torch.from_numpy(mask)):
        assert np.array_equal(
            pipe("a boat", mask=other, **options).images, first.images
        )


def test_what_comes_out_can_go_in(pipe):
    options = dict(num_inference_steps=2, progress=False)
    for kind in ("pil", "np", "pt"):
        images = pipe(PROMPTS, output_type=kind, **options).images
        assert len(pipe(PROMPTS, image=images, **options).images) == 2


def test_a_picture_for_each_prompt_and_one_for_all(pipe):
    pictures = some_pictures(2, 32, 32)
    options = dict(num_inference_steps=3, output_type="np", progress=False, seed=1)
    both = pipe(PROMPTS, image=pictures, num_images_per_prompt=2, **options).images
    last = pipe(PROMPTS[1], image=pictures[1], **(options | {"seed": 4})).images
    assert np.abs(both[3] - last[0]).max() < 1e-5
    one = pipe(PROMPTS, image=pictures[0], **options).images
    assert np.abs(one[0] - both[0]).max() < 1e-5


def one_pixel(mode, value, **info):
    picture = Image.new(mode, (4, 4), value)
    picture.info.update(info)
    return picture


@pytest.mark.filterwarnings("ignore:the transparent part")
@pytest.mark.parametrize(
    "picture, rgb",
    [
        (one_pixel("RGBA", (200, 0, 0, 0)), (255, 255, 255)),  # the red is hidden
        (one_pixel("RGBA", (200, 0, 0, 255)), (200, 0, 0)),
        (one_pixel("LA", (0, 0)), (255, 255, 255)),
        (one_pixel("LA", (10, 255)), (10, 10, 10)),
        (one_pixel("P", 0, transparency=0), (255, 255, 255)),
        (one_pixel("RGB", (1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
        (one_pixel("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (one_pixel("1", 1), (255, 255, 255)),
        (one_pixel("I;16", 65_535), (255, 255, 255)),
        (one_pixel("I;16", 0x8080), (128, 128, 128)),
        (one_pixel("I", 65_535), (255, 255, 255)),
        (one_pixel("F", 0.6), (153, 153, 153)),
        (one_pixel("HSV", (0, 255, 255)), (255, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_is_the_picture_that_one_sees(picture, rgb):
    expected = torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    for given in (picture, [picture]):
        assert torch.equal(as_pixels(given, 8, 8).mul(255).round(), expected.float())
    mask = as_pixels(one_pixel("L", rgb[0]), 8, 8, mode="L")
    assert torch.equal(mask.mul(255).round(), torch.full((1, 1, 8, 8), rgb[0]))


@pytest.mark.parametrize("mode, value", [("F", 255.0), ("F", -1.0), ("I", 65_536)])
def test_pixels_beyond_what_a_mode_may_mean_are_refused(mode, value):
    for kind in ("RGB", "L"):
        with pytest.raises(ValueError, match="pixels beyond"):
            as_pixels(one_pixel(mode, value), 4, 4, mode=kind)


def test_transparency_is_white_as_in_training_and_said(pipe):
    picture = some_pictures(1, 32, 32)[0]
    clear = picture.convert("RGBA")
    clear.paste((255, 0, 0, 0), (0, 0, 16, 32))
    white = picture.copy()
    white.paste("white", (0, 0, 16, 32))
    options = dict(num_inference_steps=2, output_type="np", progress=False)
    expected = pipe("a boat", image=white, **options).images
    with pytest.warns(UserWarning, match="transparent part .* white.* mask"):
        images = pipe("a boat", image=clear, **options).images
    assert np.array_equal(images, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is transparent here
        images = pipe("a boat", image=white.convert("RGBA"), **options).images
    assert np.array_equal(images, expected)


def test_a_mask_is_white_and_not_transparent():
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    for mask in (clear, clear.convert("LA"), one_pixel("P", 0, transparency=0)):
        with pytest.raises(ValueError, match="mask of mode .*transparency.*white"):
            as_pixels(mask, 4, 4, mode="L")
    half = np.zeros((4, 4), np.uint8)
    half[:, 2:] = 255
    plain = Image.fromarray(half)
    for mode in ("RGBA", "LA", "P", "CMYK", "1", "I;16", "F"):
        mask = plain.convert(mode if mode not in ("I;16", "F") else "L")
        if mode == "F":
            mask = Image.fromarray(half.astype(np.float32) / 255)
        if mode == "I;16":
            mask = Image.fromarray(half.astype(np.uint16) * 257)
        found = as_pixels(mask, 4, 4, mode="L")
        assert torch.equal(found[0, 0].round(), torch.from_numpy(half / 255).float())


def test_a_turned_photograph_is_upright(tmp_path):
    picture, exif = some_pictures(1, 20, 40)[0], Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "one.png", exif=exif)
    turned = Image.open(tmp_path / "one.png")
    assert picture_size(turned) == (40, 20)
    expected = as_pixels(picture.transpose(Image.Transpose.ROTATE_270), 40, 20)
    assert torch.equal(as_pixels(turned, 40, 20), expected)


def test_arrays_of_every_layout_are_read():
    array = np.asarray(some_pictures(1, 8, 8)[0], np.float64) / 255
    expected = as_pixels(array, 8, 8)
    for other in (array[::-1][::-1], array.astype(">f8"), np.asfortranarray(array)):
        assert torch.equal(as_pixels(other, 8, 8), expected)
    assert torch.equal(as_pixels(array[:, ::-1], 8, 8), expected.flip(3))
    for kind in (object, complex, "U8"):
        with pytest.raises(ValueError, match="array of"):
            as_pixels(np.ones((8, 8, 3)).astype(kind), 8, 8)


def test_sizes_of_pictures(pipe):
    picture = some_pictures(1, 33, 47)[0]
    options = dict(num_inference_steps=1, strength=1.0, progress=False)
    assert pipe("a boat", image=picture, **options).images[0].size == (46, 32)
    sized = pipe("a boat", image=picture, height=20, width=26, **options)
    assert sized.images[0].size == (26, 20)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("skip", [0, 3, 7])
def test_a_run_that_skips_steps_ends_where_others_end(name, skip):
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if name in ("ddpm", "ddim"):
        options["clip_sample"] = False
    scheduler = make_scheduler(name, **options)
    scheduler.set_timesteps(8)
    last = scheduler.timesteps[-1]
    scheduler.skip(skip)
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1])
    if skip == 0 and name not in ("ddpm", "euler_a"):
        assert len(scheduler.timesteps) >= 8
    for t in scheduler.timesteps.tolist():  # a network that always finds the noise
        signal = scheduler.add_noise(torch.ones(1), torch.zeros(1), t)
        spread = scheduler.add_noise(torch.zeros(1), torch.ones(1), t)
        x = scheduler.step((x - signal * x0) / spread, t, x)
    assert scheduler.timesteps[-1] == last
    assert relative_error(x, x0) < 0.05


def test_lms_that_skips_steps():
    """diffusers weighs the first slopes of a run as if there had been others before.

    Begun at the same place without a `begin_index`, it is right, and we equal it.
    """
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours, theirs = (
        make_scheduler("lms", **options),
        diffusers.LMSDiscreteScheduler(**options),
    )
    ours.set_timesteps(8), theirs.set_timesteps(8)
    ours.skip(3)
    theirs.timesteps, theirs.sigmas = theirs.timesteps[3:], theirs.sigmas[3:]
    x = expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        output = ours.scale_model_input(x, float(t)).tanh()
        x = ours.step(output, float(t), x)
        output = theirs.scale_model_input(expected, t).tanh()
        expected = theirs.step(output, t, expected).prev_sample
        assert relative_error(x, expected) < 1e-5


def test_skipping_all_steps_is_refused():
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="skip 5 of 5 steps: at least one"):
        scheduler.skip(5)


PICTURE = some_pictures(1, 32, 32)[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(strength=0.5), "strength without image"),
        (dict(mask=PICTURE), "mask without image"),
        (dict(image=PICTURE, strength=0), "strength=0"),
        (dict(image=PICTURE, strength=1.5), "strength=1.5"),
        (dict(image=PICTURE, strength=0.01), "0.01 of 2 steps"),
        (dict(image="fish.png"), "picture of type str"),
        (dict(image=[]), "picture of type list"),
        (dict(image=PICTURE, mask="mask.png"), "picture of type str"),
        (dict(image=np.zeros((31, 32, 3))), "height=31: .* multiples of 2"),
        (
            dict(image=np.full((32, 32, 3), 255)),
            "from 255 to 255",
        ),
        (dict(image=-torch.ones(3, 32, 32)), "from -1 to -1"),
        (
            dict(image=torch.ones(1, 32, 32)),
            r"shape \(1, 1, 32, 32\), expected \(b, 3,",
        ),
        (dict(image=torch.ones(3, 32, 32), height=16), r"expected \(b, 3, 16, 32\)"),
        (dict(image=PICTURE, mask=torch.ones(16, 16)), r"expected \(b, 1, 32, 32\)"),
        (dict(image=[PICTURE] * 2), "2 pictures or masks for 1 prompt;"),
        (
            dict(prompt=["a boat"] * 4, image=[PICTURE] * 2),
            "2 pictures or masks for 4 prompts",
        ),
    ],
)
def test_pictures_that_cannot_be_used(pipe, monkeypatch, options, message):
    for part in (pipe.unet, pipe.vae.encoder, pipe.text_encoder):
        monkeypatch.setattr(part, "forward", None)  # nothing may be computed
    options = {"prompt": "a boat", "num_inference_steps": 2} | options
    with pytest.raises(ValueError, match=message):
        pipe(progress=False, **options)


# ---- any size ----


@pytest.fixture(scope="module")
def eighth(tmp_path_factory):
    """A pipeline with 8 pixels a cell, as in Stable Diffusion, and diffusers'."""
    folder = tmp_path_factory.mktemp("eighth")
    small_pipeline((16, 24, 32), (8, 8, 8, 8), image_size=64).save_pretrained(folder)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return StableDiffusion.from_pretrained(folder), reference


@pytest.mark.parametrize("size", [(8, 8), (40, 56), (88, 24), (72, 64)])
def test_sizes_that_the_unet_cannot_halve_equal_diffusers(eighth, size):
    pipe, reference = eighth
    height, width = size
    options = dict(height=height, width=width, num_inference_steps=5, output_type="np")
    options |= dict(guidance_scale=3.0)
    ours = pipe(PROMPTS, seed=5, progress=False, **options).images
    theirs = reference(PROMPTS, generator=generators(5, 6), **options).images
    assert relative_error(ours, theirs) < 1e-4


# ---- large pictures ----


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained("data/models/scenes/vae")


@pytest.fixture(scope="module")
def wall():
    """Sixteen scenes side by side: 256 × 256 pixels."""
    from sdbook.data import Scenes

    scenes = torch.stack([Scenes(split="validation")[i][0] for i in range(16)])
    return (
        scenes.reshape(4, 4, 3, 64, 64).permute(2, 0, 3, 1, 4).reshape(1, 3, 256, 256)
    )


def steps_across(picture, whole):
    """By how much the error changes from each column to the next, in the mean."""
    return (picture - whole).diff(dim=-1).abs().mean((0, 1, 2))


@torch.no_grad()
def test_tiles_have_no_seams(vae, wall, monkeypatch):
    z = vae.encode(wall).mode()
    whole = vae.decode(z)
    cut = torch.cat(
        [torch.cat([vae.decode(part) for part in row.split(16, 3)], 3)
         for row in z.split(16, 2)], 2,
    )  # fmt: skip
    monkeypatch.setattr(vae, "tile_size", 96)
    tiled = vae.decode(z)
    typical = steps_across(tiled, whole).median()
    assert (
        steps_across(cut, whole)[63::64].min() > 4 * steps_across(cut, whole).median()
    )
    edges = [side for start in tile_starts(64, 24, 6) for side in (start, start + 24)]
    seams = [4 * edge - 1 for edge in edges if 0 < edge < 64]
    assert steps_across(tiled, whole)[seams].max() < 2 * typical
    assert (tiled - whole).square().mean() < (cut - whole).square().mean() / 3


@torch.no_grad()
def test_what_looks_only_at_near_places_is_exact_in_tiles():
    x = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    larger = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    smaller = lambda x: x[..., ::4, ::4]  # noqa: E731
    assert torch.allclose(in_tiles(larger, x, 16), larger(x), atol=1e-6)
    assert torch.allclose(in_tiles(smaller, x, 5, cell=4), smaller(x), atol=1e-6)


@pytest.mark.parametrize("length, tile, overlap", [(64, 16, 4), (17, 16, 4), (9, 4, 1)])
def test_tiles_cover_everything_and_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == length
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
    assert tile_starts(tile, tile, overlap) == [0]


@torch.no_grad()
def test_slicing_changes_nothing_and_does_one_at_a_time(vae, monkeypatch):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, seen = vae.decode(z), []
    hook = vae.decoder.register_forward_hook(
        lambda m, given, out: seen.append(len(out))
    )
    monkeypatch.setattr(vae, "slicing", True)
    assert torch.allclose(vae.decode(z), expected, atol=1e-5)
    assert seen == [1, 1, 1]
    hook.remove()


@pytest.mark.parametrize("tile_size", [0, -8, 3, 7])
def test_tiles_that_are_too_small(vae, tile_size):
    with pytest.raises(ValueError, match=f"tile_size={tile_size}: give at least 8 pix"):
        vae.tile_size = tile_size
    assert vae.tile_size is None


def overflow(module, given, out):
    """A forward hook that makes half precision overflow."""
    return out * torch.inf if out.dtype == torch.float16 else out


def test_an_encoder_that_overflows_is_asked_again_in_float32(folder):
    pipe = StableDiffusion.from_pretrained(folder, dtype=torch.float16)
    pipe.vae.encoder.register_forward_hook(overflow)
    options = dict(num_inference_steps=2, output_type="np", progress=False)
    with pytest.warns(UserWarning, match="VAE overflowed in torch.float16"):
        images = pipe("a boat", image=PICTURE, **options).images
    assert np.isfinite(images).all()
    assert next(pipe.vae.parameters()).dtype == torch.float16


def test_a_failed_retry_leaves_the_vae_as_it_was(folder):
    pipe = StableDiffusion.from_pretrained(folder, dtype=torch.float16)
    pipe.vae.decoder.register_forward_hook(overflow)

    @pipe.vae.decoder.register_forward_pre_hook
    def too_large(module, given):
        if given[0].dtype == torch.float32:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        pipe("a boat", num_inference_steps=1, progress=False)
    assert next(pipe.vae.parameters()).dtype == torch.float16


# ---- the same, for less ----


@pytest.mark.parametrize("scale, batch", [(1.0, 2), (3.0, 4)])
def test_a_step_asks_the_unet_once(pipe, scale, batch):
    sizes = []
    hook = pipe.unet.register_forward_hook(lambda *given: sizes.append(len(given[2])))
    pipe(PROMPTS, num_inference_steps=5, guidance_scale=scale, progress=False)
    hook.remove()
    assert sizes == [batch] * 5


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_both_halves_in_one_call_are_as_good_as_two(pipe, name, scale):
    pipe.scheduler = name
    options = dict(num_inference_steps=4, guidance_scale=scale, output_type="latent")
    ours = pipe(PROMPTS, seed=2, progress=False, **options).images

    context, uncond = pipe.encode_prompt(PROMPTS), pipe.encode_prompt(["", ""])
    pipe.scheduler.set_timesteps(4)
    dice = generators(2, 3)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=one) for one in dice])
    x = x * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps.tolist():
        given = pipe.scheduler.scale_model_input(x, t)
        with torch.no_grad():
            low, high = pipe.unet(given, t, uncond), pipe.unet(given, t, context)
        x = pipe.scheduler.step(low + scale * (high - low), t, x, generator=dice)
    assert relative_error(ours, x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(pipe, dtype):
    options = dict(num_inference_steps=4, output_type="np", progress=False, seed=2)
    expected = pipe(PROMPTS, **options).images
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no decode may have to be retried
            half = pipe.to(dtype=dtype)(PROMPTS, **options).images
            picture = some_pictures(1, 32, 32)[0]
            again = pipe(PROMPTS, image=picture, **options).images
    finally:
        pipe.to(dtype=torch.float32)
    assert np.abs(half - expected).mean() < 0.02
    assert np.isfinite(again).all()


def test_bench_measures_pipelines(capsys):
    bench = load_tool("bench")
    rows = list(bench.pipelines_beside_diffusers(small_pipeline(), rounds=1, steps=2))
    assert all(min(ours + theirs) > 0 for _, ours, theirs in rows)
