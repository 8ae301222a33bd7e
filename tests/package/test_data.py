"""The world of scenes keeps its promises, and the folder reader its manners."""

import csv
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tarfile
import unicodedata
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import load_tool
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import sdbook.data
import sdbook.images
import sdbook.scenes
from sdbook.data import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    COUNTS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_PAIRS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    CaptionedImages,
    CaptionedShards,
    CrowdedScenes,
    Cut,
    Group,
    Packed,
    Request,
    Scenes,
    Thing,
    arrange,
    describe,
    draw,
    draw_thing,
    find_captions,
    invent,
    is_held_out,
    read_caption,
    read_picture,
    short_name,
    stands,
    to_pixels,
    to_rgb,
    write_folder,
)
from sdbook.run.settings import RunConfig, open_dataset

SHIPPED = Path(__file__).parents[2] / "data" / "scenes"


# The vocabulary ---------------------------------------------------------------


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 10 and len(COLOURS) == 8 and len(SIZES) == 2
    assert len(BACKGROUNDS) >= 4 and set(COUNTS) == {1, 2, 3} and len(RELATIONS) == 4
    assert len(KINDS) == 6 and sum(KINDS.values()) == pytest.approx(1)


def test_held_out_things_exist_and_leave_enough_of_each():
    for shape, colour in HELD_OUT_PAIRS:
        assert shape in SHAPES and colour in COLOURS
    assert all(set(pair) <= set(SHAPES) for pair in HELD_OUT_COMBINATIONS)
    # Every shape and every colour is still seen in at least six others.
    for options, place in ((SHAPES, 0), (COLOURS, 1)):
        for option in options:
            assert sum(pair[place] == option for pair in HELD_OUT_PAIRS) <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_smooth_and_large_enough(shape):
    sprite = draw_thing(shape, "red", 16)
    alpha = sprite[..., 3]
    assert sprite.shape == (16, 16, 4)
    assert alpha.max() == 255
    assert alpha.mean() > 0.2 * 255, "lost in 16 pixels"
    if shape != "square":
        assert alpha.min() == 0
        assert ((alpha > 0) & (alpha < 255)).any(), "no smooth edge"


def test_shapes_do_not_look_alike():
    sprites = {shape: draw_thing(shape, "blue", 16).astype(float) for shape in SHAPES}
    for first in SHAPES:
        for second in SHAPES:
            if first < second:
                assert abs(sprites[first] - sprites[second]).mean() > 10


# Drawing ----------------------------------------------------------------------


def test_a_sprite_is_laid_over_its_background():
    thing = Thing("boat", "red", "big", 0.5, 0.5)
    with_it, without = draw((thing,), "sky"), draw((), "sky")
    sprite = draw_thing("boat", "red", 24).astype(float)
    alpha = sprite[..., 3:] / 255
    expected = without.astype(float)
    inside = (slice(20, 44), slice(20, 44))
    expected[inside] = alpha * sprite[..., :3] + (1 - alpha) * expected[inside]
    assert abs(with_it - expected).max() <= 1


def test_no_dark_seam_around_a_sprite():
    """Averaging must weight colours by alpha, or edges mix with invisible black."""
    sprite = draw_thing("ball", "yellow", 24)
    edge = (sprite[..., 3] > 20) & (sprite[..., 3] < 250)
    assert edge.any()
    assert abs(sprite[edge][:, :3].astype(int) - COLOURS["yellow"]).max() < 16


def test_scenes_can_be_drawn_larger():
    small, large = Scenes(64)[5], Scenes(128)[5]
    assert large[0].shape == (3, 128, 128) and small[1] == large[1]
    shrunk = torch.nn.functional.avg_pool2d(large[0][None], 2)[0]
    assert (shrunk - small[0]).abs().mean() < 0.02


# Words ------------------------------------------------------------------------

# Plain fields, not dataclasses: those are checked when made, and Hypothesis minds.
groups = st.lists(
    st.tuples(
        st.sampled_from(list(COUNTS)),
        st.sampled_from(list(SHAPES)),
        st.sampled_from([None, *COLOURS]),
        st.sampled_from([None, *SIZES]),
    ),
    min_size=1,
    max_size=2,
)
relations = st.sampled_from([None, *RELATIONS])
backgrounds = st.sampled_from([None, *BACKGROUNDS])


@settings(max_examples=300, deadline=None)
@given(groups, relations, backgrounds, st.one_of(st.none(), st.integers(0, 2**32)))
def test_every_phrasing_reads_back(groups, relation, background, seed):
    request = Request(
        tuple(Group(*fields) for fields in groups),
        relation if len(groups) == 2 else None,
        background,
    )
    rng = None if seed is None else np.random.default_rng(seed)
    assert read_caption(describe(request, rng)) == request


def test_phrasings_by_example():
    request = Request(
        (Group(1, "moon", "orange"), Group(2, "fish", None, "big")), "left", "sky"
    )
    assert describe(request) == "an orange moon left of two big fish in the sky"
    rng = np.random.default_rng(0)
    assert len({describe(request, rng) for _ in range(50)}) == 4


@pytest.mark.parametrize(
    "caption",
    [
        "Two blue fish above a red boat",
        " two blue fish over one red boat ",
        "a picture of two blue fish above a red boat",
    ],
)
def test_people_may_write_it_their_way(caption):
    expected = Request((Group(2, "fish", "blue"), Group(1, "boat", "red")), "above")
    assert read_caption(caption) == expected


@pytest.mark.parametrize(
    "caption",
    ["", "a unicorn", "red star", "a red star above", "four stars", "a star\0"],
)
def test_what_the_grammar_does_not_have_is_refused_with_help(caption):
    with pytest.raises(ValueError, match=r"say it like .* flower .* brown"):
        read_caption(caption)


# Places -----------------------------------------------------------------------


def test_relations_by_example():
    here = np.array([[0.5, 0.5]])
    for relation, place in {
        "left": (0.1, 0.6),
        "right": (0.9, 0.4),
        "above": (0.4, 0.1),
        "below": (0.6, 0.9),
    }.items():
        holds = {r: bool(stands(np.array([place]), here, r)) for r in RELATIONS}
        assert holds == {r: r == relation for r in RELATIONS}
    diagonal = np.array([[0.25, 0.25]])
    assert not any(stands(diagonal, here, relation) for relation in RELATIONS)


def keeps(scene, request):
    """Whether a scene shows all that a request says, and nothing else."""
    centres = []
    for group in request.groups:
        mine = [thing for thing in scene.things if thing.shape == group.shape]
        centres.append(np.array([(thing.x, thing.y) for thing in mine]))
        if len(mine) != group.count:
            return False
        for thing in mine:
            if group.colour not in (None, thing.colour):
                return False
            if group.size not in (None, thing.size):
                return False
    return (
        len(scene.things) == sum(group.count for group in request.groups)
        and request.background in (None, scene.background)
        and (not request.relation or bool(stands(*centres, request.relation)))
    )


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_read_back(split):
    scenes = Scenes(split=split)
    for index in range(400):
        scene = scenes.scene(index)
        assert read_caption(scene.caption) == scene.request
        assert keeps(scene, scene.request), (index, scene)


def test_a_neighbours_caption_is_hardly_ever_true():
    scenes = [Scenes().scene(index) for index in range(150)]
    pairs = zip(scenes, scenes[1:], strict=False)
    assert sum(keeps(a, b.request) for a, b in pairs) < 8


