"""Noise, and the way back

Generated from chapters/07_schedulers.ipynb, chapters/10_faster_samplers.ipynb; do
not edit.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import SupportsFloat

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .files import write_json
from .scheduler_options import FIXED, IGNORED, check_batch, check_options, read_options
from .weights import about

__all__ = [
    "Floats", "Level", "Sample", "Timestep", "Timesteps", "Generators",
    "BETA_SCHEDULES", "cosine_alpha_bar", "make_betas", "rescale_zero_terminal_snr",
    "posterior_mean", "posterior_variance", "split_output", "spaced_timesteps",
    "ddim_step", "Scheduler", "noise_like", "DDPMScheduler", "DDIMScheduler",
    "SCHEDULERS", "scheduler_class", "make_scheduler", "change_scheduler",
    "karras_sigmas", "euler_step", "heun_step", "lagrange_weights", "Levels",
    "Samples", "lms_step", "transfer", "plms_noise", "runge_kutta_noise",
    "unit_shares", "log_snr", "dpmpp_2m_step", "unic_step", "euler_ancestral_step",
    "SigmaScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "PNDMScheduler",
]


Floats = Float[Tensor, "..."]
Level = Float[Tensor, ""]  # one number
Sample = Float[Tensor, "*shape"]  # in one call all have the same shape
Timestep, Timesteps = SupportsFloat, int | Int[Tensor, "..."]
Generators = torch.Generator | list[torch.Generator] | None


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def cosine_alpha_bar(u: float) -> float:
    """Signal power left after the fraction `u` of the way (Nichol and Dhariwal)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def make_betas(schedule: str, num_timesteps: int, start: float, end: float) -> Floats:
    """The share of noise that each timestep mixes in, (num_timesteps,), float32."""
    if schedule == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float32)
    if schedule == "scaled_linear":
        roots = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float32)
        return roots**2
    if schedule in ("squaredcos_cap_v2", "cosine"):  # without start and end
        left = [cosine_alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in zip(left, left[1:])]
        return torch.tensor(betas, dtype=torch.float32)
    known = ", ".join(BETA_SCHEDULES)
    raise ValueError(f"unknown beta_schedule {schedule!r}; choose one of {known}")


