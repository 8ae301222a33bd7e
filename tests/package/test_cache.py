"""The cache of moments and text states: right, never stale, hard to break, shared."""

import json
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import webdataset
from helpers import ROOT, load_tool
from PIL import Image
from torch import nn

from sdbook.clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from sdbook.data import CaptionedImages, CaptionedShards, Scenes
from sdbook.training import Encoded, Rows, RunConfig, open_dataset, short_name
from sdbook.vae import AutoencoderKL, VAEConfig

COUNT = 12


class CountingVAE(nn.Module):
    """Counts the pictures it is shown; slow, or out of power, if asked to be."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
        self.vae = AutoencoderKL(VAEConfig(**sizes, sample_size=16)).eval()
        self.shown, self.batches, self.pause = 0, 10**9, 0.0

    def encode(self, pixels):
        time.sleep(self.pause)
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches, self.shown = self.batches - 1, self.shown + len(pixels)
        return self.vae.encode(pixels)


class CountingText(CLIPTextModel):
    shown = 0

    def forward(self, ids):
        self.shown += len(ids)
        return super().forward(ids)


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["card one two three"], vocab_size=514, max_length=40)


class InFours(Encoded):
    """Encodes four pictures of the tests at once."""

    batch_pixels = 4 * 16**2


@pytest.fixture
def vae():
    return CountingVAE()


@pytest.fixture
def text_encoder(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    ids = dict(bos_token_id=tokenizer.start_id, eos_token_id=tokenizer.end_id)
    return CountingText(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=40,
            num_attention_heads=2, **sizes, **ids,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve pictures of noise, each with a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        noise = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"card {index}")
    return folder


@pytest.fixture
def encoded(pictures, vae, text_encoder, tokenizer, tmp_path):
    """A function that caches the folder, and the pictures and texts that it cost."""

    def encode(folder=tmp_path / "cache", dataset=None, size=16, **options):
        vae.shown = text_encoder.shown = 0
        if dataset is None:
            dataset = CaptionedImages(pictures, size, **options)
        return InFours(dataset, vae, text_encoder, tokenizer, folder)

    encode.cost = lambda: (vae.shown, text_encoder.shown)
    return encode


def all_of(cache):
    return cache.__getitems__(list(range(len(cache))))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(all_of(one), all_of(two), strict=True))


# Right ------------------------------------------------------------------------


@torch.no_grad()
def test_it_holds_what_the_frozen_parts_say(
    encoded, pictures, vae, text_encoder, tokenizer
):
    options = dict(crops=2, flip=True)
    cache, dataset = encoded(**options), CaptionedImages(pictures, 16, **options)
    assert len(cache) == len(dataset) == 4 * COUNT
    moments, states = all_of(cache)
    assert moments.dtype == states.dtype == torch.float16
    for index in range(0, len(cache), 5):
        posterior = vae.vae.encode(dataset[index][0][None])
        expected = torch.cat([posterior.mean, posterior.logvar], 1)[0]
        torch.testing.assert_close(
            moments[index].float(), expected, atol=5e-3, rtol=5e-3
        )
        expected = text_encoder(tokenizer(dataset[index][1]))[0]
        torch.testing.assert_close(
            states[index].float(), expected, atol=5e-3, rtol=5e-3
        )
    one = cache[7]
    assert torch.equal(one[0], moments[7]) and torch.equal(one[1], states[7])
    nothing = text_encoder(tokenizer(""))[0]
    torch.testing.assert_close(
        torch.tensor(cache.texts[0]).float(), nothing, atol=5e-3, rtol=5e-3
    )
    assert torch.equal(torch.tensor(cache.sample[:COUNT]), states[:COUNT])


@pytest.mark.slow
def test_scenes_are_known_by_their_world_and_number(
    vae, text_encoder, tokenizer, tmp_path
):
    def cost(length, **options):
        vae.shown, scenes = 0, Scenes(64, length=length, **options)
        cache = InFours(scenes, vae, text_encoder, tokenizer, tmp_path)
        assert len(cache) == length and len(cache.sample) == 1000
        return vae.shown

    assert cost(3) == 3
    assert cost(3) == 0
    assert cost(5) == 2
    assert cost(2) == 0
    assert cost(2, seed=1) == 2
    assert cost(2, kinds=["single"]) == 2


# Never stale -------------------------------------------------------------------


def test_only_what_changed_is_computed_again(encoded, pictures):
    before = encoded()
    assert encoded.cost() == (COUNT, COUNT + 1)  # and the empty caption
    again = encoded()
    assert encoded.cost() == (0, 0) and same(before, again)
    Image.new("RGB", (16, 16), "red").save(pictures / "03.png")
    after = encoded()
    assert encoded.cost() == (1, 0)
    assert before.content == again.content != after.content
    changed = (all_of(after)[0] != all_of(before)[0]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [3]
    (pictures / "05.txt").write_text("another card")
    encoded()
    assert encoded.cost() == (0, 1)


def test_what_is_the_same_is_found_again(encoded, pictures, tmp_path):
    encoded()
    os.utime(pictures / "01.png")
    shutil.copy(pictures / "02.png", pictures / "04.png")
    for kind in ("png", "txt"):
        (pictures / f"00.{kind}").rename(pictures / f"zz.{kind}")
    (pictures / "07.png").unlink()
    shutil.copytree(pictures, tmp_path / "moved")
    with pytest.warns(UserWarning, match="07.txt: no picture"):
        moved = CaptionedImages(tmp_path / "moved", 16)
    assert len(encoded(dataset=moved)) == COUNT - 1
    assert encoded.cost() == (0, 0)


def test_other_looks_and_sizes_are_other_pictures(encoded):
    encoded()
    encoded(flip=True)
    assert encoded.cost()[0] == COUNT  # the mirror images
    encoded(crops=1)
    assert encoded.cost()[0] == COUNT
    encoded(crops=2, flip=True)
    assert encoded.cost()[0] == 3 * COUNT  # one of four is there
    encoded(crops=1, seed=1)
    assert encoded.cost()[0] == COUNT
    encoded(size=8)
    assert encoded.cost()[0] == COUNT
    encoded()
    assert encoded.cost() == (0, 0)  # and the first ones are still there


def test_other_weights_and_words_are_another_cache(
    encoded, vae, text_encoder, tokenizer
):
    before = encoded().content
    vae.vae.quant_conv.bias.data += 0.1
    assert encoded().content != before
    assert encoded.cost() == (COUNT, 0)
    text_encoder.final_layer_norm.bias.data += 0.1
    encoded()
    assert encoded.cost() == (0, COUNT + 1)
    vae.vae.quant_conv.bias.data -= 0.1
    encoded()
    assert encoded.cost() == (0, 0)
    tokenizer.max_length = 39
    encoded()
    assert encoded.cost() == (0, COUNT + 1)


# Hard to break -------------------------------------------------------------------


def test_it_goes_on_where_it_was_stopped(encoded, vae, tmp_path):
    whole = encoded(folder=tmp_path / "whole")
    vae.batches = 2
    with pytest.raises(KeyboardInterrupt):
        encoded()
    assert encoded.cost()[0] == 8
    (table,) = (tmp_path / "cache").glob("moments-*")
    for name in ("rows", "keys"):  # and a third batch was half written
        with open(table / name, "ab") as file:
            file.write(b"torn")
    vae.batches = 10
    resumed = encoded()
    assert encoded.cost()[0] == 4
    assert same(whole, resumed)  # bit for bit


def test_a_row_without_its_numbers_does_not_count(tmp_path):
    """A power cut may keep the keys and lose the rows."""
    table = Rows(tmp_path / "table")
    assert table.count() == 0 and table.numbers() == {}
    keys = [short_name(i) for i in range(3)]
    table.append(keys, np.arange(6).reshape(3, 2))
    with open(tmp_path / "table" / "rows", "r+b") as file:
        file.truncate(9)
    assert table.count() == 2 and list(table.numbers()) == keys[:2]
    table.append(keys[2:], np.full((1, 2), 7))
    assert table.open().tolist() == [[0, 1], [2, 3], [7, 7]]
    assert table.numbers() == {key: row for row, key in enumerate(keys)}


def in_a_process(function, *arguments):
    """Start `function` in a forked process, with one thread: forks and pools clash."""

    def run():
        torch.set_num_threads(1)
        function(*arguments)

    process = torch.multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for_rows(folder, at_least):
    """Until a cache in `folder` has so many rows of moments."""
    for _ in range(3000):
        if any(Rows(table).count() >= at_least for table in folder.glob("moments-*")):
            return
        time.sleep(0.02)
    raise AssertionError("nothing was written")


def test_it_survives_kill_9(encoded, vae, tmp_path):
    vae.pause = 0.2
    process = in_a_process(encoded)
    wait_for_rows(tmp_path / "cache", 4)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    vae.pause = 0.0
    resumed = encoded()
    assert encoded.cost()[0] in (4, 8)
    assert same(encoded(folder=tmp_path / "whole"), resumed)


def test_others_stand_in_for_what_cannot_be_read(encoded, pictures):
    (pictures / "03.png").write_bytes(b"<html>")
    whole = [caption for _, caption in CaptionedImages(pictures).pairs]
    with pytest.warns(UserWarning) as caught:
        cache = encoded(flip=True)
    said = [str(warning.message) for warning in caught]
    assert sum("cannot read the picture" in line for line in said) == 1
    assert sum("2 of 24 pictures cannot be read" in line for line in said) == 1
    assert len(cache) == 24
    place = whole.index("card 3")
    kept = [*whole[:place], whole[place + 1], *whole[place + 1 :]] * 2
    number = {caption: i for i, caption in enumerate(["", *whole])}
    assert cache.which.tolist() == [number[caption] for caption in kept]
    assert cache.captions == kept
    with pytest.raises(ValueError, match="03.png"):
        encoded(on_error="raise")
    for file in pictures.glob("*.png"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of 12"):
        encoded()


def test_damage_is_found_and_mended(encoded, tmp_path):
    before = [part.clone() for part in all_of(encoded())]
    for kind, cost in (("moments", (1, 0)), ("texts", (0, 1))):
        (table,) = (tmp_path / "cache").glob(f"{kind}-*")
        data = bytearray((table / "rows").read_bytes())
        data[len(data) // 2] ^= 64
        (table / "rows").write_bytes(data)
        with pytest.warns(UserWarning, match=f"{kind}.*1 damaged row, made anew"):
            again = encoded()
        assert encoded.cost() == cost
        for one, two in zip(before, all_of(again), strict=True):
            torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


# Shared ---------------------------------------------------------------------------


def test_one_builds_and_the_others_wait(encoded, vae, tmp_path):
    """Two processes and then this one: each picture is encoded once."""
    vae.pause = 0.05

    def build(name):
        cache = encoded()
        (tmp_path / name).write_text(f"{encoded.cost()[0]} {len(cache)}")

    processes = [in_a_process(build, name) for name in ("one", "two")]
    for process in processes:
        process.join()
    said = [(tmp_path / name).read_text() for name in ("one", "two")]
    assert sorted(said) == ["0 12", "12 12"]
    encoded()
    assert encoded.cost() == (0, 0)


def test_two_trainings_do_not_disturb_each_other(encoded, pictures, vae, tmp_path):
    """One reads while another, with other looks at the pictures, makes it grow."""
    first = encoded()
    before = [part.clone() for part in all_of(first)]
    vae.pause = 0.05
    process = in_a_process(encoded, tmp_path / "cache", None, 16)
    other = in_a_process(
        encoded, tmp_path / "cache", CaptionedImages(pictures, 16, flip=True, crops=2)
    )
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(all_of(first), before))
    process.join(), other.join()
    vae.pause = 0.0
    grown = encoded(flip=True, crops=2)
    assert encoded.cost() == (0, 0)
    alone = encoded(folder=tmp_path / "alone", flip=True, crops=2)
    for one, two in zip(all_of(alone), all_of(grown), strict=True):
        # Who encoded what was a race, so the batches differ, and with them last bits.
        torch.testing.assert_close(one.float(), two.float(), atol=2e-3, rtol=2e-3)
    assert all(torch.equal(*pair) for pair in zip(all_of(first), before))


def test_a_copy_in_a_worker_maps_the_files_itself(encoded):
    cache = encoded()
    copy = pickle.dumps(cache)
    assert len(copy) < cache.moments.nbytes + cache.sample.nbytes
    assert same(pickle.loads(copy), cache)


def test_captions_that_are_too_long_are_one_warning(encoded, pictures, recwarn):
    for index in (2, 3, 7):
        (pictures / f"{index:02}.txt").write_text(f"card {index} " + "three " * 40)
    encoded()
    (said,) = (str(one.message) for one in recwarn if "tokens" in str(one.message))
    assert said.startswith("3 captions longer than 38 tokens") and "shorten" in said
    assert "'card 2 three three" in said
    recwarn.clear()
    encoded()
    assert not [one for one in recwarn if "tokens" in str(one.message)]


# Shards ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_hold_the_same_pictures_as_their_folder(
    encoded, pictures, vae, text_encoder, tokenizer, tmp_path, num_workers
):
    pattern = str(tmp_path / "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for file, caption in CaptionedImages(pictures).pairs:
            writer.write(
                {"__key__": file.stem, "png": file.read_bytes(), "txt": caption}
            )
    path = f"{tmp_path}/{{0000..0002}}.tar"
    shards = open_dataset(RunConfig(dataset_path=path, image_size=16))
    assert isinstance(shards, CaptionedShards)
    assert shards.captions() == [f"card {i}" for i in range(COUNT)]
    other = tmp_path / "other"
    cache = InFours(shards, vae, text_encoder, tokenizer, other, num_workers)
    assert vae.shown == COUNT
    from_folder = encoded(folder=other)
    assert encoded.cost() == (0, 0), "the same files under the same keys"
    assert same(cache, from_folder)
    (tmp_path / "0001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="0001.tar"):
        CaptionedShards(path)


# Speed -----------------------------------------------------------------------------


def test_throughput_is_measured(tmp_path, monkeypatch):
    """At toy size: operations and times of each form of the step, and the peak."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    bench = load_tool("measure_throughput")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # a minute
    flags = "--sizes tiny --batches 2 --steps 1 --rounds 1 --side 64 --output".split()
    bench.main([*flags, str(tmp_path)])
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert len(record["rows"]) == 4 and set(record["peaks"]) == {"no", "bf16"}
    for row in record["rows"]:
        assert row["flops"] == record["rows"][0]["flops"] > 2 * row["weights"]
        speed = row["pictures_per_second"] / row["batch"]
        assert row["flops_per_second"] == pytest.approx(speed * row["flops"])


