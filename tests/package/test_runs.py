"""What befalls a run: lost weights, two at once, damage, full disks, kills."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, small_pipeline
from killed import Numbers
from PIL import Image
from safetensors.torch import save_file
from test_training import (
    line_config,
    line_loss,
    log_of,
    parts_of,
    same,
    spoiled_loss,
)
from torch import nn

from sdbook.__main__ import main
from sdbook.data import CaptionedImages, Scenes, write_folder
from sdbook.files import save_weights
from sdbook.run.checkpoints import content_of, find_checkpoint, keep_state
from sdbook.run.folder import hold, owns_output_dir
from sdbook.run.logs import Log, Meter, step_of
from sdbook.run.processes import this_process
from sdbook.training import (
    Rows,
    load_checkpoint,
    optimise,
    read_checkpoint,
    save_checkpoint,
    short_name,
)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def run_line(config, loss_of=line_loss, **options):
    return optimise(config, nn.Linear(1, 1), Numbers(), loss_of, **options)


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


# Lost weights -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 8])
def test_weights_that_are_lost_are_no_success(tmp_path, steps):
    """Fewer than ten bad steps before the end, and validations that are NaN."""
    config = line_config(
        tmp_path, learning_rate=1e38, warmup_steps=0, max_steps=steps, log_every=1,
        checkpoint_every=1, validate_every=1,
    )  # fmt: skip
    nan = dict(validate=lambda module: {"psnr": float("nan")})
    with pytest.raises(ValueError, match="no number; try a lower learning_rate.*step"):
        run_line(config, **nan)
    assert not list(tmp_path.glob("checkpoints/*.pt"))
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=no_constant)["psnr"] is None


def test_a_command_whose_weights_are_lost_fails(tmp_path, capsys):
    flags = "--block_out_channels [8,8] --norm_num_groups 4 --batch_size 2 --max_steps "
    flags += "1 --num_pictures 20 --learning_rate 1e38 --warmup_steps 0"
    with pytest.raises(SystemExit) as exit_:
        main(["train-vae", "--output_dir", str(tmp_path), *flags.split()])
    assert exit_.value.code == 2 and "wrote" not in capsys.readouterr().out
    assert not (tmp_path / "vae").exists()


def test_bad_steps_push_no_good_checkpoint_out(tmp_path):
    config = line_config(tmp_path, checkpoint_every=1, keep_checkpoints=2)
    with pytest.raises(ValueError, match="in ten steps.*goes on from .*00014.pt"):
        run_line(config, spoiled_loss(range(15, 1000)))
    assert names(tmp_path / "checkpoints") == ["step-00000014.pt"]
    assert names(tmp_path / "checkpoints-old") == ["step-00000015.pt"]
    run_line(config)
    assert read_checkpoint(tmp_path / "checkpoints/step-00000040.pt")["step"] == 40


def test_a_run_whose_only_checkpoint_is_spoiled_says_zero(tmp_path):
    run_line(line_config(tmp_path, checkpoint_every=1, keep_checkpoints=1, max_steps=3))
    more = line_config(tmp_path, checkpoint_every=1, keep_checkpoints=1, max_steps=9)
    with pytest.warns(UserWarning, match="max_steps was 3"):
        with pytest.raises(ValueError, match="goes on from step 0"):
            run_line(more, spoiled_loss(range(4, 9)))
    assert not names(tmp_path / "checkpoints")


def test_ctrl_c_in_bad_steps_says_where_it_goes_on(tmp_path):
    spoiled = spoiled_loss(range(7, 1000))

    def loss_of(*given):
        loss, numbers = spoiled(*given)
        if not loss.isfinite():
            os.kill(os.getpid(), signal.SIGTERM)
        return loss, numbers

    config = line_config(tmp_path, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt, match="after step 8; .*from step 5"):
        run_line(config, loss_of)


@pytest.mark.parametrize("loss, sound", [(1.0, True), (float("nan"), False)])
def test_an_overflow_of_gradients_alone_is_no_loss(tmp_path, loss, sound):
    """float16's scaler tries too large a scale now and then."""

    class SomeRun:
        module = averaged = nn.Linear(1, 1)
        main, config, saved, meter = True, line_config(tmp_path), 0, Meter()
        stateful = parts_of(module)

    SomeRun.meter.skip(loss)
    keep_state(SomeRun, 3)
    assert SomeRun.saved == (3 if sound else 0)
    with torch.no_grad():
        SomeRun.module.weight[0] = float("inf")
    keep_state(SomeRun, 4)
    assert SomeRun.saved == (3 if sound else 0)


