"""The judge on pictures it must read, and on pictures it has to refuse."""

import json
import math
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import load_tool, small_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from scipy.optimize import brentq
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

from sdbook import training
from sdbook.__main__ import main
from sdbook.clip import CLIP
from sdbook.data import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SPLITS,
    Group,
    Request,
    Scenes,
    Thing,
    draw,
    draw_background,
    is_held_out,
    read_caption,
)
from sdbook.evaluation import (
    Judge,
    Verdict,
    clip_score,
    compare,
    evaluate,
    frechet_distance,
    imagine,
    kernel_distance,
    matrix_sqrt,
    mean_distance,
    measure,
    nearest,
    prompts,
    satisfies,
    save_report,
    scores,
    sign_test,
    wilson,
)
from sdbook.features import (
    BookCLIP,
    Inception,
    TransformersCLIP,
    extract_features,
    open_clip,
    open_inception,
    pool_as_in_2015,
)
from sdbook.files import WeightsError, read_weights
from sdbook.formats import model_folders
from sdbook.images import labelled_grid
from sdbook.pipeline import Pictures, StableDiffusion
from sdbook.reports import (
    measures_table,
    read_geneval,
    read_report,
    scores_table,
    write_geneval,
)

JUDGE = Judge()


def render(scene):
    return draw(scene.things, scene.background)


# ---- reading real renders ----


@pytest.fixture(scope="module", params=SPLITS)
def read(request):
    """A hundred scenes of a split, and what the judge makes of their pictures."""
    world = Scenes(split=request.param, seed=5)
    truth = [world.scene(index) for index in range(100)]
    return truth, [JUDGE.read(render(scene)) for scene in truth]


def test_real_renders_are_read_exactly(read):
    wrong = [
        (scene.caption, str(verdict))
        for scene, verdict in zip(*read, strict=True)
        if set(verdict.things) != set(scene.things)
        or len(verdict.things) != len(scene.things)
        or verdict.background != scene.background
        or verdict.unknown
    ]
    assert len(wrong) <= 1, wrong


def test_real_renders_satisfy_their_captions(read):
    truth, verdicts = read
    right = [satisfies(v, read_caption(s.caption)) for s, v in zip(truth, verdicts)]
    assert sum(right) >= 99


def test_shuffled_prompts_are_wrong(read):
    truth, verdicts = read
    for shift in (1, 7):  # "a moon" may be true of a stranger's picture, but rarely
        others = truth[shift:] + truth[:shift]
        right = [satisfies(v, s.request) for v, s in zip(verdicts, others)]
        assert sum(right) <= 3


def test_every_thing_is_read_on_every_background():
    scenes = [
        ((Thing(shape, colour, "small", 0.25, 0.5),), background)
        for k, background in enumerate(BACKGROUNDS)
        for shape, colour in zip(SHAPES, [*COLOURS, *COLOURS][k:], strict=False)
    ]
    for things, background in scenes:
        verdict = JUDGE.read(draw(things, background))
        assert verdict == Verdict(things, background, 0), (things, str(verdict))


def test_things_at_the_rim():
    things = (
        Thing("house", "red", "big", 12 / 64, 12 / 64),
        Thing("fish", "blue", "big", 52 / 64, 52 / 64),
    )
    assert set(JUDGE.read(draw(things, "sky")).things) == set(things)


# ---- pictures that show something else ----


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture(background):
    verdict = JUDGE.read(draw_background(background, 64))
    assert verdict == Verdict((), background, 0)
    assert str(verdict) == f"nothing ({background})"
    assert not satisfies(verdict, read_caption("a star"))


def test_a_blob_of_no_shape_is_unknown():
    picture = draw_background("paper", 64).copy()
    picture[20:30, 10:50] = COLOURS["red"]  # a bar
    verdict = JUDGE.read(picture)
    assert verdict.things == () and verdict.unknown == 1
    assert "1 unknown" in str(verdict)


def test_a_colour_outside_the_palette_is_unknown():
    picture = draw((Thing("ball", "green", "big", 0.5, 0.5),), "paper").copy()
    inside = np.linalg.norm(picture - np.array(COLOURS["green"], float), axis=2) < 60
    picture[inside] = (0, 255, 255)
    verdict = JUDGE.read(picture)
    assert verdict.things == () and verdict.unknown == 1


def test_a_picture_full_of_something_is_one_unknown():
    picture = draw_background("dusk", 64).copy()
    picture[2:30, 2:62] = 0
    assert JUDGE.read(picture).unknown == 1


