"""The model in the page draws what the package draws: in Node, without a browser.

tests/book/play.mjs runs the page's own modules; the networks are exported once, into
the folder where `make book` looks for them.
"""

import base64
import functools
import json
import random
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_tool, relative_error

from sdbook import StableDiffusion
from sdbook.evaluation import Judge, satisfies
from sdbook.scenes import PLACES, RELATIONS, Scenes, Thing, draw, read_caption
from sdbook.schedulers import make_scheduler

ROOT = Path(__file__).resolve().parents[2]
PLAY = ROOT / "assets" / "play"
TRICKY = [
    "", " ", "a red star above a blue house", "A  Red\tSTAR\n", "three yelow flowers.",
    "a violin", "it's two o'clock, isn't it?", "1234 stars", "don't!'s", "''s 't",
    "naïve café e\u0301", "ΟΔΟΣ", "İstanbul", "ǅ ß ﬁ", "星が三つ", "🐟 two fish 🐟🏽",
    "a\u00a0b\u2003c\u3000d\ufeffe\u0085f", "<|endoftext|>", "a<|startoftext|>b",
    "<|ENDOFTEXT|> a star", "<|endoftext", "___--- == :-)", "½ ² Ⅷ ٣", "a\u0000b",
    "constructor __proto__ toString", "a small red ball and a big blue ball " * 4,
]  # fmt: skip
NOISE = [(0, 1), (1, 2), (17, 15), (17, 16), (3, 17), (5, 31), (2**31, 1024), (9, 4097)]
EPSILON = {"prediction_type": "epsilon"}
VELOCITY = {"prediction_type": "v_prediction"}
STAR, FISH = "a red star above a blue house", "two green fish"
DRAW = [
    dict(prompt=STAR, seed=17, steps=25, guidance=3, scheduler=EPSILON),
    dict(prompt=STAR, seed=4, steps=25, guidance=3, scheduler=VELOCITY),
    dict(prompt=FISH, seed=1, steps=6, guidance=1, sampler="euler", scheduler=EPSILON),
    dict(prompt=FISH, seed=2, steps=6, guidance=5, sampler="euler", scheduler=VELOCITY),
    dict(prompt=FISH, negative="a star", seed=3, steps=6, guidance=2,
         sampler="dpmpp_2m", scheduler=EPSILON),
    dict(prompt=FISH, seed=4, steps=7, guidance=3, sampler="dpmpp_2m",
         scheduler=VELOCITY | dict(timestep_spacing="trailing",
                                   rescale_betas_zero_snr=True)),
    dict(prompt=STAR, seed=5, steps=5, guidance=3, sampler="ddim",
         scheduler={"prediction_type": "sample", "timestep_spacing": "linspace",
                    "beta_schedule": "squaredcos_cap_v2"}),
]  # fmt: skip


CAPTIONS = [Scenes().scene(i).caption for i in range(300)]


def strangers(count=200):
    """Texts of all kinds of letters, the same every time."""
    dice = random.Random(0)
    letters = "abcdefgh STAR 's12<|>.,-_éßΣжא你🌟\u0301\u200d\u00a0"
    return ["".join(dice.choices(letters, k=dice.randint(1, 30))) for _ in range(count)]


@functools.cache
def looked_at():
    """[(pixels with opacity, caption)]: scenes, every third noisy or told wrongly."""
    things = (
        Thing("star", "red", "big", 0.3, 0.3), Thing("fish", "blue", "small", 0.7, 0.4),
        Thing("fish", "blue", "small", 0.6, 0.8),
    )  # fmt: skip
    scene = [Scenes(split="validation").scene(i) for i in range(40)]
    shown = [(things, "paper", "a red star and two blue fish on paper")]
    shown += [(s.things, s.background, s.caption) for s in scene]
    dice, result = np.random.default_rng(0), []
    for i, (things, ground, caption) in enumerate(shown):
        pixels = draw(things, ground).astype(float)
        if i % 3 == 1:
            pixels = (pixels + dice.normal(0, 10, pixels.shape)).clip(0, 255)
        if i % 3 == 2:
            caption = scene[i % 7].caption
        opaque = np.full((*pixels.shape[:2], 1), 255.0)
        result.append((np.concatenate([pixels, opaque], 2).astype(np.uint8), caption))
    return result