@pytest.mark.parametrize("line", ["5", "{}", "[" * 100_000, '{"step": "x"}', "nan", ""])
def test_a_line_of_the_log_that_is_none(line, tmp_path):
    assert step_of(line) == -1
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\xff\n' + line.encode())
    Log(tmp_path / "log.jsonl").cut(5)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1]


# Several processes, several runs ------------------------------------------------


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_did_not_find_each_other(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name} says that 2 .*ACCELERATE_USE_CPU"):
        this_process()
    with pytest.raises(ValueError, match="2 processes"):
        run_line(line_config(tmp_path))
    assert names(tmp_path) == []


IN_TWO = """
import sys
from pathlib import Path
from sdbook.finetuning import (
    LoRATrainingConfig, WordTrainingConfig, train_lora, train_word
)
home = Path(sys.argv[1])
every = dict(
    dataset_path=f"{home}/pictures", pretrained=f"{home}/model", batch_size=1,
    max_steps=2, warmup_steps=1, log_every=1,
)
train_lora(LoRATrainingConfig(
    **every, output_dir=f"{home}/lora", class_prompts=("a boat",),
    num_class_pictures=2,
))
train_word(WordTrainingConfig(**every, output_dir=f"{home}/word", word="<zig>"))
"""


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_run(tmp_path):
    """A real launch of both fine-tunings, over gloo."""
    small_pipeline((8, 16), (8, 8, 8), width=16, image_size=64).save_pretrained(
        tmp_path / "model"
    )
    write_folder(Scenes(64), tmp_path / "pictures", 4)
    for file in (tmp_path / "pictures" / "captions").glob("*.txt"):
        file.write_text("a <zig> boat")
    (tmp_path / "both.py").write_text(IN_TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node", "2", str(tmp_path / "both.py"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes = 2") == 2  # one plan for each training
    for name, file in (("lora", "pytorch_lora_weights"), ("word", "learned_embeds")):
        run = tmp_path / name
        assert [line["step"] for line in log_of(run)] == [1, 2]
        state = read_checkpoint(run / "checkpoints" / "step-00000002.pt")
        assert state["settings"]["processes"] == 2
        assert (run / f"{file}.safetensors").exists()


def hold_for_ever(folder):
    with hold(Path(folder)):
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process, which has `tmp_path / "run"` to itself."""
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=hold_for_ever, args=(tmp_path / "run",))
    process.start()
    while not (tmp_path / "run" / ".holder").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_folder_that_another_run_has(tmp_path, holder):
    config = line_config(tmp_path / "run", max_steps=2)
    with pytest.raises(
        BlockingIOError, match=f"run now .process {holder.pid} on .*out"
    ):
        run_line(config)
    assert names(tmp_path / "run") == [".holder", ".lock"]
    planned = owns_output_dir(lambda config: "planned")
    assert planned(replace(config, dry_run=True)) == "planned"
    holder.kill()
    holder.join()
    run_line(config)
    run_line(replace(config, max_steps=3))
    assert ".holder" not in names(tmp_path / "run")


def test_an_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run is no folder; choose another"):
        run_line(line_config(tmp_path / "run"))


def test_a_signal_before_the_first_step(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    @owns_output_dir
    def prepare(config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    config = line_config(tmp_path, max_steps=2)
    with pytest.raises(
        KeyboardInterrupt, match="before the first checkpoint; the same"
    ):
        prepare(config)
    run_line(config)
    with pytest.raises(KeyboardInterrupt, match="at once; .* from .*00000002.pt"):
        prepare(config)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_killed_run_left_is_removed(tmp_path):
    other = tmp_path / "other"  # a run of its own, which may be going on
    for folder in ("cache/moments", "unet", "checkpoints", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (other / ".lock").touch()
    left = [
        folder / ".weights.safetensors.123.tmp"
        for folder in (tmp_path, tmp_path / "unet", tmp_path / "cache/moments")
    ]
    kept = [other / ".log.jsonl.123.tmp", tmp_path / ".mine.tmp"]
    for file in left + kept:
        file.touch()
    (tmp_path / "checkpoints" / ".step-00000009.pt.77.tmp").mkdir()
    run_line(line_config(tmp_path, max_steps=1))
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in kept)
    assert names(tmp_path / "checkpoints") == ["step-00000001.pt"]


# Checkpoints that are none --------------------------------------------------------


class Something:
    """No tensor."""


def change(path, **parts):
    """Exchange parts of a checkpoint."""
    torch.save(torch.load(path, weights_only=True) | parts, path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One of a line, after a step."""
    folder = tmp_path_factory.mktemp("line")
    run_line(line_config(folder, max_steps=1))
    return folder / "checkpoints" / "step-00000001.pt"