def rescale_zero_terminal_snr(betas: Floats) -> Floats:
    """Shift and stretch √ᾱ, so that it ends at 0: algorithm 1 of Lin et al. (2024)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_bar = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


def posterior_mean(x0: Sample, x: Sample, alpha_bar: Level, before: Level) -> Sample:
    """The mean of q(x_s | x_t, x0); ᾱ at t, and `before` at s (Ho et al., eq. 7)."""
    alpha = alpha_bar / before
    x0_weight = before.sqrt() * (1 - alpha) / (1 - alpha_bar)
    x_weight = alpha.sqrt() * (1 - before) / (1 - alpha_bar)
    return x0_weight * x0 + x_weight * x


def posterior_variance(alpha_bar: Level, before: Level) -> Level:
    """The variance of q(x_s | x_t, x0), the same for every x0."""
    return (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)


def split_output(
    prediction_type: str, output: Sample, x: Sample, signal: Level, spread: Level,
    size: Level | int = 1,
) -> tuple[Sample, Sample]:
    """(x0, noise), by what a network says of x = signal * x0 + spread * noise.

    It sees x / size, of variance 1, and `v_prediction` means the velocity there.
    """
    if prediction_type == "sample":
        return output, (x - signal * output) / spread
    if prediction_type == "epsilon":
        return (x - spread * output) / signal, output
    x0 = (signal * x / size - spread * output) / size
    return x0, (signal * output + spread * x / size) / size


def spaced_timesteps(
    spacing: str, n: int, total: int, offset: int = 0, points: int = 0
) -> np.ndarray:
    """The n of `total` timesteps that a run visits, noisiest first, not yet rounded.

    Lin et al. (2024), table 2; the n noisiest of `points`, if given. As in diffusers,
    an offset may lead past total - 1, and `trailing` may have a -1 too many at the end.
    """
    points = points or n
    if spacing == "linspace":
        return np.linspace(0, total - 1, points)[::-1][:n]
    if spacing == "leading":
        points = min(points, total)
        return np.arange(points)[::-1][:n] * (total // points) + float(offset)
    return np.arange(total, 0, -total / n).round() - 1


def ddim_step(x0: Sample, noise: Sample, before: Level, std: Level | float) -> Sample:
    """x_s, but for its fresh noise std * z: Song et al. (2021), equation 12."""
    return before.sqrt() * x0 + (1 - before - std**2).clamp(min=0).sqrt() * noise


class Scheduler:
    """A noise schedule, and what all samplers share; diffusers' options as keywords.

    `config` holds all options, `options` those that were given; `alphas_cumprod[t]`
    is ᾱ_t, the signal power left at t.
    """

    defaults = dict(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02,
        beta_schedule="linear", rescale_betas_zero_snr=False,
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
    )
    choices = dict(
        beta_schedule=(*BETA_SCHEDULES, "cosine"), trained_betas=(None,),
        prediction_type=("epsilon", "sample", "v_prediction"),
        timestep_spacing=("leading", "linspace", "trailing"),
    )
    init_noise_sigma = 1.0  # the spread of the x that a run starts from
    calls = 1  # of the network, for one step
    num_inference_steps = position = None  # before set_timesteps, and the first step

    def __init__(self, **options):
        check_options(type(self), options)
        self.name = type(self).__name__
        self.options = {k: v for k, v in options.items() if k in self.defaults}
        self.config = config = SimpleNamespace(**self.defaults | self.options)
        if config.beta_schedule == "cosine":
            config.beta_schedule = "squaredcos_cap_v2"
        self.num_train_timesteps = total = config.num_train_timesteps
        betas = config.beta_schedule, total, config.beta_start, config.beta_end
        self.betas = make_betas(*betas)
        if config.rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self._on_device = self.alphas_cumprod  # where it was last asked for
        self.timesteps = torch.arange(total - 1, -1, -1)
        to_one = getattr(config, "set_alpha_to_one", True)  # after the last step
        self.final_alpha_bar = torch.tensor(1.0) if to_one else self.alphas_cumprod[0]

    def __repr__(self):
        return f"{self.name}({self.config})"

    def check_timestep(self, t: Timestep) -> int:
        """t as an int; ValueError unless the schedule has it."""
        if not 0 <= int(t) < self.num_train_timesteps:
            last = self.num_train_timesteps - 1
            raise ValueError(f"timestep {int(t)} is outside the schedule, 0 to {last}")
        return int(t)

    def levels(self, t: Timesteps, x: Floats, noise=None) -> tuple[Floats, Floats]:
        """(√ᾱ_t, √(1-ᾱ_t)), the shares of signal and noise, shaped to multiply x."""
        t = check_batch(t, x, noise)
        if t.device.type == "cpu" and t.numel():  # others would wait for the device
            self.check_timestep(t.min())
            self.check_timestep(t.max())
        self._on_device = self._on_device.to(x.device)
        alpha_bar = self._on_device[t.to(x.device)]
        alpha_bar = alpha_bar.reshape(t.shape + (1,) * (x.ndim - t.ndim))
        return alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)

    def target(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """What a network of this prediction type has to answer at (x_t, t)."""
        kind = self.config.prediction_type
        if kind == "v_prediction":
            return self.velocity(x0, noise, t)
        return noise if kind == "epsilon" else x0

    def snr(self, t: Timesteps) -> Floats:
        """Signal-to-noise ratio ᾱ_t / (1-ᾱ_t), on the CPU."""
        alpha_bar = self.alphas_cumprod[t if isinstance(t, int) else t.cpu()]
        return alpha_bar / (1 - alpha_bar)

    def add_noise(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """x_t = √ᾱ_t x0 + √(1-ᾱ_t) noise: all t steps at once (Ho et al., eq. 4)."""
        signal, spread = self.levels(t, x0, noise)
        return signal * x0 + spread * noise

    def velocity(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """v = √ᾱ_t noise - √(1-ᾱ_t) x0, the target of Salimans and Ho (2022)."""
        signal, spread = self.levels(t, x0, noise)
        return signal * noise - spread * x0

    def split(self, output: Sample, t: Timestep, x: Sample) -> tuple[Sample, Sample]:
        """(x0, noise) that the model's output at x_t amounts to, before clipping."""
        alpha_bar = self.alphas_cumprod[self.check_timestep(t)]
        kind = self.config.prediction_type
        if alpha_bar == 0 and kind == "epsilon":
            raise ValueError(
                f"timestep {int(t)} is pure noise (ᾱ = 0), so a model that predicts "
                "epsilon says nothing about x0 there; use prediction_type="
                "'v_prediction', or rescale_betas_zero_snr=False"
            )
        return split_output(kind, output, x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Begin a run of so many steps: `timesteps`, noisiest first, on the CPU."""
        total, n, config = self.num_train_timesteps, num_inference_steps, self.config
        if not isinstance(n, int | np.integer) or not 1 <= n <= total:
            raise ValueError(f"num_inference_steps={n!r}: expected 1 to {total}, whole")
        steps = spaced_timesteps(config.timestep_spacing, n, total, config.steps_offset)
        steps = steps[:n].round()
        steps -= max(0, steps[0] - (total - 1))  # at n = total an offset has no room
        self.timesteps = torch.from_numpy(steps.astype(np.int64))
        self.num_inference_steps, self.position, self.history = n, None, []

    def skip(self, steps: int) -> None:
        """Leave out the first steps, to start from a picture that is not all noise."""
        if not 0 <= steps < self.num_inference_steps:
            raise ValueError(
                f"skip {steps} of {self.num_inference_steps} steps: at least one "
                "has to be left; call set_timesteps(n) before each skip"
            )
        self.timesteps = self.timesteps[steps * self.calls :]

    def scale_model_input(self, x: Floats, t: Timestep) -> Floats:
        """The network's input for x: x itself, unless a sampler walks in σ."""
        return x

    def find(self, t: Timestep) -> int:
        """Where t stands in `timesteps`; if twice, the second, where a step begins."""
        places = (self.timesteps == float(t)).nonzero().flatten().tolist()
        if not places:
            raise ValueError(
                f"timestep {float(t):g} is not one of the {len(self.timesteps)} that "
                "set_timesteps chose; step through scheduler.timesteps"
            )
        return places[0] if places[0] == 0 else places[:2][-1]

    def clip(self, x0: Sample) -> Sample:
        """x0 limited to ±clip_sample_range where the options ask for it."""
        if not getattr(self.config, "clip_sample", False):
            return x0
        return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

    def alpha_bars(self, t: int, previous: int) -> tuple[Level, Level]:
        """ᾱ at t, and where a step leads: at `previous` or, below 0, at the end."""
        ended = previous < 0
        before = self.final_alpha_bar if ended else self.alphas_cumprod[previous]
        return self.alphas_cumprod[t], before

    @classmethod
    def from_options(cls, options: dict, foreign: bool = False):
        """Build from a dict, keeping aside what are other schedulers' options.

        A name that no scheduler knows is refused, unless the dict is another class's.
        """
        tables = (kind.defaults | kind.choices for kind in SCHEDULERS.values())
        known = IGNORED.union(*tables, *FIXED.values())
        aside = options.keys() - cls.defaults.keys() - cls.choices.keys()
        if not foreign:
            aside = aside & known - FIXED.get(cls.__name__, {}).keys()
        scheduler = cls(**{k: v for k, v in options.items() if k not in aside})
        scheduler.options = {k: v for k, v in options.items() if k in known}
        return scheduler

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """Read a folder's `scheduler_config.json`, ours or diffusers', of any class.

        `Scheduler` builds the class that the file names, other classes themselves.
        """
        path = Path(folder) / "scheduler_config.json"
        written, options = read_options(path)
        with about(path):
            kind = cls if cls in SCHEDULERS.values() else scheduler_class(written)
            return kind.from_options(options, foreign=kind.__name__ != written)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` as diffusers does, with what was kept aside."""
        values = {"_class_name": self.name, **self.options, **vars(self.config)}
        write_json(values, Path(folder) / "scheduler_config.json")

    def place(self, t: Timestep) -> int:
        """Where a run with a memory stands: at t, or ValueError. Its start is free."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(n) before the first step")
        i, t = self.position, float(t)
        if i is None:
            return self.find(t)
        n, due = len(self.timesteps), self.timesteps[i : i + 1].tolist()
        if due != [t]:
            due = f"step {i + 1} of {n} is {due[0]:g}" if due else "after the last step"
            raise ValueError(
                f"timestep {t:g} out of order: {due}; go through scheduler.timesteps, "
                "or call set_timesteps(n) to begin again"
            )
        return i


def noise_like(x: Sample, generator: Generators = None) -> Sample:
    """Standard normal noise like x, from any device's dice; of a list, one each."""
    if not isinstance(generator, list):
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        return noise.to(x.device)
    if len(generator) != len(x):
        raise ValueError(
            f"{len(generator)} generators for a batch of {len(x)}; pass one per picture"
        )
    return torch.cat([noise_like(x[k : k + 1], g) for k, g in enumerate(generator)])


class DDPMScheduler(Scheduler):
    """Ancestral sampling of Ho et al. (2020): the posterior mean, plus fresh noise."""

    defaults = Scheduler.defaults | dict(
        clip_sample=True, clip_sample_range=1.0, variance_type="fixed_small"
    )
    choices = Scheduler.choices | dict(  # None and fixed_small_log mean fixed_small
        variance_type=("fixed_small", "fixed_large", "fixed_small_log", None)
    )

    def previous_timestep(self, t: int) -> int:
        """The timestep that follows t on the way back; -1 after the last."""
        if self.num_inference_steps is None:
            return t - 1
        following = self.timesteps[self.find(t) + 1 :]
        return int(following[0]) if len(following) else -1

    def step(
        self, model_output: Sample, t: Timestep, sample: Sample, generator=None
    ) -> Sample:
        """x at the previous timestep, drawn from q(x_prev | x_t, x0 as predicted)."""
        t = self.check_timestep(t)
        x0, _ = self.split(model_output, t, sample)
        alpha_bar, before = self.alpha_bars(t, self.previous_timestep(t))
        mean = posterior_mean(self.clip(x0), sample, alpha_bar, before)
        if t == 0:
            return mean
        variance = posterior_variance(alpha_bar, before).clamp(min=1e-20)
        if self.config.variance_type == "fixed_large":
            variance = 1 - alpha_bar / before
        return mean + variance.sqrt() * noise_like(sample, generator)


class DDIMScheduler(Scheduler):
    """Deterministic sampling of Song et al. (2021), with as few steps as you like.

    As in diffusers, a step goes `num_train_timesteps // n` down. With `linspace` and
    `trailing` that can miss the next timestep, and the noise is then slightly wrong.
    """

    defaults = Scheduler.defaults | dict(
        clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True
    )

    def previous_timestep(self, t: int) -> int:
        """`t - num_train_timesteps // num_inference_steps`; negative after the last."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(n) before the first step")
        return t - self.num_train_timesteps // self.num_inference_steps

    def step(
        self, model_output: Sample, t: Timestep, sample: Sample, generator=None, eta=0.0
    ) -> Sample:
        """x at the previous timestep; `eta` of 0 to 1 (DDPM) is the fresh noise."""
        t = self.check_timestep(t)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected 0 (deterministic) to 1 (DDPM)")
        x0, noise = self.split(model_output, t, sample)
        alpha_bar, before = self.alpha_bars(t, self.previous_timestep(t))
        std = eta * posterior_variance(alpha_bar, before).sqrt()
        x = ddim_step(self.clip(x0), noise, before, std)
        return x + std * noise_like(sample, generator) if eta > 0 else x


SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


def scheduler_class(name: str) -> type[Scheduler]:
    """The class called `name`: ours (`ddim`) or diffusers' (`DDIMScheduler`)."""
    for short, kind in SCHEDULERS.items():
        if name in (short, kind.__name__):
            return kind
    known = ", ".join(SCHEDULERS)
    raise ValueError(f"no scheduler is called {name!r}; there are {known}")


def make_scheduler(name: str, **config) -> Scheduler:
    """Build a scheduler by name, such as `ddim`, with diffusers' options."""
    return scheduler_class(name)(**config)


def change_scheduler(scheduler: Scheduler, name: str) -> Scheduler:
    """The scheduler called `name` for the same model: the given options travel."""
    return scheduler_class(name).from_options(scheduler.options, foreign=True)


def karras_sigmas(largest: float, smallest: float, n: int) -> np.ndarray:
    """n values of σ, evenly spaced in σ^(1/7). Karras et al. (2022), equation 5."""
    roots = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), n)
    return roots**7


# In the functions of σ, x is x0 + σ * noise, unless they say that it has variance 1.
def euler_step(x: Sample, x0: Sample, sigma: Level, following: Level) -> Sample:
    """Straight along dx/dσ = (x - x0) / σ (Karras et al., 2022, algorithm 1)."""
    slope = (x - x0) / sigma
    return x + (following - sigma) * slope


