"""The faster samplers against diffusers', alone and in the pipeline."""

import json
import logging
import math
import shutil
import warnings

import diffusers
import pytest
import torch
from helpers import load_tool, relative_error, small_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbook.pipeline import StableDiffusion
from sdbook.scheduler_files import REPLACED, load_scheduler
from sdbook.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    Scheduler,
    change_scheduler,
    dpmpp_2m_step,
    euler_step,
    lagrange_weights,
    make_scheduler,
    noise_like,
    unit_shares,
)
from sdbook.training import DiffusionLoss

SD = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)
NAMES = ("pndm", "lms", "euler", "euler_a", "heun", "dpmpp_2m", "unipc")
KARRAS = ("lms", "euler", "heun", "dpmpp_2m", "unipc")
MULTISTEP = ("dpmpp_2m", "unipc")
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ONLY_OURS = {("pndm", "sample"), ("euler_a", "sample")}  # diffusers refuses these
VARIANTS = [(name, False) for name in NAMES] + [(name, True) for name in KARRAS]


@pytest.fixture(autouse=True)
def quiet():
    """diffusers reminds us to scale inputs, which we do."""
    diffusers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def upstream(name, **config):
    return getattr(diffusers, SCHEDULERS[name].__name__)(**config)


def options_of(name, karras=False, **config):
    config = {**SD, **config}
    return config | ({"use_karras_sigmas": True} if karras else {})


def toy_denoiser(x, t):
    """Something nonlinear of x and t, of size about 1, that is not a denoiser."""
    return torch.tanh(x * (0.3 + float(t) / 1000)) + 0.1 * torch.sin(3 * x)


