"""The schedulers against diffusers', and what they promise on their own."""

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbook.schedulers import (
    BETA_SCHEDULES,
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    Scheduler,
    change_scheduler,
    make_betas,
    make_scheduler,
    noise_like,
)

SD = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
)
NAMES = ("ddpm", "ddim")  # the others have tests/package/test_samplers.py
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def upstream(name, **config):
    return getattr(diffusers, SCHEDULERS[name].__name__)(**config)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def toy_denoiser(x, t):
    """Something nonlinear of x and t, of size about 1, that is not a denoiser."""
    return torch.tanh(x * (0.3 + int(t) / 1000)) + 0.1 * torch.sin(3 * x)


def trajectories(name, n, seed=0, step=None, **config):
    """All the samples that ours and diffusers' scheduler visit from the same start."""
    ours, theirs = make_scheduler(name, **config), upstream(name, **config)
    ours.set_timesteps(n)
    theirs.set_timesteps(n)
    results = []
    for scheduler in (ours, theirs):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 2, 5, 4, generator=generator) * scheduler.init_noise_sigma
        path = []
        for t in scheduler.timesteps[:n]:
            output = toy_denoiser(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, generator=generator, **(step or {}))
            x = x if isinstance(x, torch.Tensor) else x.prev_sample
            path.append(x)
        results.append(torch.stack(path))
    return results


# ---- the schedule ----


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_noise_schedule_equals_diffusers(schedule, total):
    config = dict(beta_schedule=schedule, num_train_timesteps=total)
    ours, theirs = make_scheduler("ddim", **config), upstream("ddim", **config)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-6, atol=0)
    assert relative(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-6


def test_stable_diffusion_schedule_is_the_one_of_the_paper():
    scheduler = make_scheduler("ddim", **SD)
    sigmas = (1 / scheduler.alphas_cumprod - 1).sqrt()
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(0.9991, abs=1e-4)


def test_cosine_is_a_friendly_name_and_diffusers_name_is_saved(tmp_path):
    scheduler = make_scheduler("ddpm", beta_schedule="cosine")
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["beta_schedule"] == "squaredcos_cap_v2"
    theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.betas, scheduler.betas)


def test_zero_terminal_snr_equals_diffusers():
    config = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours, theirs = make_scheduler("ddim", **config), upstream("ddim", **config)
    assert relative(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-6
    assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity_equal_diffusers(name):
    ours, theirs = make_scheduler(name, **SD), upstream(name, **SD)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 1, 500, 998, 999])
    for a, b in (
        (ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t)),
        (ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t)),
    ):
        assert relative(a, b) < 1e-6
    one = ours.add_noise(x0, noise, 500)
    torch.testing.assert_close(one[2], ours.add_noise(x0, noise, t)[2])


# ---- timesteps ----


