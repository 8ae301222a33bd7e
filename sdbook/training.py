"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import hashlib
import importlib.util
import json
import math
import os
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    default_collate,
    get_worker_info,
)
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .attention import SpatialTransformer, TransformerBlock
from .clip import (
    CLIP,
    CLIPTextConfig,
    CLIPTextModel,
    ImageTower,
    Tokenizer,
    contrastive_loss,
    quick_gelu,
)
from .files import read_weights, save_weights, write_atomically
from .images import CaptionedImages, CaptionedShards, Cut, to_pixels
from .pipeline import (
    StableDiffusion,
    check_tokenizer,
    find_model,
    find_tokenizer,
    load_scheduler,
    to_pictures,
)
from .resblocks import ResBlock
from .scenes import (
    COLOURS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    CrowdedScenes,
    Request,
    Scene,
    Scenes,
    arrange,
    describe,
    draw,
    is_held_out,
)
from .schedulers import DDIMScheduler
from .unet import UNet, UNetConfig, start_as_identity
from .vae import AutoencoderKL, DiagonalGaussian, VAEConfig
from .weights import build_empty

__all__ = [
    "StepSampler",
    "step_generator",
    "min_snr_weights",
    "lean_to_noise",
    "Corruption",
    "DiffusionLoss",
    "mean_where",
    "learning_rate_at",
    "EMA",
    "save_checkpoint",
    "load_checkpoint",
    "Run",
    "take_step",
    "optimise",
    "PatchCritic",
    "balance",
    "WithCritic",
    "latent_noise",
    "VAEGame",
    "start_certain",
    "latent_spread",
    "decided",
    "exchange",
    "say_alike",
    "invent_twin",
    "Twins",
    "start_apart",
    "write_texts",
    "Encoded",
    "whitening",
    "start_white",
    "Validation",
    "train",
    "AT_LEAST_ONE",
    "NOT_NEGATIVE",
    "RUN_CHOICES",
    "check_run",
    "check_machine",
    "check_multiple",
    "check_side",
    "PictureSettings",
    "StepSettings",
    "OutputSettings",
    "RunConfig",
    "is_whole",
    "read_checkpoint",
    "other_model",
    "find_checkpoint",
    "check_fits",
    "set_aside",
    "WITHOUT_EFFECT",
    "Settings",
    "step_of",
    "Log",
    "TEN_BAD_STEPS",
    "Meter",
    "make_accelerator",
    "pictures_per_step",
    "count_steps",
    "is_main_process",
    "recompute_blocks",
    "keep_all",
    "mean_of_all",
    "find_start",
    "open_tracker",
    "finish",
    "StopNote",
    "leave_signals_to_main",
    "is_due",
    "report",
    "progress",
    "step_loader",
    "Fused",
    "kept_bytes",
    "memory_needed",
    "say_plan",
    "readable",
    "describe_plan",
    "VAETrainingConfig",
    "check_vae_choices",
    "VGG_MEAN",
    "VGG_STD",
    "stages_of_vgg",
    "stages_of_tower",
    "QuickGELU",
    "PerceptualDistance",
    "open_dataset",
    "new_vae",
    "rebuilt_sheet",
    "reconstruction_psnr",
    "train_vae",
    "CLIPTrainingConfig",
    "captions_of",
    "new_text_encoder",
    "caption_ids",
    "warn_about_long",
    "Tokenize",
    "train_clip",
    "KEY_LENGTH",
    "short_name",
    "fingerprint",
    "write_at",
    "Rows",
    "look_into",
    "look_key",
    "list_items",
    "Missing",
    "MissingInShards",
    "BATCH_PIXELS",
    "write_moments",
    "side_of",
    "fill_cache",
    "find_rows",
    "encode_dataset",
    "UNetShape",
    "UNET_SIZES",
    "PRESETS",
    "asked_sizes",
    "NoiseSettings",
    "TrainingConfig",
    "make_noise_schedule",
    "check_noise",
    "check_shape",
    "FROZEN",
    "source_of",
    "open_frozen",
    "unet_from_zero",
    "check_asked_sizes",
    "find_sizes",
    "new_unet",
    "check_schedule",
    "as_it_is",
    "hold_out",
    "sheet_of",
    "unet_memory",
]


class StepSampler(Sampler):
    """Lists of picture numbers, one for each step from `first` to `last`.

    Every epoch is shuffled anew by (seed, epoch) alone, so step 700 sees the same
    pictures whether or not the run was stopped before it. `batch_size` counts the
    pictures of a whole step. Process `rank` of `world` gets its share of them, as
    `parts` lists, one after the other. Raises ValueError for a batch that does not
    split evenly.
    """

    def __init__(self, size, batch_size, seed, first, last, rank=0, world=1, parts=1):
        if batch_size % (world * parts):
            raise ValueError(
                f"batch_size {batch_size} does not split over {world} processes with "
                f"{parts} parts each; give a multiple of {world * parts}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first, self.last, self.parts = first, last, parts
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for step in range(self.first, self.last):
            picks = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(
                        self.size
                    )
                picks.append(int(order[place % self.size]))
            for part in range(self.parts):
                start = part * self.world + self.rank
                yield picks[start :: self.world * self.parts]


def step_generator(seed: int, step: int, rank: int = 0, device="cpu"):
    """A random generator that depends on the step alone, so resuming is exact."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def min_snr_weights(
    scheduler, gamma: int | float, power: float = 1.0
) -> Float[Tensor, "timesteps"]:
    """What an error at each timestep is worth (Hang et al., 2023); gamma 0: all 1.

    It makes the weight of an error in x0 min(SNR, gamma), whatever is predicted; a
    `power` below 1 evens these weights out, in favour of noisy timesteps.
    """
    snr = scheduler.snr(torch.arange(scheduler.num_train_timesteps))
    ones = torch.ones_like(snr)
    if not gamma:
        return ones
    error_in_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": ones}
    worth = snr.clamp(max=gamma) ** power
    return worth / error_in_x0[scheduler.config.prediction_type]


def lean_to_noise(place: Float[Tensor, "b"], share: float) -> Float[Tensor, "b"]:
    """Move places in [0, 1) so that `share` of them go to the last quarter instead.

    Those that were in it stay; the order stays, too.
    """
    early = 0.75 * (1 - share)  # what the first three quarters keep
    slow = 0.75 * place / max(early, 1e-9)
    fast = 0.75 + 0.25 * (place - early) / (1 - early)
    return torch.where(place < early, slow, fast)


class Corruption:
    """All that chance decides in a step, drawn for the whole step at once.

    `share` is (part, parts): a process or a part of a batch gets the rows of its own
    pictures, so that the number of processes and parts changes nothing.
    """

    def __init__(
        self, scheduler, scale, caption_dropout=0.0, offset_noise=0.0, noisy_share=0.0
    ):
        self.scheduler, self.scale = scheduler, scale
        self.caption_dropout, self.offset_noise = caption_dropout, offset_noise
        self.noisy_share = noisy_share

    def draw(
        self, moments: Float[Tensor, "b c2 h w"], generator: torch.Generator,
        share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """x0, noise, timesteps, whose caption is dropped.

        The timesteps are spread evenly over the batch, one from each of its parts;
        `noisy_share` of them are moved to the noisiest quarter.
        """
        part, parts = share
        device, count = generator.device, len(moments) * parts
        posterior = DiagonalGaussian(moments)
        c, h, w = posterior.mean.shape[1:]

        def normal(*shape):
            return torch.randn(count, *shape, generator=generator, device=device)

        def uniform():
            return torch.rand(count, generator=generator, device=device)

        latents = posterior.mean + posterior.std * normal(c, h, w)[part::parts]
        dropped = (uniform() < self.caption_dropout)[part::parts]
        place = (torch.arange(count, device=device) + uniform()) / count
        place = lean_to_noise(place, self.noisy_share)[part::parts]
        last = self.scheduler.num_train_timesteps - 1
        t = (place * (last + 1)).long().clamp(max=last)  # place can round up to 1
        noise = normal(c, h, w)[part::parts]
        if self.offset_noise:
            noise = noise + self.offset_noise * normal(c, 1, 1)[part::parts]
        return latents * self.scale, noise, t, dropped


class DiffusionLoss(Corruption):
    """Noise a latent, ask the UNet what was added, compare (Ho et al., 2020).

    `scale` is the VAE's scaling factor and `empty` (n, d) the states of the empty
    caption, which replace a share `caption_dropout` of the captions. Where `unet`
    reads token ids (it has its text model inside), `empty` (n,) are those.
    """

    def __init__(
        self, scheduler, scale, empty, caption_dropout=0.0, snr_gamma=0.0,
        snr_power=1.0, offset_noise=0.0, noisy_share=0.0,
    ):  # fmt: skip
        super().__init__(scheduler, scale, caption_dropout, offset_noise, noisy_share)
        weights = min_snr_weights(scheduler, snr_gamma, snr_power)
        self.empty, self.weights = empty, weights.to(empty.device)

    def errors(self, unet, x0, noise, t, context) -> Float[Tensor, "b"]:
        """Mean squared error of the UNet's answer, for each latent."""
        x = self.scheduler.add_noise(x0, noise, t)
        answer = unet(x.contiguous(memory_format=torch.channels_last), t, context)
        target = self.scheduler.target(x0, noise, t)
        return (answer - target).square().mean((1, 2, 3))

    def __call__(self, unet, batch, generator: torch.Generator, share=(0, 1)):
        """The loss of a batch (moments, states or ids), and numbers for the log."""
        moments, texts = batch[0].to(generator.device).float(), batch[1].to(self.empty)
        x0, noise, t, dropped = self.draw(moments, generator, share)
        dropped = dropped.view(-1, *[1] * self.empty.ndim)
        context = torch.where(dropped, self.empty, texts)
        error = self.errors(unet, x0, noise, t, context)
        third = self.scheduler.num_train_timesteps // 3
        numbers = {
            "error": error.mean(),
            "error_low_noise": mean_where(t < third, error),
            "error_high_noise": mean_where(t >= len(self.weights) - third, error),
        }
        return (self.weights[t] * error).mean(), numbers


def mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Mean of the chosen values; no number where there are none."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum()


def learning_rate_at(step: int, config: "StepSettings") -> float:
    """The factor on the learning rate: a line up, then what `lr_scheduler` says.

    Counts optimiser steps, however many processes or parts make one.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(
        1, config.max_steps - config.warmup_steps
    )
    progress = min(1.0, progress)
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.lr_scheduler]


class EMA:
    """An exponential moving average of a module's weights, `shadow`.

    Early on the average is short (decay ≤ (1 + step) / (10 + step)), so that it
    forgets the random start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.shadow = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average a little towards the module's weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.shadow.parameters()), list(module.parameters()), 1 - decay
        )


