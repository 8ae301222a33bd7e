"""Noise, and the way back

Generated from chapters/07_schedulers.ipynb; do not edit.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import SupportsInt

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
    "Configured",
    "NoiseSchedule",
    "same_shape",
    "Floats",
    "Timesteps",
    "ForwardProcess",
    "Scheduler",
    "Sampler",
    "noise_like",
    "DDPMScheduler",
    "DDIMScheduler",
    "SCHEDULERS",
    "scheduler_class",
    "make_scheduler",
    "change_scheduler",
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


class Configured:
    """Something built from named options, which it can write to a file and read."""

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
        path = Path(folder) / "scheduler_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": type(self).__name__, **asdict(self.config)}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)  # all of it or nothing: never half a file


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
        t = torch.as_tensor(t)
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
            raise ValueError(
                f"timesteps of shape {tuple(t.shape)} for a batch of {len(x)}; "
                "pass one integer, or one per item of the batch"
            )
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
        total, n = self.num_train_timesteps, num_inference_steps
        if not 1 <= n <= total:
            raise ValueError(
                f"num_inference_steps={n}: expected 1 to {total}, "
                "the number of timesteps that the model was trained with"
            )
        if self.config.timestep_spacing == "leading":
            steps = np.arange(n)[::-1] * (total // n)
            # At n = total there is no room for an offset: it shrinks to what fits.
            steps = steps + min(self.config.steps_offset, total - 1 - int(steps[0]))
        elif self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, n).round()[::-1]
        else:
            # Rounding can leave one entry too many, a timestep -1: not beyond n.
            steps = np.arange(total, 0, -total / n)[:n].round() - 1
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(steps.astype(np.int64))

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
        alpha_bar, before = self.alpha_bars(t)
        alpha = alpha_bar / before
        x0_weight = before.sqrt() * (1 - alpha) / (1 - alpha_bar)
        x_weight = alpha.sqrt() * (1 - before) / (1 - alpha_bar)
        mean = x0_weight * self.clip(x0) + x_weight * sample
        if t == 0:
            return mean
        return mean + self.variance(t).sqrt() * noise_like(sample, generator)


class DDIMScheduler(Sampler):
    """Deterministic sampling of Song et al. (2021), with as few steps as you like.

    As in diffusers, the previous timestep is `t - num_train_timesteps // n` for every
    timestep spacing. With `leading` that is the next timestep visited; with `linspace`
    and `trailing` it can miss it, and the noise level taken off is then slightly wrong.
    We give the same result on purpose. Where diffusers has no result (n = 1000 with
    `steps_offset=1` runs past the table) the offset shrinks to what fits.
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

    def variance(self, t: SupportsInt) -> Float[Tensor, ""]:
        """The noise variance of a step at t for eta = 1 (equation 16)."""
        alpha_bar, before = self.alpha_bars(self.check_timestep(t))
        return (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)

    def step(
        self,
        model_output: Float[Tensor, "*shape"],
        t: SupportsInt,
        sample: Float[Tensor, "*shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: int | float = 0.0,
    ) -> Float[Tensor, "*shape"]:
        """x at the previous timestep. Song et al. (2021), equation 12.

        `eta` scales the fresh noise from 0 (none: the same start always ends in the
        same picture) to 1 (as much as DDPM).
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
    """Build a scheduler by name, `ddpm` or `ddim`, with diffusers' options."""
    return scheduler_class(name)(**config)


def change_scheduler(scheduler: Scheduler, name: str) -> Scheduler:
    """The scheduler called `name` for the same model: the shared options stay."""
    return scheduler_class(name).from_options(scheduler.options, foreign=True)