def run(scheduler, n, shape=(3, 2, 4), seed=0):
    """All the samples that a scheduler visits from noise of this seed."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        # Or diffusers skips a step where rounding makes the first two timesteps equal.
        scheduler.set_begin_index(0)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    noisy = "Ancestral" in type(scheduler).__name__
    options = {"generator": generator} if noisy else {}
    path = [x]
    for t in scheduler.timesteps:
        output = toy_denoiser(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **options)
        x = x if isinstance(x, torch.Tensor) else x.prev_sample
        path.append(x)
    return torch.stack(path)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def assert_equal_to_diffusers(name, n, steps=None, **config):
    """Timesteps, sigmas, initial noise and every sample on the way."""
    ours, theirs = make_scheduler(name, **config), upstream(name, **config)
    a, b = run(ours, n), run(theirs, n)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    assert ours.timesteps.shape == theirs.timesteps.shape
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma))
    if hasattr(theirs, "sigmas"):
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert relative(a[:steps], b[:steps]) < 1e-5


# ---- equal to diffusers ----


@pytest.mark.parametrize(
    "name, karras, prediction",
    [
        (*variant, prediction)
        for variant in VARIANTS
        for prediction in PREDICTIONS
        if (variant[0], prediction) not in ONLY_OURS
    ],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_whole_trajectories_equal_diffusers(name, karras, spacing, prediction):
    config = options_of(
        name, karras, timestep_spacing=spacing, prediction_type=prediction
    )
    if name == "pndm":
        config["skip_prk_steps"] = True
    for n in (1, 2, 5, 14, 15):
        assert_equal_to_diffusers(name, n, **config)


@pytest.mark.parametrize("name, karras", VARIANTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fifty_steps_equal_diffusers(name, karras, spacing):
    config = options_of(name, karras, timestep_spacing=spacing)
    assert_equal_to_diffusers(name, 50, **config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_own_defaults_equal_diffusers(name, prediction):
    """No option but one: each class has betas and spacings of its own."""
    ours, theirs = SCHEDULERS[name]().config, upstream(name).config
    for key, value in vars(ours).items():
        assert theirs.get(key, False) == value, key  # theirs may lack zero SNR
    for n in (5, 20):
        assert_equal_to_diffusers(name, n, prediction_type=prediction)
    if name in KARRAS:
        assert_equal_to_diffusers(name, 10, use_karras_sigmas=True)


@pytest.mark.parametrize(
    "name, n, spacing",
    [
        ("pndm", 1000, "linspace"),
        ("euler", 1000, "leading"),
        ("euler_a", 999, "leading"),
        ("heun", 1000, "trailing"),
        ("dpmpp_2m", 999, "linspace"),
        ("dpmpp_2m", 1000, "trailing"),
        ("unipc", 999, "trailing"),
    ],
)
def test_a_thousand_steps_equal_diffusers(name, n, spacing):
    config = options_of(name, timestep_spacing=spacing, prediction_type="v_prediction")
    assert_equal_to_diffusers(name, n, **config)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_a_thousand_karras_steps_equal_diffusers(name):
    assert_equal_to_diffusers(name, 1000, **options_of(name, karras=True))


@pytest.mark.slow
def test_a_thousand_steps_of_lms_equal_diffusers():
    """LMS apart, for diffusers integrates numerically and takes seconds.

    The last Karras step extends a cubic a hundred times farther than its nodes lie
    apart. Its weights are in the thousands and multiply the rounding of diffusers'
    float32 integrand, so that step alone has no digits to compare.
    """
    assert_equal_to_diffusers("lms", 1000, **options_of("lms"))
    scheduler = make_scheduler("lms", **options_of("lms", karras=True))
    scheduler.set_timesteps(300)
    *nodes, end = scheduler.sigmas[-5:].tolist()
    assert max(map(abs, lagrange_weights(nodes, end))) > 100
    assert_equal_to_diffusers("lms", 300, steps=-1, **options_of("lms", karras=True))


@pytest.mark.parametrize("name, karras", VARIANTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_many_numbers_of_steps(name, karras, spacing):
    config = options_of(name, karras, timestep_spacing=spacing)
    if name == "pndm":
        config["skip_prk_steps"] = True
    ours, theirs = make_scheduler(name, **config), upstream(name, **config)
    for n in [*range(1, 1000, 71), 3, 7, 50, 103, 999, 1000]:
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        if n == 1000 and spacing == "leading" and name in (*MULTISTEP, "pndm"):
            if not karras:
                continue  # diffusers repeats one timestep, or begins past the table
        expected = theirs.timesteps
        if spacing == "trailing" and len(ours.timesteps) < len(expected):
            # By rounding diffusers sometimes has one entry too many, timestep -1.
            assert expected[-1] == -1
            expected = expected[: len(ours.timesteps)]
        torch.testing.assert_close(ours.timesteps, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("to_one", [True, False])
def test_pndm_with_runge_kutta_equals_diffusers(spacing, prediction, to_one):
    for n in (4, 5, 21):
        assert_equal_to_diffusers(
            "pndm",
            n,
            **SD,
            timestep_spacing=spacing,
            prediction_type=prediction,
            set_alpha_to_one=to_one,
        )


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "unipc"])
def test_zero_terminal_snr_equals_diffusers(name):
    config = options_of(
        name,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    assert_equal_to_diffusers(name, 10, **config)


@pytest.mark.parametrize("name", MULTISTEP)
def test_cosine_schedule_with_karras_sigmas_equals_diffusers(name):
    config = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    assert_equal_to_diffusers(name, 12, **config, use_karras_sigmas=True)


@pytest.mark.parametrize("limit", [1.0, 0.3])
def test_clipping_of_heun_equals_diffusers(limit):
    config = dict(SD, clip_sample=True, clip_sample_range=limit)
    assert_equal_to_diffusers("heun", 8, **config)


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_equals_diffusers(name):
    ours, theirs = make_scheduler(name, **SD), upstream(name, **SD)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    x0, noise = torch.randn(2, 3, 2, 4)
    t = ours.timesteps[[1, 4, 8]]
    expected = theirs.add_noise(x0, noise, t)
    assert relative(ours.add_noise(x0, noise, t), expected) < 1e-6
    one = ours.add_noise(x0, noise, t[1] if name != "pndm" else int(t[1]))
    torch.testing.assert_close(one[1], expected[1])


def test_table_of_five_timesteps():
    expected = {
        ("pndm", "leading"): [801, 601, 601, 401, 201, 1],
        ("euler", "leading"): [801, 601, 401, 201, 1],
        ("euler", "linspace"): [999, 749.25, 499.5, 249.75, 0],
        ("lms", "trailing"): [999, 799, 599, 399, 199],
        ("heun", "leading"): [801, 601, 601, 401, 401, 201, 201, 1, 1],
        ("dpmpp_2m", "leading"): [831, 665, 499, 333, 167],
        ("unipc", "linspace"): [999, 799, 599, 400, 200],
        ("unipc", "trailing"): [999, 799, 599, 399, 199],
    }
    for (name, spacing), timesteps in expected.items():
        options = {"skip_prk_steps": True} if name == "pndm" else {}
        scheduler = make_scheduler(name, **SD, timestep_spacing=spacing, **options)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == timesteps, (name, spacing)


# ---- where diffusers has no result ----


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_thousand_steps_of_the_solvers_are_finite(name, spacing):
    """Two equal timesteps make a step of no length, which diffusers divides by."""
    path = run(make_scheduler(name, **SD, timestep_spacing=spacing), 1000)
    assert path.isfinite().all() and len(path) == 1001


@pytest.mark.parametrize("skip", [True, False])
def test_a_thousand_steps_of_pndm_with_an_offset(skip):
    scheduler = make_scheduler("pndm", **SD, skip_prk_steps=skip)
    assert run(scheduler, 1000).isfinite().all()
    assert 0 <= scheduler.timesteps.min() and scheduler.timesteps.max() == 999
    with pytest.raises(IndexError):
        run(upstream("pndm", **SD, skip_prk_steps=skip), 1000)


@pytest.mark.parametrize("n, calls", [(1, 1), (2, 5), (3, 9), (4, 13)])
def test_few_steps_of_pndm_with_runge_kutta(n, calls):
    scheduler = make_scheduler("pndm", **SD)
    assert run(scheduler, n).isfinite().all()
    assert len(scheduler.timesteps) == calls


@pytest.mark.parametrize("name", NAMES)
def test_trailing_timesteps_do_not_go_below_zero(name):
    scheduler = make_scheduler(name, **SD, timestep_spacing="trailing")
    for n in (61, 103, 999):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.min() >= 0


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    spacing=st.sampled_from(SPACINGS),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    prediction=st.sampled_from(PREDICTIONS),
    total=st.sampled_from([1, 2, 10, 1000]),
    offset=st.integers(0, 2),
    karras=st.booleans(),
    data=st.data(),
)
def test_no_run_crashes_or_leaves_the_numbers(
    name, spacing, schedule, prediction, total, offset, karras, data
):
    config = dict(
        timestep_spacing=spacing,
        beta_schedule=schedule,
        prediction_type=prediction,
        num_train_timesteps=total,
        steps_offset=offset,
    )
    if name in KARRAS:
        config["use_karras_sigmas"] = karras
    n = data.draw(st.integers(1, min(total, 12)))
    path = run(make_scheduler(name, **config), n, shape=(1, 3))
    assert path.isfinite().all() and path.dtype == torch.float32


# ---- what the methods promise ----


@pytest.mark.parametrize("name, karras", VARIANTS)
def test_with_one_picture_in_the_world_every_path_leads_to_it(name, karras):
    config = options_of(name, karras, timestep_spacing="trailing")
    if name == "pndm":  # its step goes to ᾱ at t = 0 at most, unless told otherwise
        config |= {"set_alpha_to_one": True, "skip_prk_steps": True}
    scheduler = make_scheduler(name, **config)
    scheduler.set_timesteps(10)
    x0, x = torch.randn(2, 1, 6)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        if name != "pndm":
            sigma = scheduler.sigmas[scheduler.place(t)]
            alpha_bar = 1 / (sigma**2 + 1)
        seen = scheduler.scale_model_input(x, t)
        noise = (seen - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        x = scheduler.step(noise, t, x)
    assert relative(x, x0) < 1e-3


def test_a_line_through_the_x0s_of_no_two_steps_is_ddim():
    sigma, following = torch.tensor(3.0), torch.tensor(2.0)
    x, x0 = torch.randn(2, 4, 3)
    (signal, _), (signal_then, _) = unit_shares(sigma), unit_shares(following)
    there = signal_then * euler_step(x / signal, x0, sigma, following)
    torch.testing.assert_close(dpmpp_2m_step(x, [sigma], [x0], following), there)


@given(
    nodes=st.lists(st.floats(0.01, 20), min_size=1, max_size=4, unique=True),
    end=st.floats(0, 20),
    data=st.data(),
)
def test_lagrange_weights_integrate_polynomials(nodes, end, data):
    gaps = [abs(a - b) for k, a in enumerate(nodes) for b in nodes[:k]]
    if gaps and min(gaps) < 0.1:
        return
    power = data.draw(st.integers(0, len(nodes) - 1))
    weights = lagrange_weights(nodes, end)
    integral = (end ** (power + 1) - nodes[-1] ** (power + 1)) / (power + 1)
    total = sum(w * node**power for w, node in zip(weights, nodes))
    scale = sum(abs(w) * node**power for w, node in zip(weights, nodes))
    assert math.isclose(total, integral, abs_tol=1e-9 * (1 + scale))


@pytest.mark.parametrize("name", NAMES)
def test_set_timesteps_wipes_the_memory(name):
    scheduler = make_scheduler(name, **SD)
    first = run(scheduler, 7)
    scheduler.set_timesteps(7)
    t = scheduler.timesteps[0]
    scheduler.step(torch.ones(1, 2, 4), t, torch.ones(1, 2, 4))
    assert torch.equal(run(scheduler, 7), first)


def test_each_picture_has_noise_of_its_own():
    scheduler, x = make_scheduler("euler_a", **SD), torch.ones(2, 4)

    def step(x, seeds):
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.step(x, scheduler.timesteps[0], x, generator=generators)

    assert torch.equal(step(x, [7, 8])[1:], step(x[:1], [8]))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_half_precision(name):
    scheduler, x = make_scheduler(name, **SD), torch.ones(2, 3).half()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    assert scheduler.scale_model_input(x, t).dtype == torch.float16
    assert scheduler.step(x, t, x).dtype == torch.float16


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_run_may_start_late(name):
    scheduler = make_scheduler(name, **SD)
    scheduler.set_timesteps(8)
    x0 = torch.ones(1, 3)
    late = scheduler.timesteps[4 if name != "heun" else 7 :]
    x = scheduler.add_noise(x0, noise_like(x0), late[0])
    for t in late[int(name == "heun") :]:
        x = scheduler.step(toy_denoiser(x, t), t, x)
    assert x.isfinite().all()


# ---- files ----


@pytest.mark.parametrize("name", NAMES)
def test_files_go_both_ways(name, tmp_path, caplog):
    config = dict(SD, prediction_type="v_prediction", timestep_spacing="trailing")
    if name in KARRAS:
        config["use_karras_sigmas"] = True
    upstream(name, **config).save_pretrained(tmp_path / "theirs")
    ours = Scheduler.from_pretrained(tmp_path / "theirs")
    assert type(ours) is SCHEDULERS[name]
    assert ours.config == make_scheduler(name, **config).config

    ours.save_pretrained(tmp_path / "ours")
    diffusers.utils.logging.set_verbosity_warning()
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    theirs = type(upstream(name)).from_pretrained(tmp_path / "ours")
    logger.removeHandler(caplog.handler)
    assert caplog.text == ""  # no option that diffusers does not know
    assert {k: theirs.config[k] for k in config} == config
    assert relative(run(ours, 5), run(theirs, 5)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", ["ddim", *NAMES])
def test_every_sampler_reads_every_other_s_file(name, other, tmp_path):
    upstream(other, **SD, timestep_spacing="trailing").save_pretrained(tmp_path)
    ours = SCHEDULERS[name].from_pretrained(tmp_path)
    theirs = type(upstream(name)).from_config(upstream(other, **SD).config)
    assert ours.config.beta_end == theirs.config.beta_end == 0.012
    assert ours.config.timestep_spacing == "trailing"
    again = change_scheduler(ours, "ddim")
    assert again.config.beta_start == 0.00085


def test_a_file_without_spacing_gives_each_class_its_own(tmp_path):
    for name in NAMES:
        content = {"_class_name": SCHEDULERS[name].__name__, "beta_end": 0.012}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
        own = "leading" if name == "pndm" else "linspace"
        assert Scheduler.from_pretrained(tmp_path).config.timestep_spacing == own


def test_stable_diffusion_s_own_file(tmp_path):
    """As published with version 1.5, unknown-to-PNDM options included."""
    content = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD,
        "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
    ours = Scheduler.from_pretrained(tmp_path)
    theirs = diffusers.PNDMScheduler.from_pretrained(tmp_path)
    assert relative(run(ours, 25), run(theirs, 25)) < 1e-5


@pytest.mark.parametrize(
    "name, option",
    [
        ("euler", {"use_beta_sigmas": True}),
        ("euler", {"timestep_type": "continuous"}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("heun", {"use_exponential_sigmas": True}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"solver_type": "bh1"}),
        ("unipc", {"predict_x0": False}),
        ("pndm", {"rescale_betas_zero_snr": True}),
        ("euler", {"trained_betas": [0.1]}),
    ],
)
def test_a_file_that_asks_for_more_is_refused_by_name(tmp_path, name, option):
    content = {"_class_name": SCHEDULERS[name].__name__, **SD, **option}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
    (key,) = option
    with pytest.raises(ValueError, match=f"{key}=.* is not implemented") as error:
        Scheduler.from_pretrained(tmp_path)
    assert "scheduler_config.json" in str(error.value)


def test_what_a_file_says_beside_is_not_lost_when_it_is_saved(tmp_path):
    """DDIM's options outlast a file of Euler's, which has no use for them."""
    options = dict(SD, set_alpha_to_one=False, clip_sample=False)
    euler = change_scheduler(DDIMScheduler(**options), "euler")
    euler.save_pretrained(tmp_path)
    again = change_scheduler(Scheduler.from_pretrained(tmp_path), "ddim").config
    assert not again.clip_sample and not again.set_alpha_to_one


def test_ddpm_takes_another_s_empty_variance(tmp_path):
    """DPM-Solver++ writes `variance_type: null`; diffusers' DDPM takes it, too."""
    upstream("dpmpp_2m", **SD, variance_type=None).save_pretrained(tmp_path)
    ours = change_scheduler(Scheduler.from_pretrained(tmp_path), "ddpm")
    theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert ours.config.variance_type is theirs.config.variance_type is None


