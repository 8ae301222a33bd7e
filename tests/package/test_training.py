"""Training: the loss and its weights, order and noise, resuming, caching, the loop."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_tool
from killed import Numbers
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sdbook import training
from sdbook.attention import Attention
from sdbook.clip import CLIPTextConfig, CLIPTextModel
from sdbook.data import (
    CaptionedImages,
    Scenes,
    is_held_out,
    read_caption,
    write_folder,
)
from sdbook.evaluation import Judge, satisfies
from sdbook.files import save_weights, write_json
from sdbook.pipeline import StableDiffusion, find_model, to_pictures
from sdbook.run.settings import check_settings
from sdbook.run.unet import asked_shape
from sdbook.schedulers import DDIMScheduler
from sdbook.training import (
    EMA,
    CLIPTrainingConfig,
    DiffusionLoss,
    Log,
    Meter,
    RunConfig,
    StepSampler,
    TrainingConfig,
    Twins,
    VAETrainingConfig,
    check_fits,
    exchange,
    find_sizes,
    kept_bytes,
    latent_spread,
    learning_rate_at,
    load_checkpoint,
    min_snr_weights,
    open_dataset,
    optimise,
    preset_shape,
    save_checkpoint,
    setting,
    start_certain,
    step_generator,
    train,
    train_clip,
    train_vae,
    whitening,
)
from sdbook.unet import UNet, UNetConfig, start_as_identity
from sdbook.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).resolve().parents[2]
TOY = dict(
    num_pictures=10, batch_size=4, max_steps=4, warmup_steps=1, log_every=1,
    checkpoint_every=2,
)  # fmt: skip
TOY_VAE = dict(TOY, block_out_channels=(8, 8, 8), norm_num_groups=4)
TOY_CLIP = dict(
    TOY, vocab_size=540, max_length=48, hidden_size=32, num_hidden_layers=1,
    num_attention_heads=2,
)  # fmt: skip
TOY_UNET = dict(TOY, unet_preset="tiny", unet_dim=16)
STABLE_DIFFUSION = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
)


def log_of(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoint_of(folder):
    newest = max((Path(folder) / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)


def facts(folder):
    """The lines of a log without what depends on the clock."""
    timing = ("seconds", "pictures_per_second")
    return [{k: v for k, v in x.items() if k not in timing} for x in log_of(folder)]


def same(one, two):
    """Are two nested states equal, every bit of every tensor?"""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A folder with a toy vae/ and clip/, trained for four steps."""
    folder = tmp_path_factory.mktemp("frozen")
    train_vae(VAETrainingConfig(output_dir=f"{folder}/vae", **TOY_VAE))
    train_clip(CLIPTrainingConfig(output_dir=f"{folder}/clip", **TOY_CLIP))
    return folder


@pytest.fixture
def unet_config(frozen, tmp_path):
    return TrainingConfig(
        output_dir=f"{tmp_path}/unet", vae_weights_path=f"{frozen}/vae",
        text_encoder_path=f"{frozen}/clip", **TOY_UNET,
    )  # fmt: skip


class PowerCut(Exception):
    """Someone pulled the plug."""


@contextmanager
def power_cut(step):
    """Whatever trains inside dies in the middle of this step, counted from 1."""
    left = iter(range(step - 1))

    def pull_the_plug(optimiser, *given):
        if next(left, None) is None:
            raise PowerCut

    hook = register_optimizer_step_post_hook(pull_the_plug)
    try:
        with pytest.raises(PowerCut):
            yield
    finally:
        hook.remove()


# The loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_by_hand(kind):
    scheduler = DDIMScheduler(prediction_type=kind, **STABLE_DIFFUSION)
    weights = min_snr_weights(scheduler, 5.0)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    for t in (0, 100, 400, 700, 999):
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        expected = {
            "epsilon": min(snr, 5) / snr,
            "v_prediction": min(snr, 5) / (snr + 1),
            "sample": min(snr, 5),
        }[kind]
        assert weights[t].item() == pytest.approx(expected, rel=1e-3)
    assert torch.equal(min_snr_weights(scheduler, 0.0), torch.ones(1000))


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_weighted_error_is_one_in_x0_with_capped_weight(kind, power):
    """Whatever the network predicts, an error in x0 counts min(SNR, gamma)^power."""
    scheduler = DDIMScheduler(
        prediction_type=kind, clip_sample=False, **STABLE_DIFFUSION
    )
    x0, noise = torch.randn(2, 3, 4, 8, 8).double()
    for t in (50, 300, 600, 950):
        x = scheduler.add_noise(x0, noise, t)
        target = scheduler.target(x0, noise, t)
        answer = target + 0.1 * torch.randn_like(target)
        guess, _ = scheduler.split(answer, t, x)
        error, error_x0 = ((a - b).square().mean() for a, b in
                           ((answer, target), (guess, x0)))  # fmt: skip
        snr = scheduler.snr(t)
        weight = min_snr_weights(scheduler, 5.0, power)[t]
        worth = min(float(snr), 5) ** power
        assert weight * error / error_x0 == pytest.approx(worth, rel=1e-3)


def fake_unet(answer=0.0):
    """Stands in for a UNet and remembers what it was asked."""

    def unet(x, t, context):
        unet.asked = x, t, context
        return torch.full_like(x, answer)

    return unet


def make_loss(**options):
    scheduler = DDIMScheduler(clip_sample=False, **STABLE_DIFFUSION)
    return DiffusionLoss(scheduler, 0.5, torch.zeros(3, 8), **options)


def test_timesteps_are_spread_evenly_and_stay_in_the_schedule():
    loss = make_loss()
    for step in range(20):
        t = loss.draw(torch.randn(10, 8, 4, 4), step_generator(0, step))[2]
        assert torch.equal(t // 100, torch.arange(10))


def test_the_last_timestep_exists_even_when_rounding_says_otherwise(monkeypatch):
    almost = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda n, **_: almost.expand(n))
    t = make_loss().draw(torch.randn(512, 8, 2, 2), step_generator(0, 0))[2]
    assert t.max() == 999


def test_the_share_of_dropped_captions():
    loss, unet = make_loss(caption_dropout=0.25), fake_unet()
    batch = torch.randn(4000, 8, 2, 2), torch.ones(4000, 3, 8)
    loss(unet, batch, step_generator(0, 0))
    kept = unet.asked[2].mean((1, 2))
    assert set(kept.tolist()) == {0.0, 1.0}  # all of a caption, or nothing
    assert 1 - kept.mean().item() == pytest.approx(0.25, abs=0.03)
    for share in (0.0, 1.0):
        make_loss(caption_dropout=share)(unet, batch, step_generator(0, 0))
        assert unet.asked[2].mean() == 1 - share