def save_checkpoint(folder: Path, step: int, parts: dict, keep: int = 1) -> Path:
    """Write the state of all `parts` as step-….pt, whole or not at all.

    Older ones beyond `keep` are removed afterwards. Raises OSError, naming the last
    whole one, when it cannot be written.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    path = Path(folder) / f"step-{step:08d}.pt"

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(state | {"step": step}, file)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the second
        last = max(path.parent.glob("step-*.pt"), default=None)
        raise OSError(
            f"{path} could not be written ({error}); make room, and the same command "
            f"goes on from {last or 'zero'}"
        ) from error
    for old in sorted(path.parent.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path, parts: dict) -> int:
    """Give all `parts` their state back; returns the step to go on with.

    Raises ValueError for a file that is torn, or of another model.
    """
    state = read_checkpoint(path)
    try:
        parts["model"].load_state_dict(state["model"])
    except RuntimeError as error:
        raise other_model(path, str(error).splitlines()[1].strip()) from None
    # An average or a scaler begun only now has no state there.
    state = {"ema": state["model"], **state}
    for name, part in parts.items():
        if name != "model" and name in state:
            part.load_state_dict(state[name])
    return state["step"]


class Run:
    """What one training moves, `module` and its average; and what it writes.

    `config` is the one that was given, with its epochs counted in steps; `first` is
    the step that it starts with.
    """

    def __init__(self, config: "RunConfig", module: nn.Module, size: int):
        self.accelerator = accelerator = make_accelerator(config)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.config = config = count_steps(config, size, self.world)
        self.pictures = pictures_per_step(config, self.world)
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.output = Path(config.output_dir)
        self.checkpoints = self.output / "checkpoints"
        self.module = module.to(self.device, memory_format=torch.channels_last)
        self.ema = EMA(module, config.ema_decay) if config.ema_decay else None
        self.model = self.ema.shadow if self.ema else module
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.meter = Meter()
        self.log = Log(self.output / "log.jsonl", self.main)
        if getattr(config, "gradient_checkpointing", False):
            recompute_blocks(module)
        compiled = torch.compile(module) if config.compile else module
        self.wrapped, self.optimiser = accelerator.prepare(compiled, optimiser)
        self.parts = {"model": module, "optimiser": optimiser, "meter": self.meter}
        self.parts |= {"ema": self.model} if self.ema else {}
        self.parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
        facts = {"processes": self.world, "pictures": size}
        self.parts |= {"settings": Settings(config, **facts)} if self.main else {}
        self.first = find_start(self)
        open_tracker(self)

    def save(self, step: int) -> None:
        """Write a checkpoint of what is so after `step` steps."""
        if self.main:
            keep = self.config.keep_checkpoints
            save_checkpoint(self.checkpoints, step, self.parts, keep)


def take_step(run: Run, step: int, loss_of: Callable, batches) -> None:
    """Move the weights once, by the mean gradient of `batches`.

    A step whose loss or gradient is no number moves nothing and is counted.
    """
    config, measured = run.config, []
    parts = config.gradient_accumulation_steps
    for group in run.optimiser.param_groups:
        group["lr"] = config.learning_rate * learning_rate_at(step, config)
    for part, batch in enumerate(batches):
        share = (part * run.world + run.rank, parts * run.world)
        generator = step_generator(config.seed, step, device=run.device)
        alone = run.accelerator.no_sync(run.wrapped) if part < parts - 1 else None
        with alone or nullcontext():
            with run.accelerator.autocast():
                loss, numbers = loss_of(run.wrapped, batch, generator, share)
            run.accelerator.backward(loss / parts)
        measured.append({"loss": loss, **numbers})
    weights = run.wrapped.parameters()
    norm = run.accelerator.clip_grad_norm_(weights, config.max_grad_norm)
    means = mean_of_all(run, measured) | {"grad_norm": float(norm)}
    finite = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
    if finite or run.accelerator.scaler:  # fp16's scaler leaves bad steps out itself
        run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    if not finite:
        run.meter.skip(step)
        return
    run.meter.add(means)
    if run.ema:
        run.ema.update(run.module, step)


def optimise(
    config: "RunConfig",
    module: nn.Module,
    dataset: Dataset,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    collate: Callable | None = None,
    sample: Callable[[nn.Module], Image.Image] | None = None,
) -> nn.Module:
    """Train `module` for `config.max_steps` and return its (averaged) weights.

    `loss_of(module, batch, generator, share)` gives the loss and numbers to log. All
    chance in it comes from the generator, which is the same for all shares of a step:
    `share` is (part, parts), and this batch has the rows part, part + parts, … of it.
    `validate(module)` gives numbers every `validate_every` steps, `sample(module)` a
    picture every `sample_every`; both get the averaged weights. Numbers go to
    `output_dir/log.jsonl`, checkpoints to `output_dir/checkpoints`. Ctrl-C writes one
    and raises KeyboardInterrupt.
    """
    run = Run(config, module, len(dataset))
    with StopNote() as note:
        batches = iter(step_loader(run, dataset, collate))
        for step in progress(run):
            parts = islice(batches, config.gradient_accumulation_steps)
            take_step(run, step, loss_of, parts)
            report(run, step + 1, validate, sample)
            stop = note.is_written(run)
            if stop or is_due(step + 1, config.checkpoint_every, run.config):
                run.save(step + 1)
            if stop:
                raise KeyboardInterrupt(
                    f"after step {step + 1}; the same command goes on from there"
                )
    return finish(run)


class PatchCritic(nn.Sequential):
    """Says of each patch of a picture how real it looks (Isola et al., 2017).

    Pixels (b, 3, h, w) to scores (b, 1, h / 4, w / 4); high is real.
    """

    def __init__(self, width: int = 32):
        def layer(before, after, stride):
            conv = nn.Conv2d(before, after, 4 if stride == 2 else 3, stride, padding=1)
            return conv, nn.GroupNorm(8, after), nn.LeakyReLU(0.2)

        super().__init__(
            nn.Conv2d(3, width, 4, 2, padding=1),
            nn.LeakyReLU(0.2),
            *layer(width, 2 * width, 2),
            *layer(2 * width, 4 * width, 1),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )


def balance(error: Tensor, reward: Tensor, weight: Tensor) -> Tensor:
    """The factor that makes the reward's gradient as long as the error's.

    At one weight, a layer's; Esser et al. (2021), equation 7.
    """
    lengths = [
        torch.autograd.grad(value, weight, retain_graph=True)[0].norm()
        for value in (error, reward)
    ]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()


class WithCritic(nn.Module):
    """What a VAE in training does with its critic, `critic`; `VAEGame` has the rest."""

    def play(self, pixels: Tensor, rebuilt: Tensor, error: Tensor):
        """What the critic adds to the loss, for both players."""
        critic, config = self.critic, self.config
        self.batches += 1
        if self.batches <= config.critic_start * config.gradient_accumulation_steps:
            return sum(0.0 * weight.sum() for weight in critic.parameters()), {}
        still = {name: weight.detach() for name, weight in critic.named_parameters()}
        fooled = -torch.func.functional_call(critic, still, (rebuilt,)).mean()
        factor = balance(error, fooled, self.vae.decoder.conv_out.weight)
        real, made = critic(torch.cat([pixels, rebuilt.detach()])).chunk(2)
        told = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        numbers = {"fooled": -fooled, "critic": told, "critic_factor": factor}
        return config.critic_weight * factor * fooled + told, numbers


def latent_noise(config: VAEConfig, pixels: Tensor, generator, share=(0, 1)) -> Tensor:
    """Noise for the latents of a share of a step's pictures."""
    part, parts = share
    sides = (side // config.downscale for side in pixels.shape[-2:])
    shape = (len(pixels) * parts, config.latent_channels, *sides)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise[part::parts]


class VAEGame(WithCritic):
    """A VAE in training, with the critic that it has to please, if it has one.

    Pictures and noise for their latents give the loss and numbers for the log.
    """

    def __init__(self, config: "VAETrainingConfig", vae: AutoencoderKL):
        super().__init__()
        self.config, self.vae = config, vae
        self.critic = PatchCritic() if config.critic_weight else None
        eyes = config.perceptual_weight and PerceptualDistance(config.perceptual_path)
        self.frozen = [eyes]  # in a list: no part of what is trained and saved
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, pixels: Tensor, noise: Tensor):
        config = self.config
        posterior = self.vae.encode(pixels)
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise)
        error = rebuilt - pixels
        absolute, squared = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / pixels[0].numel()
        numbers = {"kl": kl, "squared": squared}
        loss = config.l1_weight * absolute + config.l2_weight * squared
        if config.perceptual_weight:
            numbers["perceptual"] = self.frozen[0].to(pixels.device)(rebuilt, pixels)
            loss = loss + config.perceptual_weight * numbers["perceptual"]
        if self.critic:
            played, scores = self.play(pixels, rebuilt, loss)
            loss, numbers = loss + played, numbers | scores
        return loss + config.kl_weight * kl, numbers


@torch.no_grad()
def start_certain(vae: AutoencoderKL, logvar: float = -6.0) -> None:
    """Let a new encoder begin with little noise, not with the prior's.

    With a standard deviation of 1 at the start, the noise drowns the means and a
    latent channel gives up before it has learnt to carry anything.
    """
    vae.quant_conv.bias[vae.config.latent_channels :] = logvar


@torch.no_grad()
def latent_spread(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 256
) -> float:
    """Standard deviation of latents drawn by the VAE, over everything.

    Means and noise together, by the law of total variance; scaling undoes it.
    """
    device = next(vae.parameters()).device
    posteriors = [
        vae.encode(dataset[i][0][None].to(device))
        for i in range(min(count, len(dataset)))
    ]
    means = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.std.square() for posterior in posteriors])
    return (means.var() + noise.mean()).sqrt().item()


def decided(scene: Scene) -> Request:
    """All that a scene shows, whether its caption says it or not."""
    groups = tuple(
        replace(group, colour=thing.colour, size=thing.size)
        for group, thing in zip(
            scene.request.groups, (scene.things[0], scene.things[-1]), strict=False
        )
    )
    return Request(groups, scene.request.relation, scene.background)


def exchange(request: Request, rng: np.random.Generator) -> tuple[Request, str]:
    """Change one point of a request; returns the new one and the point's name.

    Two groups exchange their colours, sizes, counts or shapes, or one of them gets
    another one. Three times out of four, a relation becomes any other one.
    """

    def another(options, than):
        return rng.choice([option for option in options if option != than]).item()

    options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "count": (1, 2, 3)}
    if request.relation and rng.random() < 0.75:
        relation = another(RELATIONS, request.relation)
        return replace(request, relation=relation), "relation"
    point = rng.choice(list(options)).item()
    values = [getattr(group, point) for group in request.groups]
    if len(set(values)) == 2 and rng.random() < 0.5:
        values.reverse()
    else:
        which = rng.integers(len(values))
        values[which] = another(options[point], values[which])
    groups = (replace(g, **{point: v}) for g, v in zip(request.groups, values))
    return replace(request, groups=tuple(groups)), point