def test_specks_are_ignored():
    things = (Thing("star", "red", "big", 0.5, 0.5),)
    picture = draw(things, "sky").copy()
    picture[3:5, 3:5] = 0
    assert JUDGE.read(picture) == Verdict(things, "sky", 0)


def test_random_pixels_hold_no_things():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert JUDGE.read(picture).things == ()


def test_merged_things_are_not_two_right_ones():
    for gap in (4, 8):
        things = (
            Thing("square", "red", "big", 0.4, 0.5),
            Thing("house", "blue", "big", 0.4 + gap / 64, 0.55),
        )
        verdict = JUDGE.read(draw(things, "paper"))
        assert not satisfies(verdict, read_caption("a red square and a blue house"))


def some_scenes(count=30):
    world = Scenes(split="validation", seed=6)
    return [world.scene(index) for index in range(count)]


def share_right(spoil):
    scenes = some_scenes()
    right = [satisfies(JUDGE.read(spoil(render(s))), s.request) for s in scenes]
    return sum(right) / len(right)


def test_a_little_blur_or_noise_does_no_harm():
    rng = np.random.default_rng(0)

    def noise(picture):
        noisy = picture + rng.normal(0, 4, picture.shape)
        return noisy.clip(0, 255).astype(np.uint8)

    assert share_right(lambda p: ndimage.gaussian_filter(p, (0.4, 0.4, 0))) >= 0.95
    assert share_right(noise) >= 0.95


def test_much_blur_or_noise_is_not_read():
    rng = np.random.default_rng(0)

    def noise(picture):
        noisy = picture + rng.normal(0, 60, picture.shape)
        return noisy.clip(0, 255).astype(np.uint8)

    assert share_right(lambda p: ndimage.gaussian_filter(p, (5, 5, 0))) <= 0.1
    assert share_right(noise) <= 0.1


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="64×64"):
        JUDGE.read(np.zeros((128, 128, 3), np.uint8))


def test_exchanged_colours_are_wrong():
    """What a judge that only counts colours cannot see."""
    world, seen = Scenes(split="validation", seed=7), 0
    for index in range(60):
        scene = world.scene(index)
        groups = scene.request.groups
        if len({group.colour for group in groups} - {None}) < 2:
            continue
        colour = {
            groups[0].shape: groups[1].colour,
            groups[1].shape: groups[0].colour,
        }
        swapped = tuple(replace(t, colour=colour[t.shape]) for t in scene.things)
        verdict = JUDGE.read(draw(swapped, scene.background))
        assert set(verdict.things) == set(swapped)
        assert not satisfies(verdict, scene.request)
        seen += 1
    assert seen >= 10


# ---- strictness ----

ASKED = read_caption("a big red star above two small blue fish on the sand")
STAR = Thing("star", "red", "big", 0.5, 0.2)
FISH = (
    Thing("fish", "blue", "small", 0.3, 0.8),
    Thing("fish", "blue", "small", 0.7, 0.7),
)
RIGHT = Verdict((STAR, *FISH), "sand", 0)


def test_right_is_right_in_any_order():
    assert satisfies(RIGHT, ASKED)
    assert satisfies(replace(RIGHT, things=(*FISH[::-1], STAR)), ASKED)


@pytest.mark.parametrize(
    "things",
    {
        "one missing": (STAR, FISH[0]),
        "one too many": (STAR, *FISH, replace(FISH[0], x=0.5)),
        "an extra thing": (STAR, *FISH, Thing("moon", "pink", "small", 0.1, 0.1)),
        "nothing": (),
        "a wrong shape": (replace(STAR, shape="heart"), *FISH),
        "a wrong colour": (replace(STAR, colour="pink"), *FISH),
        "one wrong colour": (STAR, FISH[0], replace(FISH[1], colour="green")),
        "colours exchanged": (
            replace(STAR, colour="blue"),
            *(replace(fish, colour="red") for fish in FISH),
        ),
        "a wrong size": (replace(STAR, size="small"), *FISH),
        "upside down": (replace(STAR, y=0.95), *FISH),
        "beside it": (replace(STAR, x=0.02, y=0.7), *FISH),
    }.items(),
    ids=lambda case: case[0],
)
def test_each_mistake_alone_is_wrong(things):
    assert not satisfies(replace(RIGHT, things=things[1]), ASKED)