def test_the_loss_against_plain_arithmetic():
    moments, states = torch.randn(4, 8, 6, 6).half(), torch.randn(4, 3, 8).half()
    unet = fake_unet(0.3)
    loss, numbers = make_loss()(unet, (moments, states), step_generator(5, 9))

    generator = step_generator(5, 9)
    mean, logvar = moments.float().chunk(2, dim=1)
    x0 = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
    torch.rand(4, generator=generator)  # caption dropout
    t = ((torch.arange(4) + torch.rand(4, generator=generator)) / 4 * 1000).long()
    noise = torch.randn(mean.shape, generator=generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = (1 - betas).cumprod(0)[t][:, None, None, None]
    assert torch.equal(unet.asked[1], t)
    expected = a.sqrt() * 0.5 * x0 + (1 - a).sqrt() * noise
    torch.testing.assert_close(unet.asked[0], expected)
    torch.testing.assert_close(loss, (0.3 - noise).square().mean())
    low = (0.3 - noise[t < 333]).square().mean()
    torch.testing.assert_close(numbers["error_low_noise"], low)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_draw_the_rows_of_one_batch(world):
    moments = torch.randn(8, 8, 4, 4)
    loss = make_loss(caption_dropout=0.5)
    whole = loss.draw(moments, step_generator(0, 3))
    for rank in range(world):
        rows = slice(rank, None, world)
        part = loss.draw(moments[rows], step_generator(0, 3), rows)
        assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole))


# Order, rate, average, log