# ---- models whose sampler we lack ----


def model_with(folder, index, **config):
    """A model's folder without its networks: its index and its scheduler's file."""
    pair = {"scheduler": ["diffusers", index]}
    (folder / "model_index.json").write_text(json.dumps(pair))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder / "scheduler"


LACKED = [
    ("LCMScheduler", dict(SD, original_inference_steps=50, timestep_scaling=10.0)),
    ("TCDScheduler", SD),
    ("EDMEulerScheduler", dict(sigma_min=0.002, sigma_max=80.0)),
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
    ("DPMSolverMultistepScheduler", dict(SD, algorithm_type="sde-dpmsolver++")),
    ("DPMSolverMultistepScheduler", dict(SD, solver_order=3)),
    ("DPMSolverMultistepScheduler", dict(SD, final_sigmas_type="sigma_min")),
    ("DDPMScheduler", dict(SD, variance_type="learned")),
    ("EulerDiscreteScheduler", dict(SD, use_beta_sigmas=True)),
    ("DDIMScheduler", dict(SD, thresholding=True)),
]


@pytest.mark.parametrize("name, options", LACKED)
def test_a_sampler_that_we_lack_hinders_nothing_but_drawing(name, options, tmp_path):
    scheduler = load_scheduler(model_with(tmp_path, name, _class_name=name, **options))
    with pytest.raises(ValueError, match=f"{name}.*--scheduler ddim") as error:
        scheduler.set_timesteps(4)
    assert "scheduler_config.json" in str(error.value)
    euler = change_scheduler(scheduler, "euler")
    euler.set_timesteps(4)
    assert euler.config.beta_end == options.get("beta_end", 0.02)

    x, t = torch.ones(2, 3), torch.tensor([7, 700])
    if "beta_end" in options:  # to train with
        assert torch.equal(scheduler.snr(t), make_scheduler("ddim", **SD).snr(t))
        assert torch.equal(scheduler.target(x, x + 1, t), x + 1)
    else:
        with pytest.raises(ValueError, match=name):
            scheduler.snr(t)
    scheduler.save_pretrained(tmp_path / "again")  # as it came
    saved = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
    assert saved.items() >= {"_class_name": name, **options}.items()