def test_wrong_background_and_unknown_blobs_are_wrong():
    assert not satisfies(replace(RIGHT, background="dusk"), ASKED)
    assert not satisfies(replace(RIGHT, unknown=1), ASKED)


def test_what_is_not_said_may_be_anything():
    request = Request((Group(1, "star"), Group(2, "fish")))
    assert satisfies(RIGHT, request)
    assert satisfies(replace(RIGHT, background="dusk"), request)
    changed = (replace(STAR, colour="pink", size="small", y=0.9), *FISH)
    assert satisfies(replace(RIGHT, things=changed), request)
    mixed = (STAR, FISH[0], replace(FISH[1], colour="green", size="big"))
    assert satisfies(replace(RIGHT, things=mixed), request)


@pytest.mark.parametrize("relation", ["above", "below", "left", "right"])
def test_each_relation_has_one_direction(relation):
    place = {"above": (0.5, 0.1), "below": (0.5, 0.9)}
    place |= {"left": (0.1, 0.5), "right": (0.9, 0.5)}
    request = Request((Group(1, "star"), Group(1, "moon")), relation)
    moon = Thing("moon", "pink", "big", 0.5, 0.5)
    for name, (x, y) in place.items():
        verdict = Verdict((replace(STAR, x=x, y=y), moon), "sky", 0)
        assert satisfies(verdict, request) == (name == relation)


# ---- the interval ----


@pytest.mark.parametrize(
    "right, total, low, high",
    [  # from published tables and other implementations of the same formula
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 20, 0.0089, 0.2361),
        (15, 148, 0.0624, 0.1605),  # Newcombe (1998), table I, without correction
        (81, 263, 0.2553, 0.3662),
        (190, 200, 0.9104, 0.9726),
    ],
)
def test_wilson_gives_known_numbers(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("right, total", [(3, 7), (190, 200), (199, 200), (1, 1000)])
def test_wilson_ends_solve_its_equation(right, total):
    share = right / total

    def beyond(p):
        return abs(share - p) - 1.96 * math.sqrt(p * (1 - p) / total)

    low, high = wilson(right, total)
    assert low == pytest.approx(brentq(beyond, 1e-9, share), abs=1e-9)
    assert high == pytest.approx(brentq(beyond, share, 1 - 1e-9), abs=1e-9)


def test_wilson_stays_between_0_and_1():
    for total in (1, 7, 200):
        for right in (0, total):
            low, high = wilson(right, total)
            assert 0 <= low <= right / total <= high <= 1 and high - low > 0


# ---- prompts ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "held_out"])
def test_prompts_are_different_and_always_the_same(kind):
    texts = prompts(kind, 200)
    assert len(set(texts)) == 200
    assert texts == prompts(kind, 200)
    assert texts[:50] == prompts(kind, 50)
    assert texts != prompts(kind, 200, seed=1)


@pytest.mark.parametrize("kind", [*KINDS, "held_out"])
def test_prompts_ask_for_what_their_kind_says(kind):
    requests = [read_caption(text) for text in prompts(kind, 100)]
    groups = [request.groups for request in requests]
    if kind in ("single", "colours", "counting"):
        assert all(len(group) == 1 for group in groups)
    if kind in ("two", "position", "attribution"):
        assert all(len(group) == 2 for group in groups)
    if kind in ("colours", "attribution", "held_out"):
        assert all(g.colour for group in groups for g in group)
    if kind == "counting":
        assert all(group[0].count > 1 for group in groups)
    if kind in ("single", "two"):
        assert all(g.count == 1 for group in groups for g in group)
    assert all(bool(r.relation) == (kind == "position") for r in requests) or (
        kind == "held_out"
    )


def test_held_out_prompts_name_what_training_never_shows():
    def shown(text):
        groups = read_caption(text).groups
        return is_held_out(
            tuple(Thing(g.shape, g.colour, "big", 0.0, 0.0) for g in groups)
        )

    assert all(shown(text) for text in prompts("held_out", 100))
    assert not any(shown(text) for text in prompts("attribution", 100))


@pytest.mark.slow
def test_prompts_that_there_are_not():
    with pytest.raises(ValueError, match="colour.*held_out"):
        prompts("magic", 3)
    with pytest.raises(ValueError, match="only .* different prompts"):
        prompts("single", 400)


# ---- scoring a model ----


class Painter(StableDiffusion):
    """Draws every prompt right but each fifth one; remembers the seeds."""

    def __init__(self):
        self.seeds = {}
        self.vae = SimpleNamespace(config=SimpleNamespace(downscale=4))

    def latent_shape(self):
        return 1, 4, 16, 16

    def __call__(self, prompt, seed=0, **options):
        images = []
        for k, text in enumerate(prompt):
            self.seeds[text] = seed + k
            things, background = self.imagine(read_caption(text), seed + k)
            images.append(Image.fromarray(draw(things, background)))
        return Pictures(images, [seed + k for k in range(len(prompt))])

    def imagine(self, request, seed):
        from sdbook.data import arrange

        groups = tuple(
            replace(g, colour=g.colour or "red", size=g.size or "small")
            for g in request.groups
        )
        things = arrange(replace(request, groups=groups), np.random.default_rng(seed))
        if seed % 5 == 4:
            things = things[1:]
        return things, request.background or "sky"


@pytest.fixture(scope="module")
def records():
    return evaluate(Painter(), num_prompts=10)


def test_evaluate_scores_every_kind(records):
    assert list(records) == [*KINDS, "held_out"]
    for kind, rows in records.items():
        assert [row["prompt"] for row in rows] == prompts(kind, 10)
        assert [row["right"] for row in rows] == [True, True, True, True, False] * 2
        assert all(row["seen"] and row["image"].size == (64, 64) for row in rows)


def test_seeds_do_not_depend_on_the_batch_size():
    one, other = Painter(), Painter()
    evaluate(one, num_prompts=4, kinds=["single", "two"], batch_size=3, seed=9)
    evaluate(other, num_prompts=4, kinds=["single", "two"], batch_size=50, seed=9)
    assert one.seeds == other.seeds


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="num_prompts is 0"):
        evaluate(Painter(), num_prompts=0)


