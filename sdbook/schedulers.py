"""Noise, and the way back

Generated from chapters/07_schedulers.ipynb, chapters/10_faster_samplers.ipynb; do
not edit.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, SupportsFloat, SupportsInt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "BETA_SCHEDULES",
    "cosine_alpha_bar",
    "make_betas",
    "rescale_zero_terminal_snr",
    "CHOICES",
    "SchedulerConfig",
    "DDPMConfig",
    "DDIMConfig",
    "NOT_IMPLEMENTED",
    "OPTIONS_ELSEWHERE",
    "own_options",
    "read_scheduler_file",
    "write_scheduler_file",
    "Options",
    "Configured",
    "NoiseSchedule",
    "same_shape",
    "Floats",
    "Timesteps",
    "ForwardProcess",
    "whole_timesteps",
    "Scheduler",
    "Sampler",
    "posterior_mean",
    "noise_like",
    "DDPMScheduler",
    "DDIMScheduler",
    "SCHEDULERS",
    "scheduler_class",
    "make_scheduler",
    "change_scheduler",
    "Level",
    "predicted_x0",
    "spaced_timesteps",
    "karras_sigmas",
    "Choosy",
    "InOrder",
    "SigmaConfig",
    "SigmaTable",
    "SigmaScales",
    "SigmaScheduler",
    "euler_step",
    "EulerDiscreteScheduler",
    "heun_step",
    "HeunConfig",
    "HeunDiscreteScheduler",
    "lagrange_weights",
    "lms_step",
    "LMSConfig",
    "LMSDiscreteScheduler",
    "transfer",
    "plms_noise",
    "runge_kutta_noise",
    "PNDMConfig",
    "PNDMTimesteps",
    "PNDMMoves",
    "PNDMScheduler",
    "unit_shares",
    "log_snr",
    "dpmpp_2m_step",
    "SolverScheduler",
    "DPMSolverMultistepScheduler",
    "unic_step",
    "UniPCMultistepScheduler",
    "euler_ancestral_step",
    "EulerAncestralConfig",
    "EulerAncestralDiscreteScheduler",
]


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def cosine_alpha_bar(u: float) -> float:
    """Signal power left after the fraction `u` of the way (Nichol and Dhariwal)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def make_betas(
    schedule: str, num_timesteps: int, start: float, end: float
) -> Float[Tensor, "timesteps"]:
    """The share of noise that each timestep mixes in, float32.

    `linear` is DDPM's, `scaled_linear` (linear in the square root) is Stable
    Diffusion's, `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal
    (2021), which ignores `start` and `end`. `cosine` is a friendly alias.
    """
    if schedule == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float32)
    if schedule == "scaled_linear":
        roots = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float32)
        return roots**2
    if schedule in ("squaredcos_cap_v2", "cosine"):
        left = [cosine_alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in zip(left, left[1:])]
        return torch.tensor(betas, dtype=torch.float32)
    raise ValueError(
        f"unknown beta_schedule {schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}"
    )


def rescale_zero_terminal_snr(
    betas: Float[Tensor, "timesteps"],
) -> Float[Tensor, "timesteps"]:
    """Shift and stretch the schedule so that the last timestep is pure noise.

    Algorithm 1 of Lin et al. (2024): √ᾱ keeps its first value and ends at 0.
    """
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    roots = (roots - last) * (first / (first - last))
    alphas_bar = roots**2
    alphas = torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return 1 - alphas


CHOICES = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": ("fixed_small", "fixed_large"),
}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Options that every scheduler has, with diffusers' names and defaults."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.beta_schedule == "cosine":
            object.__setattr__(self, "beta_schedule", "squaredcos_cap_v2")
        for name, valid in CHOICES.items():
            if (value := getattr(self, name, valid[0])) not in valid:
                raise ValueError(
                    f"{name}={value!r} is not one that we know; "
                    f"choose one of {', '.join(valid)}"
                )
        for name, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r}: expected an integer of {least} or more"
                )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end}: "
                "expected 0 < beta_start <= beta_end < 1"
            )


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(SchedulerConfig):
    """Options of `DDPMScheduler`. `clip_sample` is for pixels: off for latents."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"


@dataclass(frozen=True, kw_only=True)
class DDIMConfig(SchedulerConfig):
    """Options of `DDIMScheduler`. Stable Diffusion sets `set_alpha_to_one=False`."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True


# Options of diffusers that change results and that we do not have.
NOT_IMPLEMENTED = {"trained_betas": None, "thresholding": False}

# Options of diffusers' other schedulers, met in their files.
OPTIONS_ELSEWHERE = set(
    "dynamic_thresholding_ratio sample_max_value clip_sample clip_sample_range "
    "set_alpha_to_one variance_type skip_prk_steps interpolation_type "
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas sigma_min sigma_max "
    "timestep_type final_sigmas_type algorithm_type solver_order solver_type "
    "lower_order_final euler_at_final predict_x0 disable_corrector solver_p "
    "lambda_min_clipped use_lu_lambdas use_flow_sigmas flow_shift".split()
)


def own_options(config_class: type, options: dict, where: str) -> dict:
    """The options that `config_class` has; refuses by name what it cannot honour."""
    valid = [field.name for field in fields(config_class)]
    for name, value in options.items():
        if name in NOT_IMPLEMENTED:
            if value != NOT_IMPLEMENTED[name]:
                raise ValueError(
                    f"{where}: {name}={value!r} is not implemented; "
                    f"leave it out or set it to {NOT_IMPLEMENTED[name]!r}"
                )
        elif name not in valid:
            raise ValueError(
                f"{where} has no option {name!r}; its options are {', '.join(valid)}"
            )
    return {name: options[name] for name in valid if name in options}