@pytest.mark.parametrize("size, batch_size", [(10, 5), (10, 4), (3, 8)])
def test_every_picture_once_an_epoch(size, batch_size):
    steps = 5 * size // math.gcd(size, batch_size)
    row = [i for picks in StepSampler(size, batch_size, 0, 0, steps) for i in picks]
    epochs = [row[i : i + size] for i in range(0, len(row) - size + 1, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_the_order_goes_on_after_a_stop_inside_an_epoch():
    whole = list(StepSampler(10, 4, 3, 0, 20))
    assert list(StepSampler(10, 4, 3, 7, 20)) == whole[7:]
    assert len(StepSampler(10, 4, 3, 7, 20)) == 13
    assert list(StepSampler(10, 4, 4, 0, 20)) != whole  # another seed
    assert len(StepSampler(10, 4, 3, 30, 20)) == 0  # already done


def test_processes_share_a_batch():
    parts = [list(StepSampler(50, 8, 0, 0, 6, rank, 4)) for rank in range(4)]
    for step, whole in enumerate(StepSampler(50, 8, 0, 0, 6)):
        picks = [part[step] for part in parts]
        assert all(len(pick) == 2 for pick in picks)
        assert sorted(sum(picks, [])) == sorted(whole)
    with pytest.raises(ValueError, match="batch_size 6 does not split over 4"):
        StepSampler(50, 6, 0, 0, 6, 0, 4)


def test_parts_of_a_batch_are_dealt_like_processes():
    whole = list(StepSampler(50, 8, 0, 2, 6))
    shares = [list(StepSampler(50, 8, 0, 2, 6, rank, 2, 2)) for rank in (0, 1)]
    assert len(StepSampler(50, 8, 0, 2, 6, 0, 2, 2)) == len(shares[0]) == 8
    for step, picks in enumerate(whole):
        for rank, part in ((0, 0), (1, 0), (0, 1), (1, 1)):
            assert shares[rank][2 * step + part] == picks[2 * part + rank :: 4]


def test_noise_depends_on_seed_and_step_alone():
    def draw(*key):
        return tuple(torch.randn(4, generator=step_generator(*key)).tolist())

    assert draw(0, 5) == draw(0, 5)
    assert len({draw(*key) for key in [(0, 5), (0, 6), (1, 5), (5, 0)]}) == 4


def test_learning_rates():
    config = RunConfig(max_steps=110, warmup_steps=10)
    rates = [learning_rate_at(step, config) for step in range(110)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[35] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert 0 < rates[-1] < 0.001
    assert learning_rate_at(200, config) == 0.0
    assert learning_rate_at(0, replace(config, warmup_steps=0)) == 1.0
    linear = replace(config, lr_scheduler="linear")
    assert learning_rate_at(35, linear) == pytest.approx(0.75)
    constant = replace(config, lr_scheduler="constant")
    assert learning_rate_at(5, constant) == 0.6 and learning_rate_at(200, constant) == 1


def test_the_average_by_hand():
    layer = nn.Linear(2, 1)
    ema = EMA(layer, 0.8)
    expected = layer.weight.detach().clone()
    for step in range(60):
        layer.weight.data += torch.randn(1, 2)
        ema.update(layer, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(ema.shadow.weight, expected)
    assert not ema.shadow.weight.requires_grad


def test_the_log_keeps_what_came_before_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in (10, 20, 30)))
    with path.open("a") as file:
        file.write('{"step": 4')  # the power went
    log = Log(path)
    log.cut(20)
    log.write({"step": 30, "loss": 1.0})
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20, 30]
    Log(path, writes=False).write({"step": 40})
    assert len(log_of(tmp_path)) == 3


def test_the_meter_goes_on_inside_a_line():
    numbers = {"loss": 1.0, "odd": math.nan}, {"loss": 2.0, "odd": 1.0}, {"loss": 6.0}
    whole, first, second = Meter(), Meter(), Meter()
    for one in numbers:
        whole.add(one)
    first.add(numbers[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one in numbers[1:]:
        second.add(one)
    means, resumed = whole.means(4), second.means(4)
    assert means["loss"] == resumed["loss"] == 3.0 and means["odd"] == 1.0
    assert means["pictures_per_second"] > 0
    assert whole.means(4).keys() == {"seconds", "pictures_per_second"}  # begun again


# The loop


def line_loss(module, batch, generator, rows):
    x, y = batch
    return (module(x) - y).square().mean(), {}


def line_config(folder, **options):
    defaults = dict(
        output_dir=str(folder), batch_size=4, max_steps=40, warmup_steps=1,
        learning_rate=0.2, weight_decay=0.0, checkpoint_every=10, log_every=5,
        ema_decay=0.0,
    )  # fmt: skip
    return RunConfig(**defaults | options)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_loop_learns_a_line(tmp_path, decay):
    threads = torch.get_num_threads()
    line = optimise(
        line_config(tmp_path, ema_decay=decay), nn.Linear(1, 1), Numbers(), line_loss
    )
    assert line.weight.item() == pytest.approx(3, abs=0.5)
    assert torch.get_num_threads() == threads
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == list(range(5, 41, 5))
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
    assert log[0]["lr"] == 0.2 * learning_rate_at(4, line_config(tmp_path))


def test_a_run_that_is_done_stays_as_it_is(tmp_path):
    config = line_config(tmp_path, ema_decay=0.5)
    first = optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    again = optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    assert same(first.state_dict(), again.state_dict())
    assert len(log_of(tmp_path)) == 8
    fresh = replace(config, resume="none", max_steps=10)
    other = optimise(fresh, nn.Linear(1, 1), Numbers(), line_loss)
    assert not same(first.state_dict(), other.state_dict())
    assert len(log_of(tmp_path)) == 2
    assert checkpoint_of(tmp_path)["step"] == 10  # none of the first run's is left
    old = tmp_path / "checkpoints-old" / "step-00000040.pt"
    assert same(torch.load(old)["ema"], dict(first.state_dict()))
    third = replace(config, output_dir=f"{tmp_path}/third", resume=str(old))
    optimise(third, nn.Linear(1, 1), Numbers(), line_loss)
    third = replace(third, resume=str(tmp_path), max_steps=12)
    optimise(third, nn.Linear(1, 1), Numbers(), line_loss)
    assert checkpoint_of(f"{tmp_path}/third")["step"] == 12
    with pytest.raises(FileNotFoundError, match="resume: there is no .*nowhere"):
        optimise(
            replace(config, resume="nowhere"), nn.Linear(1, 1), Numbers(), line_loss
        )


def test_an_average_begun_later_starts_from_the_weights(tmp_path):
    optimise(line_config(tmp_path), nn.Linear(1, 1), Numbers(), line_loss)
    config = line_config(tmp_path, ema_decay=0.5)
    average = optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    assert same(average.state_dict(), checkpoint_of(tmp_path)["model"])


def test_going_on_with_other_settings_names_them(tmp_path, recwarn):
    def go_on(**options):
        recwarn.clear()
        optimise(replace(config, **options), nn.Linear(1, 1), Numbers(), line_loss)
        said = [str(one.message) for one in recwarn]
        return [text for text in said if "other settings" in text]

    config = line_config(tmp_path, max_steps=10)
    assert go_on() == []
    assert checkpoint_of(tmp_path)["settings"]["batch_size"] == 4
    silent = dict(log_every=1, checkpoint_every=3, keep_checkpoints=5, num_workers=1)
    assert go_on() == go_on(**silent, resume=str(tmp_path)) == []
    (said,) = go_on(batch_size=2, learning_rate=0.1, dataset_path="pets", kinds=("a",))
    for words in (
        "batch_size was 4 and is 2;", "learning_rate was 0.2 and is 0.1.",
        "dataset_path was 'scenes' and is 'pets';", "kinds was [] and is ['a'];",
    ):  # fmt: skip
        assert words in said
    (said,) = go_on(max_steps=12)  # the cosine ends later
    assert "max_steps was 10 and is 12." in said


def test_more_steps_at_a_constant_rate_are_no_other_settings(tmp_path, recwarn):
    config = line_config(tmp_path, max_steps=3, lr_scheduler="constant")
    for steps in (3, 5):
        config = replace(config, max_steps=steps)
        optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    assert not any("other settings" in str(one.message) for one in recwarn)
    assert checkpoint_of(tmp_path)["step"] == 5


def spoiled_loss(bad_steps):
    """A loss that is no number in some steps, counted from 0."""
    count = iter(range(1000))

    def loss_of(module, batch, generator, rows):
        loss, numbers = line_loss(module, batch, generator, rows)
        return loss * (float("nan") if next(count) in bad_steps else 1.0), numbers

    return loss_of


def test_a_step_without_a_number_is_left_out(tmp_path):
    line = optimise(
        line_config(tmp_path), nn.Linear(1, 1), Numbers(), spoiled_loss({3, 12, 13})
    )
    assert line.weight.item() == pytest.approx(3, abs=0.5)
    log = log_of(tmp_path)
    assert [entry.get("skipped") for entry in log[:4]] == [1, None, 2, None]
    assert all(math.isfinite(entry["loss"]) for entry in log)


def test_ten_such_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(ValueError, match="no number in ten .*step 24; try a lower"):
        optimise(
            line_config(tmp_path), nn.Linear(1, 1), Numbers(),
            spoiled_loss(range(15, 1000)),
        )  # fmt: skip
    assert checkpoint_of(tmp_path)["model"]["weight"].isfinite().all()


def parts_of(module):
    return {"model": module, "optimiser": torch.optim.AdamW(module.parameters())}


def test_a_foreign_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 7, parts_of(nn.Linear(1, 1)))
    assert load_checkpoint(path, parts_of(nn.Linear(1, 1))) == 7
    for other in (nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="07.pt is of another model.*output_dir"):
            load_checkpoint(path, parts_of(other))
        with pytest.raises(ValueError, match="another model .*weight is.*to none"):
            check_fits(path, other.to("meta"))
    check_fits(path, nn.Linear(1, 1).to("meta"))


def tear(whole, way):
    """The bytes of a file that something happened to."""
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle : middle + 200])
    return {
        "half": whole[:middle],
        "empty": b"",
        "other": b"no checkpoint",
        "spot": whole[:middle] + flipped + whole[middle + 200 :],
    }[way]