@pytest.mark.slow
def test_a_failure_is_recorded(tmp_path, monkeypatch):
    """The runs that chapter 13 shows, here of two steps."""
    monkeypatch.chdir(ROOT)
    tool = load_tool("record_failures")
    flags = "--max_steps 2 --num_pictures 8 --batch_size 2 --num_validation 4 "
    flags += "--log_every 1 --unet_dim 16"
    places = ["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    tool.main(["--only", "deaf", *places, "--", *flags.split()])
    lines = (tmp_path / "data/deaf.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "data/deaf.png").stat().st_size > 1000
    assert json.loads((tmp_path / "data/hearing.json").read_text())["deaf"] > 0


@pytest.mark.slow
def test_the_benchmark_of_training_steps_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # and back again afterwards
    bench = load_tool("bench_training")
    flags = "--sizes tiny --batch_size 2 --steps 1 --rounds 2 --output".split()
    bench.main([*flags, str(tmp_path)])
    record = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert [row["who"] for row in record["rows"]] == [
        "diffusers", "ours, no cache", "ours, cached",
    ]  # fmt: skip
    assert all(row["pictures_per_second"] > 0 for row in record["rows"])
    assert record["rows"][0]["ratio"] == 1
    assert "ours, cached" in capsys.readouterr().out