def test_things_stand_on_the_grid_apart_and_inside():
    for index in range(200):
        things = Scenes().scene(index).things
        boxes = [
            (t.x * CELLS, t.y * CELLS, SIZES[t.size] * CELLS // 64) for t in things
        ]
        for n, (x, y, side) in enumerate(boxes):
            assert x == int(x) and y == int(y)
            for place in (x, y):
                assert side / 2 <= place <= CELLS - side / 2
            for u, v, other in boxes[:n]:
                assert max(abs(x - u), abs(y - v)) >= (side + other) / 2 + 1


def test_without_room_it_says_so():
    six = Request((Group(3, "ball", "blue", "big"), Group(3, "star", "blue", "big")))
    with pytest.raises(ValueError, match="no room for 'three big blue balls and"):
        arrange(six, np.random.default_rng(0))


# The data set -----------------------------------------------------------------


def test_items():
    pixels, caption = Scenes()[3]
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() and pixels.max() <= 1 and isinstance(caption, str)


@pytest.mark.parametrize("split", SPLITS)
def test_picture_i_is_always_the_same(split):
    first, second = Scenes(split=split), Scenes(split=split, length=1000)
    forwards = [first[index] for index in range(60)]
    backwards = [second[index] for index in reversed(range(60))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one[0], other[0]) and one[1] == other[1]


def test_splits_and_seeds_differ():
    firsts = [
        tuple(Scenes(split=split, seed=seed).scene(i) for i in range(5))
        for split in SPLITS
        for seed in (0, 1)
    ]
    assert len(set(firsts)) == len(firsts)


def test_it_ends_where_an_epoch_ends():
    scenes = Scenes(length=3)
    assert len(scenes) == len(list(scenes)) == 3
    with pytest.raises(IndexError, match="3 of 3"):
        scenes[3]
    with pytest.raises(IndexError, match="start at 0"):
        scenes[-1]
    assert scenes.scene(10**9).caption  # but there is always one more


@pytest.mark.parametrize(
    "wrong", [{"split": "test"}, {"size": 0}, {"size": 65}, {"size": -64}]
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        Scenes(**wrong)


def test_a_kind_that_is_named_twice_is_shown_twice_as_often():
    once = Scenes(kinds=["position", "single"]).odds
    twice = Scenes(kinds=["single", "position", "position"]).odds
    assert twice == {"single": once["single"], "position": 2 * once["position"]}
    assert list(once) == list(twice)


def test_some_kinds_alone():
    scenes = Scenes(kinds=["counting"])
    assert {len(scenes.scene(i).things) for i in range(40)} == {2, 3}
    for wrong in ([], ["pairs"], ["single", "pairs"]):
        with pytest.raises(ValueError, match="name some of single, two, counting"):
            Scenes(kinds=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_the_same_pictures_from_two_workers(method):
    if method == "forkserver":
        pytest.skip("like spawn, and slow to start")
    scenes = Scenes(length=20)
    alone = [scenes[index] for index in range(20)]
    loader = DataLoader(
        scenes,
        4,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for _ in range(2):  # epochs
        batches = list(loader)
        pixels = torch.cat([pixels for pixels, _ in batches])
        captions = [caption for _, captions in batches for caption in captions]
        assert torch.equal(pixels, torch.stack([item[0] for item in alone]))
        assert captions == [item[1] for item in alone]


@pytest.mark.slow
def test_nothing_held_out_in_20000_training_scenes(monkeypatch):
    # Checking the shapes of so many calls takes minutes: a copy without checks.
    name = "sdbook.unchecked"
    spec = importlib.util.spec_from_file_location(name, sdbook.scenes.__file__)
    unchecked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, unchecked)
    spec.loader.exec_module(unchecked)
    scenes = unchecked.Scenes()
    for index in range(20_000):
        assert not unchecked.is_held_out(scenes.scene(index).things), index


def test_held_out_scenes_show_and_say_what_is_held_out():
    scenes = [Scenes(split="held_out").scene(index) for index in range(400)]
    for scene in scenes:
        assert is_held_out(scene.things)
        assert is_held_out(read_caption(scene.caption).groups)
    shown = {(t.shape, t.colour) for scene in scenes for t in scene.things}
    assert shown >= HELD_OUT_PAIRS
    together = {frozenset(t.shape for t in scene.things) for scene in scenes}
    assert together >= HELD_OUT_COMBINATIONS


def test_is_held_out_by_example():
    shape, colour = sorted(HELD_OUT_PAIRS)[0]
    thing = Thing(shape, colour, "big", 0.5, 0.5)
    assert is_held_out((thing,))
    free = next(c for c in COLOURS if (shape, c) not in HELD_OUT_PAIRS)
    assert not is_held_out((replace(thing, colour=free),))


def test_training_shows_each_kind_of_request():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        made = [invent(kind, rng) for _ in range(60)]
        counts = {tuple(group.count for group in request.groups) for request in made}
        relations = {request.relation for request in made}
        if kind in ("single", "colours"):
            assert counts == {(1,)}
        elif kind == "counting":
            assert counts == {(2,), (3,)}
        elif kind == "two":
            assert counts == {(1, 1)}
        else:
            assert counts == {(1, 1), (2, 1), (1, 2)}
        assert relations == (set(RELATIONS) if kind == "position" else {None})
        for request in made:
            shapes = [group.shape for group in request.groups]
            assert len(set(shapes)) == len(shapes)


def test_crowds(monkeypatch):
    crowds = CrowdedScenes(length=300)
    pixels, caption = crowds[0]
    assert pixels.shape == (3, 64, 64) and caption == ""
    assert torch.equal(pixels, CrowdedScenes()[0][0])
    assert not torch.equal(pixels, crowds[1][0])

    drawn = []

    def note(things, background, size):
        drawn.append(things)
        return np.zeros((size, size, 3), dtype=np.uint8)

    monkeypatch.setattr("sdbook.scenes.draw", note)
    assert len(list(crowds)) == 300
    assert max(map(len, drawn)) == 8
    pairs = {(thing.shape, thing.colour) for things in drawn for thing in things}
    assert len(pairs) == len(SHAPES) * len(COLOURS) - len(HELD_OUT_PAIRS)
    assert not pairs & HELD_OUT_PAIRS


# Files ------------------------------------------------------------------------


def test_the_shipped_scenes_are_what_scenes_draws():
    read = CaptionedImages(SHIPPED, on_error="raise")
    assert len(read) == 200 and read.problems == []
    scenes = Scenes(split="validation")
    for index in range(0, 200, 7):
        pixels, caption = scenes[index]
        assert read[index][1] == caption
        # Another version of Pillow may round an edge differently.
        assert (read[index][0] - pixels).abs().mean() < 0.01


def test_written_scenes_read_back(tmp_path):
    write_folder(Scenes(split="validation"), tmp_path, 3)
    for read, drawn in zip(CaptionedImages(tmp_path), Scenes(split="validation")):
        assert torch.equal(read[0], drawn[0]) and read[1] == drawn[1]


def colour_card(path, colour, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


CARDS = {"one": ("red", "a red card"), "two": ("blue", "a blue card, the second")}


def make_folder(path, form):
    """Two cards in one of the forms that the reader takes."""
    rows = []
    for name, (colour, caption) in CARDS.items():
        place = {"seed": "images", "table beside": "pictures/deep"}.get(form, "")
        file = path / place / f"{name}.png"
        colour_card(file, colour)
        rows.append(
            {"file_name": f"{place}/{name}.png".lstrip("/"), "caption": caption}
        )
        if form in ("seed", "side by side"):
            text = path / ("captions" if form == "seed" else "") / f"{name}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text(caption + "\n", encoding="utf-8")
    if form in ("csv", "table beside"):
        with (path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    if form in ("jsonl", "jsonl with text"):
        if form == "jsonl with text":
            rows = [{"file_name": r["file_name"], "text": r["caption"]} for r in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return path


FORMS = ("seed", "side by side", "csv", "table beside", "jsonl", "jsonl with text")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_folder_reads(tmp_path, form):
    make_folder(tmp_path, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = CaptionedImages(tmp_path, 16, on_error="raise")
    assert [caption for _, caption in images] == [c for _, c in CARDS.values()]
    red, blue = (pixels for pixels, _ in images)
    assert red.shape == (3, 16, 16)
    assert red[:, 8, 8].tolist() == [1, -1, -1] and blue[:, 8, 8].tolist() == [
        -1,
        -1,
        1,
    ]


def test_deep_folders_keep_their_names_apart(tmp_path):
    for place, colour in (("a", "red"), ("b", "blue")):
        colour_card(tmp_path / "images" / place / "1.v2.png", colour)
        text = tmp_path / "captions" / place / "1.v2.txt"
        text.parent.mkdir(parents=True)
        text.write_text(colour)
    pairs, problems = find_captions(tmp_path)
    assert [caption for _, caption in pairs] == ["red", "blue"] and not problems


def test_both_sides_without_a_partner_are_listed(tmp_path):
    make_folder(tmp_path, "seed")
    colour_card(tmp_path / "images" / "alone.png", "red")
    (tmp_path / "captions" / "lost.txt").write_text("nobody")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="2 left out") as caught:
        images = CaptionedImages(tmp_path)
    assert len(images) == 2 and len(images.problems) == 2
    for expected in ("alone.png: no caption", "lost.txt: no picture"):
        assert any(problem.endswith(expected) for problem in images.problems)
        assert expected in str(caught[0].message)
    with pytest.raises(ValueError, match=r"(?s)alone\.png.*lost\.txt"):
        CaptionedImages(tmp_path, on_error="raise")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_tables_list_both_sides_too(tmp_path, form):
    make_folder(tmp_path, form)
    (tmp_path / "two.png").unlink()
    colour_card(tmp_path / "alone.png", "red")
    with pytest.warns(UserWarning, match="2 left out"):
        images = CaptionedImages(tmp_path)
    line = {"csv": 3, "jsonl": 2}[form]
    assert images.problems == [
        f"{tmp_path / f'metadata.{form}'}:{line}: no picture two.png",
        f"{tmp_path / 'alone.png'}: no caption",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_empty_captions_are_reported(tmp_path, form):
    make_folder(tmp_path, form)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".txt", ".csv", ".jsonl"):
            text = file.read_text()
            file.write_text(text.replace("a red card", "  "))
    with pytest.warns(UserWarning, match="1 left out"):
        images = CaptionedImages(tmp_path)
    assert len(images) == 1 and "empty" in images.problems[0]


def test_two_pictures_of_one_name_are_reported(tmp_path):
    make_folder(tmp_path, "side by side")
    colour_card(tmp_path / "one.jpg", "green")
    with pytest.warns(UserWarning, match="same name as one.jpg"):
        images = CaptionedImages(tmp_path)
    assert len(images) == 2


def test_captions_become_one_line(tmp_path):
    make_folder(tmp_path, "side by side")
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfa red\r\n  card\r\n")  # with a BOM
    assert CaptionedImages(tmp_path)[0][1] == "a red card"


def test_a_table_with_a_mark_and_windows_line_ends(tmp_path):
    make_folder(tmp_path, "csv")
    table = tmp_path / "metadata.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert len(CaptionedImages(tmp_path, on_error="raise")) == 2


@pytest.mark.parametrize(
    "encoding, guess",
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("latin-1", "ISO-8859-1")],
)
@pytest.mark.parametrize("name", ["one.txt", "metadata.csv"])
def test_other_encodings_are_named_with_the_way_out(tmp_path, name, encoding, guess):
    make_folder(tmp_path, "side by side" if name == "one.txt" else "csv")
    file = tmp_path / name
    file.write_bytes((file.read_text() + "grün\n").encode(encoding))
    line = file.read_text("latin-1").count("\n") if guess.startswith("ISO") else 1
    expected = rf"{re.escape(str(file))}:{line}: not UTF-8.*{guess}.*iconv -f {guess}"
    with pytest.raises(ValueError, match=expected):
        CaptionedImages(tmp_path)


def test_all_broken_captions_are_named_at_once(tmp_path):
    make_folder(tmp_path, "seed")
    for name in CARDS:
        (tmp_path / "captions" / f"{name}.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=r"(?s)2 broken.*one\.txt:1.*two\.txt:1"):
        CaptionedImages(tmp_path)


BROKEN_LINES = {
    "csv": {
        "one.png,a red card, the first": "put captions with commas in quotes",
        "one.png": "needs file_name and caption",
        ",a red card": "needs file_name and caption",
        'one.png,"a red card': "unexpected end of data",
        '"one.png,a red card\ntwo.png,a blue card': "unexpected end of data",
        "../one.png,a red card": "leaves the folder",
        "a/../../one.png,a red card": "leaves the folder",
        r"..\one.png,a red card": "leaves the folder",
        "/etc/one.png,a red card": "leaves the folder",
        "C:/one.png,a red card": "leaves the folder",
    },
    "jsonl": {
        '{"file_name": "one.png"': "not JSON",
        '["one.png", "a red card"]': "not a JSON object",
        '"one.png"': "not a JSON object",
        "7": "not a JSON object",
        '{"file_name": "one.png"}': "needs file_name and caption",
        '{"caption": "a red card"}': "needs file_name and caption",
        '{"file_name": 1, "caption": "a red card"}': "needs file_name and caption",
        '{"file_name": "one.png", "caption": ["a"]}': "needs file_name and caption",
        '{"file_name": "../one.png", "text": "a"}': "leaves the folder",
        r'{"file_name": "one.png", "text": "a \ud83c star"}': "half a character",
        r'{"file_name": "\ud83c.png", "text": "a star"}': "half a character",
        "[" * 100_000: "not JSON: maximum recursion",
        '{"file_name": "one.png", "text": "a", "n": ' + "1" * 5000 + "}": "not JSON",
    },
}


@pytest.mark.parametrize(
    "form, line, expected",
    [(form, *case) for form, cases in BROKEN_LINES.items() for case in cases.items()],
)
def test_broken_lines_are_named(tmp_path, form, line, expected):
    make_folder(tmp_path, form)
    table = tmp_path / f"metadata.{form}"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, line]) + "\n")
    place = rf"{re.escape(str(table))}:{len(lines) + 1}"
    with pytest.raises(ValueError, match=f"{place}: .*{expected}"):
        CaptionedImages(tmp_path)


@pytest.mark.parametrize(
    "header", ["", "name,caption", "file_name;caption", "file_name"]
)
def test_a_table_without_its_columns_is_refused(tmp_path, header):
    make_folder(tmp_path, "csv")
    table = tmp_path / "metadata.csv"
    table.write_text("\n".join([header, *table.read_text().splitlines()[1:]]))
    with pytest.raises(ValueError, match=r"metadata\.csv:1: needs columns file_name"):
        CaptionedImages(tmp_path)


def test_quoted_captions_over_several_lines_count_lines_right(tmp_path):
    make_folder(tmp_path, "csv")
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,caption\none.png,"a red\ncard"\n\ntwo.png,a,b\n')
    with pytest.raises(ValueError, match=r"metadata\.csv:5: more cells"):
        CaptionedImages(tmp_path)
    table.write_text('file_name,caption\none.png,"a red\ncard"\ntwo.png,b\n')
    assert CaptionedImages(tmp_path)[0][1] == "a red card"


def test_two_tables_are_one_too_many(tmp_path):
    make_folder(make_folder(tmp_path, "csv"), "jsonl")
    with pytest.raises(ValueError, match="keep one"):
        CaptionedImages(tmp_path)


def test_a_folder_with_nothing_usable_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        CaptionedImages(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture with a caption"):
        CaptionedImages(tmp_path)
    colour_card(tmp_path / "alone.png", "red")
    with pytest.raises(
        ValueError, match=r"(?s)holds no picture.*alone\.png: no caption"
    ):
        CaptionedImages(tmp_path)


# What a folder holds besides, and what its names may look like.


@pytest.mark.parametrize("form", FORMS)
def test_hidden_folders_are_not_read(tmp_path, form):
    """Jupyter keeps old copies of files in .ipynb_checkpoints."""
    make_folder(tmp_path, form)
    for place in {file.parent for file in tmp_path.rglob("*") if file.is_file()}:
        (place / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
        for inside in (".ipynb_checkpoints", ".ipynb_checkpoints/deep"):
            colour_card(place / inside / "0-checkpoint.png", "red")
            (place / inside / "0-checkpoint.txt").write_text("an old caption")
    images = CaptionedImages(tmp_path, on_error="raise")
    assert images.captions() == [caption for _, caption in CARDS.values()]
    # It is what lies inside that must not be hidden, not where the folder lies.
    shutil.copytree(tmp_path, tmp_path / ".cache" / "pets")
    assert len(CaptionedImages(tmp_path / ".cache" / "pets", on_error="raise")) == 2


def test_what_a_run_writes_into_its_data_is_left_out(tmp_path):
    make_folder(tmp_path, "side by side")
    config = RunConfig(dataset_path=str(tmp_path), output_dir=f"{tmp_path}/runs/lora")
    for name in ("class/00000.png", "samples/step.png"):
        colour_card(tmp_path / "runs" / "lora" / name, "green")
    (tmp_path / "runs/lora/class/00000.txt").write_text("a model's own picture")
    with pytest.warns(UserWarning, match="runs.lora.*left out"):
        images = open_dataset(config)
    assert images.captions() == [caption for _, caption in CARDS.values()]
    assert not images.problems
    (tmp_path / "runs").rename(tmp_path / "class")  # output_dir is the folder itself
    with pytest.warns(UserWarning, match="class.*left out"):
        images = open_dataset(replace(config, output_dir=str(tmp_path)))
    assert len(images) == 2
    assert len(CaptionedImages(tmp_path / "class" / "lora" / "class")) == 1


def test_a_table_further_down_is_shown(tmp_path):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    make_folder(tmp_path / "pets" / "train", "csv")
    with pytest.raises(ValueError, match=r"there is .*pets.train.metadata\.csv"):
        CaptionedImages(tmp_path)
    assert len(CaptionedImages(tmp_path / "pets" / "train")) == 2


@pytest.mark.parametrize("kind", ["dangling", "pipe", "device", "folder"])
@pytest.mark.parametrize("ending", ["png", "txt"])
def test_what_is_no_file_is_left_out_and_never_waited_for(tmp_path, kind, ending):
    make_folder(tmp_path, "side by side")
    colour_card(tmp_path / "three.png", "red")
    (tmp_path / "three.txt").write_text("three")
    odd = tmp_path / f"three.{ending}"
    odd.unlink()
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        (tmp_path / "elsewhere.d").mkdir()
        target = {"dangling": "nowhere", "device": "/dev/zero", "folder": "elsewhere.d"}
        odd.symlink_to(target[kind])
    with pytest.warns(UserWarning, match=rf"three\.{ending}: a link to"):
        images = CaptionedImages(tmp_path, 8)
    assert [caption for _, caption in images] == [c for _, c in CARDS.values()]
    with pytest.raises(ValueError, match="three"):
        CaptionedImages(tmp_path, on_error="raise")
    if ending == "png":
        with pytest.raises(ValueError, match=r"cannot read .*three\.png"):
            read_picture(odd)


def test_a_picture_that_vanishes_is_named(tmp_path):
    make_folder(tmp_path, "side by side")
    images = CaptionedImages(tmp_path)
    (tmp_path / "one.png").unlink()
    with pytest.warns(UserWarning, match=r"one\.png"):
        assert images[0][1] == CARDS["two"][1]


NAMES = {  # on the disk: as it is written
    "sub/one.png": r"sub\one.png",
    "sub/./one.png": "./sub//one.png",
    "café.png": unicodedata.normalize("NFD", "café.png"),
    unicodedata.normalize("NFD", "é/é.png"): r"é\é.png",
    "a\\b.png": r"a\b.png",
}


@pytest.mark.parametrize("there, written", NAMES.items())
@pytest.mark.parametrize("form", ["csv", "texts"])
def test_names_from_other_systems_are_found(tmp_path, form, there, written):
    colour_card(tmp_path / "images" / there, "red")
    if form == "csv":
        row = f"file_name,text\nimages/{written},a red card\n"
        (tmp_path / "metadata.csv").write_text(row, encoding="utf-8")
    else:
        text = unicodedata.normalize("NFC", there.replace(".png", ".txt"))
        (tmp_path / "captions" / text).parent.mkdir(parents=True)
        (tmp_path / "captions" / text).write_text("a red card")
    images = CaptionedImages(tmp_path, on_error="raise")
    assert images.captions() == ["a red card"]
    assert images.name(0) == f"images/{Path(there).as_posix()}"


def test_both_forms_of_a_name_may_be_there(tmp_path):
    """Then each caption goes with its own picture."""
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        colour_card(tmp_path / f"{name}.png", "red")
        (tmp_path / f"{name}.txt").write_text(form)
    pairs, problems = find_captions(tmp_path)
    assert not problems
    for file, caption in pairs:
        assert unicodedata.is_normalized(caption, file.stem)


def test_names_that_are_no_utf8_can_be_cut(tmp_path):
    name = os.fsdecode("caf\xe9".encode("latin-1"))
    try:
        colour_card(tmp_path / f"{name}.png", "red")
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    (tmp_path / f"{name}.txt").write_text("a red card")
    images = CaptionedImages(tmp_path, 8, crops=2, on_error="raise")
    assert len(images.keys(tmp_path)) == 2 and images[1][1] == "a red card"


def test_two_captions_of_one_name_are_reported(tmp_path):
    make_folder(tmp_path, "side by side")
    (tmp_path / "one.TXT").write_text("another caption")
    with pytest.warns(UserWarning, match="same name as one.TXT; rename one"):
        CaptionedImages(tmp_path)


def test_columns_of_tables_may_have_other_names(tmp_path):
    make_folder(tmp_path, "csv")
    table = tmp_path / "metadata.csv"
    text = table.read_text().replace("file_name,caption", "path,prompt")
    table.write_text(text)
    with pytest.raises(ValueError, match="needs columns file_name and caption or text"):
        CaptionedImages(tmp_path)
    config = RunConfig(dataset_path=str(tmp_path), image_column="path")
    with pytest.raises(ValueError, match="needs columns path and caption or text"):
        open_dataset(config)
    images = open_dataset(replace(config, caption_column="prompt", on_error="raise"))
    assert images.captions() == [caption for _, caption in CARDS.values()]


@pytest.mark.parametrize(
    "wrong", [{"on_error": "ignore"}, {"image_size": 0}, {"crops": -1}]
)
def test_wrong_arguments_of_the_reader_are_named(tmp_path, wrong):
    make_folder(tmp_path, "seed")
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
        CaptionedImages(tmp_path, **wrong)


# Pictures ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["empty", "truncated", "a text", "damaged"])
def test_an_unreadable_picture_is_named(tmp_path, fault):
    make_folder(tmp_path, "side by side")
    file = tmp_path / "one.png"
    shutil.copy(SHIPPED / "images" / "00000.png", file)
    data = bytearray(file.read_bytes())
    damaged = data[:60] + bytes(200) + data[260:]
    file.write_bytes(
        {"empty": b"", "truncated": data[:400], "a text": b"hi", "damaged": damaged}[
            fault
        ]
    )
    images = CaptionedImages(tmp_path, on_error="raise")
    with pytest.raises(ValueError, match=r"cannot read the picture .*one\.png.* mend"):
        images[0]
    assert images[1][1] == CARDS["two"][1]
    images = CaptionedImages(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot read .*one\.png") as caught:
        items = [images[0], images[1], images[0]]
    assert len(caught) == 1, "reported once"
    assert [caption for _, caption in items] == [CARDS["two"][1]] * 3
    assert images.read(0) is None and images.read(1) is not None


def test_a_truncated_jpeg_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "one.jpg")
    data = (tmp_path / "one.jpg").read_bytes()
    (tmp_path / "one.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"one\.jpg.*truncated"):
        read_picture(tmp_path / "one.jpg")


# How a camera stores an upright picture `a` with each note of EXIF's orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],  # turn me by 90 degrees, clockwise
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_turned_photographs_are_turned_back(tmp_path, orientation, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:] = (250, 0, 0), (0, 250, 0)
    upright[16:, :24], upright[16:, 24:] = (0, 0, 250), (250, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / f"one.{suffix}", exif=exif, quality=95)
    read = np.asarray(read_picture(tmp_path / f"one.{suffix}")).astype(int)
    assert read.shape == upright.shape
    corners = (slice(4, None, 24), slice(4, None, 40))  # away from blurred seams
    assert abs(read[corners] - upright[corners]).max() < 20


def test_a_png_of_three_times_16_bits(tmp_path):
    """Pillow cannot write one, so here are its chunks."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    row = b"\0" + struct.pack(">6H", 65_535, 32_896, 0, 257, 514, 771)
    (tmp_path / "one.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    read = np.asarray(read_picture(tmp_path / "one.png")).tolist()
    assert read == [[[255, 128, 0], [1, 2, 3]]]


def ramp(dtype, largest):
    return np.linspace(0, largest, 64).astype(dtype).reshape(8, 8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    file = tmp_path / f"one.{suffix}"
    Image.fromarray(ramp(np.uint16, 65_535)).save(file)
    read = np.asarray(read_picture(file)).astype(int)
    assert abs(read - ramp(float, 255)[..., None]).max() <= 1


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A PNG of 657 KB may hold 169 million pixels: its header says so."""
    make_folder(tmp_path, "side by side")

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    (tmp_path / "one.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    images = CaptionedImages(tmp_path, 8)
    with pytest.warns(UserWarning, match=r"one\.png \(13000 × 13000 pixels"):
        assert images.read(0) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)  # who has more memory raises it
    with pytest.raises(ValueError, match="8 × 8 pixels; make it smaller"):
        read_picture(tmp_path / "two.png")


def test_postscript_is_not_run(tmp_path):
    """Pillow would start Ghostscript for it, whatever the file is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one.eps")
    (tmp_path / "one.eps").rename(tmp_path / "one.png")
    with pytest.raises(ValueError, match="PostScript"):
        read_picture(tmp_path / "one.png")


def test_every_16_bit_grey_is_what_it_was():
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    read = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert (read == (values.astype(np.int64) / 257).round()).all()


@pytest.mark.parametrize("suffix", ["tif", None])
def test_floats_count_from_0_to_1(tmp_path, suffix):
    picture = Image.fromarray(ramp(np.float32, 1))
    if suffix:
        picture.save(tmp_path / "one.tif")
        picture = read_picture(tmp_path / "one.tif")
    read = np.asarray(to_rgb(picture)).astype(int)
    assert abs(read - ramp(float, 255)[..., None]).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    file = tmp_path / "one.tif"
    Image.fromarray(ramp(dtype, 1_000_000)).save(file)
    with pytest.raises(ValueError, match=r"one\.tif.*8 bits"):
        read_picture(file)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr", "RGBX"])
def test_modes_of_colour_come_out_right(tmp_path, mode):
    grey = mode in ("L", "1", "LA")
    expected = (255, 255, 255) if grey else (255, 0, 0)
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "RGBX": "tif"}.get(mode, "png")
    picture = Image.new("RGB", (16, 16), expected).convert(mode)
    picture.save(tmp_path / f"one.{suffix}")
    read = read_picture(tmp_path / f"one.{suffix}")
    assert read.mode == "RGB"
    assert abs(np.asarray(read).astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "P", "RGB with a transparent colour", "I;16 with one"]
)
def test_what_is_transparent_becomes_white(tmp_path, kind):
    """The left half is invisible black; a naive reader would show it."""
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((90, 90, 90, 255), (8, 0, 16, 16))
    options = {}
    if kind == "P":
        picture = picture.convert("RGB").quantize(4)
        options["transparency"] = picture.getpixel((0, 0))
    elif kind.startswith("I;16"):
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        picture, options = Image.fromarray(grey), {"transparency": 0}
    elif kind.startswith("RGB with"):
        picture, options = picture.convert("RGB"), {"transparency": (0, 0, 0)}
    else:
        picture = picture.convert(kind)
    picture.save(tmp_path / "one.png", **options)
    read = np.asarray(read_picture(tmp_path / "one.png")).astype(int)
    assert (read[:, :8] == 255).all() and abs(read[:, 8:] - 90).max() <= 2


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "one.png")
    read = np.asarray(read_picture(tmp_path / "one.png")).astype(int)
    assert abs(read - (255, 127, 127)).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    file = tmp_path / f"one.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    assert read_picture(file).getpixel((4, 4)) == (255, 0, 0)


def test_the_middle_is_cut_out(tmp_path):
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("red", (30, 0, 60, 30))
    wide.save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("the middle")
    pixels = CaptionedImages(tmp_path, 30)[0][0]
    assert pixels.shape == (3, 30, 30)
    assert (pixels[0] == 1).all() and (pixels[1:] == -1).all()


# Looks ------------------------------------------------------------------------


def test_flip_shows_each_picture_straight_and_mirrored(tmp_path):
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("red", (0, 0, 4, 8))
    picture.save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("red on the left")
    straight, mirrored = CaptionedImages(tmp_path, 8, flip=True)
    assert straight[0][1, 4, 1] < 0 < straight[0][1, 4, 6]
    assert torch.equal(mirrored[0], straight[0].flip(-1))
    assert len(CaptionedImages(tmp_path, 8)) == 1


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_crops_lie_along_the_longer_side(size):
    """Each pixel of the picture says where it is."""
    steps = np.linspace(0, 180, 90).round().astype(np.uint8)
    ramp = np.broadcast_to(steps[:, None, None], (90, 30, 3))
    picture = Image.fromarray(ramp.swapaxes(0, 1) if size[0] > size[1] else ramp)
    assert picture.size == size
    cut = Cut(30, crops=40)
    starts = []
    for look in range(cut.looks):
        pixels = (cut(picture, "one.png", look) + 1) * 127.5
        across = pixels[0].T if size[0] > size[1] else pixels[0]
        starts.append(float(across[0, 0]) / 2)
        expected = across[0, 0] + torch.linspace(0, 180, 90)[:30]
        assert (across[:, 15] - expected).abs().max() < 2.5
    assert min(starts) < 10 and max(starts) > 50, "anywhere from 0 to 60"


def test_looks_depend_on_seed_and_name_alone(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("b", "c", "d"):
        noise = rng.integers(0, 256, (16, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    options = dict(image_size=16, crops=2, flip=True)

    def looks(**more):
        images = CaptionedImages(tmp_path, **options, **more)
        assert len(images) == 4 * len(images.pairs)
        order = rng.permutation(len(images)).tolist()
        count = len(images.pairs)
        return {(images[i][1], i // count): images[i][0] for i in order}

    first = looks()
    assert len({tuple(x.flatten().tolist()) for x in first.values()}) == 12
    other_seed = looks(seed=1)
    assert not all(torch.equal(first[key], other_seed[key]) for key in first)
    loader = DataLoader(CaptionedImages(tmp_path, **options), 3, num_workers=2)
    by_workers = torch.cat([pixels for pixels, _ in loader])
    images = CaptionedImages(tmp_path, **options)
    assert torch.equal(by_workers, torch.stack([pixels for pixels, _ in images]))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")  # a newcomer, in front
    (tmp_path / "a.txt").write_text("a")
    second = looks()
    assert all(torch.equal(first[key], second[key]) for key in first)


# Faults at scale -----------------------------------------------------------------


def test_opening_a_folder_decodes_nothing(tmp_path, monkeypatch):
    make_folder(tmp_path, "seed")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("decoded"))
    assert len(CaptionedImages(tmp_path)) == 2


def count_reports(images, queue):
    """In another process: read everything, and say how many warnings there were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(len(images)):
            images.read(index)
    queue.put(len(caught))


def test_one_report_for_all_processes(tmp_path):
    make_folder(tmp_path, "side by side")
    (tmp_path / "two.png").write_bytes(b"<html>not found</html>")
    images = CaptionedImages(tmp_path)
    context = torch.multiprocessing.get_context("fork")
    counts = []
    for _ in range(3):
        queue = context.SimpleQueue()
        worker = context.Process(target=count_reports, args=(images, queue))
        worker.start()
        worker.join()
        counts.append(queue.get())
    assert counts == [1, 0, 0]
    assert images.unreadable.tolist() == [False, True]


def test_when_no_picture_can_be_read_it_says_so(tmp_path):
    make_folder(tmp_path, "side by side")
    for name in CARDS:
        (tmp_path / f"{name}.png").write_bytes(b"")
    images = CaptionedImages(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 2"):
        images[1]
    with pytest.raises(IndexError, match="2 of 2"):
        images[2]


def test_the_benchmark_of_folders_runs(tmp_path, capsys):
    load_tool("bench_data").main(["--count", "30", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("30 pictures") == 3, said


def test_what_other_trainings_wrote_is_no_data(tmp_path):
    """A folder with a run's lock is a run's; beside the lock lie its class pictures."""
    for place in ("", "lora/class/", "class/"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / place / "a.png")
        (tmp_path / place / "a.txt").write_text(f"of {place}")
    assert len(CaptionedImages(tmp_path)) == 3
    (tmp_path / "lora/.lock").touch()
    with pytest.warns(UserWarning, match="lora is where runs write: left out"):
        assert CaptionedImages(tmp_path).captions() == ["of", "of class/"]
    (tmp_path / ".lock").touch()
    with pytest.warns(UserWarning, match="left out"):
        assert CaptionedImages(tmp_path).captions() == ["of"]
    assert len(CaptionedImages(tmp_path / "class")) == 1  # asked for by its name


# Shards ---------------------------------------------------------------------------


def write_shards(folder, count=24, each=4):
    """`count` cards, in shards of `each`; card i has the colour (i, i, i)."""
    pattern = str(folder / "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=each, verbose=0) as writer:
        for index in range(count):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (index,) * 3).save(file, "png")
            writer.write(
                {
                    "__key__": f"{index:03}",
                    "png": file.getvalue(),
                    "txt": f"card {index}",
                }
            )
    return f"{folder}/{{0000..{(count - 1) // each:04}}}.tar"


def numbers(items):
    """Which cards these are, by their pixels, which must agree with the captions."""
    found = [round((pixels[0, 4, 4].item() + 1) * 127.5) for pixels, _ in items]
    assert [caption for _, caption in items] == [f"card {n}" for n in found]
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_give_every_sample_once(tmp_path, num_workers):
    shards = CaptionedShards(write_shards(tmp_path), 8)
    found = numbers(list(DataLoader(shards, None, num_workers=num_workers)))
    assert found == list(range(24))
    both_ways = CaptionedShards(write_shards(tmp_path), 8, flip=True)
    assert numbers(list(both_ways)) == [*range(24)] * 2


def write_tar(path, *files):
    """A shard of (name, bytes or text) pairs, just as they come."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            data = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def png_of(colour, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def test_faults_in_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)2 of 2 .*0001\.tar"):
        CaptionedShards(f"{tmp_path}/{{0000..0001}}.tar")
    card = png_of("red")
    path = write_tar(
        tmp_path / "a.tar",
        *[("good.png", card), ("good.txt", "a card"), ("silent.png", card)],
        *[("blind.txt", "a card"), ("torn.png", card[:45]), ("torn.txt", "a card")],
        *[("empty.png", card), ("empty.txt", " ")],
        *[("twin.png", card), ("twin.txt", "first"), ("twin.txt", "second")],
    )
    with pytest.warns(UserWarning, match="4 left out") as caught:
        shards = CaptionedShards(path, 8)
    for part in (
        "a.tar/silent: no caption", "a.tar/blind: no picture",
        "a.tar/empty.txt: the caption is empty", "a.tar/twin.txt: two of this name",
    ):  # fmt: skip
        assert part in str(caught[0].message)
        assert any(part in problem for problem in shards.problems)
    with pytest.warns(UserWarning, match="cannot read .*a.tar/torn"):
        items = list(shards)
    assert [caption for _, caption in items] == ["a card", "first", "first"]
    with pytest.raises(ValueError, match="a.tar/silent: no caption"):
        CaptionedShards(path, 8, on_error="raise")


@pytest.mark.parametrize("damage", ["cut off", "a header", "no tar"])
def test_torn_shards_are_named(tmp_path, damage):
    """Python's `tarfile` takes a damaged header for the end, and says nothing."""
    path = tmp_path / "a.tar"
    names = [f"{number}.{ending}" for number in range(4) for ending in ("png", "txt")]
    write_tar(path, *[(name, png_of("red")) for name in names])
    data = path.read_bytes()
    torn = {
        "cut off": data[:700],
        "a header": data[:2048] + b"x" * 512 + data[2560:],
        "no tar": b"<html>not found</html>" * 100,
    }
    path.write_bytes(torn[damage])
    with pytest.raises(ValueError, match=r"cannot read the shard .*a\.tar.*copy it"):
        CaptionedShards(path)


def test_a_shard_without_a_usable_sample_says_so(tmp_path):
    """webdataset issue 237."""
    write_tar(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar holds no .*up to the first dot"):
        CaptionedShards(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", ("a.jpeg2", b""), ("a.txt", "a card"))
    with pytest.raises(ValueError, match=r"(?s)holds no.*a: no picture; it has jpeg2"):
        CaptionedShards(tmp_path / "b.tar")


def test_a_name_in_a_shard_ends_at_its_first_dot(tmp_path):
    """As WebDataset's does; webdataset issue 288."""
    path = write_tar(
        tmp_path / "a.tar",
        *[("./x.y/a.v1.PNG", png_of("red")), ("./x.y/a.v1.txt", "red")],
        *[("b.thumb.png", png_of("green")), ("b.png", png_of("blue"))],
        *[("b.txt", "blue"), ("b.thumb.txt", "green")],
        *[("._c.png", b""), (".hidden/c.png", png_of("red")), (".hidden/c.txt", "no")],
    )
    shards = CaptionedShards(path, 8, on_error="raise")
    assert [shards.name(i) for i in range(2)] == ["a.tar/./x.y/a", "a.tar/b"]
    assert shards.captions() == ["red", "blue"]
    assert [x[:, 4, 4].tolist() for x, _ in shards] == [[1, -1, -1], [-1, -1, 1]]
    old = [
        sample["__key__"]
        for sample in webdataset.tarfile_to_samples()([{"url": str(path)}])
        if not sample["__key__"].startswith(".hidden")
    ]
    assert old == ["./x.y/a", "b"]


def test_two_pictures_of_a_sample_each_with_a_caption(tmp_path):
    """a.v1 and a.v2 are one sample to WebDataset; none is lost without a word."""
    files = [("a.v1.png", png_of("red")), ("a.v1.txt", "one")]
    files += [("a.v2.png", png_of("blue")), ("a.v2.txt", "two")]
    shards = CaptionedShards(write_tar(tmp_path / "a.tar", *files), 8, on_error="raise")
    assert shards.captions() == ["one", "two"]
    assert [x[:, 4, 4].tolist() for x, _ in shards] == [[1, -1, -1], [-1, -1, 1]]
    assert shards.name(1) == "a.tar/a.v2"
    path = write_tar(tmp_path / "b.tar", *files[:2], files[2], ("a.v1.jpg", b""))
    with pytest.warns(UserWarning, match=r"(?s)2 left out.*a\.v2\.png: no caption"):
        assert CaptionedShards(path).captions() == ["one"]


def test_names_in_shards_are_those_of_other_systems_too(tmp_path):
    files = [("sub\\cafe\u0301.png", png_of("red")), ("sub/caf\u00e9.txt", "coffee")]
    files += [(".old\\a.png", png_of("red")), (".old\\a.txt", "old")]
    shards = CaptionedShards(write_tar(tmp_path / "a.tar", *files), on_error="raise")
    assert shards.captions() == ["coffee"]


def test_pictures_before_all_captions_are_found_in_a_shard(tmp_path):
    names = [f"{number}.{kind}" for kind in ("png", "txt") for number in range(3)]
    files = [(n, png_of("red") if n.endswith("png") else f"card {n}") for n in names]
    shards = CaptionedShards(write_tar(tmp_path / "a.tar", *files), on_error="raise")
    assert shards.captions() == ["card 0.txt", "card 1.txt", "card 2.txt"]


@pytest.mark.parametrize(
    "encoding, guess", [("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1")]
)
def test_captions_in_shards_are_read_as_those_of_folders(tmp_path, encoding, guess):
    path = tmp_path / "a.tar"
    card = ("a.png", png_of("red"))
    write_tar(path, card, ("a.txt", "un café\r\n noir".encode("utf-8-sig")))
    assert CaptionedShards(path).captions() == ["un café noir"]
    write_tar(path, card, ("a.txt", "un café".encode(encoding)))
    with pytest.raises(ValueError, match=f"a.tar/a.txt:1: not UTF-8.*{guess}"):
        CaptionedShards(path)


def test_data_hands_on_the_names_of_scenes_and_images():
    for module in (sdbook.scenes, sdbook.images):
        for name in module.__all__:
            assert getattr(sdbook.data, name) is getattr(module, name)


# What training asks -----------------------------------------------------------------


@pytest.fixture
def one_picture(tmp_path):
    """One thing in a folder and in a shard; what decodes nothing sees no picture."""
    data = b"not even a picture"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.png").write_bytes(data)
    (tmp_path / "deep" / "one.txt").write_text("one")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "one", "png": data, "txt": "one"})
    return tmp_path


def test_keys_stay_what_they_were(one_picture):
    """Caches of earlier versions are found again."""
    assert short_name("a", 1, b"x") == "233812f52b5f3bbfd2ce928e92dcd95f"
    first, last = "28961f799bf33ba9bc10d0cd610e95f4", "4c1a3157cc80cf0ae00ab79054edabf8"
    assert CaptionedImages(one_picture, 16).keys(one_picture) == [first]
    looks = CaptionedImages(one_picture, 16, crops=2, flip=True, seed=3)
    assert looks.keys(one_picture)[3] == last
    assert CaptionedShards(one_picture / "a.tar", 16).keys(one_picture) == [first]
    scenes = Scenes(length=3)
    drawn = (scenes.scene(index) for index in range(16))
    pictures = [to_pixels(draw(s.things, s.background)) for s in drawn]
    world = short_name(*(pixels.numpy().tobytes() for pixels in pictures))
    assert scenes.keys(one_picture) == [short_name(world, i) for i in range(3)]


def test_files_are_looked_into_once(one_picture, monkeypatch):
    shards = CaptionedShards(one_picture / "a.tar")
    for dataset in (shards, CaptionedImages(one_picture)):
        before = dataset.keys(one_picture)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
            patch.setattr(Packed, "read_bytes", lambda _: pytest.fail("read again"))
            assert dataset.keys(one_picture) == before
    (one_picture / "deep" / "one.png").write_bytes(b"another")
    assert CaptionedImages(one_picture).keys(one_picture) != before


def test_damaged_notes_are_made_again(one_picture):
    images = CaptionedImages(one_picture)
    keys = images.keys(one_picture)
    for text in ("", "{", "[1]", "7", "null"):
        (one_picture / "pictures.json").write_text(text)
        assert images.keys(one_picture) == keys


# Tables of pictures ------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Five cards as a data set of the hub's form; 3 has no caption, 4 no picture."""
    import datasets

    folder = tmp_path_factory.mktemp("parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        cards = [{"bytes": png_of((i,) * 3), "path": "card.png"} for i in range(4)]
        columns = {
            "image": [*cards, None],
            "text": ["card 0", " card\n1", "card 2", " ", "none"],
            "words": [["card 0", "zero"], ["card 1"], ["card 2"], ["card 3"], []],
            "numbers": [1, 2, 3, 4, 5],
            "files": ["/dev/zero", str(SHIPPED / "images/00000.png"), None, "no", ""],
        }
        kinds = {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "words": datasets.Sequence(datasets.Value("string")),
            "numbers": datasets.Value("int64"),
            "files": datasets.Value("string"),
        }
        rows = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
        (folder / "pets" / "data").mkdir(parents=True)
        rows.to_parquet(folder / "pets" / "data" / "train-00000-of-00001.parquet")
        yield folder / "pets"


@pytest.mark.parametrize("where", ["file", "pattern", "folder"])
def test_parquet_is_read_as_a_folder_is(parquet, tmp_path, where):
    name = {"file": "data/train-00000-of-00001.parquet", "pattern": "data/*.parquet"}
    config = RunConfig(dataset_path=f"{parquet}/{name.get(where, '')}", image_size=8)
    with pytest.warns(UserWarning, match="1 left out.*(?s:.)*row 3: the caption is"):
        images = open_dataset(config)
    assert images.captions() == ["card 0", "card 1", "card 2", "none"]
    with pytest.warns(UserWarning, match="row 4 holds no picture"):
        assert images.read(3) is None
    assert numbers([images[i] for i in range(3)]) == [0, 1, 2]
    for number in range(3):  # the same picture in a folder has the same key
        (tmp_path / f"{number}.png").write_bytes(png_of((number,) * 3))
        (tmp_path / f"{number}.txt").write_text("a card")
    pairs = CaptionedImages(tmp_path, 8).keys(tmp_path)
    images.pairs = images.pairs[:3]
    assert images.keys(tmp_path) == pairs
    loader = DataLoader(images, 3, num_workers=2)
    assert numbers(list(zip(*next(iter(loader))))) == [0, 1, 2]


def test_columns_of_parquet_may_have_other_names(parquet):
    config = RunConfig(dataset_path=str(parquet), caption_column="words")
    with pytest.warns(UserWarning, match="row 4"):
        images = open_dataset(config)
    assert images.captions() == [f"card {i}" for i in range(4)]
    for column in ("image_column", "caption_column"):
        with pytest.raises(ValueError, match="(?s)cannot read.*nothing.*image_column"):
            open_dataset(replace(config, **{column: "nothing"}))
    with pytest.raises(ValueError, match="5 broken(?s:.)*row 4: numbers 5 is no text"):
        open_dataset(replace(config, caption_column="numbers"))


def test_rows_may_name_files_but_no_devices(parquet):
    config = RunConfig(dataset_path=str(parquet), image_column="files")
    with pytest.warns(UserWarning, match="row 3"):
        images = open_dataset(config)
    assert torch.equal(images.read(1), CaptionedImages(SHIPPED).read(0))
    for number in (0, 2, 3):
        with pytest.warns(UserWarning, match="holds no picture"):
            assert images.read(number) is None


def test_a_set_on_the_hub_is_asked_for(monkeypatch, parquet):
    """Here nothing can be fetched: what is asked, and what is said without the hub."""
    import datasets

    asked = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda name, **kw: asked.append((name, kw)) or load(str(parquet), **kw),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_dataset(RunConfig(dataset_path="someone/pets"))) == 4
    assert asked == [("someone/pets", {"split": "train"})]

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="someone/pets.*reach the hub.*give a folder"):
        open_dataset(RunConfig(dataset_path="someone/pets"))


def test_without_the_library_tables_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="someone/pets.*pip install datasets"):
        open_dataset(RunConfig(dataset_path="someone/pets"))


def every_dataset(folder):
    """One of each kind, with what is fast to read."""
    write_folder(Scenes(split="validation"), folder / "files", 12)
    yield Scenes(length=20)
    yield CrowdedScenes(length=20)
    yield CaptionedImages(folder / "files", flip=True)
    yield CaptionedShards(write_shards(folder), 8, flip=True)


def test_every_dataset_answers_alike(tmp_path):
    for dataset in every_dataset(tmp_path):
        items = list(dataset)
        assert dataset.captions() == [caption for _, caption in items]
        assert items[0][0].shape == (3, dataset.side, dataset.side)
        assert list(dataset.problems) == []
        keys = dataset.keys(tmp_path)
        assert len(set(keys)) == len(keys) == len(dataset) == len(items)
        assert len(dataset.sample_captions(5)) == 5
        some = {keys[number]: number for number in (1, 4, 19)}
        for num_workers in (0, 2):
            wanted, read = list(some.items()), dataset.unread
            loader = DataLoader(wanted, 2, collate_fn=read, num_workers=num_workers)
            found = dict(sum(loader, []))
            assert set(found) == set(some)
            for key, number in some.items():
                assert torch.equal(found[key], items[number][0])


def test_what_is_held_out_is_not_trained_on(tmp_path):
    for dataset in every_dataset(tmp_path):
        numbers, held = dataset.held_out(16)
        trained = {dataset.keys(tmp_path)[number] for number in numbers}
        assert len(trained) == len(numbers)
        if isinstance(dataset, CaptionedImages):
            assert len(held) == len(dataset) // 10  # a tenth of all looks
            assert len(numbers) == len(dataset) - len(held)
            assert not {*numbers} & {*held.indices}
        else:
            assert len(numbers) == 20 and len(held) == 16
            validation = Scenes(split="validation")
            assert all(torch.equal(held[i][0], validation[i][0]) for i in range(16))
        assert dataset.held_out(16)[0] == numbers
        assert dataset.held_out(0)[0] == list(range(len(dataset)))


def test_scenes_of_some_kinds_keep_to_them_in_validation():
    scenes = Scenes(length=30, kinds=["counting"])
    _, held = scenes.held_out(30)
    assert {len(held.scene(i).things) for i in range(30)} == {2, 3}
    # but what stands for all captions has all kinds
    assert scenes.sample_captions(40) == Scenes(length=40).captions()


def test_unreadable_pictures_are_none(one_picture):
    shards = CaptionedShards(one_picture / "a.tar")
    for dataset in (shards, CaptionedImages(one_picture)):
        (key,) = dataset.keys(one_picture)
        with pytest.warns(UserWarning, match="cannot read the picture"):
            assert dataset.unread([(key, 0)]) == [(key, None)]


def test_the_reader_works_with_workers():
    images = CaptionedImages(SHIPPED)
    loader = DataLoader(torch.utils.data.Subset(images, range(8)), 4, num_workers=2)
    pixels = torch.cat([pixels for pixels, _ in loader])
    assert torch.equal(pixels, torch.stack([images[index][0] for index in range(8)]))