def test_a_model_of_another_size_is_refused_before_it_draws(monkeypatch):
    pipe = small_pipeline()  # 16×16
    monkeypatch.setattr(pipe, "denoise", lambda *a, **o: pytest.fail("it drew"))
    with pytest.raises(ValueError, match="16×16.*64×64.*GenEval"):
        evaluate(pipe, num_prompts=1)


def test_scores_and_table(records):
    table = scores(records)
    low, high = wilson(8, 10)
    row = {"right": 8, "total": 10, "share": 0.8}
    row |= {"low": round(low, 4), "high": round(high, 4)}
    assert table["held_out"] == row
    text = scores_table(table)
    assert "| held out | 8 | 10 | 80.0% | 49.0% to 94.3% |" in text
    assert len(text.splitlines()) == 2 + len(table)


def test_the_report_has_all_that_was_seen(records, tmp_path):
    save_report(records, tmp_path / "new" / "report", model="painter", seed=0)
    folder = tmp_path / "new" / "report"
    report = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert report["facts"] == {"model": "painter", "seed": 0}
    assert report["scores"] == scores(records)
    first = report["records"]["single"][0]
    assert set(first) == {"prompt", "seen", "right"}
    assert (folder / "scores.md").read_text() == scores_table(scores(records))
    for name in ("right", "wrong"):
        sheet = Image.open(folder / f"{name}.png")
        assert sheet.width > 6 * 64 and sheet.height > 64


def test_a_report_without_mistakes_has_no_sheet_of_them(records, tmp_path):
    right = {k: [row for row in rows if row["right"]] for k, rows in records.items()}
    save_report(right, tmp_path)
    assert (tmp_path / "right.png").exists() and not (tmp_path / "wrong.png").exists()


def test_labelled_grid():
    images = [Image.new("RGB", (64, 64), "red")] * 5
    sheet = labelled_grid(images, ["a label that is rather long"] * 5, columns=4)
    assert sheet.width == 4 * (64 * 3 + 12)
    assert sheet.height > 2 * 64 * 3
    alone = labelled_grid(images[:1], ["one"])
    assert alone.width == 64 * 3 + 12
    assert alone.getpixel((20, 20)) == (255, 0, 0)


# ---- two runs ----


@pytest.mark.parametrize("wins, losses", [(30, 12), (12, 30), (7, 1), (0, 5), (4, 4)])
def test_the_sign_test_is_the_binomial_test(wins, losses):
    first = [True] * 20 + [True] * wins + [False] * losses + [False] * 9
    second = [True] * 20 + [False] * wins + [True] * losses + [False] * 9
    expected = binomtest(wins, wins + losses).pvalue
    assert sign_test(first, second) == pytest.approx(expected, rel=1e-9)