@pytest.mark.parametrize("option, value", [
    ("num_train_timesteps", True), ("num_train_timesteps", 10**9), ("beta_start", "x"),
    ("clip_sample_range", "a"), ("clip_sample_range", float("nan")),
])  # fmt: skip
def test_options_that_cannot_be_meant_are_named(option, value, tmp_path):
    options = {**SD, "_class_name": "DDIMScheduler", option: value}
    folder = model_with(tmp_path, "DDIMScheduler", **options)
    with pytest.raises(ValueError, match=f"scheduler_config.json.*{option[:4]}"):
        load_scheduler(folder).set_timesteps(4)


@pytest.mark.parametrize("entry", [5, [], ["diffusers"], None])
def test_an_index_that_names_no_sampler_leaves_it_to_the_file(entry, tmp_path):
    folder = model_with(tmp_path, "PNDMScheduler", _class_name="DDIMScheduler", **SD)
    (folder.parent / "model_index.json").write_text(json.dumps({"scheduler": entry}))
    assert type(load_scheduler(folder)).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("name", sorted(REPLACED))
def test_a_sampler_that_ddim_can_replace_is_replaced_with_a_warning(name, tmp_path):
    assert name in diffusers.schedulers.KarrasDiffusionSchedulers.__members__
    with pytest.warns(UserWarning, match=f"{name}; using ddim"):
        scheduler = load_scheduler(model_with(tmp_path, name, **SD, solver_order=3))
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.steps_offset == 1