def read_scheduler_file(folder: str | os.PathLike) -> tuple[str, dict]:
    """The class name and the options in a folder's `scheduler_config.json`."""
    path = Path(folder) / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; pass the folder that holds a "
            "scheduler_config.json, usually <model>/scheduler"
        )
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    options = {key: v for key, v in values.items() if not key.startswith("_")}
    return str(values.get("_class_name")), options


def write_scheduler_file(folder: str | os.PathLike, values: dict) -> None:
    """Write a folder's `scheduler_config.json`, all of it or nothing."""
    path = Path(folder) / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(
        json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    beside.replace(path)


class Options:
    """Something built from named options. `options` holds those that were given."""

    config_class = SchedulerConfig

    def __init__(self, **options):
        self.options = own_options(self.config_class, options, type(self).__name__)
        self.config = self.config_class(**self.options)

    def __repr__(self):
        return f"{type(self).__name__}({self.config})"

    @classmethod
    def from_options(cls, options: dict, foreign: bool = False):
        """Build from a dict that may hold options of other schedulers as well.

        They are kept aside in `options`, for a later change of scheduler.
        """
        own = {field.name for field in fields(cls.config_class)} | set(NOT_IMPLEMENTED)
        elsewhere = {name for name in options if name not in own}
        unknown = elsewhere - OPTIONS_ELSEWHERE
        if unknown and not foreign:
            own_options(cls.config_class, dict.fromkeys(sorted(unknown)), cls.__name__)
        scheduler = cls(**{k: v for k, v in options.items() if k not in elsewhere})
        scheduler.options = {**options}
        return scheduler


class Configured(Options):
    """Something built from named options, which it can write to a file and read."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike):
        """Read a folder's `scheduler_config.json`, ours or diffusers'.

        `Scheduler.from_pretrained` builds the class that the file names, and
        `DDIMScheduler.from_pretrained` that one, with the options that both have.
        Raises FileNotFoundError or ValueError, naming the file.
        """
        written, options = read_scheduler_file(folder)
        try:
            kind = cls if cls in SCHEDULERS.values() else scheduler_class(written)
            return kind.from_options(options, foreign=kind.__name__ != written)
        except ValueError as error:
            path = Path(folder) / "scheduler_config.json"
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `scheduler_config.json` as diffusers does."""
        values = {"_class_name": type(self).__name__, **asdict(self.config)}
        write_scheduler_file(folder, values)


def _as_timesteps(t, x: Tensor) -> Tensor:
    """t as a tensor: one number, or one for each item of x; else ValueError."""
    t = torch.as_tensor(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
        raise ValueError(
            f"timesteps of shape {tuple(t.shape)} for a batch of {len(x)}; "
            "pass one integer, or one per item of the batch"
        )
    return t


class NoiseSchedule(Configured):
    """The forward process. `alphas_cumprod[t]` is ᾱ_t, the signal power left at t."""

    def __init__(self, **options):
        super().__init__(**options)
        config = self.config
        total = config.num_train_timesteps
        betas = make_betas(
            config.beta_schedule, total, config.beta_start, config.beta_end
        )
        if config.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.num_train_timesteps = total
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._tables = {}

    def check_timestep(self, t: SupportsInt) -> int:
        """t as an int; ValueError unless the schedule has it."""
        t = int(t)
        if not 0 <= t < self.num_train_timesteps:
            raise ValueError(
                f"timestep {t} is outside the schedule, "
                f"which runs from 0 to {self.num_train_timesteps - 1}"
            )
        return t

    def levels(
        self, t: int | Int[Tensor, "..."], x: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """(√ᾱ_t, √(1-ᾱ_t)), shaped to multiply x: the shares of signal and noise."""
        t = _as_timesteps(t, x)
        # On an accelerator the check would wait for the device at every training
        # step, and the indexing below is checked there anyway.
        if t.device.type == "cpu" and t.numel():
            self.check_timestep(t.min())
            self.check_timestep(t.max())
        if x.device not in self._tables:
            roots = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[x.device] = torch.stack(roots).to(x.device)
        signal, spread = self._tables[x.device][:, t.to(x.device)].to(x.dtype)
        shape = t.shape + (1,) * (x.ndim - t.ndim)
        return signal.reshape(shape), spread.reshape(shape)


def same_shape(x0: Tensor, noise: Tensor) -> None:
    if x0.shape != noise.shape:
        raise ValueError(
            f"x0 has shape {tuple(x0.shape)} but noise {tuple(noise.shape)}; "
            "every value of x0 needs noise of its own"
        )


Floats = Float[Tensor, "..."]
Timesteps = int | Int[Tensor, "..."]


class ForwardProcess(NoiseSchedule):
    """From clean to noisy, and what a network learns from it.

    x0 and noise have the shape (b, ...); t is an integer or (b,). All raise
    ValueError for a t outside 0 to num_train_timesteps - 1.
    """

    def add_noise(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """x_t = √ᾱ_t x0 + √(1-ᾱ_t) noise: all t steps at once (Ho et al., eq. 4)."""
        same_shape(x0, noise)
        signal, spread = self.levels(t, x0)
        return signal * x0 + spread * noise

    def velocity(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """v = √ᾱ_t noise - √(1-ᾱ_t) x0, the target of Salimans and Ho (2022)."""
        same_shape(x0, noise)
        signal, spread = self.levels(t, x0)
        return signal * noise - spread * x0

    def target(self, x0: Floats, noise: Floats, t: Timesteps) -> Floats:
        """What a network of this prediction type has to answer at (x_t, t)."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x0
        return self.velocity(x0, noise, t)

    def snr(self, t: Timesteps) -> Floats:
        """Signal-to-noise ratio ᾱ_t / (1-ᾱ_t), on the CPU."""
        alpha_bar = self.alphas_cumprod[t if isinstance(t, int) else t.cpu()]
        return alpha_bar / (1 - alpha_bar)


def whole_timesteps(spacing: str, total: int, n: int, offset: int) -> np.ndarray:
    """The n of `total` timesteps that a run visits, from noisy to clean.

    `leading`, `linspace` or `trailing`, as in Lin et al. (2024), table 2.
    """
    if spacing == "leading":
        steps = np.arange(n)[::-1] * (total // n)
        # At n = total there is no room for an offset: it shrinks to what fits.
        steps = steps + min(offset, total - 1 - int(steps[0]))
    elif spacing == "linspace":
        steps = np.linspace(0, total - 1, n).round()[::-1]
    else:
        # Rounding can leave one entry too many, a timestep -1: not beyond n.
        steps = np.arange(total, 0, -total / n)[:n].round() - 1
    return steps.astype(np.int64)


class Scheduler(ForwardProcess):
    """What all samplers share. Built with diffusers' option names as keywords."""

    init_noise_sigma = 1.0
    num_inference_steps = None

    def __init__(self, **options):
        super().__init__(**options)
        self.timesteps = torch.arange(self.num_train_timesteps - 1, -1, -1)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose which timesteps a sampling run of so many steps visits.

        `timesteps` holds them, from noisy to clean, on the CPU. Raises ValueError
        outside 1 to num_train_timesteps.
        """
        total, n, config = self.num_train_timesteps, num_inference_steps, self.config
        if not 1 <= n <= total:
            raise ValueError(
                f"num_inference_steps={n}: expected 1 to {total}, "
                "the number of timesteps that the model was trained with"
            )
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(
            whole_timesteps(config.timestep_spacing, total, n, config.steps_offset)
        )

    def skip(self, steps: int) -> None:
        """Leave out the first steps of the run that `set_timesteps` chose.

        For starting from a picture that is not all noise. ValueError if none is left.
        """
        if not 0 <= steps < self.num_inference_steps:
            raise ValueError(
                f"skip {steps} of {self.num_inference_steps} steps: at least one "
                "has to be left; call set_timesteps(n) before each skip"
            )
        self.timesteps = self.timesteps[steps:]

    def scale_model_input(
        self, x: Float[Tensor, "..."], t: int | float | Tensor
    ) -> Float[Tensor, "..."]:
        """The network's input for x: x itself, in the schedulers of this chapter."""
        return x


class Sampler(Scheduler):
    """A scheduler of the DDPM family: it thinks in x0 and noise."""

    final_alpha_bar = torch.tensor(1.0)  # after the last step nothing is noise

    def split(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsInt,
        x: Float[Tensor, "*shape"],
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """(x0, noise) that the model's output at x_t amounts to, before clipping."""
        alpha_bar = self.alphas_cumprod[self.check_timestep(t)]
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.config.prediction_type == "sample":
            return model_output, (x - signal * model_output) / spread
        if self.config.prediction_type == "v_prediction":
            x0 = signal * x - spread * model_output
            return x0, signal * model_output + spread * x
        if alpha_bar == 0:
            raise ValueError(
                f"timestep {int(t)} is pure noise (ᾱ = 0), so a model that predicts "
                "epsilon says nothing about x0 there; use prediction_type="
                "'v_prediction', or rescale_betas_zero_snr=False"
            )
        return (x - spread * model_output) / signal, model_output

    def clip(self, x0: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """x0 limited to ±clip_sample_range where the config asks for it."""
        if not self.config.clip_sample:
            return x0
        return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

    def alpha_bars(self, t: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """ᾱ at t, and where the step from t leads to."""
        previous = self.previous_timestep(t)
        if previous < 0:
            return self.alphas_cumprod[t], self.final_alpha_bar
        return self.alphas_cumprod[t], self.alphas_cumprod[previous]

    def variance(self, t: SupportsInt) -> Float[Tensor, ""]:
        """The posterior's variance for the step at t (Song et al., equation 16)."""
        alpha_bar, before = self.alpha_bars(self.check_timestep(t))
        return (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)


def posterior_mean(x0: Floats, x: Floats, alpha_bar: Tensor, before: Tensor) -> Floats:
    """The mean of q(x_s | x_t, x0): Ho et al. (2020), equation 7, for any s < t.

    `alpha_bar` is ᾱ at t, `before` ᾱ at s.
    """
    alpha = alpha_bar / before
    x0_weight = before.sqrt() * (1 - alpha) / (1 - alpha_bar)
    x_weight = alpha.sqrt() * (1 - before) / (1 - alpha_bar)
    return x0_weight * x0 + x_weight * x


def noise_like(
    x: Float[Tensor, "*shape"],
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Float[Tensor, "*shape"]:
    """Standard normal noise of x's shape and dtype, on x's device.

    It is drawn on the generator's device: a CPU generator gives the same noise
    whatever device x lives on. A list of generators gives picture k noise from
    generator k alone, so that it does not depend on the rest of the batch.
    """
    if not isinstance(generator, list):
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        return noise.to(x.device)
    if len(generator) != len(x):
        raise ValueError(
            f"{len(generator)} generators for a batch of {len(x)}; pass one per picture"
        )
    return torch.cat([noise_like(x[k : k + 1], g) for k, g in enumerate(generator)])


class DDPMScheduler(Sampler):
    """Ancestral sampling of Ho et al. (2020): the posterior mean, plus fresh noise."""

    config_class = DDPMConfig

    def previous_timestep(self, t: int) -> int:
        """The timestep that follows t on the way back; -1 after the last."""
        if self.num_inference_steps is None:
            return t - 1
        found = (self.timesteps == t).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"timestep {t} is not one of the {self.num_inference_steps} that "
                "set_timesteps chose; step through scheduler.timesteps"
            )
        following = self.timesteps[int(found[0]) + 1 :]
        return int(following[0]) if len(following) else -1

    def variance(self, t: SupportsInt) -> Float[Tensor, ""]:
        """Variance of the noise that the step at t adds (equation 7; β_t if large)."""
        alpha_bar, before = self.alpha_bars(self.check_timestep(t))
        beta = 1 - alpha_bar / before
        if self.config.variance_type == "fixed_large":
            return beta
        return ((1 - before) / (1 - alpha_bar) * beta).clamp(min=1e-20)

    def step(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsInt,
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """x at the previous timestep, drawn from q(x_prev | x_t, x0 as predicted).

        Ho et al. (2020), equation 7, with ᾱ of the timesteps actually visited.
        """
        t = self.check_timestep(t)
        x0, _ = self.split(model_output, t, sample)
        mean = posterior_mean(self.clip(x0), sample, *self.alpha_bars(t))
        if t == 0:
            return mean
        return mean + self.variance(t).sqrt() * noise_like(sample, generator)


class DDIMScheduler(Sampler):
    """Deterministic sampling of Song et al. (2021), with as few steps as you like.

    As in diffusers, a step goes `num_train_timesteps // n` down for every spacing. With
    `linspace` and `trailing` that can miss the next timestep visited; the noise level
    is then slightly wrong, and we give the same result on purpose.
    """

    config_class = DDIMConfig

    def __init__(self, **options):
        super().__init__(**options)
        if not self.config.set_alpha_to_one:
            self.final_alpha_bar = self.alphas_cumprod[0]

    def previous_timestep(self, t: int) -> int:
        """`t - num_train_timesteps // num_inference_steps`; negative after the last."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(n) before the first step")
        return t - self.num_train_timesteps // self.num_inference_steps

    def step(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsInt,
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: int | float = 0.0,
    ) -> Float[Tensor, "*shape"]:
        """x at the previous timestep. Song et al. (2021), equation 12.

        `eta`: fresh noise, from 0 (the start decides the end) to 1 (as much as DDPM).
        """
        t = self.check_timestep(t)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected 0 (deterministic) to 1 (DDPM)")
        x0, noise = self.split(model_output, t, sample)
        _, before = self.alpha_bars(t)
        std = eta * self.variance(t).sqrt()
        direction = (1 - before - std**2).clamp(min=0).sqrt() * noise
        previous = before.sqrt() * self.clip(x0) + direction
        if eta > 0:
            previous = previous + std * noise_like(sample, generator)
        return previous


SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


def scheduler_class(name: str) -> type[Scheduler]:
    """The class called `name`: ours (`ddim`) or diffusers' (`DDIMScheduler`)."""
    for short, kind in SCHEDULERS.items():
        if name in (short, kind.__name__):
            return kind
    raise ValueError(
        f"no scheduler is called {name!r}; there are {', '.join(SCHEDULERS)}"
    )


def make_scheduler(name: str, **config) -> Scheduler:
    """Build a scheduler by name, such as `ddim`, with diffusers' options."""
    return scheduler_class(name)(**config)


def change_scheduler(scheduler: Scheduler, name: str) -> Scheduler:
    """The scheduler called `name` for the same model: the shared options stay."""
    return scheduler_class(name).from_options(scheduler.options, foreign=True)


Level = Float[Tensor, ""]


def predicted_x0(
    prediction_type: str, output: Floats, x: Floats, signal: Level, spread: Level
) -> Floats:
    """x0 from what the network answered at x = signal * x0 + spread * noise.

    x may have any scale: (√ᾱ, √(1-ᾱ)) as in chapter 7, or (1, σ). The network itself
    always sees variance 1, and so `v_prediction` means the velocity there.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (x - spread * output) / signal
    size = (signal**2 + spread**2).sqrt()
    return (signal * x / size - spread * output) / size


def spaced_timesteps(
    spacing: str, n: int, points: int, total: int, offset: int
) -> np.ndarray:
    """The n noisiest of `points` timesteps spread over 0 to total - 1, float64.

    They need not be whole, and an offset may lead past total - 1, as in diffusers.
    With `trailing`, rounding sometimes leaves one too many, a timestep -1.
    """
    if spacing == "linspace":
        return np.linspace(0, total - 1, points)[::-1][:n]
    if spacing == "leading":
        return np.arange(points)[::-1][:n] * (total // points) + float(offset)
    return np.arange(total, 0, -total / n).round() - 1


def karras_sigmas(largest: float, smallest: float, n: int) -> np.ndarray:
    """n values of σ, evenly spaced in σ^(1/7). Karras et al. (2022), equation 5."""
    roots = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), n)
    return roots**7


class Choosy(Scheduler):
    """A scheduler that refuses values of diffusers' options that it cannot honour."""

    # An option, and the values that we have. The first is what all of them mean:
    # diffusers maps the other names to it, and so files that hold them work.
    accepts: ClassVar[dict[str, tuple]] = {}

    @classmethod
    def from_options(cls, options: dict, foreign: bool = False):
        for name, values in cls.accepts.items():
            if options.get(name, values[0]) not in values:
                raise ValueError(
                    f"{cls.__name__}: {name}={options[name]!r} is not implemented; "
                    f"set it to {values[0]!r}, or choose another scheduler"
                )
        return super().from_options(options, foreign)


class InOrder(Choosy):
    """A scheduler with a memory: steps come in the order of `timesteps`.

    `set_timesteps` wipes the memory and begins a new run.
    """

    position = None  # in `timesteps`; None before the first step
    history = ()  # what earlier steps found

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        self.position, self.history = None, []

    def find(self, t: SupportsFloat) -> int:
        """Where t stands; if at two places, the second, where a step begins."""
        places = (self.timesteps == float(t)).nonzero().flatten().tolist()
        if not places:
            raise ValueError(
                f"timestep {float(t):g} is not one of the {len(self.timesteps)} that "
                "set_timesteps chose; step through scheduler.timesteps"
            )
        return places[0] if places[0] == 0 else places[:2][-1]

    def place(self, t: SupportsFloat) -> int:
        """Where the run stands, which must be at t. Only the first step is free."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(n) before the first step")
        if self.position is None:
            return self.find(t)
        if self.position == len(self.timesteps):
            raise ValueError(
                f"timestep {float(t):g} after the last step of a run; "
                "call set_timesteps(n) to begin another"
            )
        expected = float(self.timesteps[self.position])
        if float(t) != expected:
            raise ValueError(
                f"timestep {float(t):g} out of order: step {self.position + 1} of "
                f"{len(self.timesteps)} is {expected:g}; go through "
                "scheduler.timesteps, or call set_timesteps(n) to begin again"
            )
        return self.position


@dataclass(frozen=True, kw_only=True)
class SigmaConfig(SchedulerConfig):
    """Options of the samplers that walk down a table of σ."""

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False


class SigmaTable(InOrder):
    """The levels of a sampler of x = x0 + σ * noise.

    `sigmas` has one σ for each entry of `timesteps`, and 0 at the end. As in
    diffusers, timesteps may be fractions, and 1000 leading steps with an offset begin
    at timestep 1000, with the σ of 999.
    """

    config_class = SigmaConfig
    accepts = {
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    }

    def __init__(self, **options):
        super().__init__(**options)
        if self.config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # σ = 4096 and not ∞, as in diffusers
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.training_sigmas = sigmas.numpy()
        self.sigmas = torch.cat([sigmas.flip(0), sigmas.new_zeros(1)])

    def choose(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n timesteps and their σ."""
        config, every = self.config, np.arange(self.num_train_timesteps)
        timesteps = spaced_timesteps(
            config.timestep_spacing, n, n, len(every), config.steps_offset
        ).astype(np.float32)
        sigmas = np.interp(timesteps, every, self.training_sigmas)
        if config.use_karras_sigmas:
            sigmas = karras_sigmas(sigmas[0], sigmas[-1], n)
            timesteps = np.interp(np.log(sigmas), np.log(self.training_sigmas), every)
        return timesteps[:n].astype(np.float32), sigmas[:n]

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        timesteps, sigmas = self.choose(num_inference_steps)
        self.timesteps = torch.from_numpy(timesteps)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))

    def skip(self, steps: int) -> None:
        entries = len(self.timesteps)
        super().skip(steps)
        self.sigmas = self.sigmas[entries - len(self.timesteps) :]


class SigmaScales(SigmaTable):
    """How large x is: for the network, at the start, and in `add_noise`."""

    @property
    def init_noise_sigma(self) -> float:
        """The spread of the x that a run starts from, as diffusers has it.

        With `leading` timesteps it is √(σ²+1), the spread of x0 + σ * noise for data
        of variance 1; otherwise σ itself.
        """
        largest = self.sigmas.max()
        if self.config.timestep_spacing == "leading":
            return (largest**2 + 1).sqrt().item()
        return largest.item()

    def shares(self, sigma: Floats) -> tuple[Floats, Floats]:
        """How much x0 and how much noise there is in x."""
        return torch.ones_like(sigma), sigma

    def scale_model_input(self, x: Floats, t: SupportsFloat) -> Floats:
        """x / √(σ²+1): networks are trained on variance 1."""
        return x / (self.sigmas[self.place(t)] ** 2 + 1).sqrt()

    def add_noise(self, x0: Floats, noise: Floats, t: SupportsFloat) -> Floats:
        """x at timestep t, one of `timesteps`, or one for each item of the batch."""
        same_shape(x0, noise)
        steps = torch.as_tensor(t).flatten().tolist()
        if len(steps) not in (1, len(x0)):
            raise ValueError(
                f"{len(steps)} timesteps for a batch of {len(x0)}; "
                "pass one, or one per item of the batch"
            )
        sigma = self.sigmas[[self.find(step) for step in steps]].to(x0)
        signal, spread = self.shares(sigma.reshape(-1, *[1] * (x0.ndim - 1)))
        return signal * x0 + spread * noise


class SigmaScheduler(SigmaScales):
    """A sampler of x = x0 + σ * noise that walks down a table of σ.

    All share the step; each only says how to `advance`.
    """

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        """x at sigmas[i + 1], from x at sigmas[i] and the guess of x0 there."""
        raise NotImplementedError(f"{type(self).__name__} has no advance(x, x0, i, …)")

    def remember(self, sigma: Level, value: Floats, count: int) -> None:
        """Keep what was found at this σ and at the count - 1 others before it."""
        if self.history and self.history[-1][0] == sigma:
            self.history.pop()  # a step of no length taught us nothing
        self.history = [*self.history, (sigma, value)][-count:]

    def step(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsFloat,
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """x at the next σ. ValueError for a t out of order (see `InOrder`)."""
        i = self.place(t)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        signal, spread = self.shares(self.sigmas[i])
        kind = self.config.prediction_type
        x0 = predicted_x0(kind, model_output.to(x.dtype), x, signal, spread)
        x = self.advance(x, x0, i, generator)
        self.position = i + 1
        return x.to(sample.dtype)


def euler_step(x: Floats, x0: Floats, sigma: Level, following: Level) -> Floats:
    """Follow the slope dx/dσ = (x - x0) / σ straight to the next σ.

    x is x0 + sigma * noise. The step of DDIM (Song et al., 2021, section 4.3) and of
    Karras et al. (2022), algorithm 1.
    """
    slope = (x - x0) / sigma
    return x + (following - sigma) * slope


class EulerDiscreteScheduler(SigmaScheduler):
    """Euler's method in σ (Karras et al., 2022). The name for it is `euler`."""

    accepts = SigmaScheduler.accepts | {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        return euler_step(x, x0, *self.sigmas[i : i + 2])


def heun_step(
    x: Floats,
    slope: Floats,
    arrived: Floats,
    x0: Floats,
    sigma: Level,
    following: Level,
) -> Floats:
    """Euler's step from x again, with the mean of the slopes at both its ends.

    `arrived` is where Euler's step led, x0 the guess there. Karras et al. (2022),
    algorithm 1, lines 7 and 8.
    """
    slope_there = (arrived - x0) / following
    return x + (following - sigma) * (slope + slope_there) / 2


@dataclass(frozen=True, kw_only=True)
class HeunConfig(SigmaConfig):
    """Options of `HeunDiscreteScheduler`, with its own defaults."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: ClassVar[bool] = False  # no option here


class HeunDiscreteScheduler(SigmaScheduler):
    """Heun's method in σ (Karras et al., 2022): n steps ask the network 2n - 1 times.

    All timesteps but the first come twice, once as the end of a step and once as the
    beginning of the next.
    """

    config_class = HeunConfig
    accepts = SigmaScheduler.accepts | {"rescale_betas_zero_snr": (False,)}

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        first, others = self.timesteps[:1], self.timesteps[1:]
        self.timesteps = torch.cat([first, others.repeat_interleave(2)])
        first, others, zero = self.sigmas[:1], self.sigmas[1:-1], self.sigmas[-1:]
        self.sigmas = torch.cat([first, others.repeat_interleave(2), zero])

    def skip(self, steps: int) -> None:
        super().skip(steps)
        self.timesteps, self.sigmas = self.timesteps[steps:], self.sigmas[steps:]

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            x0 = x0.clamp(-limit, limit)
        if i % 2 == 0:
            self.history = [x, (x - x0) / self.sigmas[i]]
            return euler_step(x, x0, *self.sigmas[i : i + 2])
        return heun_step(*self.history, x, x0, *self.sigmas[i - 1 : i + 1])


def lagrange_weights(nodes: Sequence[int | float], end: int | float) -> list[float]:
    """The integral, from the last node to `end`, of the polynomial through the nodes.

    As weights of its values there. Exact for up to four nodes: Gauss's rule with two
    points integrates any cubic.
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


def lms_step(
    x: Floats, sigmas: Sequence[Level], slopes: Sequence[Floats], following: Level
) -> Floats:
    """Follow the polynomial through the last slopes (linear multistep method).

    Adams and Bashforth's method for steps of any length; newest last, four at most.
    """
    weights = lagrange_weights([float(s) for s in sigmas], float(following))
    return x + sum(weight * slope for weight, slope in zip(weights, slopes))


@dataclass(frozen=True, kw_only=True)
class LMSConfig(SigmaConfig):
    """Options of `LMSDiscreteScheduler`."""

    rescale_betas_zero_snr: ClassVar[bool] = False  # no option here


class LMSDiscreteScheduler(SigmaScheduler):
    """Linear multistep in σ: one call of the network for each step.

    Of order 4 once four slopes are known; the first step is Euler's. A run
    that skips steps begins at order 1, like any other. (diffusers weighs its first
    slopes as if there had been others before, and steps up to twice too far.)
    """

    config_class = LMSConfig
    accepts = HeunDiscreteScheduler.accepts

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        self.remember(self.sigmas[i], (x - x0) / self.sigmas[i], 4)
        return lms_step(x, *zip(*self.history), self.sigmas[i + 1])


def transfer(x: Floats, noise: Floats, alpha_bar: Level, following: Level) -> Floats:
    """To the next ᾱ along this noise: DDIM, in the form of Liu et al. (2022)."""
    roots = alpha_bar * (1 - following).sqrt()
    roots = roots + (alpha_bar * (1 - alpha_bar) * following).sqrt()
    weight = (following - alpha_bar) / roots
    return (following / alpha_bar).sqrt() * x - weight * noise


def plms_noise(noises: Sequence[Floats]) -> Floats:
    """The last noises as one, by Adams and Bashforth (equation 12 for four)."""
    weights = lagrange_weights(range(len(noises)), len(noises))
    return sum(weight * noise for weight, noise in zip(weights, noises))


def runge_kutta_noise(noises: Sequence[Floats]) -> Floats:
    """One noise from those at the start, twice in the middle, and the end (eq. 13)."""
    start, middle, middle_again, end = noises
    return (start + 2 * middle + 2 * middle_again + end) / 6


@dataclass(frozen=True, kw_only=True)
class PNDMConfig(SchedulerConfig):
    """Options of `PNDMScheduler`. Stable Diffusion sets `skip_prk_steps=True`."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: ClassVar[bool] = False  # no option here


class PNDMTimesteps(InOrder, Sampler):
    """Where `PNDMScheduler` asks the network: more often than n times."""

    config_class = PNDMConfig
    accepts = {"rescale_betas_zero_snr": (False,)}

    def __init__(self, **options):
        super().__init__(**options)
        if not self.config.set_alpha_to_one:
            self.final_alpha_bar = self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps)
        self.stride = self.num_train_timesteps // num_inference_steps
        self.visited = self.timesteps
        self.add_warm_up()

    def add_warm_up(self) -> None:
        """Put the further calls of the first steps into `timesteps`."""
        visited, warm_up = self.timesteps.tolist(), []
        if self.config.skip_prk_steps:
            visited = visited[:2] + visited[1:]
        else:
            for upper, lower in zip(visited[:3], visited[1:4]):
                middle = lower + self.stride // 2
                warm_up += [upper, middle, middle, lower]
            visited = visited[len(warm_up) // 4 :]
        self.num_runge_kutta = len(warm_up)
        self.timesteps = torch.tensor(warm_up + visited)

    def skip(self, steps: int) -> None:
        if self.config.skip_prk_steps:
            super().skip(steps)
        else:
            self.timesteps = self.visited
            super().skip(steps)
            self.add_warm_up()


class PNDMMoves(PNDMTimesteps):
    """The two kinds of steps that `PNDMScheduler` makes."""

    def move(self, x: Floats, output: Floats, t: int, previous: int) -> Floats:
        """From t to another timestep, along the noise that the output amounts to."""
        _, noise = self.split(output, t, x)
        alpha_bar, following = self.alphas_cumprod[[t, max(previous, 0)]]
        if previous < 0:
            following = self.final_alpha_bar
        return transfer(x, noise, alpha_bar, following)

    def runge_kutta_step(self, output: Floats, t: int, x: Floats, i: int) -> Floats:
        stage = i % 4
        if stage == 0:
            self.start, self.stages = x, []
            self.history.append(output)
        self.stages.append(output)
        if stage == 3:
            output = runge_kutta_noise(self.stages)
        previous = t if stage % 2 else t - self.stride // 2
        return self.move(self.start, output, int(self.timesteps[i - stage]), previous)

    def multistep(self, output: Floats, t: int, x: Floats, i: int) -> Floats:
        if i == 1:  # the first step once more, with the mean of what both its ends say
            output = (self.history[0] + output) / 2
            return self.move(self.start, output, t + self.stride, t)
        self.start, self.history = x, [*self.history, output][-4:]
        return self.move(x, plms_noise(self.history), t, t - self.stride)


class PNDMScheduler(PNDMMoves):
    """Pseudo numerical methods of Liu et al. (2022): Adams and Bashforth on the noise.

    The first three steps have too little history. They are Runge and Kutta's, four
    calls each; or, with `skip_prk_steps`, of lower order, the first of them made twice.

    Of order 2: the weights are for equal steps in t, and the noise counts in σ.

    As in diffusers, a step from t leads to `t - num_train_timesteps // n` for every
    spacing (see `DDIMScheduler`), and outputs are averaged before `v_prediction` is
    turned into noise.

    Where diffusers fails, we do not. At n = 1000 an offset shrinks to what fits. With
    n below 4 there are n - 1 steps of Runge and Kutta's. And `prediction_type="sample"`
    works.

    For runs that skip steps other samplers suit better. With `skip_prk_steps` such a
    run has the timesteps that diffusers gives it. The second of them is then no
    repetition, and x stays one step noisier than the network is told.
    """

    def find(self, t: SupportsFloat) -> int:
        if float(t) != self.timesteps[0]:
            raise ValueError(
                f"timestep {float(t):g} cannot be the first: PNDM's warm-up begins at "
                f"{self.timesteps[0]}; call set_timesteps(n) and begin there"
            )
        return 0

    def step(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsFloat,
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """x at the next of `timesteps`. ValueError for a t out of order."""
        i = self.place(t)
        warm_up = i < self.num_runge_kutta
        advance = self.runge_kutta_step if warm_up else self.multistep
        result = advance(model_output, int(t), sample, i)
        self.position = i + 1
        return result


def unit_shares(sigma: Floats) -> tuple[Floats, Floats]:
    """σ as (√ᾱ, √(1-ᾱ)): the shares of signal and noise at variance 1."""
    signal = 1 / (sigma**2 + 1).sqrt()
    return signal, sigma * signal


def log_snr(sigma: Floats) -> Floats:
    """λ = log(√ᾱ / √(1-ᾱ)) = -log σ: half the log of the signal-to-noise ratio."""
    return -sigma.log()


def dpmpp_2m_step(
    x: Floats, sigmas: Sequence[Level], x0s: Sequence[Floats], following: Level
) -> Floats:
    """DPM-Solver++(2M): x0 goes on as it went, and the rest is solved exactly.

    x has variance 1. `sigmas` and `x0s` hold this step's and the one's before, newest
    last; with one entry it is DDIM. Lu et al. (2022b), algorithm 2.
    """
    signal, spread = unit_shares(following)
    _, spread_now = unit_shares(sigmas[-1])
    h = log_snr(following) - log_snr(sigmas[-1])
    x0 = x0s[-1]
    if len(x0s) > 1:
        h_before = log_snr(sigmas[-1]) - log_snr(sigmas[-2])
        x0 = x0 + h / (2 * h_before) * (x0 - x0s[-2])
    return spread / spread_now * x - signal * torch.expm1(-h) * x0


class SolverScheduler(SigmaScheduler):
    """A sampler of x at variance 1, the network's own scale, that counts in λ.

    Timesteps are whole numbers. With `linspace` and `leading` they are the n noisiest
    of n + 1, for the last step ends at σ = 0 anyway. With about 1000 steps two can
    have the same σ, and diffusers divides by zero; here such a step changes nothing.
    """

    accepts = SigmaScheduler.accepts | {
        "solver_order": (2,),
        "final_sigmas_type": ("zero",),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    }
    init_noise_sigma = 1.0

    def shares(self, sigma: Floats) -> tuple[Floats, Floats]:
        return unit_shares(sigma)

    def scale_model_input(self, x: Floats, t: SupportsFloat) -> Floats:
        return x

    def whole(self, timesteps: np.ndarray) -> np.ndarray:
        """The whole timesteps that stand for Karras' fractions."""
        return timesteps.round().astype(np.int64)

    def choose(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        config, every = self.config, np.arange(self.num_train_timesteps)
        if config.use_karras_sigmas:
            table = self.training_sigmas
            sigmas = karras_sigmas(float(table[-1]), float(table[0]), n)
            return self.whole(np.interp(np.log(sigmas), np.log(table), every)), sigmas
        # diffusers gives 1000 leading steps one timestep 1000 times over. Not here.
        leading = config.timestep_spacing == "leading"
        points = min(n + 1, len(every)) if leading else n + 1
        steps = spaced_timesteps(
            config.timestep_spacing, n, points, len(every), config.steps_offset
        )[:n].round().astype(np.int64)
        return steps, np.interp(steps, every, self.training_sigmas)


class DPMSolverMultistepScheduler(SolverScheduler):
    """DPM-Solver++(2M) of Lu et al. (2022b); the last step, to σ = 0, is DDIM's."""

    accepts = SolverScheduler.accepts | {
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        "use_lu_lambdas": (False,),
        "lambda_min_clipped": (-math.inf,),
    }

    def whole(self, timesteps: np.ndarray) -> np.ndarray:
        if self.config.beta_schedule == "squaredcos_cap_v2":
            return timesteps.astype(np.int64)  # rounded down, as in diffusers
        return super().whole(timesteps)

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        self.remember(self.sigmas[i], x0, 2)
        last = i == len(self.timesteps) - 1
        sigmas, x0s = zip(*self.history[-1 if last else -2 :])
        return dpmpp_2m_step(x, sigmas, x0s, self.sigmas[i + 1])


def unic_step(
    x: Floats,
    sigmas: Sequence[Level],
    x0s: Sequence[Floats],
    arrived: Level,
    x0: Floats,
) -> Floats:
    """UniC: the step from x again, now that x0 at its end is known as well.

    Exact for x0s that lie on a parabola in λ; with none but those at both ends it
    takes their mean. Zhao et al. (2023), section 3, with B(h) = exp(-h) - 1.
    """
    signal, spread = unit_shares(arrived)
    _, spread_before = unit_shares(sigmas[-1])
    h = log_snr(arrived) - log_snr(sigmas[-1])
    decay = torch.expm1(-h)
    change = (x0 - x0s[-1]) / 2
    if len(x0s) > 1:
        r = (log_snr(sigmas[-2]) - log_snr(sigmas[-1])) / h
        line = (-decay / h - 1) / decay  # the weight of x0 that goes as λ
        square = 2 * ((decay / h + 1) / h - 0.5) / decay  # and as λ²
        before = (line - square) / (1 - r)
        change = before / r * (x0s[-2] - x0s[-1]) + (line - before) * (x0 - x0s[-1])
    return spread / spread_before * x - signal * decay * (x0s[-1] + change)


class UniPCMultistepScheduler(SolverScheduler):
    """UniPC of Zhao et al. (2023): first correct where we are, then go on.

    The predictor is of order 2, and with the corrector the method is of order 3. The
    last step is not corrected.
    """

    accepts = SolverScheduler.accepts | {
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([],),
        "solver_p": (None,),
        "sigma_min": (None,),
        "sigma_max": (None,),
        "shift_terminal": (None,),
    }

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        if self.history and self.history[-1][0] != self.sigmas[i]:
            x = unic_step(self.corrected, *zip(*self.history), self.sigmas[i], x0)
        self.remember(self.sigmas[i], x0, 2)
        self.corrected = x
        last = i == len(self.timesteps) - 1
        sigmas, x0s = zip(*self.history[-1 if last else -2 :])
        return dpmpp_2m_step(x, sigmas, x0s, self.sigmas[i + 1])


def euler_ancestral_step(
    x: Floats, x0: Floats, sigma: Level, following: Level, noise: Floats
) -> Floats:
    """Go down farther than the next σ, and come up to it with fresh noise.

    The posterior of DDPM (Ho et al., 2020, equation 7) for x = x0 + sigma * noise.
    """
    ratio = following / sigma
    down, up = following * ratio, following * (1 - ratio**2).sqrt()
    return euler_step(x, x0, sigma, down) + up * noise


@dataclass(frozen=True, kw_only=True)
class EulerAncestralConfig(SigmaConfig):
    """Options of `EulerAncestralDiscreteScheduler`."""

    use_karras_sigmas: ClassVar[bool] = False  # no option here


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Euler's method with fresh noise in every step. The name for it is `euler_a`."""

    config_class = EulerAncestralConfig
    accepts = {}

    def advance(self, x: Floats, x0: Floats, i: int, generator) -> Floats:
        noise = noise_like(x, generator)
        return euler_ancestral_step(x, x0, *self.sigmas[i : i + 2], noise)


SCHEDULERS.update(
    pndm=PNDMScheduler,
    lms=LMSDiscreteScheduler,
    euler=EulerDiscreteScheduler,
    euler_a=EulerAncestralDiscreteScheduler,
    heun=HeunDiscreteScheduler,
    dpmpp_2m=DPMSolverMultistepScheduler,
    unipc=UniPCMultistepScheduler,
)
OPTIONS_ELSEWHERE.update(["use_dynamic_shifting", "time_shift_type", "shift_terminal"])