PARITY_TABLE = {
    "leading": [801, 601, 401, 201, 1],
    "linspace": [999, 749, 500, 250, 0],
    "trailing": [999, 799, 599, 399, 199],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_five_steps_are_those_of_the_table(name, spacing):
    scheduler = make_scheduler(name, **SD, timestep_spacing=spacing)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == PARITY_TABLE[spacing]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_number_of_steps(name, spacing):
    config = dict(timestep_spacing=spacing, steps_offset=1)
    ours, theirs = make_scheduler(name, **config), upstream(name, **config)
    for n in range(1, 1001):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        timesteps = ours.timesteps.tolist()
        assert len(timesteps) == n
        if spacing == "leading" and n == 1000:
            # diffusers starts at 1000, past the table, and fails
            assert timesteps == list(range(999, -1, -1))
        else:
            # 'trailing' of diffusers sometimes has one entry too many, -1
            assert timesteps == theirs.timesteps.tolist()[:n]


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    spacing=st.sampled_from(SPACINGS),
    total=st.integers(1, 1000),
    offset=st.integers(0, 3),
    data=st.data(),
)
def test_timesteps_fall_and_stay_inside_the_schedule(
    name, spacing, total, offset, data
):
    n = data.draw(st.integers(1, total))
    scheduler = make_scheduler(
        name, num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset
    )
    scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps
    assert len(timesteps) == n
    assert 0 <= timesteps.min() and timesteps.max() < total
    assert (timesteps.diff() < 0).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    spacing=st.sampled_from(SPACINGS),
    schedule=st.sampled_from(BETA_SCHEDULES),
    prediction=st.sampled_from(PREDICTIONS),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    n=st.sampled_from([1, 2, 7, 61, 999, 1000]),
    data=st.data(),
)
def test_no_step_anywhere_crashes_or_leaves_the_numbers(
    name, spacing, schedule, prediction, eta, n, data
):
    scheduler = make_scheduler(
        name,
        beta_schedule=schedule,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
        rescale_betas_zero_snr=prediction != "epsilon" and data.draw(st.booleans()),
    )
    scheduler.set_timesteps(n)
    k = data.draw(st.integers(0, n - 1))
    options = {"eta": eta} if name == "ddim" else {}
    x = torch.linspace(-2, 2, 8).reshape(2, 4)
    out = scheduler.step(torch.ones(2, 4), scheduler.timesteps[k], x, **options)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.isfinite().all()


# ---- steps ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_whole_trajectories_equal_diffusers(name, prediction, spacing, schedule):
    config = dict(
        SD,
        prediction_type=prediction,
        timestep_spacing=spacing,
        beta_schedule=schedule,
        # An arbitrary network's x0 would grow without bound: √ᾱ is tiny at the
        # noisy end of the cosine schedule.
        clip_sample=schedule == "squaredcos_cap_v2" or prediction == "epsilon",
    )
    for n in (1, 2, 11):
        ours, theirs = trajectories(name, n, **config)
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "spacing, n",
    [(spacing, n) for spacing in SPACINGS for n in (1, 2, 7, 48, 112)]
    + [("leading", 1000), ("linspace", 333)],
)
def test_many_numbers_of_steps_equal_diffusers(name, spacing, n):
    config = dict(SD, timestep_spacing=spacing, prediction_type="v_prediction")
    if n == 1000:
        config["steps_offset"] = 0  # diffusers fails with 1
    ours, theirs = trajectories(name, n, **config)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("clip_range", [1.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_equals_diffusers(name, clip, clip_range):
    config = dict(SD, clip_sample=clip, clip_sample_range=clip_range)
    ours, theirs = trajectories(name, 10, **config)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_eta_equals_diffusers(eta, to_one, prediction):
    config = dict(SD, set_alpha_to_one=to_one, prediction_type=prediction)
    ours, theirs = trajectories("ddim", 15, step={"eta": eta}, **config)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "variance", ["fixed_small", "fixed_large", "fixed_small_log", None]
)
def test_ddpm_variances_equal_diffusers(variance):
    ours, theirs = trajectories("ddpm", 12, **SD, variance_type=variance)
    assert relative(ours, theirs) < 1e-5


def test_ddpm_without_set_timesteps_takes_every_timestep():
    ours, theirs = DDPMScheduler(**SD), diffusers.DDPMScheduler(**SD)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    for t in (999, 500, 1, 0):
        a, b = (torch.Generator().manual_seed(2) for _ in range(2))
        mine = ours.step(x.sin(), t, x, generator=a)
        torch.testing.assert_close(
            mine, theirs.step(x.sin(), t, x, generator=b).prev_sample
        )


def test_zero_terminal_snr_trajectory_equals_diffusers():
    config = dict(
        SD,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    for name in NAMES:
        ours, theirs = trajectories(name, 10, **config)
        assert relative(ours, theirs) < 1e-5


@settings(max_examples=50, deadline=None)
@given(
    t=st.integers(0, 999),
    schedule=st.sampled_from(BETA_SCHEDULES),
    prediction=st.sampled_from(PREDICTIONS),
)
def test_a_perfect_answer_gives_x0_and_noise_back(t, schedule, prediction):
    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction, num_train_timesteps=1000
    )
    generator = torch.Generator().manual_seed(t)
    x0, noise = torch.randn(2, 4, 3, generator=generator)
    x = scheduler.add_noise(x0, noise, t)
    answer = scheduler.target(x0, noise, t)
    x0_again, noise_again = scheduler.split(answer, t, x)
    # Near pure noise (or pure signal) the other part is multiplied by almost zero.
    signal, spread = (float(v) for v in scheduler.levels(t, x0[0, 0]))
    assert (x0_again - x0).abs().max() < 1e-5 / signal
    assert (noise_again - noise).abs().max() < 1e-5 / spread


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 60), schedule=st.sampled_from(BETA_SCHEDULES))
def test_ddim_with_a_perfect_denoiser_lands_on_the_only_picture(n, schedule):
    """If there is one picture in the world, every path leads to it."""
    scheduler = DDIMScheduler(beta_schedule=schedule, clip_sample=False)
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(n)
    x0, x = torch.randn(2, 1, 6, generator=generator)
    for t in scheduler.timesteps:
        signal, spread = scheduler.levels(t, x)
        x = scheduler.step((x - signal * x0) / spread, t, x)
    assert relative(x, x0) < 1e-3