def test_nonsense_in_a_scheduler_s_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="scheduler_config.json.*beta_start"):
        load_scheduler(model_with(tmp_path, "LCMScheduler", **{**SD, "beta_start": 2}))


# ---- in the pipeline ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return StableDiffusion.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.mark.parametrize("name, karras", VARIANTS)
def test_pictures_equal_diffusers(pipe, reference, name, karras):
    pipe.scheduler = "ddim"
    more = {"use_karras_sigmas": True} if karras else {}
    if name == "pndm":
        more = {"skip_prk_steps": True}
    kind = getattr(diffusers, SCHEDULERS[name].__name__)
    reference.scheduler = kind.from_config(reference.scheduler.config, **more)
    if more:
        options = {**pipe.scheduler.options, **more}
        pipe.scheduler = SCHEDULERS[name].from_options(options, foreign=True)
    else:
        pipe.scheduler = name
    options = dict(num_inference_steps=8, guidance_scale=3.0, output_type="np")
    ours = pipe(["a red star", "a boat"], seed=3, progress=False, **options).images
    theirs = reference(
        ["a red star", "a boat"],
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        **options,
    ).images
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_depends_neither_on_its_batch_nor_on_the_one_before(pipe, name):
    pipe.scheduler = name

    def draw(prompts, seed):
        options = dict(num_inference_steps=3, progress=False, output_type="np")
        return pipe(prompts, seed=seed, **options).images

    both = draw(["a boat", "a red star"], 10)
    alone = draw("a red star", 11)
    assert abs(both[1] - alone[0]).max() < 1e-5
    assert (draw("a red star", 11) == alone).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_pipeline_draws_the_same(pipe, name, tmp_path):
    pipe.scheduler = name
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert type(again.scheduler) is SCHEDULERS[name]
    options = dict(num_inference_steps=2, progress=False, output_type="pt")
    assert torch.equal(again("two fish", **options).images,
                       pipe("two fish", **options).images)  # fmt: skip