def test_models_that_never_differ_are_no_evidence():
    assert sign_test([True, False], [True, False]) == 1
    with pytest.raises(ValueError):
        sign_test([True], [True, False])


def test_two_runs_side_by_side(records, tmp_path):
    worse = {
        kind: [row | {"right": row["right"] and k > 1} for k, row in enumerate(rows)]
        for kind, rows in records.items()
    }
    save_report(worse, tmp_path)
    lines = compare(records, read_report(tmp_path)["records"]).splitlines()
    assert len(lines) == 2 + len(records)
    assert lines[-1] == "| held out | 8 | 6 | 2 | 0 | 0.500 |"


def test_runs_over_other_prompts_are_not_compared(records):
    fewer = {kind: rows[:-1] for kind, rows in records.items()}
    other = {**records, "two": records["single"]}
    for others in (fewer, other, {}):
        with pytest.raises(ValueError, match="different prompts.*num_prompts and seed"):
            compare(records, others)
        with pytest.raises(ValueError, match="different prompts"):
            compare({**others, "single": records["single"] * 2}, records)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"records": 3}', "\xff"])
def test_what_is_no_report_is_refused(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="sdbook evaluate"):
        read_report(tmp_path)
    (tmp_path / "scores.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="scores.json is no report"):
        read_report(tmp_path)


# ---- two heaps ----


def heaps(count=300, other=400, width=24):
    """Correlated features of two different worlds."""
    mix = torch.randn(width, width)
    first = torch.randn(count, width) @ mix
    return first, torch.randn(other, width) @ (
        mix + 0.3 * torch.randn(width, width)
    ) + 1


def test_the_root_of_a_matrix_squares_to_it():
    for rank in (6, 3):  # and a flat one, which rounding makes slightly negative
        half = torch.randn(6, rank, dtype=torch.float64)
        matrix = half @ half.T
        root = matrix_sqrt(matrix)
        assert torch.allclose(root @ root, matrix, atol=1e-7)
        assert torch.allclose(root, root.T)


def given_features(width):
    """A network for torchmetrics that lets features through."""
    network = nn.Identity()
    network.num_features = width
    return network


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [300, 15])  # more pictures than features, and fewer
def test_fid_is_torchmetrics_and_scipys(count):
    from torchmetrics.image.fid import FrechetInceptionDistance

    first, second = heaps(count)
    metric = FrechetInceptionDistance(feature=given_features(24))
    metric.set_dtype(torch.float64)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    ours = frechet_distance(first, second)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)

    # the formula of pytorch-fid and clean-fid, with a general root
    one, two = first.double().numpy(), second.double().numpy()
    covariances = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = one.mean(0) - two.mean(0)
    expected = shift @ shift + np.trace(sum(covariances)) - 2 * np.trace(root)
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_kid_is_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = heaps(300, 300)
    metric = KernelInceptionDistance(given_features(24), subsets=1, subset_size=300)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    ours = kernel_distance(first, second)
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_fid_of_known_gaussians():
    first = torch.randn(4000, 1)
    assert frechet_distance(first, first * 3 + 2) == pytest.approx(4 + 4, rel=0.1)
    shifted = first + 0.7
    assert frechet_distance(first, shifted) == pytest.approx(0.49, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_both_distances_are_symmetric():
    first, second = heaps(60, 90)
    for distance in (frechet_distance, kernel_distance):
        assert distance(first, second) == pytest.approx(distance(second, first))


def test_fid_is_biased_and_kid_is_not():
    fids, kids = [], []
    for _ in range(60):
        first, second = torch.randn(2, 40, 12)
        fids.append(frechet_distance(first, second))
        kids.append(kernel_distance(first, second))
    assert min(fids) > 0.5
    error = np.std(kids) / len(kids) ** 0.5
    assert abs(np.mean(kids)) < 3 * error and min(kids) < 0 < max(kids)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_heaps_that_cannot_be_compared(distance):
    with pytest.raises(ValueError, match="8 and of 9 numbers.*same network"):
        distance(torch.zeros(5, 8), torch.zeros(5, 9))
    with pytest.raises(ValueError, match="1 and 5 pictures.*at least 2"):
        distance(torch.zeros(1, 8), torch.zeros(5, 8))


# ---- Inception ----


@pytest.fixture(scope="module", params=[1000, 1008])
def inception(request, tmp_path_factory):
    """A weights file as torchvision has it, or as the FID has it; and its network."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(
        weights=None,
        num_classes=request.param,
        aux_logits=request.param == 1000,
        init_weights=False,
    ).eval()
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    network.fc = nn.Identity()
    return path, network, request.param


@torch.no_grad()
def test_inception_from_a_file(inception):
    path, network, classes = inception
    picture = Image.fromarray(render(some_scenes(1)[0]))
    ours = extract_features(open_inception(path), [picture])
    assert ours.shape == (1, 2048)
    large = picture.resize((299, 299), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(large)).permute(2, 0, 1)[None] / 127.5 - 1
    plain = network(pixels).double()
    off = (ours - plain).norm() / plain.norm()
    assert off < 0.02 if classes == 1000 else off > 0.02  # the other pooling


def test_inception_makes_pictures_smaller_as_pillow_does():
    """Without anti-aliasing, a large picture would be another picture (and FID)."""
    large = draw(some_scenes(1)[0].things, "sky", 64 * 16)
    pixels = torch.from_numpy(large).permute(2, 0, 1)[None] / 127.5 - 1
    ours = Inception(nn.Flatten())(pixels).view(3, 299, 299)
    small = Image.fromarray(large).resize((299, 299), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
    assert (ours - theirs).abs().max() < 0.03
    jagged = F.interpolate(pixels, (299, 299), mode="bicubic")[0]
    assert (jagged - theirs).abs().max() > 0.3


def test_the_pooling_of_2015_does_not_see_the_rim():
    from torchvision.models.inception import InceptionA

    block = InceptionA(3, 4).eval()
    pool_as_in_2015(block, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    with torch.no_grad():
        pooled = block(torch.ones(1, 3, 5, 5))[:, -4:]
    assert torch.allclose(pooled, pooled[..., 2:3, 2:3].expand_as(pooled))


def test_other_weights_are_no_inception(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(10, 4)}, path)
    with pytest.raises(ValueError, match="other.pth holds no Inception v3"):
        open_inception(path)
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        open_inception(tmp_path / "nothing.pth")


# ---- CLIP ----


@pytest.fixture(scope="module")
def shipped_clip():
    return open_clip()


def test_the_shipped_clip_is_small_and_tells_scenes_apart(shipped_clip):
    folder = model_folders()[-1] / "clip"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6
    state = read_weights(folder / "clip.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    truth = some_scenes(30)
    images, texts = [render(s) for s in truth], [s.caption for s in truth]
    own = clip_score(shipped_clip, images, texts)
    other = clip_score(shipped_clip, images, texts[1:] + texts[:1])
    assert (own > other).float().mean() > 0.9
    assert ((own >= 0) & (own <= 100 + 1e-4)).all() and (other >= 0).all()


def test_clip_score_is_the_cosine(shipped_clip):
    image, text = render(some_scenes(1)[0]), "a red star"
    clip, tokenizer = shipped_clip.clip, shipped_clip.tokenizer
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        logits = clip(tokenizer([text]), pixels)[0, 0] / clip.logit_scale.exp()
    score = clip_score(shipped_clip, [image], [text])[0]
    assert score.item() == pytest.approx(100 * max(logits.item(), 0), abs=1e-3)


def test_our_clip_from_a_run_and_back(tmp_path):
    config = training.CLIPTrainingConfig(
        output_dir=str(tmp_path / "run"), num_pictures=8, batch_size=4, max_steps=2,
        warmup_steps=1, vocab_size=540, max_length=48, hidden_size=32,
        num_hidden_layers=1, num_attention_heads=2, twins=False,
    )  # fmt: skip
    training.train_clip(config)
    clip = open_clip(tmp_path / "run")
    assert isinstance(clip, BookCLIP) and isinstance(clip.clip, CLIP)
    clip.save_pretrained(tmp_path / "saved")
    again = open_clip(tmp_path / "saved")
    images, texts = [render(s) for s in some_scenes(3)], ["a star", "a fish", "a boat"]
    assert torch.equal(clip.pictures(images), again.pictures(images))
    assert torch.equal(clip.texts(texts), again.texts(texts))
    assert clip.texts(texts).norm(dim=1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["text_projection.weight", "image_encoder.row.weight"])
@pytest.mark.parametrize("change", ["without", "smaller"])
def test_a_clip_that_does_not_fit_is_named(shipped_clip, tmp_path, name, change):
    shipped_clip.save_pretrained(tmp_path)
    tensors = load_file(path := tmp_path / "clip.safetensors")
    tensor = tensors.pop(name)
    if change == "smaller":
        tensors[name] = tensor[:, :-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="clip.safetensors .*train-clip"):
        open_clip(tmp_path)


def test_clip_of_transformers(shipped_clip, tmp_path):
    import transformers

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    ids = {"bos_token_id": shipped_clip.tokenizer.start_id}
    ids |= {"eos_token_id": shipped_clip.tokenizer.end_id}
    text = {"vocab_size": len(shipped_clip.tokenizer), "max_position_embeddings": 24}
    config = transformers.CLIPConfig(
        text_config={**size, **text, **ids, "pad_token_id": ids["eos_token_id"]},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    theirs = transformers.CLIPModel(config).eval()
    side = {"height": 32, "width": 32}
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
        shipped_clip.tokenizer.backend,
    )
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    clip = open_clip(tmp_path)
    assert isinstance(clip, TransformersCLIP)
    images = [Image.fromarray(render(scene)) for scene in some_scenes(3)]
    texts = ["a red star", "a fish", "two boats above a tree"]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = theirs(**inputs).logits_per_image / theirs.logit_scale.exp()
    expected = 100 * logits.diagonal().clamp(min=0)
    assert torch.allclose(clip_score(clip, images, texts), expected, atol=1e-3)


def test_no_clip_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-clip.*CLIPModel"):
        open_clip(tmp_path)


# ---- real pictures of prompts, and measures ----


@pytest.mark.parametrize("kind", [*KINDS, "held_out"])
def test_imagined_pictures_show_their_prompt(kind):
    rng = np.random.default_rng(0)
    for text in prompts(kind, 8):
        request = read_caption(text)
        verdict = JUDGE.read(imagine(request, rng))
        assert satisfies(verdict, request), text
        assert is_held_out(verdict.things) == (kind == "held_out"), text


def test_measures_know_a_painter_from_a_blur(records, shipped_clip):
    tower = shipped_clip.clip.image_encoder
    blurred = {
        kind: [
            row | {"image": ndimage.gaussian_filter(row["image"], (2, 2, 0))}
            for row in rows
        ]
        for kind, rows in records.items()
    }
    good = measure(records, shipped_clip, tower)
    bad = measure(blurred, shipped_clip, tower)
    assert list(good) == ["FID", "KID", "CLIP score"]
    assert bad["FID"]["model"] > 2 * good["FID"]["model"] > good["FID"]["real"] > 0
    assert bad["KID"]["model"] > good["KID"]["model"]
    assert bad["CLIP score"]["model"] < good["CLIP score"]["model"]
    assert good["FID"]["real"] == bad["FID"]["real"]
    table = measures_table(good)
    assert table.count("\n| ") == 3 and measures_table({}) == ""


def test_mean_distance_and_nearest():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert mean_distance(points) == pytest.approx(10 / 3)
    with pytest.raises(ValueError, match="at least 2"):
        mean_distance(points[:1])
    training = torch.randn(200, 3000) * 50
    distances, which = nearest(training[[7, 120]], training)
    assert distances.tolist() == [0, 0] and which.tolist() == [7, 120]


# ---- GenEval's layout ----

BENCH = {
    "tag": "single_object",
    "include": [{"class": "bench", "count": 1}],
    "prompt": "a photo of a bench",
}


class Repeater(StableDiffusion):
    """Draws grey pictures and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, num_images_per_prompt=1, **options):
        self.calls.append((prompt, options))
        images = [Image.new("RGB", (32, 32), "grey")] * num_images_per_prompt
        return Pictures(images, [0] * num_images_per_prompt)