def heun_step(
    x: Sample, slope: Sample, arrived: Sample, x0: Sample,
    sigma: Level, following: Level,
) -> Sample:
    """Euler's step from x again, with the mean of the slopes at both its ends.

    `arrived` is where it led, and x0 the guess there (algorithm 1, lines 7 and 8).
    """
    slope_there = (arrived - x0) / following
    return x + (following - sigma) * (slope + slope_there) / 2


def lagrange_weights(nodes: Sequence[int | float], end: int | float) -> list[float]:
    """The integral of a polynomial from the last node to `end`, in its values there.

    For up to four nodes, since Gauss's rule with two points is exact for cubics.
    """
    middle, half = (nodes[-1] + end) / 2, (end - nodes[-1]) / 2
    weights = []
    for k, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != k]
        basis = [
            math.prod((point - other) / (node - other) for other in others)
            for point in (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
        ]
        weights.append(half * sum(basis))
    return weights


Levels, Samples = Sequence[Level], Sequence[Sample]  # of a history, the newest last


def lms_step(x: Sample, sigmas: Levels, slopes: Samples, following: Level) -> Sample:
    """Adams and Bashforth's step for uneven σ: along the polynomial through slopes."""
    weights = lagrange_weights([float(s) for s in sigmas], float(following))
    return x + sum(weight * slope for weight, slope in zip(weights, slopes))


def transfer(x: Sample, noise: Sample, alpha_bar: Level, following: Level) -> Sample:
    """To the next ᾱ along this noise: DDIM, in the form of Liu et al. (2022)."""
    roots = alpha_bar * (1 - following).sqrt()
    roots = roots + (alpha_bar * (1 - alpha_bar) * following).sqrt()
    weight = (following - alpha_bar) / roots
    return (following / alpha_bar).sqrt() * x - weight * noise


def plms_noise(noises: Samples) -> Sample:
    """The last noises as one, by Adams and Bashforth (equation 12 for four)."""
    weights = lagrange_weights(range(len(noises)), len(noises))
    return sum(weight * noise for weight, noise in zip(weights, noises))


def runge_kutta_noise(noises: Samples) -> Sample:
    """One noise from those at the start, twice in the middle, and the end (eq. 13)."""
    start, middle, middle_again, end = noises
    return (start + 2 * middle + 2 * middle_again + end) / 6


def unit_shares(sigma: Floats) -> tuple[Floats, Floats]:
    """σ as (√ᾱ, √(1-ᾱ)): the shares of signal and noise at variance 1."""
    signal = 1 / (sigma**2 + 1).sqrt()
    return signal, sigma * signal


def log_snr(sigma: Floats) -> Floats:
    """λ = log(√ᾱ / √(1-ᾱ)) = -log σ: half the log of the signal-to-noise ratio."""
    return -sigma.log()


def dpmpp_2m_step(x: Sample, sigmas: Levels, x0s: Samples, following: Level) -> Sample:
    """DPM-Solver++(2M): x0 goes on as it went, and the rest is solved exactly.

    x has variance 1. `sigmas` and `x0s` are the last step's and this one's. With one of
    each, or to σ = 0, it is DDIM. Lu et al. (2022b), algorithm 2.
    """
    signal, spread = unit_shares(following)
    _, spread_now = unit_shares(sigmas[-1])
    now, x0 = log_snr(sigmas[-1]), x0s[-1]
    h = log_snr(following) - now
    if len(x0s) > 1 and float(following) > 0:
        h_before = now - log_snr(sigmas[-2])
        x0 = x0 + h / (2 * h_before) * (x0 - x0s[-2])
    return spread / spread_now * x - signal * torch.expm1(-h) * x0


def unic_step(
    x: Sample, sigmas: Levels, x0s: Samples, arrived: Level, x0: Sample
) -> Sample:
    """UniC: the step from x again, now that x0 at its end is known as well.

    Exact for x0s on a parabola in λ; with those at its two ends alone it takes their
    mean. Zhao et al. (2023), section 3, with B(h) = exp(-h) - 1.
    """
    signal, spread = unit_shares(arrived)
    _, spread_before = unit_shares(sigmas[-1])
    start = log_snr(sigmas[-1])
    h = log_snr(arrived) - start
    decay = torch.expm1(-h)
    change = (x0 - x0s[-1]) / 2
    if len(x0s) > 1:
        r = (log_snr(sigmas[-2]) - start) / h
        line = (-decay / h - 1) / decay  # the weight of x0 that goes as λ
        square = 2 * ((decay / h + 1) / h - 0.5) / decay  # and as λ²
        before = (line - square) / (1 - r)
        change = before / r * (x0s[-2] - x0s[-1]) + (line - before) * (x0 - x0s[-1])
    return spread / spread_before * x - signal * decay * (x0s[-1] + change)


def euler_ancestral_step(
    x: Sample, x0: Sample, sigma: Level, following: Level, noise: Sample
) -> Sample:
    """Down farther than the next σ, and up with fresh noise: DDPM's posterior."""
    ratio = following / sigma
    down, up = following * ratio, following * (1 - ratio**2).sqrt()
    return euler_step(x, x0, sigma, down) + up * noise


class SigmaScheduler(Scheduler):
    """A sampler down a table of σ, one for each of `timesteps`, and 0 at the end.

    Each kind has its `advance(x, x0, i, generator)`, from sigmas[i] to sigmas[i + 1].
    As in diffusers, timesteps may be fractions, or 1000 (leading, with an offset).
    """

    defaults = Scheduler.defaults | dict(
        timestep_spacing="linspace", use_karras_sigmas=False
    )
    # Whether x has variance 1, as the network sees it, or is x0 + σ * noise. With
    # variance 1 timesteps are whole, and the n noisiest of n + 1.
    variance_one, rounded = False, staticmethod(np.round)

    def __init__(self, **options):
        super().__init__(**options)
        if self.config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # σ = 4096 and not ∞, as in diffusers
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.training_sigmas = sigmas.numpy()
        self.sigmas = torch.cat([sigmas.flip(0), sigmas.new_zeros(1)])

    def set_timesteps(self, num_inference_steps: int) -> None:
        Scheduler.set_timesteps(self, num_inference_steps)
        n, config, whole = num_inference_steps, self.config, self.variance_one
        table, every = self.training_sigmas, np.arange(self.num_train_timesteps)
        timesteps = spaced_timesteps(
            config.timestep_spacing, n, len(table), config.steps_offset, n + whole
        )
        timesteps = timesteps.round() if whole else timesteps.astype(np.float32)
        sigmas = np.interp(timesteps, every, table)
        if getattr(config, "use_karras_sigmas", False):
            largest, smallest = table[[-1, 0]] if whole else sigmas[[0, -1]]
            sigmas = karras_sigmas(float(largest), float(smallest), n)
            timesteps = np.interp(np.log(sigmas), np.log(table), every)
            timesteps = self.rounded(timesteps) if whole else timesteps
        timesteps = timesteps[:n].astype(np.int64 if whole else np.float32)
        self.timesteps = torch.from_numpy(timesteps)
        self.sigmas = torch.from_numpy(np.append(sigmas[:n], 0).astype(np.float32))

    def skip(self, steps: int) -> None:
        Scheduler.skip(self, steps)
        self.sigmas = self.sigmas[-len(self.timesteps) - 1 :]

    @property
    def init_noise_sigma(self) -> float:
        """The spread of the x that a run starts from: σ or, if leading, √(σ²+1)."""
        if self.variance_one:
            return 1.0
        leading = self.config.timestep_spacing == "leading"
        return (self.sigmas.max() ** 2 + leading).sqrt().item()

    def shares(self, sigma: Floats) -> tuple[Floats, Floats]:
        """How much x0 and how much noise there is in x."""
        if self.variance_one:
            return unit_shares(sigma)
        return torch.ones_like(sigma), sigma

    def scale_model_input(self, x: Floats, t: Timestep) -> Floats:
        """x at variance 1, on which networks are trained."""
        if self.variance_one:
            return x
        return x / (self.sigmas[self.place(t)] ** 2 + 1).sqrt()

    def add_noise(self, x0: Floats, noise: Floats, t: Timestep) -> Floats:
        """x at timestep t, one of `timesteps`, or one for each item of the batch."""
        steps = check_batch(t, x0, noise).flatten().tolist()
        places = [self.find(step) for step in steps]
        sigma = self.sigmas[places].to(x0).reshape(-1, *[1] * (x0.ndim - 1))
        signal, spread = self.shares(sigma)
        return signal * x0 + spread * noise

    def step(
        self, model_output: Sample, t: Timestep, sample: Sample, generator=None
    ) -> Sample:
        """x at the next σ. ValueError for a t out of order."""
        i = self.place(t)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        signal, spread = self.shares(self.sigmas[i])
        size = (signal**2 + spread**2).sqrt()
        kind, output = self.config.prediction_type, model_output.to(x.dtype)
        x0, _ = split_output(kind, output, x, signal, spread, size)
        x = self.advance(x, self.clip(x0), i, generator)
        self.position = i + 1
        return x.to(sample.dtype)

    def remember(self, sigma: Level, value: Sample, count: int) -> None:
        """Keep what was found at this σ and at the count - 1 others before it."""
        if self.history and self.history[-1][0] == sigma:
            self.history.pop()  # a step of no length, where diffusers divides by zero
        self.history = [*self.history, (sigma, value)][-count:]


class EulerDiscreteScheduler(SigmaScheduler):
    """Euler's method in σ (Karras et al., 2022). The name for it is `euler`."""

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        return euler_step(x, x0, *self.sigmas[i : i + 2])


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Euler's method with fresh noise in every step. The name for it is `euler_a`."""

    defaults = Scheduler.defaults | dict(timestep_spacing="linspace")

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        noise = noise_like(x, generator)
        return euler_ancestral_step(x, x0, *self.sigmas[i : i + 2], noise)


class LMSDiscreteScheduler(SigmaScheduler):
    """Linear multistep in σ: one call for each step, order 4 once it has history."""

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        self.remember(self.sigmas[i], (x - x0) / self.sigmas[i], 4)
        return lms_step(x, *zip(*self.history), self.sigmas[i + 1])


class HeunDiscreteScheduler(SigmaScheduler):
    """Heun's method in σ (Karras et al., 2022): 2n - 1 calls for n steps."""

    defaults = SigmaScheduler.defaults | dict(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, clip_sample_range=1.0
    )
    calls = 2

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        self.timesteps = self.timesteps.repeat_interleave(2)[1:]
        self.sigmas = self.sigmas.repeat_interleave(2)[1:-1]

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        if i % 2 == 0:
            self.history = [x, (x - x0) / self.sigmas[i]]
            return euler_step(x, x0, *self.sigmas[i : i + 2])
        return heun_step(*self.history, x, x0, *self.sigmas[i - 1 : i + 1])


class DPMSolverMultistepScheduler(SigmaScheduler):
    """DPM-Solver++(2M) of Lu et al. (2022b): order 2, one call for each step."""

    variance_one = True

    def rounded(self, timesteps: np.ndarray) -> np.ndarray:
        down = self.config.beta_schedule == "squaredcos_cap_v2"  # as in diffusers
        return np.floor(timesteps) if down else timesteps.round()

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        self.remember(self.sigmas[i], x0, 2)
        return dpmpp_2m_step(x, *zip(*self.history), self.sigmas[i + 1])


class UniPCMultistepScheduler(SigmaScheduler):
    """UniPC of Zhao et al. (2023): first correct where we are, then go on (order 3)."""

    variance_one = True

    def advance(self, x: Sample, x0: Sample, i: int, generator: Generators) -> Sample:
        if self.history and self.history[-1][0] != self.sigmas[i]:
            x = unic_step(self.corrected, *zip(*self.history), self.sigmas[i], x0)
        self.remember(self.sigmas[i], x0, 2)
        self.corrected = x
        return dpmpp_2m_step(x, *zip(*self.history), self.sigmas[i + 1])


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods of Liu et al. (2022): Adams and Bashforth on the noise.

    As in diffusers, a step from t leads to `t - num_train_timesteps // n`, and outputs
    are averaged before a velocity becomes noise. Where diffusers fails (n = 1000 with
    an offset, n below 4 with Runge and Kutta, `prediction_type="sample"`), we do not.
    A run that skips steps stays, with `skip_prk_steps`, one step noisier than told.
    """

    defaults = Scheduler.defaults | dict(skip_prk_steps=False, set_alpha_to_one=False)
    choices = Scheduler.choices | dict(rescale_betas_zero_snr=(False,))

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        twice = self.config.skip_prk_steps  # then the first step is made twice
        self.chosen = torch.cat([self.timesteps[: 1 + twice], self.timesteps[1:]])
        self.skip(0)

    def skip(self, steps: int) -> None:
        self.timesteps, self.position = self.chosen, 0
        super().skip(steps)
        self.plan()

    def plan(self) -> None:
        """The calls of a run, as rows of `moves`: asked at, moves from, moves to."""
        stride = self.num_train_timesteps // self.num_inference_steps
        visited, half, warm_up = self.timesteps.tolist(), stride // 2, []
        moves = [(t, t, t - stride) for t in visited]
        if self.config.skip_prk_steps:
            moves[1:2] = [(t, t + stride, t) for t in visited[1:2]]
        else:
            for upper, lower in zip(visited[:3], visited[1:4]):
                middle = lower + half
                warm_up += [(upper, upper, upper - half), (middle, upper, middle)]
                warm_up += [(middle, upper, middle - half), (lower, upper, lower)]
            moves = warm_up + moves[len(warm_up) // 4 :]
        self.moves, self.num_runge_kutta = moves, len(warm_up)
        self.timesteps = torch.tensor([asked for asked, _, _ in moves])

    def step(
        self, model_output: Sample, t: Timestep, sample: Sample, generator=None
    ) -> Sample:
        """x at the next of `timesteps`. ValueError for a t out of order."""
        i = self.place(t)
        asked, start, end = self.moves[i]
        if asked == start:  # a step begins; the history keeps the first of its calls
            self.start, self.stages = sample, []
            self.history = [*self.history, model_output][-4:]
        self.stages.append(model_output)
        output = model_output
        if i < self.num_runge_kutta:
            if len(self.stages) == 4:
                output = runge_kutta_noise(self.stages)
        elif asked == start:
            output = plms_noise(self.history)
        else:  # the first step once more, with the mean of what both its ends say
            output = (self.stages[0] + output) / 2
        _, noise = self.split(output, start, self.start)
        self.position = i + 1
        return transfer(self.start, noise, *self.alpha_bars(start, end))


SCHEDULERS.update(
    pndm=PNDMScheduler, lms=LMSDiscreteScheduler, euler=EulerDiscreteScheduler,
    euler_a=EulerAncestralDiscreteScheduler, heun=HeunDiscreteScheduler,
    dpmpp_2m=DPMSolverMultistepScheduler, unipc=UniPCMultistepScheduler,
)