@pytest.mark.parametrize(
    "index, written",
    [
        ("EulerDiscreteScheduler", {"_class_name": "DDIMScheduler"}),
        ("DDIMScheduler", {"_class_name": "LCMScheduler", "timestep_scaling": 10.0}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
    ],
)
def test_the_index_names_the_sampler_as_in_diffusers(folder, tmp_path, index, written):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    values = json.loads((model / "model_index.json").read_text())
    values["scheduler"][1] = index
    (model / "model_index.json").write_text(json.dumps(values))
    options = json.dumps({**written, **SD, "num_train_timesteps": 1000})
    (model / "scheduler" / "scheduler_config.json").write_text(options)
    ours, theirs = (
        kind.from_pretrained(model).scheduler
        for kind in (StableDiffusion, diffusers.StableDiffusionPipeline)
    )
    assert type(ours).__name__ == type(theirs).__name__ == index
    for name, value in vars(ours.config).items():
        assert theirs.config[name] == value, name


def test_a_model_whose_sampler_we_lack(pipe, tmp_path):
    """It opens, says why it cannot draw, draws with another, and is saved as it was."""
    pipe.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "scheduler")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    model_with(tmp_path / "model", "LCMScheduler", **SD, timestep_scaling=10.0)
    index["scheduler"][1] = "LCMScheduler"
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    opened = StableDiffusion.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="LCMScheduler.*pipe.scheduler = 'ddim'"):
        opened("a boat", num_inference_steps=2, progress=False)
    opened.save_pretrained(tmp_path / "again")
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert "LCMScheduler" in (tmp_path / "again" / file).read_text()
    opened.scheduler = "ddim"
    assert opened.scheduler.config.beta_end == 0.012
    opened("a boat", num_inference_steps=1, progress=False)