def test_genevals_tool_finds_its_folders(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    listed = [BENCH, {**BENCH, "prompt": "a photo of a café"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in listed))
    pipe = Repeater()
    write_geneval(
        pipe, read_geneval(path), tmp_path / "out", seed=3, guidance_scale=9.0
    )
    assert [prompt for prompt, _ in pipe.calls] == [line["prompt"] for line in listed]
    assert all(o["seed"] == 3 and o["guidance_scale"] == 9 for _, o in pipe.calls)
    # read it as evaluation/evaluate_images.py does
    for number, folder in enumerate(sorted(os.listdir(tmp_path / "out"))):
        assert folder.isdigit() and int(folder) == number
        with open(tmp_path / "out" / folder / "metadata.jsonl") as file:
            assert json.load(file) == listed[number]
        names = os.listdir(tmp_path / "out" / folder / "samples")
        assert len(names) == 4 and all(re.match(r"\d+\.png", name) for name in names)


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": "a dog"}', '"a dog"'])
def test_a_line_that_geneval_does_not_have(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(BENCH) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*prompts.jsonl"):
        read_geneval(path)


def test_a_file_of_prompts_that_cannot_be_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(FileNotFoundError, match="evaluation_metadata.jsonl"):
        read_geneval(path)
    path.write_text(json.dumps(BENCH), encoding="utf-16")
    with pytest.raises(ValueError, match="prompts.jsonl:1: .*UTF-16"):
        read_geneval(path)
    path.write_text(json.dumps(BENCH) + "\n\n", encoding="utf-8-sig")
    assert read_geneval(path) == [BENCH]


# ---- the command, and the trade-offs ----


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """An untrained model of 64×64 pixels, as a run of `sdbook train` leaves it."""
    run = tmp_path_factory.mktemp("run")
    pipe = small_pipeline(channels=(8, 16), vae_channels=(8, 8, 8), image_size=64)
    pipe.save_pretrained(run)
    raw = pipe.unet.state_dict()
    averaged = {key: tensor * 0.5 for key, tensor in raw.items()}
    (run / "checkpoints").mkdir()
    checkpoint = run / "checkpoints" / "step-00000007.pt"
    state = {"step": 7, "model": raw, "ema": averaged, "optimiser": {"state": {}}}
    torch.save(state, checkpoint)
    return run


def command(*arguments):
    main([str(argument) for argument in arguments])


@pytest.mark.filterwarnings("ignore:only .* tokens of the prompt fit")
def test_the_command_measures_and_compares(small_model, tmp_path, capsys):
    flags = ["evaluate", "--checkpoint_path", small_model]
    flags += ["--num_prompts", 1, "--num_inference_steps", 1, "--output_dir"]
    command(*flags, tmp_path / "one")
    report = read_report(tmp_path / "one")
    assert set(report["measures"]) == {"FID", "KID", "CLIP score"}
    assert report["facts"]["features"] == report["facts"]["clip"] == "clip"
    command(*flags, tmp_path / "two", "--compare_with", tmp_path / "one")
    table = (tmp_path / "two" / "comparison.md").read_text()
    said = capsys.readouterr().out
    assert table in said and "| 1.000 |" in table and "CLIP score" in said


@pytest.mark.filterwarnings("ignore:only .* tokens of the prompt fit")
def test_the_command_draws_for_geneval(small_model, tmp_path, capsys):
    listed = tmp_path / "evaluation_metadata.jsonl"
    listed.write_text(json.dumps(BENCH) + "\n")
    flags = ["evaluate", "--checkpoint_path", small_model]
    flags += ["--geneval_prompts", listed, "--output_dir", tmp_path / "out"]
    command(*flags, "--num_inference_steps", 1)
    assert len(list(tmp_path.glob("out/00000/samples/*.png"))) == 4
    with pytest.raises(SystemExit):
        command(*flags, "--compare_with", tmp_path)
    assert "leave out compare_with" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:only .* tokens of the prompt fit")
def test_the_tradeoffs_are_recorded(small_model, records, tmp_path):
    tool = load_tool("measure_tradeoffs")
    few = ["--prompts", "1", "--steps", "1", "--output", str(tmp_path)]
    model = str(small_model)
    tool.main(["--model", model, "--pictures", "2", "--scales", "1", "3", *few])
    guidance = json.loads((tmp_path / "guidance.json").read_text())
    assert [row["guidance_scale"] for row in guidance["rows"]] == [1, 3]
    assert all(row["total"] == 7 for row in guidance["rows"])
    assert guidance["diversity_of_real"] > 0

    tool.main(["--only", "ema", "--ema_run", str(small_model), *few])
    ema = json.loads((tmp_path / "ema.json").read_text())
    assert [row["weights"] for row in ema["rows"]] == ["averaged", "raw"]
    assert "Step 7" in ema["note"] and 0 <= ema["P"] <= 1

    save_report(records, tmp_path / "report")
    stages = [f"{minutes}={tmp_path / 'report'}" for minutes in (90, 30)]
    tool.main(["--only", "training", "--stages", *stages, *few])
    stages = json.loads((tmp_path / "training.json").read_text())
    assert [row["minutes"] for row in stages["rows"]] == [30, 90]
    assert stages["rows"][0]["kinds"]["single"] == {"right": 8, "total": 10}
    with pytest.raises(SystemExit):
        tool.main(["--only", "ema"])