def test_noise_of_each_picture_depends_on_its_own_generator():
    def generators(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    x = torch.zeros(3, 2, 4)
    noise = noise_like(x, generators([5, 6, 7]))
    for k, seed in enumerate([5, 6, 7]):
        alone = noise_like(x[:1], generators([seed]))
        assert torch.equal(noise[k : k + 1], alone)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        noise_like(x, generators([1, 2]))


def test_half_precision_stays_half_precision():
    scheduler = make_scheduler("ddim", **SD)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3).half()
    assert scheduler.step(x, 751, x).dtype == torch.float16
    assert scheduler.add_noise(x, x, torch.tensor([1, 2])).dtype == torch.float16


# ---- files ----


@pytest.mark.parametrize("name", NAMES)
def test_files_go_both_ways(name, tmp_path):
    config = dict(SD, prediction_type="v_prediction", timestep_spacing="trailing")
    upstream(name, **config).save_pretrained(tmp_path / "theirs")
    ours = Scheduler.from_pretrained(tmp_path / "theirs")
    assert ours.config == make_scheduler(name, **config).config
    assert type(ours) is SCHEDULERS[name]

    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = type(upstream(name)).from_pretrained(tmp_path / "ours")
    for key, value in config.items():
        assert theirs.config[key] == value


def test_another_schedulers_file_gives_what_is_shared(tmp_path):
    diffusers.PNDMScheduler(
        **{k: v for k, v in SD.items() if k != "clip_sample"},
        skip_prk_steps=True,
        set_alpha_to_one=False,
    ).save_pretrained(tmp_path)
    ours = DDIMScheduler.from_pretrained(tmp_path)
    assert ours.config.set_alpha_to_one is False
    assert ours.config.beta_end == 0.012
    values = {"_class_name": "DPMSolverSDEScheduler"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="DPMSolverSDEScheduler.*there are ddpm, ddim"):
        Scheduler.from_pretrained(tmp_path)


def test_changing_the_scheduler_keeps_the_model_s_options():
    ddim = make_scheduler("ddim", **SD, set_alpha_to_one=False)
    ddpm = change_scheduler(ddim, "ddpm")
    assert isinstance(ddpm, DDPMScheduler)
    torch.testing.assert_close(ddpm.alphas_cumprod, ddim.alphas_cumprod)
    assert ddpm.config.steps_offset == 1 and not ddpm.config.clip_sample
    # what DDPM has no use for is there again on the way back
    assert change_scheduler(ddpm, "ddim").config == ddim.config


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"_class_name": "DDIMScheduler", ', "null"]
)
def test_broken_file_is_named(tmp_path, content):
    (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(ValueError, match="scheduler_config.json .*JSON"):
        Scheduler.from_pretrained(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        Scheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"thresholding": True}, "thresholding=True is not implemented"),
        ({"trained_betas": [0.1]}, "trained_betas=.* is not implemented"),
        ({"variance_type": "learned"}, "variance_type='learned'.*fixed_small"),
        ({"betas_start": 0.1}, "no option 'betas_start'; its options are num_train"),
    ],
)
def test_a_file_that_asks_for_more_is_refused_by_name(tmp_path, option, message):
    values = {"_class_name": "DDPMScheduler", **option}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        Scheduler.from_pretrained(tmp_path)
    assert "scheduler_config.json" in str(error.value)