def test_latents_are_not_clipped_for_the_model_did_not_say_so(pipe):
    """A single file has Stable Diffusion's PNDM, which has no such option."""
    pipe.scheduler = make_scheduler("pndm", **SD)
    for name in ("ddim", "ddpm", "heun"):
        pipe.scheduler = name
        assert not pipe.scheduler.config.clip_sample


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_trained_alike_whatever_its_sampler(name):
    """The UNet reads x of variance 1, on whatever scale the sampler walks."""
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t, seen = torch.tensor([3, 500, 999]), []
    for scheduler in (make_scheduler("ddim", **SD), make_scheduler(name, **SD)):
        loss = DiffusionLoss(scheduler, 1.0, torch.zeros(2, 3), snr_gamma=5.0)
        for steps in (None, 4):  # before and after pictures are drawn
            if steps:
                scheduler.set_timesteps(steps)
            loss.errors(lambda x, t, _: seen.append(x) or x, x0, noise, t, None)
        seen.append(loss.weights)
    first, drawn, weights, *others = seen
    assert first.std() == pytest.approx(1, abs=0.2)
    for one, other in zip((first, drawn, weights), others):
        torch.testing.assert_close(one, other)


def test_eta_belongs_to_ddim(pipe):
    pipe.scheduler = "euler"
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no eta"):
        pipe("a boat", eta=0.5, progress=False)


# ---- bad input ----