def say_alike(request: Request, like: Request, point: str) -> Request:
    """Leave out what `like` leaves out too, but say the point."""
    groups = tuple(
        replace(
            group,
            colour=group.colour if model.colour or point == "colour" else None,
            size=group.size if model.size or point == "size" else None,
        )
        for group, model in zip(request.groups, like.groups, strict=True)
    )
    background = request.background if like.background else None
    return Request(groups, request.relation, background)


def invent_twin(scene: Scene, rng: np.random.Generator) -> tuple[Request, ...]:
    """The twin, and what the captions of the scene and of its twin say.

    A twin may be shown in training, has room in a picture, and is told apart by
    its caption: "a star and a house" and "a house and a star" are no twins.
    """
    while True:
        twin, point = exchange(decided(scene), rng)
        said, other = (
            say_alike(request, scene.request, point)
            for request in (decided(scene), twin)
        )
        shapes = {group.shape for group in twin.groups}
        room = sum(group.count for group in twin.groups) <= 3
        apart = twin.relation or set(said.groups) != set(other.groups)
        if room and apart and len(shapes) == len(twin.groups):
            if not is_held_out(twin.groups):
                return twin, said, other


class Twins(Dataset):
    """Each scene with a near twin: `((pixels, caption), (pixels, caption))`.

    "a red star above a blue house" comes with "a blue star above a red house". A
    reader of bags of words cannot tell them apart, so CLIP has to learn order. Both
    captions say the point in which the two differ.
    """

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int):
        scene = self.scenes.scene(index)
        rng = np.random.default_rng((self.scenes.seed, 7, index))
        twin, said, other = invent_twin(scene, rng)
        pictures = (
            draw(things, scene.background, self.scenes.side)
            for things in (scene.things, arrange(twin, rng))
        )
        return tuple(
            (to_pixels(picture), describe(request, rng))
            for picture, request in zip(pictures, (said, other))
        )


def start_apart(clip: CLIP) -> None:
    """Let words differ more, and their fit count less, than in CLIP's own start."""
    embeddings = clip.text_encoder.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.3)
    nn.init.constant_(clip.logit_scale, math.log(4))


@torch.no_grad()
def write_texts(table: "Rows", texts, text_encoder, tokenizer, batch_size=256) -> None:
    """Add the states (tokens, d) of every text that the table lacks."""
    device, known = next(text_encoder.parameters()).device, table.numbers()
    keys = {short_name(text): text for text in texts}  # equal texts once, in order
    missing = [(key, text) for key, text in keys.items() if key not in known]
    with tqdm(total=len(keys), initial=len(keys) - len(missing), desc="texts") as bar:
        for start in range(0, len(missing), batch_size):
            names, batch = map(list, zip(*missing[start : start + batch_size]))
            states = text_encoder(caption_ids(tokenizer, batch).to(device))
            table.append(names, states.half().cpu().numpy())
            bar.update(len(batch))
    warn_about_long(tokenizer, [text for _, text in missing])


class Encoded(Dataset):
    """A dataset after its frozen parts: latents' moments and text states, in files.

    `moments` (rows, 2c, h, w) and `texts` (m, tokens, d), both float16, are mapped
    from `folder`, which several trainings may share; `rows` and `which` are the rows of
    each item, `captions` what it says. Text 0 is "". What is missing is computed first
    (`fill_cache`); pictures that cannot be read are left out, with a warning. Indexed
    with a list, it gives `(moments, text states)` of the whole batch at once. `sample`
    (m, tokens, d) are the states of `some_captions` (or of the first 1000 items').
    """

    def __init__(
        self, dataset, vae, text_encoder, tokenizer, folder, num_workers=0,
        some_captions=(),
    ):  # fmt: skip
        *self.tables, items = fill_cache(
            Path(folder), dataset, vae, text_encoder, tokenizer, num_workers,
            some_captions,
        )  # fmt: skip
        self.rows, self.which = find_rows(*self.tables, items).T
        self.moments, self.texts = (table.open() for table in self.tables)
        some = list(some_captions) or [text for _, text in items[:1000]]
        number = self.tables[1].numbers()
        said = {number[short_name(text)]: text for _, text in items}
        self.captions = [said[which] for which in self.which]
        self.sample = self.texts[[number[short_name(text)] for text in some]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        moments = torch.from_numpy(self.moments[self.rows[indices]])
        return moments, torch.from_numpy(self.texts[self.which[indices]])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        moments, states = self.__getitems__([index])
        return moments[0], states[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "moments": None, "texts": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.moments, self.texts = (table.open() for table in self.tables)


def whitening(
    states: Float[Tensor, "m n d"], floor: float = 0.01
) -> Float[Tensor, "d d"]:
    """S^(-1/2), with S the second moments of the states' vectors.

    `floor`, as a share of the mean, is added to the strength of every direction.
    """
    x = states.flatten(0, 1).float()
    strengths, directions = torch.linalg.eigh(x.T @ x / len(x))
    strengths = strengths + floor * strengths.mean()
    return directions / strengths.sqrt() @ directions.T


@torch.no_grad()
def start_white(unet: UNet, states: Float[Tensor, "m n d"]) -> UNet:
    """Let the maps that read the text start as if its states were white.

    `states` are those of many captions. `to_k` and `to_v` of each cross-attention
    are multiplied by their `whitening`.
    """
    whiten = whitening(states)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            for read in (block.attn2.to_k, block.attn2.to_v):
                read.weight.copy_(read.weight @ whiten.to(read.weight))
    return unet


class Validation:
    """The UNet's error on held-out pictures, with the same noise each time.

    Called with a UNet, it gives numbers for the log: the mean, and that of each band
    of timesteps, a quarter of them by default.
    """

    def __init__(self, loss, held: Dataset, vae, text_encoder, tokenizer, bands=4):
        self.loss, self.device = loss, next(vae.parameters()).device
        last = loss.scheduler.num_train_timesteps
        self.edges = [last * band // bands for band in range(bands + 1)]
        self.batches = []
        for start in range(0, len(held), 8):
            items = (held[i] for i in range(start, min(start + 8, len(held))))
            pixels, captions = zip(*items, strict=True)
            with torch.no_grad():
                x0 = vae.encode(torch.stack(pixels).to(self.device)).mean * loss.scale
                ids = caption_ids(tokenizer, list(captions)).to(self.device)
                context = text_encoder(ids)
            self.batches.append((x0, context))

    @torch.no_grad()
    def __call__(self, unet) -> dict[str, float]:
        means = {}
        for low, high in zip(self.edges, self.edges[1:]):
            generator = step_generator(0, low, device=self.device)
            errors = []
            for x0, context in self.batches:
                place = (torch.arange(len(x0), device=self.device) + 0.5) / len(x0)
                t = (low + place * (high - low)).long()
                noise = torch.randn(x0.shape, generator=generator, device=self.device)
                errors.append(self.loss.errors(unet, x0, noise, t, context))
            means[f"val_error_{low}_{high - 1}"] = torch.cat(errors).mean().item()
        return {"val_error": sum(means.values()) / len(means), **means}


def train(config: "TrainingConfig") -> StableDiffusion | None:
    """Train a UNet on a frozen VAE and text model, and save the whole pipeline.

    Says the plan first; with `dry_run` that is all. The pictures and captions go
    through the frozen parts once, before the loop. Writes the model to `output_dir`,
    which diffusers and `StableDiffusion.from_pretrained` open.
    """
    accelerator = make_accelerator(config)
    sizes = find_sizes(config)
    check_schedule(config)
    empty_unet = build_empty(UNet, sizes)
    check_fits(find_checkpoint(config), empty_unet)
    dataset = open_dataset(config)
    shown, held = hold_out(config, dataset)
    memory = unet_memory(config, empty_unet)
    say_plan(config, dataset, empty_unet, memory, shown=len(shown), held=len(held))
    if config.dry_run:
        return None

    frozen = vae, text_encoder, tokenizer = open_frozen(config)
    encoded = encode_dataset(config, dataset, accelerator, *frozen)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    unet = new_unet(config, sizes, torch.tensor(encoded.sample))
    scheduler = make_noise_schedule(config)
    empty = torch.tensor(encoded.texts[0]).float().to(accelerator.device)
    loss = DiffusionLoss(
        scheduler, vae.config.scaling_factor, empty, config.caption_dropout,
        config.snr_gamma, config.snr_power, config.offset_noise,
        config.noisy_share,
    )  # fmt: skip
    unet = optimise(
        config, unet, Subset(encoded, shown), loss, collate=as_it_is,
        validate=Validation(loss, held, *frozen) if len(held) else None,
        sample=sheet_of(config, held if len(held) else dataset, *frozen, scheduler),
    )  # fmt: skip
    pipe = StableDiffusion(*frozen, unet.eval(), scheduler)
    if is_main_process():
        pipe.save_pretrained(config.output_dir)
    return pipe


AT_LEAST_ONE = (
    "batch_size gradient_accumulation_steps max_steps num_train_epochs num_pictures "
    "image_size log_every checkpoint_every keep_checkpoints layers_per_block "
    "norm_num_groups num_heads num_attention_heads hidden_size unet_dim"
).split()
NOT_NEGATIVE = (
    "warmup_steps num_workers weight_decay validate_every num_validation "
    "sample_every offset_noise snr_gamma l1_weight l2_weight kl_weight "
    "perceptual_weight critic_weight critic_start"
).split()
RUN_CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_scheduler": ("constant", "linear", "cosine"),
    "log_with": ("none", "tensorboard", "wandb"),
}


def check_run(config) -> None:
    """Raise ValueError for settings of a run that cannot be meant."""
    for names, least, remedy in (
        (AT_LEAST_ONE, 1, "at least 1"), (NOT_NEGATIVE, 0, "0 or more"),
    ):  # fmt: skip
        for name in names:
            value = getattr(config, name, None)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {remedy}")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; give more than 0")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(
            f"ema_decay is {config.ema_decay}; give 0 (no average) or less than 1"
        )
    for name, valid in RUN_CHOICES.items():
        value = getattr(config, name)
        if value not in valid:
            raise ValueError(f"{name} {value!r} is none of {', '.join(valid)}")


def check_machine(config) -> None:
    """Raise ValueError for settings that this machine cannot follow."""
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision fp16 needs a GPU; use 'no' or 'bf16'")
    package = config.log_with
    if package != "none" and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"log_with {package} needs a package that is not installed; run "
            f"`pip install {package}`, or set log_with to none"
        )