# ---- bad input ----


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta_schedule": "exp"}, "beta_schedule='exp'.*linear, scaled_linear"),
        ({"prediction_type": "eps"}, "prediction_type='eps'.*epsilon, sample, v_pred"),
        ({"timestep_spacing": "log"}, "timestep_spacing='log'.*leading, linspace"),
        ({"eta": 0.1}, "no option 'eta'; its options are num_train_timesteps"),
        ({"thresholding": True}, "thresholding=True is not implemented"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: expected"),
        ({"num_train_timesteps": 10**12}, "from 1 to 1048576"),
        ({"steps_offset": -1}, "steps_offset=-1: expected"),
        ({"steps_offset": 10**9}, "from 0 to"),
        ({"beta_start": 0.0}, "expected 0 < beta_start"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_start": "0.1"}, "expected 0 < beta_start"),
    ],
)
def test_unknown_options_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler("ddim", **config)


def test_unknown_scheduler_lists_what_exists():
    with pytest.raises(ValueError, match="'eulr'; there are ddpm, ddim"):
        make_scheduler("eulr")


def test_unknown_beta_schedule_in_make_betas():
    with pytest.raises(ValueError, match="unknown beta_schedule 'x'; choose one of"):
        make_betas("x", 10, 0.1, 0.2)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_number_of_steps_outside_the_schedule(n):
    with pytest.raises(
        ValueError, match=f"num_inference_steps={n}: expected 1 to 1000"
    ):
        make_scheduler("ddim").set_timesteps(n)


@pytest.mark.parametrize("t", [1000, -1, torch.tensor([3, 1000])])
def test_timestep_outside_the_schedule(t):
    scheduler, x = make_scheduler("ddpm"), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="outside the schedule, 0 to 999"
    ):
        scheduler.add_noise(x, x, t)
    if isinstance(t, int):
        with pytest.raises(ValueError, match="outside the schedule"):
            scheduler.step(x, t, x)


def test_timesteps_for_another_batch():
    scheduler, x = make_scheduler("ddpm"), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shape \(3,\) for a batch of 2"):
        scheduler.add_noise(x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="noise of its own"):
        scheduler.add_noise(x, x[:1], 3)


def test_steps_before_set_timesteps_or_beside_them():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="call set_timesteps"):
        make_scheduler("ddim").step(x, 3, x)
    scheduler = make_scheduler("ddpm")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3 is not one of the 4"):
        scheduler.step(x, 3, x)


def test_epsilon_at_pure_noise_is_an_error_and_not_infinity():
    scheduler = make_scheduler(
        "ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="use prediction_type='v_prediction'"):
        scheduler.step(torch.zeros(2, 3), 999, torch.zeros(2, 3))


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_its_range(eta):
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="expected 0 .deterministic. to 1"):
        scheduler.step(torch.zeros(2, 3), 750, torch.zeros(2, 3), eta=eta)


def test_numpy_integers_are_welcome():
    scheduler, x = make_scheduler("ddim"), torch.zeros(2, 3)
    scheduler.set_timesteps(4)
    assert scheduler.step(x, np.int64(750), x).shape == x.shape


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_a_file_without_a_spacing_gets_the_class_s_own(kind, tmp_path):
    values = {"_class_name": kind, **SD, "steps_offset": 1}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    ours = Scheduler.from_pretrained(tmp_path)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path)
    assert ours.config.timestep_spacing == theirs.config.timestep_spacing == "leading"
