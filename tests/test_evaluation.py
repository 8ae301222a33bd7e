"""The judge on pictures it must read, and on pictures it has to refuse."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.optimize import brentq

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
    evaluate,
    labelled_grid,
    markdown_table,
    prompts,
    satisfies,
    save_report,
    scores,
    wilson,
)
from sdbook.pipeline import Pictures, StableDiffusion

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


def test_scores_and_table(records):
    table = scores(records)
    low, high = wilson(8, 10)
    row = {"right": 8, "total": 10, "share": 0.8}
    row |= {"low": round(low, 4), "high": round(high, 4)}
    assert table["held_out"] == row
    text = markdown_table(table)
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
    assert (folder / "scores.md").read_text() == markdown_table(scores(records))
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