@pytest.mark.parametrize("way", ["half", "empty", "other", "spot"])
def test_a_torn_checkpoint_and_the_one_before(tmp_path, way):
    torch.manual_seed(0)
    config = line_config(tmp_path, max_steps=20, keep_checkpoints=2)
    optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    first, newest = sorted((tmp_path / "checkpoints").iterdir())
    expected = checkpoint_of(tmp_path)
    newest.write_bytes(tear(newest.read_bytes(), way))
    with pytest.raises(ValueError, match="00020.pt is no checkpoint.*set resume"):
        load_checkpoint(newest, parts_of(nn.Linear(1, 1)))
    with pytest.warns(UserWarning, match="00020.pt cannot be used.*the one before"):
        optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    assert same(checkpoint_of(tmp_path), expected)
    for path in (first, newest):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="be used.*none"):
        optimise(config, nn.Linear(1, 1), Numbers(), line_loss)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """No file may grow beyond a limit, which is what a full disk looks like."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    parts = parts_of(nn.Linear(100, 100))
    save_checkpoint(tmp_path, 7, parts, keep=2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(OSError, match="00008.pt could not.*make room.*00007.pt"):
            save_checkpoint(tmp_path, 8, parts, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000007.pt"]
    assert load_checkpoint(tmp_path / "step-00000007.pt", parts) == 7


def test_the_newest_checkpoints_are_kept(tmp_path):
    config = line_config(tmp_path, checkpoint_every=5, keep_checkpoints=3)
    optimise(config, nn.Linear(1, 1), Numbers(), line_loss)
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-000000{step}.pt" for step in (30, 35, 40)]


# Stopping and going on


def wide_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))


def noisy_loss(module, batch, generator, rows):
    """A loss with chance in it, drawn for all rows of a step."""
    x, y = batch
    noise = torch.randn(len(x) * rows.step, 1, generator=generator)[rows]
    return (module(x) - y - 0.1 * noise).square().mean(), {"first": x[0, 0]}


def stopping(config, stops, loss_of=noisy_loss):
    """Run, stopped by Ctrl-C in these steps (counted in calls of the loss)."""
    count = iter(range(10**6))

    def loss(*given):
        if next(count) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(*given)

    for _ in stops:
        with pytest.raises(KeyboardInterrupt, match="after step .* goes on from step"):
            optimise(config, wide_net(), Numbers(), loss)
    return optimise(config, wide_net(), Numbers(), loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "batch_size": 3},
        {"num_workers": 2, "batch_size": 5},
        {"num_train_epochs": 7, "batch_size": 6, "lr_scheduler": "linear"},
    ],
    ids=["plain", "parts", "workers", "epochs"],
)
def test_ctrl_c_saves_and_going_on_is_exact(tmp_path, options):
    """Inside an epoch, a line of the log, and between two checkpoints."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    settings = {"max_steps": 20, "log_every": 4, "ema_decay": 0.9, **options}
    whole = line_config(tmp_path / "whole", **settings)
    one = optimise(whole, wide_net(), Numbers(), noisy_loss)
    stopped = replace(whole, output_dir=f"{tmp_path}/stopped")
    two = stopping(stopped, stops={5, 11})
    assert same(dict(one.state_dict()), dict(two.state_dict()))
    states = [checkpoint_of(config.output_dir) for config in (whole, stopped)]
    assert same(*states) and states[0]["step"] == (19 if "num_train_epochs" in options
                                                   else 20)  # fmt: skip
    assert facts(whole.output_dir) == facts(stopped.output_dir)
    assert signal.getsignal(signal.SIGINT) == before