MEANS = {
    "step": torch.tensor(1.0),
    "exp_avg": torch.zeros(1),
    "exp_avg_sq": torch.ones(9),
}
LOST = {name: torch.full((1, 1), float("nan")) for name in ("exp_avg", "exp_avg_sq")}
FOREIGN = {
    "optimiser of other shapes": dict(optimiser={"state": {0: MEANS}}),
    "optimiser of more weights": dict(optimiser={"state": {7: MEANS}}),
    "optimiser of numbers": dict(optimiser={"state": {0: 5}}),
    "optimiser of nothing": dict(optimiser=None),
    "optimiser that is lost": dict(optimiser={"state": {0: LOST}}),
    "model of numbers": dict(model={"weight": 1}),
    "average that is lost": dict(ema={"weight": torch.tensor([[float("nan")]])}),
    "average of numbers": dict(ema=3),
    "step of text": dict(step="x"),
    "meter of numbers": dict(meter=[1]),
    "settings of numbers": dict(settings=3),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_with_something_else_in_it(kind, checkpoint, tmp_path):
    """Means of other shapes once ended in a segmentation fault."""
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    change(path, **FOREIGN[kind])
    config = line_config(tmp_path / "run", resume=str(path), max_steps=2)
    with pytest.raises(ValueError, match="00001.pt.*(set resume to|output_dir)"):
        run_line(config)


@pytest.mark.parametrize("lacks", ["model", "optimiser", "step"])
def test_a_checkpoint_that_lacks_a_part(lacks, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    del state[lacks]
    torch.save(state, tmp_path / "stripped.pt")
    config = line_config(tmp_path / "run", resume=str(tmp_path / "stripped.pt"))
    with pytest.raises(ValueError, match=f"stripped.pt is no .*has no {lacks}"):
        run_line(config)


def write_foreign(path, kind):
    if kind == "safetensors":
        save_file({"weight": torch.zeros(1)}, path)
    elif kind == "weights":
        torch.save(nn.Linear(1, 1).state_dict(), path)
    elif kind == "objects":
        torch.save({"model": Something()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": 1}))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(kind)


@pytest.mark.parametrize(
    "kind", ["safetensors", "weights", "objects", "pickle", "{}", "fifo", "endless"]
)
def test_foreign_files_to_resume_from(kind, checkpoint, tmp_path):
    path = tmp_path / "a.pt"
    write_foreign(path, kind)
    config = line_config(tmp_path / "run", resume=str(path), max_steps=2)
    with pytest.raises((ValueError, FileNotFoundError), match="a.pt.*(none|no file)"):
        find_checkpoint(config)
    folder = tmp_path / "run" / "checkpoints"  # and beside a good one
    folder.mkdir(parents=True)
    (folder / checkpoint.name).write_bytes(checkpoint.read_bytes())
    write_foreign(folder / "step-00000007.pt", kind)
    with pytest.warns(UserWarning, match="00007.pt cannot be used.*the one before"):
        assert find_checkpoint(replace(config, resume="auto")).name == checkpoint.name


def test_one_byte_of_a_zip_s_directory(checkpoint, tmp_path):
    """Either the file is passed over, or what it holds is what it held."""
    whole, expected = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    start, passed = whole.index(b"PK\x01\x02"), 0
    path = tmp_path / "step-00000002.pt"
    for place in range(start, len(whole), 23):
        byte = bytes([whole[place] ^ 0x10])
        path.write_bytes(whole[:place] + byte + whole[place + 1 :])
        os.utime(path, ns=(place, place))
        try:
            assert same(read_checkpoint(path), expected)
        except ValueError as error:
            assert "is no checkpoint" in str(error)
            passed += 1
    assert passed > 20


def test_settings_of_the_optimiser_are_those_of_now(tmp_path):
    save_checkpoint(tmp_path, 1, parts_of(nn.Linear(1, 1)))
    module = nn.Linear(1, 1)
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=0.5)
    parts = {"model": module, "optimiser": optimiser}
    assert load_checkpoint(tmp_path / "step-00000001.pt", parts) == 1
    assert optimiser.param_groups[0]["weight_decay"] == 0.5


# What a run is trained on ------------------------------------------------------------


def test_exchanged_pictures_are_noticed(tmp_path, recwarn):
    """As many of them, with the same names and captions."""

    def go_on(**options):
        recwarn.clear()
        dataset = CaptionedImages(tmp_path / "pictures", 16)
        subset = torch.utils.data.Subset(dataset, [0, 1, 2])

        def loss_of(module, batch, generator, rows):
            return module(batch[0].mean((1, 2, 3))[:, None]).mean(), {}

        config = line_config(tmp_path / "run", **options)
        optimise(config, nn.Linear(1, 1), subset, loss_of)
        return [str(w.message) for w in recwarn if "other settings" in str(w.message)]

    folder = tmp_path / "pictures"
    write_folder(Scenes(64), folder, 3)
    steady = dict(lr_scheduler="constant")
    assert go_on(max_steps=1, **steady) == go_on(max_steps=2, **steady) == []
    picture = folder / "images" / "00001.png"
    Image.open(picture).rotate(90).resize((32, 32)).save(picture)
    (said,) = go_on(max_steps=3, **steady)
    assert "the pictures or captions" in said
    assert go_on(max_steps=4, **steady) == []


def test_what_a_dataset_holds(tmp_path):
    assert content_of(Numbers()) is None and content_of(Scenes(64)) is None
    write_folder(Scenes(64), tmp_path, 2)
    one = content_of(CaptionedImages(tmp_path))
    (tmp_path / "captions" / "00001.txt").write_text("another caption")
    assert content_of(CaptionedImages(tmp_path)) not in (one, None)


# The cache, damaged ---------------------------------------------------------------


def make_table(folder, count=6):
    table = Rows(folder)
    keys = [short_name(i) for i in range(count)]
    rows = np.random.default_rng(0).normal(size=(count, 3, 4)).astype(np.float16)
    table.append(keys, rows)
    return keys, rows


def fill(folder, keys, rows):
    """What a training does: adds what a table lacks; the rows by their keys."""
    table = Rows(folder)
    known = table.numbers()
    lacks = [i for i, key in enumerate(keys) if key not in known]
    if lacks:
        table.append([keys[i] for i in lacks], rows[lacks])
    numbers = table.numbers()
    return table.read([numbers[key] for key in keys])


@pytest.mark.parametrize("name", ["rows", "keys", "sums", "shape.json"])
def test_flipped_bits_are_found_and_mended(name, tmp_path, recwarn):
    keys, rows = make_table(tmp_path / "whole")
    for place in range(0, (tmp_path / "whole" / name).stat().st_size, 11):
        folder = tmp_path / str(place)
        make_table(folder)
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1 << place % 8
        (folder / name).write_bytes(data)
        recwarn.clear()
        assert np.array_equal(fill(folder, keys, rows), rows)
        assert any("made anew" in str(one.message) for one in recwarn)
        recwarn.clear()
        assert np.array_equal(fill(folder, keys, rows), rows) and not len(recwarn)


@pytest.mark.parametrize("text", ["", "[0]", "null", "[3,", "[" * 100_000, "\udcff"])
def test_a_damaged_shape_is_made_anew(text, tmp_path):
    keys, rows = make_table(tmp_path / "table")
    shape = tmp_path / "table" / "shape.json"
    shape.write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match="table is damaged in shape.json"):
        assert np.array_equal(fill(tmp_path / "table", keys, rows), rows)
    assert json.loads(shape.read_text()) == [3, 4]


@pytest.mark.parametrize("name", ["rows", "keys", "shape.json"])
def test_a_table_without_one_of_its_files(name, tmp_path, recwarn):
    keys, rows = make_table(tmp_path / "table")
    (tmp_path / "table" / name).unlink()
    assert np.array_equal(fill(tmp_path / "table", keys, rows), rows)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_table_takes_only_numbers(value, tmp_path):
    """A VAE whose weights are lost says such things, and nobody would look."""
    with pytest.raises(ValueError, match="table should hold is no number"):
        Rows(tmp_path / "table").append([short_name(0)], np.full((1, 2), value))
    assert Rows(tmp_path / "table").count() == 0


def test_an_older_table_gets_sums(tmp_path):
    keys, rows = make_table(tmp_path / "table")
    sums = tmp_path / "table" / "sums"
    expected = sums.read_bytes()
    sums.unlink()
    with pytest.warns(UserWarning, match="table has no check sums"):
        assert np.array_equal(fill(tmp_path / "table", keys, rows), rows)
    assert sums.read_bytes() == expected


def test_damage_after_the_start_is_found_when_it_is_read(tmp_path):
    keys, rows = make_table(tmp_path / "table")
    table = Rows(tmp_path / "table")
    table.numbers(), table.open()
    with open(table.rows, "r+b") as file:
        file.seek(2 * 12 * 3)
        file.write(b"\x55")
    assert np.array_equal(table.read([0, 1, 2]), rows[:3])
    with pytest.raises(
        ValueError, match="table was damaged.* in 1 row; .*same command"
    ):
        table.read([2, 3, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said already
        assert np.array_equal(fill(tmp_path / "table", keys, rows), rows)


def test_notes_that_are_damaged_are_taken_again(tmp_path):
    write_folder(Scenes(64), tmp_path / "pictures", 2)
    dataset = CaptionedImages(tmp_path / "pictures")
    keys = dataset.keys(tmp_path)
    for text in ("", "5", "[]", "{"):
        (tmp_path / "pictures.json").write_text(text)
        assert dataset.keys(tmp_path) == keys


# A full disk ---------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """No file may grow beyond 10,000 bytes, which is what a full disk looks like."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_the_end(tmp_path, full_disk):
    """The finished model cannot be written: nothing is lost, and it says what to do."""

    @owns_output_dir
    def train(config):
        run_line(config)
        save_weights({"weight": torch.zeros(10_000)}, tmp_path / "a.safetensors")

    with pytest.raises(OSError, match="a.safetensors could.*make room.*from .*0002.pt"):
        train(line_config(tmp_path, max_steps=2))
    assert find_checkpoint(line_config(tmp_path)).name == "step-00000002.pt"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_disk_that_is_full_in_the_cache(tmp_path, full_disk):
    keys, rows = make_table(tmp_path / "table")

    @owns_output_dir
    def train(config):
        more = [short_name(i) for i in range(6, 6000)]
        Rows(tmp_path / "table").append(more, np.zeros((len(more), 3, 4)))

    with pytest.raises(OSError, match="table/rows could not be written.*make room"):
        train(line_config(tmp_path))
    assert np.array_equal(fill(tmp_path / "table", keys, rows), rows)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_disk_that_is_full_in_the_log(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        Log(tmp_path / "log.jsonl").write({"step": 1})
    assert "log.jsonl" in str(error.value)