def check_multiple(name: str, widths, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless every width is a multiple of the divisor."""
    if any(width % divisor for width in widths):
        raise ValueError(
            f"{name} {widths} do not split into {divisor_name} {divisor}; make every "
            "width a multiple of it"
        )


def check_side(image_size: int, factor: int, why: str = "the VAE") -> None:
    """Raise ValueError unless pictures of this side can be halved often enough."""
    if image_size % factor:
        near = max(1, round(image_size / factor)) * factor
        raise ValueError(
            f"image_size is {image_size}, but {why} needs a multiple of {factor}; "
            f"give {near}"
        )


@dataclass(frozen=True)
class PictureSettings:
    """What a training is shown.

    Attributes:
        dataset_path: "scenes" for the book's own world, a folder of pictures, or
            .tar shards, as in "pets/{0000..0099}.tar".
        num_pictures: how many of the endless scenes to use.
        kinds: kinds of scene to show (chapter 4's `KINDS`); none named: all; one that
            is named twice is shown twice as often.
        image_size: pictures are cut to squares of this side, in pixels.
        crops: squares cut from each picture at random places; 0: one, the middle.
        flip: show mirror images, too; wrong where captions say left and right.
        on_error: "skip" pictures that cannot be used, with a warning, or "raise".
        batch_size: pictures that a process takes at once.
        gradient_accumulation_steps: batches whose gradients make one step; a step sees
            batch_size pictures times this times the number of processes.
        num_workers: processes that prepare data.
        seed: of the weights, the data order and the noise.
    """

    dataset_path: str = "scenes"
    num_pictures: int = 20_000
    kinds: tuple[str, ...] = ()
    image_size: int = 64
    crops: int = 0
    flip: bool = False
    on_error: str = "skip"
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    num_workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class StepSettings:
    """How a training moves the weights.

    Attributes:
        max_steps: optimiser steps.
        num_train_epochs: times that each picture is shown, in place of max_steps.
        learning_rate: the highest.
        lr_scheduler: what it does after the warm-up: "constant", "linear" or "cosine",
            the last two down to 0 at the last step.
        warmup_steps: steps until the highest learning rate.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are shortened to this.
        ema_decay: how slowly the averaged weights follow; 0 keeps no average.
        mixed_precision: "no", "fp16" or "bf16".
        compile: let torch.compile speed the model up (a GPU's gain).
    """

    max_steps: int = 1000
    num_train_epochs: int | None = None
    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    compile: bool = False


@dataclass(frozen=True)
class OutputSettings:
    """What a training writes down, and when.

    Attributes:
        output_dir: where the model, checkpoints/ and the log (log.jsonl) go.
        log_every: steps between two lines of the log.
        log_with: "tensorboard" or "wandb" get the same numbers and pictures; "none".
        validate_every: steps between two looks at held-out pictures; 0 for none.
        sample_every: steps between two sheets of pictures; 0 for none.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of them stay, the newest.
        resume: "auto" goes on from the newest whole checkpoint in output_dir, "none"
            starts from zero and sets those aside, a path goes on from that file or run.
        dry_run: say what would be done, and stop before the first step.
    """

    output_dir: str = "runs/model"
    log_every: int = 50
    log_with: str = "none"
    validate_every: int = 500
    sample_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: str = "auto"
    dry_run: bool = False


@dataclass(frozen=True)
class RunConfig(OutputSettings, StepSettings, PictureSettings):
    """What every training run needs to know."""

    def __post_init__(self):
        check_run(self)
        check_machine(self)


def is_whole(path: Path) -> bool:
    """Does every piece of a checkpoint fit its check sum?"""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # each way of being torn raises another one
        return False


def read_checkpoint(path: Path, mapped: bool = False) -> dict:
    """What a checkpoint holds, or a view of the file; ValueError for a torn one."""
    if not is_whole(path):
        raise ValueError(
            f"{path} is no checkpoint that can be read, it may be cut off; copy it "
            "again, or set resume to another one, or to none to start from zero"
        )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def other_model(path: Path, why: str) -> ValueError:
    """The error for a checkpoint that does not fit the settings."""
    return ValueError(
        f"{path} is of another model ({why}); set the sizes (unet_channels, "
        "layers_per_block, rank and so on) as they were, or choose another "
        "output_dir, or set resume to none to start from zero"
    )


def find_checkpoint(config: OutputSettings) -> Path | None:
    """The checkpoint that `resume` means; None to start from zero.

    Of a folder it is the newest whole one, with a warning for each torn one. Raises
    ValueError if all are torn, FileNotFoundError for a path without any.
    """
    if config.resume == "none":
        return None
    run = Path(config.output_dir if config.resume == "auto" else config.resume)
    if run.is_file():
        return run
    found = sorted(run.glob("checkpoints/step-*.pt"), reverse=True)
    for path in found:
        if is_whole(path):
            return path
        warnings.warn(f"{path} is torn; trying the one before it", stacklevel=2)
    if found:
        raise ValueError(
            f"no checkpoint in {found[0].parent} is whole; copy them again, or set "
            "resume to none to start from zero"
        )
    if config.resume != "auto":
        raise FileNotFoundError(
            f"resume: there is no checkpoint at {run}; give a file step-….pt, the "
            "output_dir of a run, auto or none"
        )
    return None


def check_fits(path: Path | None, model: nn.Module) -> None:
    """Raise ValueError if a checkpoint is of a model with other weights than this.

    Reads no weights, so the model may live on the meta device.
    """
    if path is None:
        return
    theirs = read_checkpoint(path, mapped=True)["model"]
    ours = model.state_dict()
    for name in [*ours, *theirs]:
        there, here = (
            tuple(state[name].shape) if name in state else "missing"
            for state in (theirs, ours)
        )
        if there != here:
            raise other_model(path, f"{name} is {there} there and {here} here")


def set_aside(folder: Path, first: int) -> None:
    """Move checkpoints of steps after `first`, made again or torn, to folder-old."""
    for path in sorted(folder.glob("step-*.pt")):
        if path.stem > f"step-{first:08d}":
            old = folder.with_name(folder.name + "-old")
            old.mkdir(exist_ok=True)
            path.replace(old / path.name)


WITHOUT_EFFECT = (
    "output_dir resume dry_run log_every log_with validate_every sample_every "
    "sample_prompts checkpoint_every keep_checkpoints compile gradient_checkpointing"
).split()


class Settings:
    """The settings that decide what a step does, as a part of a checkpoint.

    `more` are facts of the same kind. Taking back others than these warns, naming
    each with its old and its new value.
    """

    def __init__(self, config: RunConfig, **more):
        facts = {**asdict(config), **more}
        without = set(WITHOUT_EFFECT)
        if config.lr_scheduler == "constant":
            without.add("max_steps")
        if not config.dataset_path.endswith(".tar"):
            without.add("num_workers")  # they share shards, but no other data
        kept = {name: value for name, value in facts.items() if name not in without}
        self.kept = json.loads(json.dumps(kept))  # lists for tuples, as in a file

    def state_dict(self) -> dict:
        return self.kept

    def load_state_dict(self, before: dict) -> None:
        both = [name for name in self.kept if name in before]
        changed = "; ".join(
            f"{name} was {before[name]!r} and is {self.kept[name]!r}"
            for name in both
            if before[name] != self.kept[name]
        )
        if changed:
            warnings.warn(
                f"the checkpoint was made with other settings: {changed}. The steps "
                "from here on follow the new ones; if you do not mean that, stop, and "
                "set them as they were, or choose another output_dir",
                stacklevel=2,
            )


def step_of(line: str) -> int:
    """The step of a line of the log; -1 for one that was cut off by a power cut."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return -1


class Log:
    """Lines of a JSON file; only the process that `writes` touches it."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def cut(self, first: int) -> None:
        """Remove the lines of steps after `first`, which will be made again."""
        if self.writes:
            path = self.path
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if -1 < step_of(line) <= first]
            text = "".join(line + "\n" for line in kept)
            write_atomically(path, lambda file: file.write_text(text))

    def write(self, line: dict) -> None:
        """Append one line."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


TEN_BAD_STEPS = (
    "the loss or its gradient was no number in ten steps running, the last of them "
    "step {step}; try a lower learning_rate, more warmup_steps, mixed_precision bf16 "
    "or no in place of fp16, and look for broken pictures. The last checkpoint is "
    "whole: the same command goes on from there"
)


class Meter:
    """Means of what was measured in the last steps, and a count of failed ones."""

    def __init__(self):
        self.in_a_row, self.loss = 0, math.nan
        self.start_again()

    def start_again(self) -> None:
        self.sums, self.counts, self.skipped, self.steps = {}, {}, 0, 0
        self.started = time.perf_counter()

    def state_dict(self) -> dict:
        """The sums of the line that is not finished."""
        names = ("sums", "counts", "skipped", "in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def add(self, numbers: dict[str, float]) -> None:
        """Count one step; what is no number is left out."""
        self.in_a_row, self.steps = 0, self.steps + 1
        self.loss = numbers.get("loss", math.nan)
        for name, value in numbers.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.counts[name] = self.counts.get(name, 0) + 1

    def skip(self, step: int) -> None:
        """Count a step that was left out; ValueError after ten in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == 10:
            raise ValueError(TEN_BAD_STEPS.format(step=step))

    def means(self, pictures: int) -> dict[str, int | float]:
        """The means since the last call, and how fast steps of `pictures` went."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        means |= {"skipped": self.skipped} if self.skipped else {}
        seconds = time.perf_counter() - self.started
        means["seconds"] = round(seconds, 2)
        means["pictures_per_second"] = round(self.steps * pictures / seconds, 2)
        self.start_again()
        return means


def make_accelerator(config: RunConfig):
    """Accelerate's view of this process: device, precision, rank among others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run may have had another precision
    threads = torch.get_num_threads()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=config.output_dir,
    )
    torch.set_num_threads(threads)  # accelerate lowers them on some CPUs
    return accelerator


def pictures_per_step(config: PictureSettings, processes: int) -> int:
    """How many pictures one optimiser step sees, over all processes."""
    return config.batch_size * config.gradient_accumulation_steps * processes


def count_steps(config: RunConfig, size: int, processes: int) -> RunConfig:
    """The config with `max_steps` that make `num_train_epochs` of `size` pictures."""
    if config.num_train_epochs is None:
        return config
    shown = config.num_train_epochs * size
    steps = math.ceil(shown / pictures_per_step(config, processes))
    return replace(config, max_steps=steps, num_train_epochs=None)


def is_main_process() -> bool:
    """Is this the process that writes files? With one process, it is."""
    from accelerate import PartialState

    return PartialState().is_main_process


def recompute_blocks(module: nn.Module) -> None:
    """Keep no values inside residual and transformer blocks for the backward pass."""
    for block in module.modules():
        if isinstance(block, (ResBlock, SpatialTransformer)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_all(module: nn.Module) -> None:
    """Undo `recompute_blocks`."""
    for block in module.modules():
        vars(block).pop("forward", None)


def mean_of_all(run: Run, measured: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each number over the parts of a step and over the processes.

    Of all but the loss, what is no number is left out.
    """
    names = list(measured[0])
    rows = [[torch.as_tensor(m[n]).detach().float() for n in names] for m in measured]
    table = torch.stack([torch.stack(row) for row in rows]).to(run.device)
    table = run.accelerator.gather(table).double()
    means = dict(zip(names, table.nanmean(0).tolist(), strict=True))
    return means | {"loss": table[:, 0].mean().item()}


def find_start(run: Run) -> int:
    """Take back what the last checkpoint says; the step to go on with."""
    with run.accelerator.main_process_first():
        for left in run.checkpoints.glob(".*.tmp") if run.main else ():
            left.unlink()  # by a run that was killed while it wrote
        path = find_checkpoint(run.config)
        first = load_checkpoint(path, run.parts) if path else 0
        run.log.cut(first)
        if run.main:
            set_aside(run.checkpoints, first)
    return first


def open_tracker(run: Run) -> None:
    """TensorBoard or wandb, which go on where the log does."""
    name = {"wandb": "sdbook"}.get(run.config.log_with, "tensorboard")
    later = {"tensorboard": {"purge_step": run.first}}
    run.accelerator.init_trackers(name, init_kwargs=later)


def finish(run: Run) -> nn.Module:
    """Undo what training put around the module; the (averaged) weights."""
    run.accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
    keep_all(run.module)
    run.accelerator.end_training()
    return run.model


class StopNote:
    """While open, Ctrl-C and SIGTERM only set `.written`; the second one interrupts."""

    def __enter__(self):
        self.written, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.write)
        return self

    def write(self, number, frame) -> None:
        if self.written:
            raise KeyboardInterrupt
        self.written = True

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def is_written(self, run: Run) -> bool:
        """Has any of the processes such a note?"""
        if run.world == 1:
            return self.written
        note = torch.tensor([float(self.written)], device=run.device)
        return bool(run.accelerator.reduce(note, "sum") > 0)


def leave_signals_to_main(worker: int) -> None:
    """A process that prepares data ends when the main one tells it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_due(done: int, every: int, config: RunConfig) -> bool:
    """Is it time, after `done` steps, for what comes every so often and at the end?"""
    return every > 0 and (done % every == 0 or done == config.max_steps)


def report(run: Run, done: int, validate=None, sample=None) -> None:
    """Write what is due after `done` steps; mostly nothing."""
    config, line = run.config, {}
    if not run.main:
        return
    if is_due(done, config.log_every, config):
        line = run.meter.means(run.pictures)
    if validate and is_due(done, config.validate_every, config):
        line |= validate(run.model)
    if line:
        lr = config.learning_rate * learning_rate_at(done - 1, config)
        line = {"lr": lr, **line}
        run.log.write({"step": done, **line})
        run.accelerator.log(line, step=done)
    if sample and is_due(done, config.sample_every, config):
        path = run.output / "samples" / f"step-{done:08d}.png"
        picture = sample(run.model)
        write_atomically(path, lambda file: picture.save(file, "PNG"))
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({"samples": pixels}, step=done, **layout)


def progress(run: Run) -> Iterator[int]:
    """The steps to make, with a bar: loss, learning rate, speed and time left."""
    config, started = run.config, time.perf_counter()
    bar = tqdm(
        range(run.first, config.max_steps), initial=run.first,
        total=config.max_steps, disable=not run.main,
    )  # fmt: skip
    for made, step in enumerate(bar, start=1):
        yield step
        bar.set_postfix(
            loss=f"{run.meter.loss:.4g}",
            lr=f"{config.learning_rate * learning_rate_at(step, config):.2g}",
            pictures=f"{made * run.pictures / (time.perf_counter() - started):.3g}/s",
            refresh=False,
        )


def step_loader(run: Run, dataset: Dataset, collate=None) -> DataLoader:
    """This process's batches, from the first step to the last."""
    config = run.config
    if isinstance(dataset, CaptionedShards):
        parts = config.gradient_accumulation_steps
        batches = dataset.steps(
            config.batch_size, config.seed, run.first * parts,
            config.max_steps * parts, run.rank, run.world,
        )  # fmt: skip
        return DataLoader(
            batches, batch_size=None, collate_fn=collate or default_collate,
            num_workers=config.num_workers, worker_init_fn=leave_signals_to_main,
        )  # fmt: skip
    sampler = StepSampler(
        len(dataset), run.pictures, config.seed, run.first, config.max_steps,
        run.rank, run.world, config.gradient_accumulation_steps,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_main,
        persistent_workers=config.num_workers > 0,
    )  # fmt: skip


class Fused(TorchFunctionMode):
    """While it is open, attention on the meta device stores no scores, as on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **(kwargs or {}))


def kept_bytes(model: nn.Module, *inputs: Tensor, fused=False, beside=()) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the weights.

    Model and inputs are on the meta device: nothing is computed. `fused`: as on a
    GPU, where attention does not store its scores; on a CPU it does. `beside`:
    modules that take part and are none of the model's own.
    """
    weights = {
        weight.untyped_storage()._cdata
        for module in (model, *beside)
        for weight in module.parameters()
    }
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, Fused() if fused else nullcontext():
        result = model(*inputs)  # alive, so that no storage's number is used twice
    del result
    return sum(kept.values())


def memory_needed(
    config: RunConfig, model: nn.Module, *inputs: Tensor, beside: tuple = ()
) -> dict:
    """An estimate in bytes: what is kept all the time, and what one batch adds.

    `model` and the `inputs` for one batch are on the meta device, and so are the
    modules `beside` it, such as a LoRA. Weights that need no gradient count once.
    """
    weights = {w for module in (model, *beside) for w in module.parameters()}
    extra = 3 + bool(config.ema_decay)  # gradients, two means of AdamW's, average
    copies = sum(4 * w.numel() * (1 + extra * w.requires_grad) for w in weights)
    batch = kept_bytes(model, *inputs, fused=torch.cuda.is_available(), beside=beside)
    if getattr(config, "gradient_checkpointing", False):
        batch = batch // 4  # at most, in the four presets (chapter 13)
    half = config.mixed_precision != "no"
    return {"weights": copies, "batch": batch // 2 if half else batch}


def say_plan(config: RunConfig, *facts, **more) -> None:
    """Print the plan, once."""
    if is_main_process():
        print(describe_plan(config, *facts, **more), flush=True)


def readable(size: int) -> str:
    """A number of bytes as people say it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def describe_plan(
    config: RunConfig, dataset: Dataset, model: nn.Module, memory: dict,
    shown: int | None = None, held: int = 0, also: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """What a run is going to do, as text.

    It trains on `shown` of the pictures (all), and `held` are only validated on.
    `model` is what the optimiser moves; `also` are more lines, by their first word.
    """
    from accelerate import PartialState

    world = PartialState().num_processes
    shown = len(dataset) if shown is None else shown
    config = count_steps(config, shown, world)
    pictures = pictures_per_step(config, world)
    rejected = len(getattr(dataset, "problems", ()))
    path = find_checkpoint(config)
    count = sum(weight.numel() for weight in model.parameters())
    epochs = config.max_steps * pictures / shown
    lines = {
        "data": f"{config.dataset_path}: {shown:,} pictures to train on, {held:,} "
        f"held out, {rejected:,} rejected, {config.image_size} pixels a side",
        "model": f"{count:,} parameters to train",
        "steps": f"{config.max_steps:,} of {pictures:,} pictures ({epochs:.1f} epochs)",
        "batch": f"{config.batch_size} at once × {config.gradient_accumulation_steps} "
        f"added up × {world} processes = {pictures}",
        "memory": f"about {readable(sum(memory.values()))} a process: "
        f"{readable(memory['weights'])} for the weights and what moves them, "
        f"{readable(memory['batch'])} for a batch",
        "output": f"{config.output_dir}: checkpoints/ (one in "
        f"{config.checkpoint_every:,} steps, {config.keep_checkpoints} kept), "
        "log.jsonl, the finished model",
        **(also or {}),
        "start": f"goes on from {path}" if path else "from step 0",
    }
    return "\n".join(f"{name:8}{text}" for name, text in lines.items())


@dataclass(frozen=True)
class VAETrainingConfig(RunConfig):
    """Train an AutoencoderKL from zero: `sdbook train-vae`.

    Attributes:
        block_out_channels: width of each level; one halving between two levels.
        layers_per_block: residual blocks per level of the encoder.
        norm_num_groups: groups of every GroupNorm.
        l1_weight: of the absolute error.
        l2_weight: of the squared error.
        kl_weight: of the divergence from the standard normal, per pixel number.
        perceptual_weight: of the difference that a frozen network sees; 0 for none.
        perceptual_path: that network: a run of train-clip, or a file with the weights
            of torchvision's vgg16.
        critic_weight: of pleasing a critic that learns to tell pictures from rebuilt
            ones; 0 for no critic.
        critic_start: steps before the critic begins.
    """

    output_dir: str = "runs/vae"
    batch_size: int = 32
    max_steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    l1_weight: float = 0.1
    l2_weight: float = 1.0
    kl_weight: float = 3e-4
    perceptual_weight: float = 0.0
    perceptual_path: str | None = None
    critic_weight: float = 0.0
    critic_start: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_vae_choices(self)


def check_vae_choices(config) -> None:
    """Raise ValueError for settings of the VAE's training that cannot be meant."""
    widths = config.block_out_channels
    check_multiple(
        "block_out_channels", widths, "norm_num_groups", config.norm_num_groups
    )
    check_side(config.image_size, 2 ** (len(widths) - 1))
    if not config.l1_weight and not config.l2_weight:
        raise ValueError("l1_weight and l2_weight are both 0; give one of them more")
    path = config.perceptual_path
    if config.perceptual_weight and (path is None or not Path(path).exists()):
        raise ValueError(
            f"perceptual_weight is {config.perceptual_weight}, but there is no network "
            f"at perceptual_path {path}; give the output_dir of train-clip, or a file "
            "with the weights of torchvision's vgg16, or set perceptual_weight to 0"
        )
    if config.critic_weight and config.compile:
        raise ValueError(
            "critic_weight needs gradients inside the step, which compile cannot do; "
            "set compile to false"
        )


VGG_MEAN, VGG_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stages_of_vgg(path: Path) -> list[nn.Module]:
    """The five stages of torchvision's VGG16, for pixels in [-1, 1]."""
    from torchvision.models import vgg16
    from torchvision.transforms import Normalize

    network = vgg16(weights=None)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    mean, std = ([2 * m - 1 for m in VGG_MEAN], [2 * s for s in VGG_STD])
    cuts = (0, 4, 9, 16, 23, 30)
    stages = [network.features[start:end] for start, end in zip(cuts, cuts[1:])]
    stages[0] = nn.Sequential(Normalize(mean, std), *stages[0])
    return stages


def stages_of_tower(folder: Path) -> list[nn.Module]:
    """The stages of the picture tower that train-clip left in a folder."""
    state = read_weights(folder / "clip.safetensors").items()
    tower = {k.removeprefix("image_encoder."): t for k, t in state}
    stem = {key: value for key, value in tower.items() if key.startswith("stem.")}
    tower = ImageTower(8, width=len(stem["stem.2.weight"]))
    tower.load_state_dict(stem, strict=False)
    return [tower.stem[0], *(nn.Sequential(QuickGELU(), c) for c in tower.stem[1:])]


class QuickGELU(nn.Module):
    """CLIP's activation, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


class PerceptualDistance(nn.Module):
    """How different two batches of pictures look to a frozen network.

    The mean squared difference of features of length 1, over places and stages
    (Zhang et al., 2018, without their learned weights). Pixels are in [-1, 1].
    """

    def __init__(self, path: str | Path):
        super().__init__()
        path = Path(path)
        stages = stages_of_vgg(path) if path.is_file() else stages_of_tower(path)
        self.stages = nn.ModuleList(stages).eval().requires_grad_(False)

    def forward(self, one: Tensor, two: Tensor) -> Float[Tensor, ""]:
        distances = []
        for stage in self.stages:
            one, two = stage(one), stage(two)
            unit = (F.normalize(x, dim=1, eps=1e-6) for x in (one, two))
            distances.append((next(unit) - next(unit)).square().sum(1).mean())
        return sum(distances) / len(distances)


def open_dataset(config: RunConfig, split: str = "train") -> Dataset:
    """The scenes, or the pictures of a folder or of .tar shards (without splits)."""
    if config.dataset_path == "scenes":
        kinds = config.kinds or tuple(KINDS)
        return Scenes(
            config.image_size, split, length=config.num_pictures, kinds=kinds
        )
    shards = config.dataset_path.endswith(".tar")
    reader = CaptionedShards if shards else CaptionedImages
    return reader(
        config.dataset_path, config.image_size, config.flip, config.on_error,
        config.crops, config.seed,
    )  # fmt: skip


def new_vae(config: VAETrainingConfig) -> AutoencoderKL:
    """A VAE with random weights that begins certain."""
    vae = AutoencoderKL(
        VAEConfig(
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.image_size,
        )
    )
    start_certain(vae)
    return vae


def rebuilt_sheet(dataset: Dataset | list, count: int = 8):
    """A function that shows pictures above what a VAE in training makes of them."""
    pixels = torch.stack([dataset[i][0] for i in range(min(count, len(dataset)))])

    @torch.no_grad()
    def draw_sheet(game: VAEGame) -> Image.Image:
        device = next(game.parameters()).device
        rebuilt = game.vae.decode(game.vae.encode(pixels.to(device)).mode()).cpu()
        sheet = make_grid(torch.cat([pixels, rebuilt]).clamp(-1, 1), len(pixels))
        return to_pictures(sheet[None], "pil")[0]

    return draw_sheet


@torch.no_grad()
def reconstruction_psnr(
    vae: AutoencoderKL, dataset: Dataset | list, count: int = 64
) -> float:
    """Mean PSNR, in dB, of `count` pictures through encoder and decoder."""
    device = next(vae.parameters()).device
    values = []
    for index in range(min(count, len(dataset))):
        pixels = dataset[index][0][None].to(device)
        rebuilt = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        values.append(10 * math.log10(4 / (rebuilt - pixels).square().mean().item()))
    return sum(values) / len(values)


def train_vae(config: VAETrainingConfig) -> AutoencoderKL | None:
    """Train a VAE, measure its latent scale, and save it in diffusers' layout.

    Says the plan first; with `dry_run` that is all. Writes `output_dir/vae`.
    """
    make_accelerator(config)
    torch.manual_seed(config.seed)
    dataset, held = open_dataset(config), open_dataset(config, "validation")
    if isinstance(dataset, CaptionedShards):
        held = list(islice(held, 256))  # a stream has no numbers
    crowds = isinstance(dataset, Scenes)
    shown = dataset
    if crowds:
        shown = CrowdedScenes(config.image_size, config.seed, len(dataset))
    vae = new_vae(config)
    side = config.image_size
    pixels = torch.empty(config.batch_size, 3, side, side, device="meta")
    empty = copy.deepcopy(vae).to("meta")
    say_plan(config, shown, empty, memory_needed(config, empty, pixels))
    if config.dry_run:
        return None

    def loss_of(module, batch, generator, share):
        pixels = batch[0].to(generator.device, memory_format=torch.channels_last)
        noise = latent_noise(vae.config, pixels, generator, share)
        return module(pixels, noise)

    def validate(module):
        return {"psnr": reconstruction_psnr(module.vae, held)}

    game, sample = VAEGame(config, vae), rebuilt_sheet(held)
    game = optimise(config, game, shown, loss_of, validate, sample=sample)
    vae = game.vae.eval()
    some = held if isinstance(dataset, CaptionedShards) else dataset
    scale = round(1 / latent_spread(vae, some), 5)
    vae.config = replace(vae.config, scaling_factor=scale)
    if is_main_process():
        vae.save_pretrained(Path(config.output_dir) / "vae")
    return vae


@dataclass(frozen=True)
class CLIPTrainingConfig(RunConfig):
    """Train a CLIP text model and its tokenizer from zero: `sdbook train-clip`.

    Attributes:
        vocab_size: tokens to learn from the captions, at most.
        max_length: tokens per caption, start and end included.
        hidden_size: width of the text embeddings.
        num_hidden_layers: of the text model.
        num_attention_heads: of the text model.
        twins: give every scene a near twin, so that word order has to matter.
    """

    output_dir: str = "runs/clip"
    batch_size: int = 96
    max_steps: int = 600
    weight_decay: float = 0.05
    warmup_steps: int = 50
    vocab_size: int = 800
    max_length: int = 24
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    twins: bool = True


def captions_of(dataset: Dataset) -> list[str]:
    """Every caption of a dataset, without opening a picture."""
    if isinstance(dataset, Scenes):
        return [dataset.scene(i).caption for i in range(len(dataset))]
    if isinstance(dataset, CaptionedShards):
        return [caption for *_, caption in dataset.samples(dataset.shards)]
    return [caption for _, caption in dataset.pairs]


def new_text_encoder(config: CLIPTrainingConfig, tokenizer) -> CLIPTextModel:
    """A text model with random weights that fits a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.start_id,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.end_id,
        )
    )


def caption_ids(tokenizer: Tokenizer, captions: list[str]) -> Int64[Tensor, "m n"]:
    """Token ids of captions, without a warning for each that is too long."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* tokens of the prompt fit")
        return tokenizer(captions)


def warn_about_long(tokenizer: Tokenizer, captions: list[str]) -> None:
    """Warn, once for all of them, of captions that the text model sees in part only."""
    rows = tokenizer.backend(captions, verbose=False)["input_ids"] if captions else []
    room = tokenizer.max_length
    long = [text for text, ids in zip(captions, rows, strict=True) if len(ids) > room]
    if long:
        warnings.warn(
            f"{len(long):,} captions are longer than {room - 2} tokens, and the text "
            "model does not see their ends; shorten them, or begin them with what "
            "matters most (train-clip can also raise max_length). One of them: "
            f"{long[0]!r}",
            stacklevel=2,
        )


class Tokenize:
    """Collation for CLIP: pictures in one tensor, captions as rows of token ids."""

    def __init__(self, tokenizer: Tokenizer, twins: bool):
        self.tokenizer, self.twins = tokenizer, twins

    def __call__(self, items):
        pairs = [pair for item in items for pair in item] if self.twins else items
        pixels, captions = zip(*pairs, strict=True)
        return torch.stack(pixels), caption_ids(self.tokenizer, list(captions))


def train_clip(config: CLIPTrainingConfig) -> CLIPTextModel | None:
    """Train text and picture towers to agree; save text model and tokenizer.

    Says the plan first; with `dry_run` that is all. Writes `text_encoder`,
    `tokenizer` and `clip.safetensors` (the rest) to `output_dir`. With
    several processes, or parts of a batch, each compares its own pictures alone.
    """
    make_accelerator(config)
    torch.manual_seed(config.seed)
    dataset = open_dataset(config)
    twins = config.twins and isinstance(dataset, Scenes)
    texts = sorted(set(captions_of(dataset)))
    tokenizer = Tokenizer.train(texts, config.vocab_size, config.max_length)
    warn_about_long(tokenizer, texts)
    text_encoder = new_text_encoder(config, tokenizer)
    clip = CLIP(text_encoder, config.image_size, projection_dim=config.hidden_size)
    start_apart(clip)
    count = config.batch_size * (2 if twins else 1)
    ids = torch.zeros(count, config.max_length, dtype=torch.int64, device="meta")
    pixels = torch.empty(count, 3, config.image_size, config.image_size, device="meta")
    empty = copy.deepcopy(clip).to("meta")
    say_plan(config, dataset, empty, memory_needed(config, empty, ids, pixels))
    if config.dry_run:
        return None

    def loss_of(module, batch, generator, share):
        pixels, ids = (part.to(generator.device) for part in batch)
        same = (ids[:, None] == ids[None]).all(-1)
        logits = module(ids, pixels)
        right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return contrastive_loss(logits, same), {"accuracy": right}

    data, collate = Twins(dataset) if twins else dataset, Tokenize(tokenizer, twins)
    clip = optimise(config, clip, data, loss_of, collate=collate).eval()
    if is_main_process():
        clip.text_encoder.save_pretrained(Path(config.output_dir) / "text_encoder")
        tokenizer.save_pretrained(Path(config.output_dir) / "tokenizer")
        state = clip.state_dict().items()
        rest = {key: t for key, t in state if not key.startswith("text_encoder.")}
        save_weights(rest, Path(config.output_dir) / "clip.safetensors")
    return clip.text_encoder


KEY_LENGTH = 32


def short_name(*facts) -> str:
    """A key for bytes, texts and numbers: 32 letters, others if any fact is."""
    digest = hashlib.sha256()
    for fact in facts:
        data = fact if isinstance(fact, bytes) else str(fact).encode()
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()[:KEY_LENGTH]


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights: other weights, other name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_at(path: Path, place: int, data: bytes) -> None:
    """Write at a place of a file, and drop what came after it."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(place)
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the rows have to be there before their keys


class Rows:
    """A growing table of float16 rows in files, each row under a key.

    `folder` gets rows (the numbers), keys (32 letters a row) and shape.json. May be
    cut off at any time: a row counts once its key is written, which is done last. One
    process at a time may append; any number may read what was there when they opened.
    """

    def __init__(self, folder: Path):
        self.folder, self.shape_file = folder, folder / "shape.json"

    def count(self) -> int:
        """How many rows are there, whole and with a key."""
        if not (self.folder / "keys").exists():
            return 0
        row = 2 * math.prod(json.loads(self.shape_file.read_text()))  # bytes
        sizes = [os.path.getsize(self.folder / name) for name in ("keys", "rows")]
        return min(sizes[0] // KEY_LENGTH, sizes[1] // row)

    def numbers(self) -> dict[str, int]:
        """The number of each key's row."""
        count = self.count()
        text = (self.folder / "keys").read_text()[: count * KEY_LENGTH] if count else ""
        return {text[i * KEY_LENGTH :][:KEY_LENGTH]: i for i in range(count)}

    def append(self, keys: list[str], rows: np.ndarray) -> None:
        """Add rows (b, …) at the end; on the disk when this returns."""
        if not self.shape_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(rows.shape[1:])
            write_atomically(self.shape_file, lambda file: file.write_text(text))
        count, rows = self.count(), rows.astype(np.float16)
        write_at(self.folder / "rows", count * rows[0].nbytes, rows.tobytes())
        write_at(self.folder / "keys", count * KEY_LENGTH, "".join(keys).encode())

    def open(self) -> np.ndarray:
        """All rows (count, …), mapped into memory: read when they are used."""
        shape = (self.count(), *json.loads(self.shape_file.read_text()))
        return np.memmap(self.folder / "rows", np.float16, "r", shape=shape)


def look_into(notes: Path, files: list, read: Callable) -> list:
    """`read(file)` of every file; as noted, where size and date are those noted."""
    known = json.loads(notes.read_text()) if notes.exists() else {}
    found = []
    for file in tqdm(files, desc="files"):
        facts, name = os.stat(file), os.path.abspath(file)
        stamp = [facts.st_size, facts.st_mtime_ns]
        if name not in known or known[name][0] != stamp:
            known[name] = [stamp, read(file)]
        found.append(known[name][1])
    write_atomically(notes, lambda path: path.write_text(json.dumps(known)))
    return found


def look_key(content: str, cut: Cut, name: str, look: int) -> str:
    """The key of one look at a picture, of which `content` is the short name."""
    return short_name(content, cut.size, *cut.place(name, look))


def list_items(dataset: Dataset, folder: Path) -> list[tuple[str, str]]:
    """(key, caption) of every item, in order; `folder` keeps notes of the files."""
    if isinstance(dataset, Scenes):
        first = copy.copy(dataset)
        first.length = 16
        world = short_name(*(pixels.numpy().tobytes() for pixels, _ in first))
        captions = captions_of(dataset)
        return [(short_name(world, i), text) for i, text in enumerate(captions)]
    if isinstance(dataset, CaptionedShards):
        shards = look_into(folder / "shards.json", dataset.shards, lambda shard: [
            (short_name(data), name, caption)
            for name, data, caption in dataset.samples([shard])
        ])  # fmt: skip
        pictures = [picture for shard in shards for picture in shard]
    else:
        files, captions = map(list, zip(*dataset.pairs))
        contents = look_into(
            folder / "pictures.json", files, lambda file: short_name(file.read_bytes())
        )
        names = map(dataset.name, range(len(files)))
        pictures = list(zip(contents, names, captions))
    return [
        (look_key(content, dataset.cut, name, look), caption)
        for look in range(dataset.cut.looks)
        for content, name, caption in pictures
    ]


class Missing(Dataset):
    """The items of `wanted` {key: number} as (key, pixels); None if unreadable."""

    def __init__(self, dataset: Dataset, wanted: dict[str, int]):
        self.dataset, self.wanted = dataset, list(wanted.items())

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[str, Tensor | None]:
        key, number = self.wanted[place]
        if isinstance(self.dataset, CaptionedImages):
            return key, self.dataset.read(number)
        return key, self.dataset[number][0]


class MissingInShards(IterableDataset):
    """The same from shards, in their order; workers share the shards."""

    def __init__(self, dataset: CaptionedShards, wanted: dict[str, int]):
        self.dataset, self.wanted = dataset, wanted

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        worker, shards, cut = get_worker_info(), self.dataset.shards, self.dataset.cut
        mine = shards[worker.id :: worker.num_workers] if worker else shards
        for name, data, _ in self.dataset.samples(mine):
            content = short_name(data)
            for look in range(cut.looks):
                key = look_key(content, cut, name, look)
                if key in self.wanted:
                    yield key, self.dataset.decode(name, data, look)


BATCH_PIXELS = 2**19  # fits into any memory: 128 pictures of 64 × 64, 2 of 512 × 512


@torch.no_grad()
def write_moments(table: Rows, dataset, keys: list[str], vae, num_workers=0) -> None:
    """Add mean and log-variance (2c, h, w) of every item that the table lacks."""
    device, known = next(vae.parameters()).device, table.numbers()
    wanted = {key: number for number, key in enumerate(keys) if key not in known}
    if not wanted:
        return
    shards = isinstance(dataset, CaptionedShards)
    source = (MissingInShards if shards else Missing)(dataset, wanted)
    batch_size = max(1, BATCH_PIXELS // side_of(dataset) ** 2)
    loader = DataLoader(source, batch_size, collate_fn=list, num_workers=num_workers)
    done = len(keys) - len(wanted)
    with tqdm(total=len(keys), initial=done, desc="latents") as bar:
        for items in loader:
            bar.update(len(items))
            good = [(key, pixels) for key, pixels in items if pixels is not None]
            if good:
                names, pixels = zip(*good)
                pixels = torch.stack(pixels).to(
                    device, memory_format=torch.channels_last
                )
                posterior = vae.encode(pixels)
                moments = torch.cat([posterior.mean, posterior.logvar], 1)
                table.append(list(names), moments.half().cpu().numpy())


def side_of(dataset: Dataset) -> int:
    """The side of a dataset's pictures, in pixels."""
    return dataset.side


def fill_cache(
    folder: Path, dataset, vae, text_encoder, tokenizer, num_workers=0, captions=()
) -> tuple[Rows, Rows, list[tuple[str, str]]]:
    """Compute what the cache in `folder` lacks of a dataset and of more `captions`.

    Returns the tables of moments and of texts, and (key, caption) of every item.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(tokenizer.backend.get_vocab().items()), tokenizer.max_length
    texts = Rows(folder / f"texts-{fingerprint(text_encoder)}-{short_name(words)}")
    moments = Rows(folder / f"moments-{fingerprint(vae)}-{side_of(dataset)}")
    with FileLock(folder / "lock"):
        items = list_items(dataset, folder)
        keys, said = map(list, zip(*items))
        write_texts(texts, ["", *said, *captions], text_encoder, tokenizer)
        write_moments(moments, dataset, keys, vae, num_workers)
    return moments, texts, items


def find_rows(moments: Rows, texts: Rows, items: list[tuple[str, str]]) -> np.ndarray:
    """The rows (n, 2) of each item's moments and text.

    For a picture that cannot be read the next one stands in, with its caption.
    """
    row, number = moments.numbers(), texts.numbers()
    good = [i for i, (key, _) in enumerate(items) if key in row]
    if not good:
        raise ValueError(f"none of {len(items)} pictures can be read; mend the files")
    if len(good) < len(items):
        count = f"{len(items) - len(good)} of {len(items)} pictures"
        warnings.warn(f"{count} cannot be read; others stand in", stacklevel=2)
    places = np.searchsorted(good, np.arange(len(items))) % len(good)
    stand_ins = (items[good[place]] for place in places)
    return np.array([(row[key], number[short_name(text)]) for key, text in stand_ins])


def encode_dataset(
    config: RunConfig, dataset, accelerator, vae, text_encoder, tokenizer
):
    """The pictures and captions of a run after the frozen parts."""
    some = ()
    if isinstance(dataset, Scenes):
        some = captions_of(open_dataset(replace(config, kinds=(), num_pictures=1000)))
    vae.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    return Encoded(
        dataset, vae, text_encoder, tokenizer, Path(config.output_dir) / "cache",
        config.num_workers, some,
    )  # fmt: skip


@dataclass(frozen=True)
class UNetShape:
    """How large a UNet is; what is not said comes from the preset, or `pretrained`.

    Attributes:
        unet_preset: "tiny", "small", "base" or "sd15", Stable Diffusion 1.5's; small
            for a UNet from zero.
        unet_dim: width of the first level; the preset's others keep their proportion.
        unet_channels: width of each level.
        layers_per_block: residual blocks per level on the way down.
        attention_levels: levels that attend to the text, counted from 0 at the top.
        num_heads: attention heads.
        norm_num_groups: groups of every GroupNorm.
    """

    unet_preset: str | None = None
    unet_dim: int | None = None
    unet_channels: tuple[int, ...] | None = None
    layers_per_block: int | None = None
    attention_levels: tuple[int, ...] | None = None
    num_heads: int | None = None
    norm_num_groups: int | None = None


UNET_SIZES = (
    "unet_channels", "layers_per_block", "attention_levels", "num_heads",
    "norm_num_groups",
)  # fmt: skip
PRESETS = {
    "tiny": ((32, 64), 1, (1,), 2, 8),
    "small": ((64, 128, 192), 1, (1, 2), 4, 16),
    "base": ((128, 256, 384, 512), 2, (1, 2, 3), 8, 32),
    "sd15": ((320, 640, 1280, 1280), 2, (0, 1, 2), 8, 32),
}


def asked_sizes(config: UNetShape, preset: str | None = None) -> dict:
    """The sizes that a config names, itself or by its preset (or by this one)."""
    values = PRESETS.get(config.unet_preset or preset, ())
    sizes = dict(zip(UNET_SIZES, values))
    if config.unet_dim and sizes:
        widths = sizes["unet_channels"]
        sizes["unet_channels"] = tuple(w * config.unet_dim // widths[0] for w in widths)
    own = {name: getattr(config, name) for name in UNET_SIZES}
    own = {name: size for name, size in own.items() if size is not None}
    return sizes | {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}


@dataclass(frozen=True)
class NoiseSettings:
    """What the UNet is asked, and how much an answer counts.

    Attributes:
        beta_schedule: "scaled_linear", "linear" or "cosine".
        diffusion_steps: timesteps of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        rescale_betas_zero_snr: let the schedule end in pure noise (Lin et al., 2024).
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
        snr_power: on these weights; below 1, noisy timesteps (the layout) count more.
        offset_noise: noise that is the same all over a channel; 0.05 to 0.1, or 0.
        noisy_share: of the timesteps, moved to the noisiest quarter; 0 for none.
    """

    beta_schedule: str = "scaled_linear"
    diffusion_steps: int = 1000
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    snr_power: float = 1.0
    offset_noise: float = 0.0
    noisy_share: float = 0.0


@dataclass(frozen=True)
class TrainingConfig(RunConfig, NoiseSettings, UNetShape):
    """Train a UNet on frozen latents and texts: `sdbook train`.

    Attributes:
        pretrained: a model to go on from: a folder, a hub id or one file.
        vae_weights_path: folder (or file) of a VAE, or of a run of train-vae; by
            default that of `pretrained`, or runs/vae.
        text_encoder_path: folder with text_encoder/ and tokenizer/ (train-clip's); by
            default those of `pretrained`, or of runs/clip.
        gradient_checkpointing: compute the insides of blocks twice to save memory.
        num_validation: pictures to validate on, not trained on (a tenth at most).
        sample_prompts: what to draw every sample_every steps; by default captions of
            held-out pictures.
    """

    output_dir: str = "runs/unet"
    max_steps: int = 10_000
    checkpoint_every: int = 1000
    pretrained: str | None = None
    vae_weights_path: str | None = None
    text_encoder_path: str | None = None
    gradient_checkpointing: bool = False
    num_validation: int = 64
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_noise(self)
        check_shape(self)


def make_noise_schedule(config) -> DDIMScheduler:
    """The noise schedule, with Stable Diffusion's betas, as a sampler to save."""
    return DDIMScheduler(
        num_train_timesteps=config.diffusion_steps,
        beta_schedule=config.beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def check_noise(config) -> None:
    """Raise ValueError for settings of the noise that cannot be meant."""
    make_noise_schedule(config)  # refuses unknown schedules and prediction types
    if not 0 <= config.caption_dropout <= 1:
        raise ValueError(
            f"caption_dropout is {config.caption_dropout}; give a share from 0 to 1"
        )
    if not 0 <= config.snr_power <= 1:
        raise ValueError(f"snr_power is {config.snr_power}; give a number from 0 to 1")
    if not 0 <= config.noisy_share <= 1:
        raise ValueError(
            f"noisy_share is {config.noisy_share}; give a share from 0 to 1"
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr makes the last timestep pure noise, from which "
            "prediction_type 'epsilon' says nothing about the picture; set "
            "prediction_type to v_prediction, or rescale_betas_zero_snr to false"
        )


def check_shape(config) -> None:
    """Raise ValueError for a UNet that cannot be built."""
    if config.unet_preset not in (None, *PRESETS):
        raise ValueError(
            f"unet_preset {config.unet_preset!r} is none of {', '.join(PRESETS)}"
        )
    if config.unet_dim and config.unet_channels:
        raise ValueError(
            f"unet_dim is {config.unet_dim} and unet_channels {config.unet_channels}; "
            "give one of them"
        )
    sizes = asked_sizes(config, None if config.pretrained else "small")
    widths = sizes.get("unet_channels")
    if widths is None:
        return
    for level in sizes.get("attention_levels", ()):
        if not 0 <= level < len(widths):
            raise ValueError(
                f"attention_levels {sizes['attention_levels']}, but unet_channels has "
                f"{len(widths)} levels; give numbers from 0 to {len(widths) - 1}"
            )
    for name in ("norm_num_groups", "num_heads"):
        if name in sizes:
            check_multiple("unet_channels", widths, name, sizes[name])


FROZEN = {
    "vae": ("vae_weights_path", "runs/vae", "train-vae"),
    "text_encoder": ("text_encoder_path", "runs/clip", "train-clip"),
    "tokenizer": ("text_encoder_path", "runs/clip", "train-clip"),
}


def source_of(config: TrainingConfig, part: str) -> Path:
    """Where a part comes from: its own path, `pretrained`, or a training's output.

    Raises FileNotFoundError that says which command makes it.
    """
    key, usual, command = FROZEN.get(part, (None, None, None))
    own = getattr(config, key) if key else None
    if config.pretrained and own is None:
        path = find_model(config.pretrained)
    else:
        path = Path(own or usual)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; run `sdbook {command} --output_dir {path}` "
                f"first, or set {key}"
            )
    return path / part if (path / part).is_dir() else path


def open_frozen(config: TrainingConfig):
    """The trained VAE, text model and tokenizer."""
    words = source_of(config, "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(source_of(config, "text_encoder"))
    tokenizer = Tokenizer.from_pretrained(
        find_tokenizer(None if words.is_file() else words)
    )
    check_tokenizer(tokenizer, text_encoder.config)
    vae = AutoencoderKL.from_pretrained(source_of(config, "vae"))
    return vae.eval(), text_encoder.eval(), tokenizer


def unet_from_zero(config: TrainingConfig) -> UNetConfig:
    """The sizes of a new UNet, but for what the VAE and the text model decide."""
    sizes = asked_sizes(config, "small")
    levels = range(len(sizes["unet_channels"]))
    attends = [level in sizes["attention_levels"] for level in levels]
    down = ("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    up = ("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return UNetConfig(
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=sizes["unet_channels"],
        layers_per_block=sizes["layers_per_block"],
        attention_head_dim=sizes["num_heads"],
        norm_num_groups=sizes["norm_num_groups"],
    )


def check_asked_sizes(config: TrainingConfig, unet: UNetConfig) -> None:
    """Raise ValueError where the settings ask for other sizes than `pretrained` has."""
    blocks = enumerate(unet.down_block_types)
    attends = tuple(level for level, name in blocks if name.startswith("Cross"))
    has = dict(zip(UNET_SIZES, (
        unet.block_out_channels, unet.layers_per_block, attends,
        unet.attention_head_dim, unet.norm_num_groups,
    )))  # fmt: skip
    for name, size in asked_sizes(config).items():
        if size != has[name]:
            raise ValueError(
                f"{name} is {size}, but the UNet of {config.pretrained} has "
                f"{has[name]}; leave the sizes out, they are taken from there"
            )


def find_sizes(config: TrainingConfig) -> UNetConfig:
    """The UNet's sizes, from the settings and the parts' config files alone.

    Raises ValueError for a picture size or parts that do not fit together.
    """
    vae = AutoencoderKL.find_config(source_of(config, "vae"))
    text = CLIPTextModel.find_config(source_of(config, "text_encoder"))
    fitting = {"cross_attention_dim": text.hidden_size}
    fitting |= {"in_channels": vae.latent_channels, "out_channels": vae.latent_channels}
    if config.pretrained is None:
        unet = replace(unet_from_zero(config), **fitting)
    else:
        unet = UNet.find_config(source_of(config, "unet"))
        check_asked_sizes(config, unet)
    for name, size in fitting.items():
        if getattr(unet, name) != size:
            key = "text_encoder_path" if "cross" in name else "vae_weights_path"
            raise ValueError(
                f"{key}: the UNet of {config.pretrained} has {name} "
                f"{getattr(unet, name)}, but this part gives {size}; leave {key} out "
                "to take the part that it was trained with"
            )
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    check_side(config.image_size, vae.downscale * halvings, "the VAE with this UNet")
    return replace(unet, sample_size=config.image_size // vae.downscale)


def new_unet(config: TrainingConfig, sizes: UNetConfig, states: Tensor) -> UNet:
    """A UNet that starts from zero, or from the one in `pretrained`.

    From zero, it starts as the identity, and white for the text states (m, n, d).
    """
    if config.pretrained is None:
        return start_white(start_as_identity(UNet(sizes)), states)
    unet = UNet.from_pretrained(source_of(config, "unet"))
    unet.config = sizes  # the same, but for the size of the pictures
    return unet


def check_schedule(config: TrainingConfig) -> None:
    """Warn where the noise is not the one that `pretrained` was trained with."""
    folder = find_model(config.pretrained) / "scheduler" if config.pretrained else None
    if folder is None or not folder.is_dir():
        return
    theirs, ours = load_scheduler(folder).config, make_noise_schedule(config).config
    for key, name in (
        ("prediction_type", "prediction_type"), ("beta_schedule", "beta_schedule"),
        ("diffusion_steps", "num_train_timesteps"),
        ("rescale_betas_zero_snr", "rescale_betas_zero_snr"),
    ):  # fmt: skip
        was, is_ = (getattr(one, name, None) for one in (theirs, ours))
        if was != is_:
            warnings.warn(
                f"{key} is {is_}, but {config.pretrained} was trained with {was}; "
                f"unless you mean to change it, set {key} to {was}",
                stacklevel=2,
            )


def as_it_is(batch):
    """The collation of a dataset that already gives whole batches."""
    return batch


def hold_out(config: TrainingConfig, dataset: Dataset) -> tuple[list[int], Dataset]:
    """Numbers of the pictures to train on, and the pictures to validate on."""
    if isinstance(dataset, Scenes):
        count = min(config.num_validation, len(dataset))
        held = Subset(open_dataset(config, "validation"), range(count))
        return list(range(len(dataset))), held
    if isinstance(dataset, CaptionedShards):
        return list(range(len(dataset))), Subset(dataset, [])
    count = min(config.num_validation, len(dataset) // 10)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    return sorted(order[count:]), Subset(dataset, order[:count])


def sheet_of(config: TrainingConfig, dataset, vae, text_encoder, tokenizer, scheduler):
    """A function that draws the sample prompts with a UNet, always from one noise."""
    pictures = islice(iter(dataset), min(4, len(dataset)))
    prompts = list(config.sample_prompts or (caption for _, caption in pictures))

    def draw_sheet(unet):
        from .images import labelled_grid

        pipe = StableDiffusion(vae, text_encoder, tokenizer, unet, scheduler)
        images = pipe(prompts, seed=config.seed, progress=False).images
        return labelled_grid(images, prompts)

    return draw_sheet


def unet_memory(config: TrainingConfig, unet: UNet) -> dict:
    """What training this (empty) UNet needs: see `memory_needed`."""
    b, side = config.batch_size, unet.config.sample_size
    with torch.device("meta"):
        latents = torch.empty(b, unet.config.in_channels, side, side)
        context = torch.empty(b, 77, unet.config.cross_attention_dim)
        return memory_needed(config, unet, latents, torch.zeros(b), context)