def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path):
    settings = {"max_steps": 10, "log_every": 5, "max_grad_norm": 0.1}
    runs = {}
    for parts in (1, 4):
        split = {"batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        config = line_config(tmp_path / str(parts), **settings, **split)
        runs[parts] = optimise(config, wide_net(), Numbers(), noisy_loss).state_dict()
    for name, weights in runs[1].items():
        torch.testing.assert_close(weights, runs[4][name], rtol=1e-4, atol=1e-5)
    one, four = (facts(tmp_path / name) for name in ("1", "4"))
    for ours, theirs in zip(one, four, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == theirs["lr"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_random_moments_and_inside_checkpoints(tmp_path):
    """See killed.py: a run is killed again and again; its results stay the same."""
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True,
        timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert kills == {"inside a checkpoint": 2, "anywhere": 4}
    states = [checkpoint_of(tmp_path / name) for name in ("whole", "killed")]
    assert same(*states)
    assert facts(tmp_path / "whole") == facts(tmp_path / "killed")
    left = [file.name for file in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert len(left) == 2 and all(name.endswith(".pt") for name in left)


# Settings


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0; give at least 1"),
        ({"unet_dim": 0}, "unet_dim is 0; give at least 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give a number"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give more than 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"mixed_precision": "half"}, "mixed_precision 'half' is none of"),
        ({"lr_scheduler": "wavy"}, "lr_scheduler 'wavy' is none of constant, linear"),
        ({"log_with": "paper"}, "log_with 'paper' is none of none, tensorboard"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0; give at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; give at least 1"),
        ({"unet_preset": "huge"}, "unet_preset 'huge' is none of tiny, scenes, small"),
        ({"unet_dim": 40, "unet_config": "a.json"}, "unet_config is a.json.* one of"),
        ({"unet_config": "there/is/none.json"}, "there is no file there/is"),
        ({"unet_dim": 40}, r"\(40, 80, 120\) do not split into norm_num"),
        ({"rescale_betas_zero_snr": True}, "prediction_type 'epsilon'.* v_prediction"),
        ({"beta_schedule": "quadratic"}, "'quadratic' is none of scaled_linear"),
        ({"prediction_type": "noise"}, "'noise' is none of epsilon, v_pred"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"snr_gamma": -1.0}, "snr_gamma is -1.0"),
        ({"snr_power": 1.5}, "snr_power is 1.5; give at least 0 and at most 1"),
        ({"noisy_share": 1.5}, "noisy_share is 1.5; give at least 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be_meant(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TrainingConfig(**options)


def test_every_setting_knows_its_limits_by_itself():
    """A field that is given another name takes its limits along."""

    @dataclass(frozen=True)
    class Mine(RunConfig):
        width: int = setting(8, at_least=2)
        widths: tuple[int, ...] = setting((8, 8), at_least=2)
        share: float = setting(0.5, more_than=0, below=1)

    assert Mine(share=0.9).width == 8
    for name, value in (("width", 1), ("widths", (4, 1)), ("share", 1), ("share", 0)):
        with pytest.raises(ValueError, match=f"{name} is .*; give "):
            Mine(**{name: value})
    with pytest.raises(TypeError, match="knows no at_last"):
        setting(8, at_last=2)


def test_a_blank_value_is_named():
    for kind in (TrainingConfig, VAETrainingConfig, CLIPTrainingConfig):
        for one in fields(kind):
            config = kind()
            object.__setattr__(config, one.name, None)  # as a YAML file can have it
            if one.default is not None:
                with pytest.raises(ValueError, match=f"{one.name} has no value; give"):
                    check_settings(config)


def test_fp16_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        RunConfig(mixed_precision="fp16")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"log_with {package} .*pip install {package}"):
        RunConfig(log_with=package)


def test_sides_that_cannot_be_halved(unet_config):
    with pytest.raises(ValueError, match="image_size is 50.*multiple of 4; give 48"):
        VAETrainingConfig(image_size=50)
    with pytest.raises(ValueError, match="image_size is 68.*multiple of 8; give 64"):
        train(replace(unet_config, image_size=68))


def test_missing_frozen_parts_say_what_to_run(tmp_path, frozen):
    gone, vae, clip = f"{tmp_path}/nothing", f"{frozen}/vae", f"{frozen}/clip"
    with pytest.raises(FileNotFoundError, match="vae_weights_path.*train-vae"):
        train(TrainingConfig(vae_weights_path=gone, text_encoder_path=clip))
    with pytest.raises(FileNotFoundError, match="text_encoder_path.*train-clip"):
        train(TrainingConfig(vae_weights_path=vae, text_encoder_path=gone))


def test_a_preset_and_its_width():
    assert preset_shape("sd15") == UNetConfig()
    half = preset_shape("sd15", 160)
    assert half.block_out_channels == (160, 320, 640, 640)
    assert asked_shape(TrainingConfig()) == preset_shape("small")
    shipped = UNet.find_config(find_model("scenes") / "unet")
    fitted = ("sample_size", "in_channels", "out_channels", "cross_attention_dim")
    fitted = {name: getattr(shipped, name) for name in fitted}
    assert replace(preset_shape("scenes"), **fitted) == shipped


def test_a_unet_of_any_shape(tmp_path):
    shape = replace(
        preset_shape("tiny"), block_out_channels=(24, 32), attention_head_dim=(2, 4)
    )
    file = tmp_path / "unet.json"
    write_json({"_class_name": "UNet2DConditionModel", **shape.to_dict()}, file)
    assert asked_shape(TrainingConfig(unet_config=str(file))) == shape
    write_json({**shape.to_dict(), "attention_head_dim": 5}, file)
    with pytest.raises(ValueError, match="do not split into attention_head_dim 5"):
        train(TrainingConfig(unet_config=str(file)))
    file.write_text("{")
    with pytest.raises(ValueError, match="unet.json is not valid JSON"):
        train(TrainingConfig(unet_config=str(file)))


def test_what_a_forward_pass_keeps():
    """On the meta device it is counted what is kept on a real one."""
    block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.empty(32, 8, device="meta")
    kept = kept_bytes(block.to("meta"), inputs)
    assert kept == 4 * 32 * (8 + 16)  # what goes into each layer, once


def test_frozen_weights_are_in_memory_once():
    """And need neither gradients nor means; a part beside the model counts, too."""
    model = nn.Linear(8, 4, bias=False).to("meta").requires_grad_(False)
    beside = nn.Linear(4, 2, bias=False).to("meta")
    inputs = torch.empty(32, 8, device="meta")
    for decay, copies in ((0.0, 4), (0.9, 5)):
        config = RunConfig(ema_decay=decay)
        memory = training.memory_needed(config, model, inputs, beside=(beside,))
        assert memory == {"weights": 4 * (8 * 4 + copies * 4 * 2), "batch": 0}


def test_attention_keeps_no_scores():
    """On a real device as on the meta one: input, q, k, v, answer, sums of softmax."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    attend, tokens = Attention(32, num_heads=4), torch.randn(2, 256, 32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(tokens).sum()
    for weight in attend.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    estimate = kept_bytes(attend.to("meta"), tokens.to("meta"))
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.01)
    assert estimate < 4 * 2 * 4 * 256 * 256 / 4  # a quarter of the scores alone


# The VAE and CLIP


def test_a_certain_start_and_the_total_spread():
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4))
    start_certain(vae)
    scenes = Scenes(64, length=4)
    with torch.no_grad():
        posterior = vae.encode(torch.stack([scenes[i][0] for i in range(4)]))
        draws = torch.cat([posterior.sample() for _ in range(30)])
    assert posterior.logvar.mean().item() == pytest.approx(-6, abs=1)
    assert latent_spread(vae, scenes) == pytest.approx(draws.std().item(), rel=0.01)


def test_checkpoints_of_an_older_version_s_vae_go_on(frozen, tmp_path):
    """Its loss counted batches, and could have a critic, which is no more."""
    state, path = checkpoint_of(frozen / "vae"), tmp_path / "old.pt"
    for name in ("model", "ema"):
        state[name]["batches"] = torch.tensor(4)
    torch.save(state, path)
    loss = training.VAELoss(training.new_vae(VAETrainingConfig(**TOY_VAE)))
    moving = {"optimiser": torch.optim.AdamW(loss.parameters()), "model": loss}
    assert load_checkpoint(path, moving) == 4
    assert same(dict(loss.state_dict()), dict(checkpoint_of(frozen / "vae")["model"]))
    state["model"]["critic.0.weight"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(ValueError, match="critic.*version of sdbook that wrote it"):
        load_checkpoint(path, moving)


@pytest.mark.slow
def test_twins_differ_in_one_point_that_both_captions_say():
    twins, judge = Twins(Scenes(64, length=120)), Judge()
    for i in range(0, 120, 2):
        pixels, captions = zip(*twins[i], strict=True)
        one, two = (read_caption(caption) for caption in captions)
        assert one.background == two.background
        points = {
            name
            for a, b in zip(one.groups, two.groups, strict=True)
            for name in ("count", "shape", "colour", "size")
            if getattr(a, name) != getattr(b, name)
        }
        if one.relation != two.relation:
            points.add("relation")
        assert len(points) == 1, captions
        seen = [
            judge.read(np.asarray(picture))
            for picture in to_pictures(torch.stack(pixels), "pil")
        ]
        fits = [[satisfies(verdict, said) for said in (one, two)] for verdict in seen]
        assert fits == [[True, False], [False, True]], captions
        assert not any(is_held_out(verdict.things) for verdict in seen)
    assert same(twins[5], twins[5])


def test_exchanged_shapes_alone_are_no_twins():
    scenes = Scenes(64, length=200, kinds=["two"])
    for i in range(200):
        _, one, two = training.invent_twin(scenes.scene(i), np.random.default_rng(i))
        assert set(one.groups) != set(two.groups)


def test_a_relation_s_twin_stands_otherwise():
    asked = [read_caption("a red star above a blue house")] * 200
    rng = np.random.default_rng(0)
    twins = [exchange(request, rng) for request in asked]
    moved = [request.relation for request, point in twins if point == "relation"]
    assert set(moved) == {"below", "left", "right"} and 120 < len(moved) < 180


def test_both_are_saved_and_improve(frozen):
    vae = AutoencoderKL.from_pretrained(frozen / "vae" / "vae")
    spread = latent_spread(vae, Scenes(64, length=10))
    assert vae.config.scaling_factor == pytest.approx(1 / spread, rel=1e-4)
    log = log_of(frozen / "vae")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["psnr"] > 3
    assert (frozen / "clip" / "text_encoder" / "model.safetensors").exists()


def test_long_captions_are_one_warning(tmp_path, recwarn):
    """Not one for each caption, and none for each batch."""
    toy = {**TOY_CLIP, "max_length": 8, "max_steps": 2}
    train_clip(CLIPTrainingConfig(**toy, output_dir=f"{tmp_path}/clip"))
    said = [str(w.message) for w in recwarn if "tokens" in str(w.message)]
    assert len(said) == 1 and re.search(r"\d+ captions longer than 6 .*'a", said[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "l1_weight and l2_weight are both 0"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1; give at least 0"),
        ({"block_out_channels": (12, 16)}, "block_out_channels .* norm_num_groups 8"),
    ],
)
def test_vae_settings_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        VAETrainingConfig(**options)


# The UNet


def test_white_states_are_equally_strong_everywhere():
    states = torch.randn(300, 24, 32) * torch.logspace(0, -1, 32) + torch.randn(32)
    x = states.flatten(0, 1) @ whitening(states, floor=0.0)
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(32), atol=1e-3, rtol=0)
    gentle = states.flatten(0, 1) @ whitening(states)
    assert 0.05 < gentle.square().mean(0).min() < gentle.square().mean(0).max() <= 1


def test_a_new_unet_starts_as_the_identity_and_white(unet_config):
    sizes = find_sizes(unet_config)
    states = torch.randn(50, 16, sizes.cross_attention_dim)
    torch.manual_seed(0)
    ours = training.new_unet(unet_config, sizes, states)
    torch.manual_seed(0)
    plain = start_as_identity(UNet(sizes)).state_dict()
    read = [name for name in plain if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(read) > 3
    for name, weight in ours.state_dict().items():
        expected = plain[name] @ whitening(states) if name in read else plain[name]
        torch.testing.assert_close(weight, expected)


@pytest.mark.slow
def test_the_start_does_not_depend_on_the_cache(unet_config):
    start = replace(unet_config, max_steps=1, learning_rate=1e-20, weight_decay=0.0)
    first, second = train(start), train(replace(start, resume="none"))
    assert same(dict(first.unet.state_dict()), dict(second.unet.state_dict()))


@pytest.mark.slow
def test_refitting_a_text_model_to_itself_changes_little(unet_config):
    tool = load_tool("refit_text")
    tool.COUNT, tool.WHITE = 200, 0.0
    pipe = train(replace(unet_config, max_steps=1))
    before = [read.weight.clone() for read in tool.text_maps(pipe.unet)]
    states = pipe.encode_prompt([Scenes().scene(i).caption for i in range(30)])
    after = tool.refit(pipe, pipe.text_encoder, pipe.tokenizer)
    for old, new in zip(before, tool.text_maps(after.unet), strict=True):
        told, tells = states @ old.T, new(states)
        assert (told - tells).norm() < 0.2 * told.norm()


@pytest.mark.slow
def test_the_pipeline_opens_and_draws(unet_config):
    train(unet_config)
    pipe = StableDiffusion.from_pretrained(unet_config.output_dir)
    assert pipe("a red star", num_inference_steps=2).images[0].size == (64, 64)
    average = checkpoint_of(unet_config.output_dir)["ema"]
    assert same(dict(pipe.unet.state_dict()), dict(average))
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(unet_config.output_dir)
    assert type(theirs.unet).__name__ == "UNet2DConditionModel"


@pytest.mark.slow
def test_going_on_from_another_pipeline(unet_config, frozen):
    first = train(unet_config)
    second = TrainingConfig(
        output_dir=f"{unet_config.output_dir}-2", pretrained=unet_config.output_dir,
        image_size=128, **TOY | {"max_steps": 1}, learning_rate=1e-20, weight_decay=0.0,
    )  # fmt: skip
    again = train(second)  # with its own VAE and text model, and of its sizes
    assert same(dict(first.unet.state_dict()), dict(again.unet.state_dict()))
    assert same(dict(first.vae.state_dict()), dict(again.vae.state_dict()))
    assert again.unet.config.sample_size == 2 * first.unet.config.sample_size
    with pytest.raises(ValueError, match=r"channels would be \(24, 48\).*has \(16, 32"):
        train(replace(second, unet_preset="tiny", unet_dim=24))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(second, pretrained="nowhere"))
    with pytest.warns(UserWarning, match="prediction_type is sample.*with epsilon"):
        train(replace(second, prediction_type="sample", dry_run=True))
    other = CLIPTextModel(CLIPTextConfig(
        vocab_size=540, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    ))  # fmt: skip
    other.save_pretrained(f"{second.output_dir}/other")
    with pytest.raises(ValueError, match="text_encoder_path: .*be 16, .*has 32"):
        train(replace(second, text_encoder_path=f"{second.output_dir}/other"))


def test_one_original_file_to_go_on_from(tmp_path, capsys):
    """Its sizes are SD 1.5's, far too large for a test: only the plan is made."""
    key = "model.diffusion_model.middle_block.1.attn2.to_k.weight"  # 768 is SD 1's
    save_weights({key: torch.zeros(1, 768)}, tmp_path / "sd.safetensors")
    config = TrainingConfig(pretrained=f"{tmp_path}/sd.safetensors", dry_run=True,
                            image_size=512, batch_size=1)  # fmt: skip
    assert train(config) is None
    assert "859,520,964 parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_resuming_with_other_sizes_is_refused_first(unet_config, monkeypatch):
    train(replace(unet_config, max_steps=1))
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", refuse)
    monkeypatch.setattr(Scenes, "__init__", refuse)
    with pytest.raises(ValueError, match="another model.*unet_preset.*resume"):
        train(replace(unet_config, unet_dim=32))


def test_the_plan_and_nothing_else(unet_config, capsys):
    config = replace(unet_config, dry_run=True, gradient_accumulation_steps=3)
    config = replace(config, num_train_epochs=12)
    assert train(config) is None
    said = capsys.readouterr().out
    for words in (
        "scenes: 10 pictures to train on, 10 held out, 0 rejected", "parameters",
        "10 of 12 pictures (every picture is seen 12.0 times)",
        "4 at once × 3 added up × 1 process = 12",
        "memory  about", config.output_dir, "start   from step 0",
    ):  # fmt: skip
        assert words in said, said
    assert not Path(config.output_dir).exists()


def test_a_folder_keeps_some_pictures_back(tmp_path):
    write_folder(Scenes(64), tmp_path, 30)
    config = TrainingConfig(dataset_path=str(tmp_path))
    dataset = open_dataset(config)
    shown, held = dataset.held_out(config.num_validation)
    assert len(shown) == 27 and len(held) == 3
    assert sorted([*shown, *held.indices]) == list(range(30))
    assert dataset.held_out(config.num_validation)[0] == shown


@pytest.mark.slow
def test_validation_and_samples(unet_config):
    config = replace(
        unet_config, validate_every=2, sample_every=4, sample_prompts=("a star",),
        gradient_checkpointing=True,
    )  # fmt: skip
    pipe = train(config)
    lines = {x["step"]: x for x in log_of(config.output_dir)}
    assert "val_error" not in lines[1] and lines[2]["val_error"] > 0
    bands = [lines[4][f"val_error_{a}_{a + 249}"] for a in (0, 250, 500, 750)]
    assert lines[4]["val_error"] == pytest.approx(sum(bands) / 4)
    sheets = sorted((Path(config.output_dir) / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000004.png"]
    assert not any("forward" in vars(block) for block in pipe.unet.modules())


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_else(unet_config):
    plain, saving = (
        replace(unet_config, output_dir=f"{unet_config.output_dir}-{on}", max_steps=2,
                gradient_checkpointing=on)
        for on in (False, True)
    )  # fmt: skip
    one, two = (dict(train(config).unet.state_dict()) for config in (plain, saving))
    assert same(one, two)


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def sample(module):
        return Image.new("RGB", (8, 4), "red")

    config = line_config(
        tmp_path, log_with="tensorboard", max_steps=20, sample_every=20
    )
    optimise(config, nn.Linear(1, 1), Numbers(), line_loss, sample=sample)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = {e.step: e.value for e in events.Scalars("loss")}
    assert seen == pytest.approx({x["step"]: x["loss"] for x in log_of(tmp_path)})
    (sheet,) = (
        events.Images("samples/0")
        if "samples/0" in events.Tags()["images"]
        else events.Images("samples")
    )  # noqa: E501
    assert (sheet.step, sheet.width, sheet.height) == (20, 8, 4)


def test_the_kinds_of_scene_that_are_shown(unet_config):
    shown = open_dataset(replace(unet_config, kinds=("single", "colours")))
    assert all(len(shown.scene(index).things) == 1 for index in range(50))
    assert {len(open_dataset(unet_config).scene(i).things) for i in range(50)} > {1}


@pytest.mark.slow
def test_the_loss_falls(unet_config):
    train(replace(unet_config, max_steps=25, learning_rate=5e-3, snr_gamma=0.0))
    losses = [line["loss"] for line in log_of(unet_config.output_dir)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions(unet_config, kind):
    train(replace(unet_config, prediction_type=kind, max_steps=1))
    pipe = StableDiffusion.from_pretrained(unet_config.output_dir)
    assert pipe.scheduler.config.prediction_type == kind


@pytest.mark.slow
def test_bfloat16_on_a_cpu(unet_config):
    pipe = train(replace(unet_config, mixed_precision="bf16", max_steps=2))
    assert all(weight.dtype == torch.float32 for weight in pipe.unet.parameters())
    assert all(math.isfinite(x["loss"]) for x in log_of(unet_config.output_dir))
    train(replace(unet_config, max_steps=3))  # and back, in the same process


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "clip", "unet"])
def test_resuming_is_exact_to_the_bit(part, tmp_path, unet_config):
    function, config = {
        "vae": (train_vae, VAETrainingConfig(**TOY_VAE)),
        "clip": (train_clip, CLIPTrainingConfig(**TOY_CLIP)),
        "unet": (train, unet_config),
    }[part]
    config = replace(config, output_dir=f"{tmp_path}/whole", log_every=2)
    function(config)
    stopped = replace(config, output_dir=f"{tmp_path}/stopped")
    with power_cut(3):
        function(stopped)
    assert checkpoint_of(stopped.output_dir)["step"] == 2
    function(stopped)
    assert same(*(checkpoint_of(c.output_dir) for c in (config, stopped)))
    assert facts(config.output_dir) == facts(stopped.output_dir)
    assert [x["step"] for x in log_of(stopped.output_dir)] == [2, 4]


def refuse(*args, **kwargs):
    raise AssertionError("a frozen part ran")


@pytest.mark.slow
def test_frozen_parts_run_once(unet_config, monkeypatch):
    config = replace(unet_config, num_validation=0)
    train(replace(config, max_steps=1))
    monkeypatch.setattr(AutoencoderKL, "encode", refuse)
    monkeypatch.setattr(CLIPTextModel, "forward", refuse)
    train(replace(config, max_steps=4, resume="none"))


def test_a_folder_of_pictures_from_end_to_end(tmp_path):
    pictures = ROOT / "data" / "scenes"
    if not pictures.is_dir():
        pictures = tmp_path / "pictures"
        write_folder(Scenes(64), pictures, 8)
    data = {"dataset_path": str(pictures), "max_steps": 2, "checkpoint_every": 2}
    vae, clip, unet = (f"{tmp_path}/{name}" for name in ("vae", "clip", "unet"))
    train_vae(VAETrainingConfig(**{**TOY_VAE, **data}, output_dir=vae))
    train_clip(CLIPTrainingConfig(**{**TOY_CLIP, **data}, output_dir=clip))
    config = TrainingConfig(
        **{**TOY_UNET, **data},
        output_dir=unet,
        vae_weights_path=vae,
        text_encoder_path=clip,
    )
    pipe = train(config)
    assert pipe("a boat", num_inference_steps=1).images[0].size == (64, 64)


@pytest.fixture
def shards(tmp_path):
    """Ten scenes in two shards, as a key `dataset_path`."""
    webdataset = pytest.importorskip("webdataset")
    write_folder(Scenes(64), tmp_path / "pictures", 10)
    pattern = str(tmp_path / "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for file, text in CaptionedImages(tmp_path / "pictures").pairs:
            writer.write({"__key__": file.stem, "png": file.read_bytes(), "txt": text})
    return f"{tmp_path}/{{0000..0001}}.tar"


@pytest.mark.parametrize("part, num_workers", [("vae", 2), ("clip", 0)])
def test_the_frozen_parts_learn_from_shards(
    part, num_workers, shards, tmp_path, capsys
):
    function, config = {
        "vae": (train_vae, VAETrainingConfig(**TOY_VAE)),
        "clip": (train_clip, CLIPTrainingConfig(**TOY_CLIP)),
    }[part]
    whole, stopped = (
        replace(
            config, dataset_path=shards, output_dir=f"{tmp_path}/{name}", max_steps=3,
            num_workers=num_workers, gradient_accumulation_steps=2, batch_size=2,
        )
        for name in ("whole", "stopped")
    )  # fmt: skip
    assert function(whole) is not None
    assert "10 pictures to train on" in capsys.readouterr().out
    with power_cut(3):
        function(stopped)
    function(stopped)
    assert same(*(checkpoint_of(c.output_dir) for c in (whole, stopped)))
    if part == "vae":
        vae = AutoencoderKL.from_pretrained(f"{tmp_path}/whole/vae")
        assert vae.config.scaling_factor != VAEConfig().scaling_factor
        assert all("psnr" in line for line in log_of(whole.output_dir)[-1:])


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    write_folder(Scenes(64), tmp_path, 2)
    (tmp_path / "captions" / "00001.txt").unlink()
    with pytest.warns(UserWarning, match="(?s)1 left out in.*00001.png: no caption"):
        training.open_dataset(RunConfig(dataset_path=str(tmp_path)))


@pytest.mark.slow
def test_two_processes_get_the_weights_of_one(unet_config, frozen):
    """A real launch: two processes, each with half of the pictures, over gloo.

    By torchrun, with accelerate's flag for CPUs: `accelerate launch --cpu
    --num_processes 2` starts a single process (accelerate 1.15).
    """
    options = {**TOY_UNET, "max_steps": 3, "caption_dropout": 0.5, "batch_size": 2}
    single = replace(unet_config, output_dir=unet_config.output_dir + "-single")
    train(replace(single, max_steps=3, caption_dropout=0.5, batch_size=4))
    flags = {
        "output_dir": unet_config.output_dir,
        "vae_weights_path": f"{frozen}/vae",
        "text_encoder_path": f"{frozen}/clip",
        **lists(options),
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", "2", "-m", "sdbook", "train",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 at once × 1 added up × 2 processes = 4" in done.stdout
    one, two = (checkpoint_of(c.output_dir) for c in (single, unet_config))
    assert one["step"] == two["step"] == 3
    for kind in ("model", "ema"):
        a, b = (torch.cat([w.flatten() for w in c[kind].values()]) for c in (one, two))
        off = (a - b).abs()
        assert off.mean() < 1e-6
        # AdamW turns a gradient near zero into a whole step, whichever sign it has.
        assert (off < 1e-5).float().mean() > 0.999
    pipe = StableDiffusion.from_pretrained(unet_config.output_dir)
    assert same(dict(pipe.unet.state_dict()), dict(two["ema"]))
    logs = [log_of(config.output_dir) for config in (single, unet_config)]
    for one, two in zip(*logs, strict=True):
        assert one["lr"] == two["lr"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


# The script that trains what ships


def lists(options):
    """Tuples as lists, which YAML and flags know."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def write_toy_configs(folder):
    import yaml

    folder.mkdir()
    files = {"vae": TOY_VAE, "clip": TOY_CLIP, "unet-cpu": TOY_UNET}
    files["unet-gpu"] = {**TOY_UNET, "mixed_precision": "bf16"}
    for kind in ("cpu", "gpu"):
        files[f"singles-{kind}"] = {**files[f"unet-{kind}"], "kinds": ["single"]}
        files[f"overfit-{kind}"] = {**files[f"unet-{kind}"], "num_pictures": 5}
    for name, options in files.items():
        (folder / f"scenes-{name}.yaml").write_text(yaml.safe_dump(lists(options)))


@pytest.mark.slow
def test_the_script_trains_ships_and_scores(tmp_path, capsys):
    write_toy_configs(tmp_path / "configs")
    places = [f"--{k}={tmp_path / k}" for k in ("runs", "data", "configs")]
    arguments = [*places, "--num_prompts=1", "--overfit=4"]
    arguments += ["--", "--max_steps=2"]
    tool = load_tool("train_scenes")
    tool.main(arguments)
    runs = tmp_path / "data" / "runs"
    for name in ("vae", "clip", "singles", "unet"):
        assert log_of(runs / name)[-1]["step"] == 2
    scores = json.loads((runs / "evaluation" / "scores.json").read_text())
    assert "held_out" in scores["scores"]
    pipe = StableDiffusion.from_pretrained(tmp_path / "data" / "models" / "scenes")
    before = pipe.unet.state_dict()
    assert "train-vae --config" in capsys.readouterr().out
    tool.main(arguments)  # started again, it finds everything done
    again = StableDiffusion.from_pretrained(tmp_path / "data" / "models" / "scenes")
    assert same(dict(before), dict(again.unet.state_dict()))


def test_timesteps_lean_to_the_noisy_end():
    place = (torch.arange(1000) + 0.5) / 1000
    same = training.lean_to_noise(place, 0.0)
    torch.testing.assert_close(same, place)
    for share, expected in ((0.2, 0.4), (0.5, 0.625), (1.0, 1.0)):
        moved = training.lean_to_noise(place, share)
        assert (moved.diff() >= 0).all() and 0 <= moved[0] and moved[-1] < 1
        late = (moved >= 0.75).float().mean().item()
        assert late == pytest.approx(expected, abs=2e-3)
    moments = torch.zeros(8, 8, 2, 2)
    t = make_loss(noisy_share=1.0).draw(moments, step_generator(0, 0))[2]
    assert t.min() >= 750 and len(t.unique()) == 8