@functools.cache
def node():
    """The JavaScript engine: Node, or the one that playwright brings along."""
    if found := shutil.which("node"):
        return found
    from playwright._impl._driver import compute_driver_executable

    return compute_driver_executable()[0]


def in_node(**questions):
    """What tests/book/play.mjs answers."""
    given = {"code": PLAY.as_uri(), "captions": [], **questions}
    done = subprocess.run(
        [node(), ROOT / "tests" / "book" / "play.mjs"], input=json.dumps(given),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def folder():
    """The exported model, where `make book` keeps it."""
    pytest.importorskip("onnxscript", reason="pip install -r requirements.txt")
    return load_tool("sphinx_play").exported()


@pytest.fixture(scope="session")
def pipe():
    return StableDiffusion.from_pretrained("scenes")


@pytest.fixture(scope="session")
def answers(folder):
    return in_node(
        folder=str(folder), prompts=TRICKY + strangers(), captions=CAPTIONS,
        noise=NOISE, draw=DRAW, pictures=[
            (base64.b64encode(pixels.tobytes()).decode(), caption)
            for pixels, caption in looked_at()
        ],
    )  # fmt: skip


def test_texts_have_the_same_ids(answers, pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are too long
        expected = [pipe.tokenizer(text)[0].tolist() for text in TRICKY + strangers()]
    wrong = [
        (text, ours, theirs)
        for text, ours, theirs in zip(TRICKY + strangers(), answers["ids"], expected)
        if ours != theirs
    ]
    assert not wrong, wrong[:3]


def test_captions_are_read_as_the_package_reads_them(answers):
    links = {word: name for name, words in RELATIONS.items() for word in words}
    for caption, ours, said in zip(
        CAPTIONS, answers["requests"], answers["said"], strict=True
    ):
        theirs = read_caption(caption)
        groups = [
            (g["count"], g["thing"], g["colour"] or None, g["size"] or None)
            for g in ours["groups"]
        ]
        assert groups == [(g.count, g.shape, g.colour, g.size) for g in theirs.groups]
        assert links.get(ours["relation"]) == theirs.relation
        assert ours["place"] == PLACES.get(theirs.background, "")
        assert said == caption, "and said again in the same words"


def test_the_judge_sees_the_same(answers):
    judge, told = Judge(), answers["judged"]
    rights = 0
    for (pixels, caption), ours in zip(looked_at(), told, strict=True):
        theirs = judge.read(pixels[..., :3])
        assert (ours["ground"], ours["unknown"]) == (theirs.background, theirs.unknown)
        found = [(t["shape"], t["colour"], t["size"]) for t in ours["things"]]
        assert found == [(t.shape, t.colour, t.size) for t in theirs.things], caption
        for here, there in zip(ours["things"], theirs.things, strict=True):
            assert abs(here["x"] - there.x) + abs(here["y"] - there.y) < 1e-6
        assert ours["right"] == satisfies(theirs, read_caption(caption)), caption
        rights += ours["right"]
    assert 10 < rights < 30, "some are right, and some are wrong"
    assert told[0]["text"] == "a red star and two blue fish, on paper"


def test_a_word_that_is_taken_changes_the_thing_that_it_is_about(answers):
    assert answers["taken"] == {
        "1 orange": "a red star above an orange house",
        "0 3": "three red stars above a blue house",
        "0 red": "a star above a blue house",
        "1 left of": "a red star left of a blue house",
        "0 above": "a red star",
        "1 at dusk": "a red star above a blue house at dusk",
    }


def test_words_of_another_world_are_noticed(answers):
    strange = dict(zip(TRICKY, answers["strange"], strict=False))
    assert strange["a red star above a blue house"] == []
    assert strange["a violin"] == [{"word": "violin", "near": ""}]
    assert strange["three yelow flowers."] == [{"word": "yelow", "near": "yellow"}]


def test_a_seed_gives_the_same_noise(answers):
    for (seed, size), ours in zip(NOISE, answers["noise"], strict=True):
        dice = torch.Generator().manual_seed(seed)
        theirs = torch.randn(size, generator=dice).numpy()
        assert np.abs(np.array(ours) - theirs).max() <= 1e-6, (seed, size)


def in_python(pipe, prompt, seed, steps, guidance, scheduler, sampler="ddim",
              negative=""):  # fmt: skip
    """(latents, picture, x before the last step, the last timestep) of the package."""
    pipe.scheduler = make_scheduler("ddim", **pipe.scheduler.options | scheduler)
    if sampler != "ddim":
        pipe.scheduler = sampler
    xs = []
    x = pipe(
        prompt, negative_prompt=negative, seed=seed, num_inference_steps=steps,
        guidance_scale=guidance, output_type="latent", progress=False,
        callback=lambda i, t, x: xs.append(x),
    ).images  # fmt: skip
    return x, pipe.decode(x)[0], xs[-2], pipe.scheduler.timesteps[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(DRAW)))
def test_pictures_are_the_same(number, answers, pipe):
    before, drawn = pipe.scheduler, answers["drawn"][number]
    try:
        x, picture, *_ = in_python(pipe, **DRAW[number])
    finally:
        pipe.scheduler = before
    error = relative_error(torch.tensor(drawn["x"]).view(x.shape), x)
    assert error < 1e-3, error
    theirs = np.asarray(picture, int)
    ours = np.array(drawn["pixels"]).reshape(*theirs.shape[:2], 4)
    assert (ours[..., 3] == 255).all()
    assert np.abs(ours[..., :3] - theirs).max() <= 1


@pytest.mark.slow
@torch.no_grad()
def test_words_are_heard_in_the_same_places(answers, pipe, folder):
    """The second output of the UNet is the mean attention of its largest maps."""
    before = pipe.scheduler
    try:
        _, _, x, t = in_python(pipe, **DRAW[0])
        maps = []

        def look(module, inputs):
            query, key = module.to_q(inputs[0]), module.to_k(inputs[1])
            query, key = module.split(query), module.split(key)
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            maps.append(scores.softmax(dim=-1)[0])

        hooks = [
            module.register_forward_pre_hook(look)
            for name, module in pipe.unet.named_modules()
            if name.endswith("attn2")
        ]
        pipe.predict(x, int(t), pipe.encode_prompt([STAR]))
        for hook in hooks:
            hook.remove()
    finally:
        pipe.scheduler = before
    cells = max(weights.shape[1] for weights in maps)
    mean = torch.stack([w for w in maps if w.shape[1] == cells]).mean(dim=(0, 1)).T
    ours = torch.tensor(answers["drawn"][0]["heard"]).view(mean.shape)
    assert float((ours - mean).abs().max()) < 1e-4
    assert torch.allclose(ours.sum(dim=0), torch.ones(cells), atol=1e-4)
    shape = json.loads((folder / "model.json").read_text())["heard"]
    assert shape == [pipe.tokenizer.max_length, *[round(cells**0.5)] * 2]


def test_the_exported_files_are_small_and_say_nothing_of_this_machine(folder):
    for name, shipped in (("text", "text_encoder"), ("unet", "unet")):
        (weights,) = (ROOT / "data/models/scenes" / shipped).glob("*.safetensors")
        size = (folder / f"{name}.onnx").stat().st_size
        assert size < 1.03 * weights.stat().st_size, name
    for path in (path for path in folder.iterdir() if path.is_file()):
        text = path.read_bytes()
        assert str(ROOT).encode() not in text and b"site-packages" not in text, path


def test_the_vendored_runtime_is_the_published_one():
    """As in the npm package, and with its licence, which the package lacks."""
    import hashlib

    notes = (PLAY / "vendor" / "README.md").read_text(encoding="utf-8")
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        digest = hashlib.sha256((PLAY / "vendor" / name).read_bytes()).hexdigest()
        assert digest in notes, name
    assert "MIT License" in (PLAY / "vendor" / "LICENSE").read_text(encoding="utf-8")


def test_modules_import_nothing_from_elsewhere():
    for path in PLAY.glob("*.js"):
        lines = path.read_text(encoding="utf-8")
        for name in re.findall(r'^import .* from "([^"]+)"', lines, re.M):
            assert re.fullmatch(r"\./\w+\.js", name) and (PLAY / name).exists(), path