@pytest.mark.parametrize("name", NAMES)
def test_steps_before_set_timesteps_or_out_of_order(name):
    scheduler, x = make_scheduler(name, **SD), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="call set_timesteps.n. before the first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps.tolist()
    first = "is not one of the|out of order: step 1 of"
    with pytest.raises(ValueError, match=f"timestep 7 {first}"):
        scheduler.step(x, 7, x)
    scheduler.step(x, t[0], x)
    with pytest.raises(ValueError, match=f"timestep {t[0]:g} out of order: step 2 of"):
        scheduler.step(x, t[0], x)
    with pytest.raises(ValueError, match=f"is {t[1]:g}; go through scheduler.timest"):
        scheduler.step(x, t[-1], x)
    for step in t[1:]:
        scheduler.step(x, step, x)
    with pytest.raises(ValueError, match="after the last step.* call set_timesteps"):
        scheduler.step(x, t[0], x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, -1, 1001])
def test_number_of_steps_outside_the_schedule(name, n):
    with pytest.raises(ValueError, match=f"num_inference_steps={n}: expected 1 to"):
        make_scheduler(name).set_timesteps(n)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("euler", {"timestep_spacing": "log"}, "timestep_spacing='log'.*leading, lin"),
        ("euler", {"use_karras": True}, "no option 'use_karras'; its options are"),
        ("euler_a", {"use_karras_sigmas": True}, "no option 'use_karras_sigmas'"),
        ("heun", {"beta_end": 2.0}, "beta_end < 1"),
        ("pndm", {"prediction_type": "eps"}, "prediction_type='eps'.*epsilon, sample"),
        ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is"),
    ],
)
def test_unknown_options_are_refused_by_name(name, config, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, **config)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pndm"])
def test_pure_noise_at_the_end_of_a_schedule_is_not_dropped_on_the_way(name):
    """It is the model's. (diffusers' LMS and Heun forget it.)"""
    options = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = change_scheduler(DDIMScheduler(**options), name)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    scheduler.set_timesteps(10)
    x0, x = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:  # a network that knows the only picture
        sigma = scheduler.sigmas[scheduler.place(t)]
        signal, spread = unit_shares(sigma)
        noise = (scheduler.scale_model_input(x, t) - signal * x0) / spread
        x = scheduler.step(signal * noise - spread * x0, t, x)
    assert relative(x, x0) < 1e-3


def test_pndm_and_pure_noise():
    options = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="PNDM.*zero_snr=True is not implemented"):
        change_scheduler(DDIMScheduler(**options), "pndm")


def test_noise_for_timesteps_that_are_not_there():
    scheduler, x = make_scheduler("euler", **SD), torch.zeros(2, 3)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep 3 is not one of the 5"):
        scheduler.add_noise(x, x, 3)
    with pytest.raises(ValueError, match=r"shape \(3,\) for a batch of 2"):
        scheduler.add_noise(x, x, scheduler.timesteps[:3])
    with pytest.raises(ValueError, match="noise of its own"):
        scheduler.add_noise(x, x[:1], scheduler.timesteps[0])


def test_generators_for_another_batch():
    scheduler, x = make_scheduler("euler_a", **SD), torch.zeros(3, 3)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="1 generators for a batch of 3"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator()])


def test_unknown_schedulers_list_what_exists():
    with pytest.raises(ValueError, match="'eulr'; there are ddpm, ddim, pndm, lms, eu"):
        make_scheduler("eulr")


# ---- the record ----


@pytest.mark.slow
def test_the_comparison_on_a_model_writes_its_record(tmp_path, capsys):
    tool, folder = load_tool("compare_samplers"), tmp_path / "model"
    small_pipeline((16, 32), (8, 8, 8), image_size=64).save_pretrained(folder)
    flags = ["--model", str(folder), "--output", str(tmp_path), "--prompts", "1"]
    assert tool.main([*flags, "--steps", "2", "6", "--reference_steps", "6"]) == 0
    record = json.loads((tmp_path / "errors.json").read_text())
    assert record["pictures"] == 6 and len(record["rows"]) == 2 * len(tool.SAMPLERS)
    errors = {(r["scheduler"], r["steps"]): r["error"] for r in record["rows"]}
    assert errors["Euler", 6] == 0  # the reference itself
    assert all(math.isfinite(error) for error in errors.values())
    assert all(0 <= row["right"] <= 6 for row in record["rows"])
    assert "11 calls" in capsys.readouterr().out
