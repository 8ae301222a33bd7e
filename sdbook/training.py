"""Training

Generated from chapters/08_training.ipynb; do not edit.
"""

import copy
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    get_worker_info,
)
from tqdm.auto import tqdm

from .attention import TransformerBlock
from .clip import CLIP, CLIPTextConfig, CLIPTextModel, Tokenizer, contrastive_loss
from .data import (
    COLOURS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    CaptionedImages,
    CaptionedShards,
    Crowds,
    Cut,
    Request,
    Scene,
    Scenes,
    arrange,
    describe,
    draw,
    is_held_out,
    to_pixels,
)
from .pipeline import StableDiffusion
from .schedulers import DDIMScheduler
from .unet import UNet, UNetConfig, start_as_identity
from .vae import AutoencoderKL, DiagonalGaussian, VAEConfig
from .weights import write_atomically

__all__ = [
    "check_run",
    "RunConfig",
    "StepSampler",
    "step_generator",
    "min_snr_weights",
    "DiffusionLoss",
    "mean_where",
    "learning_rate_at",
    "EMA",
    "save_checkpoint",
    "load_checkpoint",
    "step_of",
    "Log",
    "make_accelerator",
    "descend",
    "optimise",
    "is_due",
    "set_learning_rate",
    "report",
    "step_loader",
    "is_main_process",
    "VAETrainingConfig",
    "vae_loss",
    "start_certain",
    "reconstruction_psnr",
    "latent_spread",
    "open_dataset",
    "train_vae",
    "decided",
    "exchange",
    "say_alike",
    "Twins",
    "CLIPTrainingConfig",
    "captions_of",
    "new_text_encoder",
    "Tokenize",
    "start_apart",
    "train_clip",
    "KEY_LENGTH",
    "short_name",
    "fingerprint",
    "Rows",
    "write_at",
    "look_into",
    "look_key",
    "list_items",
    "Missing",
    "MissingInShards",
    "BATCH_PIXELS",
    "write_texts",
    "write_moments",
    "side_of",
    "fill_cache",
    "find_rows",
    "Encoded",
    "encode_dataset",
    "TrainingConfig",
    "check_unet_choices",
    "make_noise_schedule",
    "unet_config",
    "open_frozen",
    "whitening",
    "start_white",
    "new_unet",
    "as_it_is",
    "train",
]


def check_run(config) -> None:
    """Raise ValueError for settings of a run that cannot be meant."""
    at_least_one = (
        "batch_size max_steps num_pictures image_size log_every checkpoint_every "
        "layers_per_block norm_num_groups num_heads num_attention_heads hidden_size"
    )
    for name in at_least_one.split():
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; give at least 1")
    for name in ("warmup_steps", "num_workers", "weight_decay"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}; give 0 or more")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; give more than 0")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(
            f"ema_decay is {config.ema_decay}; give 0 (no average) or less than 1"
        )
    if config.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"mixed_precision {config.mixed_precision!r} is none of no, fp16, bf16"
        )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision fp16 needs a GPU; use 'no' or 'bf16'")


@dataclass(frozen=True)
class RunConfig:
    """What every training run needs to know.

    Attributes:
        dataset_path: "scenes" for the book's own world, or a folder of pictures.
        num_pictures: how many of the endless scenes to use.
        kinds: kinds of scene to show (chapter 4's `KINDS`); none named: all; one that
            is named twice is shown twice as often.
        output_dir: where the model, checkpoints and the log (log.jsonl) go.
        image_size: pictures are cut to squares of this side, in pixels.
        batch_size: pictures in one optimiser step, over all processes.
        max_steps: optimiser steps.
        learning_rate: the highest; it warms up, then falls along a cosine to 0.
        warmup_steps: steps until the highest learning rate.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are shortened to this.
        ema_decay: how slowly the averaged weights follow; 0 keeps no average.
        mixed_precision: "no", "fp16" or "bf16".
        compile: let torch.compile speed the model up (a GPU's gain).
        seed: of the weights, the data order and the noise.
        num_workers: processes that prepare data.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints.
        resume: go on from output_dir's checkpoint when it holds one.
    """

    dataset_path: str = "scenes"
    num_pictures: int = 20_000
    kinds: tuple[str, ...] = ()
    output_dir: str = "runs/model"
    image_size: int = 64
    batch_size: int = 64
    max_steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    compile: bool = False
    seed: int = 0
    num_workers: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    resume: bool = True

    def __post_init__(self):
        check_run(self)


class StepSampler(Sampler):
    """Lists of picture numbers, one for each step from `first` to `last`.

    Every epoch is shuffled anew by (seed, epoch) alone, so step 700 sees the same
    pictures whether or not the run was stopped before it. Process `rank` of `world`
    gets every world-th picture of each batch. Raises ValueError for a batch that
    does not split evenly.
    """

    def __init__(self, size, batch_size, seed, first, last, rank=0, world=1):
        if batch_size % world:
            raise ValueError(
                f"batch_size {batch_size} does not split over {world} processes; "
                f"give a multiple of {world}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

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
            yield picks[self.rank :: self.world]


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


class DiffusionLoss:
    """Noise a latent, ask the UNet what was added, compare (Ho et al., 2020).

    `scale` is the VAE's scaling factor and `empty` (n, d) the states of the empty
    caption, which replace a share `caption_dropout` of the captions. `share` is
    (rank, world): each process draws for the whole batch and keeps its own rows, so
    that the number of processes changes nothing.
    """

    def __init__(
        self, scheduler, scale, empty, caption_dropout=0.0, snr_gamma=0.0,
        snr_power=1.0, share=(0, 1),
    ):  # fmt: skip
        self.scheduler, self.scale, self.empty = scheduler, scale, empty
        self.caption_dropout, self.share = caption_dropout, share
        weights = min_snr_weights(scheduler, snr_gamma, snr_power)
        self.weights = weights.to(empty.device)

    def draw(self, moments: Float[Tensor, "b c2 h w"], generator: torch.Generator):
        """All that chance decides: x0, noise, timesteps, whose caption is dropped.

        The timesteps are spread evenly over the batch, one from each of its parts.
        """
        rank, world = self.share
        device, count = generator.device, len(moments) * world
        posterior = DiagonalGaussian(moments)

        def normal():
            shape = (count, *posterior.mean.shape[1:])
            return torch.randn(shape, generator=generator, device=device)[rank::world]

        def uniform():
            return torch.rand(count, generator=generator, device=device)

        x0 = (posterior.mean + posterior.std * normal()) * self.scale
        dropped = (uniform() < self.caption_dropout)[rank::world]
        place = ((torch.arange(count, device=device) + uniform()) / count)[rank::world]
        last = self.scheduler.num_train_timesteps - 1
        t = (place * (last + 1)).long().clamp(max=last)  # place can round up to 1
        return x0, normal(), t, dropped

    def __call__(self, unet, batch, generator: torch.Generator):
        """The loss of a batch (moments, states), and numbers for the log."""
        moments, states = (part.to(generator.device).float() for part in batch)
        x0, noise, t, dropped = self.draw(moments, generator)
        context = torch.where(dropped[:, None, None], self.empty, states)
        x = self.scheduler.add_noise(x0, noise, t)
        answer = unet(x.contiguous(memory_format=torch.channels_last), t, context)
        target = self.scheduler.target(x0, noise, t)
        error = (answer - target).square().mean((1, 2, 3))
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


def learning_rate_at(step: int, config: RunConfig) -> float:
    """The factor on the learning rate: a line up, then half a cosine down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(
        1, config.max_steps - config.warmup_steps
    )
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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


def save_checkpoint(path, module, ema, optimiser, step) -> None:
    """Write weights, average, optimiser state and step; whole or not at all."""
    state = {
        "step": step,
        "model": module.state_dict(),
        "ema": ema.shadow.state_dict() if ema else None,
        "optimiser": optimiser.state_dict(),
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path, module, ema, optimiser) -> int:
    """Restore what `save_checkpoint` wrote; returns the step to go on with.

    Raises ValueError for a file that is torn, or of another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model, step = state["model"], state["step"]
    except Exception as error:  # each way of being torn raises another one
        raise ValueError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}); "
            "it may be cut off: copy it again, or remove it to start from zero"
        ) from error
    try:
        module.load_state_dict(model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is of another model ({str(error).splitlines()[1].strip()}); "
            "choose another output_dir, or set resume to false and remove it"
        ) from None
    if ema:
        ema.shadow.load_state_dict(state["ema"] or model)
    optimiser.load_state_dict(state["optimiser"])
    return step


def step_of(line: str) -> int:
    """The step of a line of the log; -1 for one that was cut off by a power cut."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return -1


class Log:
    """Means of what was measured in the last steps, as lines of a JSON file.

    `first` is the step that the run starts with; lines after it are removed. Only
    the process that `writes` touches the file.
    """

    def __init__(self, path: Path, first: int, writes: bool = True):
        self.path, self.writes, self.in_a_row = path, writes, 0
        self.start_again()
        if writes:
            self.cut(first)

    def cut(self, first: int) -> None:
        """Remove the lines of steps that will be made again."""
        path = self.path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if -1 < step_of(line) <= first]
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda file: file.write_text(text))

    def start_again(self) -> None:
        self.sums, self.count, self.skipped = {}, 0, 0
        self.started = time.perf_counter()

    def add(self, numbers: dict) -> None:
        """Count one step; nothing waits for the device here."""
        self.in_a_row = 0
        for name, value in numbers.items():
            value = torch.as_tensor(value).detach()
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, int | float]:
        """The means since the last call (without what is no number), and seconds."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        means |= {"skipped": self.skipped} if self.skipped else {}
        means["seconds"] = round(time.perf_counter() - self.started, 2)
        self.start_again()
        return means

    def skip(self, step: int) -> None:
        """Count a step that was left out; ValueError after ten in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == 10:
            raise ValueError(
                f"the gradient was no number in ten steps running, the last of them "
                f"step {step}; lower the learning_rate, look for broken pictures, and "
                f"go on from the last checkpoint in {self.path.parent}"
            )

    def write(self, line: dict) -> None:
        """Append one line."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def make_accelerator(mixed_precision: str):
    """Accelerate's view of this process: device, precision, rank among others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run may have had another precision
    threads = torch.get_num_threads()
    accelerator = Accelerator(mixed_precision=mixed_precision)
    torch.set_num_threads(threads)  # accelerate lowers them on some CPUs
    return accelerator


def descend(accelerator, module, optimiser, loss: Tensor, max_norm: float):
    """One step down the gradient; returns its length, and whether it was a number."""
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    finite = bool(norm.isfinite())
    if finite or accelerator.scaler:  # fp16's scaler leaves bad steps out itself
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, finite


def optimise(
    config: RunConfig,
    module: nn.Module,
    dataset: Dataset,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    collate: Callable | None = None,
) -> nn.Module:
    """Train `module` for `config.max_steps` and return its (averaged) weights.

    `loss_of(module, batch, generator)` gives the loss and numbers to log. Every
    random choice in it comes from the generator, which is the same in all processes.
    `validate(module)` is asked at each checkpoint. A line of numbers (the main
    process's) goes to `output_dir/log.jsonl` every `log_every` steps;
    `output_dir/checkpoint.pt` holds all that resuming needs.
    """
    accelerator = make_accelerator(config.mixed_precision)
    device, output = accelerator.device, Path(config.output_dir)
    checkpoint = output / "checkpoint.pt"
    module.to(device, memory_format=torch.channels_last)
    ema = EMA(module, config.ema_decay) if config.ema_decay else None
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    first, main = 0, accelerator.is_main_process
    if config.resume and checkpoint.exists():
        first = load_checkpoint(checkpoint, module, ema, optimiser)
    log = Log(output / "log.jsonl", first, main)
    wrapped = torch.compile(module) if config.compile else module
    wrapped, optimiser = accelerator.prepare(wrapped, optimiser)
    loader = step_loader(config, dataset, first, accelerator, collate)
    bar = tqdm(loader, initial=first, total=config.max_steps, disable=not main)
    for step, batch in enumerate(bar, start=first):
        set_learning_rate(optimiser, config, step)
        generator = step_generator(config.seed, step, device=device)
        with accelerator.autocast():
            loss, numbers = loss_of(wrapped, batch, generator)
        norm, finite = descend(
            accelerator, wrapped, optimiser, loss, config.max_grad_norm
        )
        if not finite:
            log.skip(step)
        else:
            log.add({"loss": loss, "grad_norm": norm, **numbers})
            if ema:
                ema.update(module, step)
        if main:
            report(config, log, step, validate, ema.shadow if ema else module)
        if main and is_due(step + 1, config.checkpoint_every, config):
            save_checkpoint(checkpoint, module, ema, optimiser, step + 1)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.end_training()
    return ema.shadow if ema else module


def is_due(done: int, every: int, config: RunConfig) -> bool:
    """Is it time, after `done` steps, for what comes every so often and at the end?"""
    return done % every == 0 or done == config.max_steps


def set_learning_rate(optimiser, config: RunConfig, step: int) -> None:
    """Give every weight the learning rate of this step."""
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate * learning_rate_at(step, config)


def report(config: RunConfig, log: Log, step: int, validate, model) -> None:
    """Write what is due after a step; mostly nothing."""
    done, line = step + 1, {}
    if is_due(done, config.log_every, config):
        line = log.means()
    if validate and is_due(done, config.checkpoint_every, config):
        line |= validate(model)
    if line:
        lr = config.learning_rate * learning_rate_at(step, config)
        log.write({"step": done, "lr": lr, **line})


def step_loader(config, dataset, first, accelerator, collate=None) -> DataLoader:
    """This process's batches, from step `first` to the last."""
    sampler = StepSampler(
        len(dataset), config.batch_size, config.seed, first, config.max_steps,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
    )  # fmt: skip


def is_main_process() -> bool:
    """Is this the process that writes files? With one process, it is."""
    from accelerate import PartialState

    return PartialState().is_main_process


@dataclass(frozen=True)
class VAETrainingConfig(RunConfig):
    """Train an AutoencoderKL from zero: `sdbook train-vae`.

    Attributes:
        block_out_channels: width of each level; one halving between two levels.
        layers_per_block: residual blocks per level of the encoder.
        norm_num_groups: groups of every GroupNorm.
        kl_weight: of the divergence from the standard normal, per pixel number.
    """

    output_dir: str = "runs/vae"
    batch_size: int = 32
    max_steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    kl_weight: float = 3e-4


def vae_loss(vae: nn.Module, batch, generator: torch.Generator, kl_weight: float):
    """Mean squared error, a little absolute error, and the weighted divergence.

    Squares care most for large errors, the things' colours; absolute values alone
    would first polish the background, which is most of a picture.
    """
    pixels = batch[0].to(generator.device, memory_format=torch.channels_last)
    rebuilt, posterior = vae(pixels, generator)
    error = rebuilt - pixels
    absolute, squared = error.abs().mean(), error.square().mean()
    kl = posterior.kl().mean() / pixels[0].numel()
    return squared + 0.1 * absolute + kl_weight * kl, {"kl": kl, "squared": squared}


@torch.no_grad()
def start_certain(vae: AutoencoderKL, logvar: float = -6.0) -> None:
    """Let a new encoder begin with little noise, not with the prior's.

    With a standard deviation of 1 at the start, the noise drowns the means and a
    latent channel gives up before it has learnt to carry anything.
    """
    vae.quant_conv.bias[vae.config.latent_channels :] = logvar


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, dataset: Dataset, count: int = 64) -> float:
    """Mean PSNR, in dB, of `count` pictures through encoder and decoder."""
    device = next(vae.parameters()).device
    values = []
    for index in range(min(count, len(dataset))):
        pixels = dataset[index][0][None].to(device)
        rebuilt = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        values.append(10 * math.log10(4 / (rebuilt - pixels).square().mean().item()))
    return sum(values) / len(values)


@torch.no_grad()
def latent_spread(vae: AutoencoderKL, dataset: Dataset, count: int = 256) -> float:
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


def open_dataset(config: RunConfig, split: str = "train") -> Dataset:
    """The scenes, or the pictures of a folder or of .tar shards (without splits)."""
    if config.dataset_path == "scenes":
        kinds = config.kinds or tuple(KINDS)
        return Scenes(
            config.image_size, split, length=config.num_pictures, kinds=kinds
        )
    shards = config.dataset_path.endswith(".tar")
    reader = CaptionedShards if shards else CaptionedImages
    return reader(config.dataset_path, config.image_size)


def train_vae(config: VAETrainingConfig) -> AutoencoderKL:
    """Train a VAE, measure its latent scale, and save it in diffusers' layout.

    Writes `output_dir/vae`.
    """
    torch.manual_seed(config.seed)
    dataset, held = open_dataset(config), open_dataset(config, "validation")
    crowds = isinstance(dataset, Scenes)
    shown = Crowds(config.image_size, config.seed, len(dataset)) if crowds else dataset
    vae = AutoencoderKL(
        VAEConfig(
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.image_size,
        )
    )
    start_certain(vae)

    def loss_of(module, batch, generator):
        return vae_loss(module, batch, generator, config.kl_weight)

    def validate(module):
        return {"psnr": reconstruction_psnr(module, held)}

    vae = optimise(config, vae, shown, loss_of, validate).eval()
    scale = round(1 / latent_spread(vae, dataset), 5)
    vae.config = replace(vae.config, scaling_factor=scale)
    if is_main_process():
        vae.save_pretrained(Path(config.output_dir) / "vae")
    return vae


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

    def invent(self, scene: Scene, rng: np.random.Generator) -> tuple[Request, ...]:
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

    def __getitem__(self, index: int):
        scene = self.scenes.scene(index)
        rng = np.random.default_rng((self.scenes.seed, 7, index))
        twin, said, other = self.invent(scene, rng)
        pictures = (
            draw(things, scene.background, self.scenes.size)
            for things in (scene.things, arrange(twin, rng))
        )
        return tuple(
            (to_pixels(picture), describe(request, rng))
            for picture, request in zip(pictures, (said, other))
        )


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


class Tokenize:
    """Collation for CLIP: pictures in one tensor, captions as rows of token ids."""

    def __init__(self, tokenizer: Tokenizer, twins: bool):
        self.tokenizer, self.twins = tokenizer, twins

    def __call__(self, items):
        pairs = [pair for item in items for pair in item] if self.twins else items
        pixels, captions = zip(*pairs, strict=True)
        return torch.stack(pixels), self.tokenizer(list(captions))


def start_apart(clip: CLIP) -> None:
    """Let words differ more, and their fit count less, than in CLIP's own start."""
    embeddings = clip.text_encoder.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.3)
    nn.init.constant_(clip.logit_scale, math.log(4))


def train_clip(config: CLIPTrainingConfig) -> CLIPTextModel:
    """Train text and picture towers to agree; save text model and tokenizer.

    Writes `output_dir/text_encoder` and `output_dir/tokenizer`. With several
    processes, each compares the pictures of its own share of a batch.
    """
    torch.manual_seed(config.seed)
    dataset = open_dataset(config)
    twins = config.twins and isinstance(dataset, Scenes)
    texts = sorted(set(captions_of(dataset)))
    tokenizer = Tokenizer.train(texts, config.vocab_size, config.max_length)
    text_encoder = new_text_encoder(config, tokenizer)
    clip = CLIP(text_encoder, config.image_size, projection_dim=config.hidden_size)
    start_apart(clip)

    def loss_of(module, batch, generator):
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


def write_at(path: Path, place: int, data: bytes) -> None:
    """Write at a place of a file, and drop what came after it."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(place)
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the rows have to be there before their keys


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
                    yield key, self.dataset.read(name, data, look)


BATCH_PIXELS = 2**19  # fits into any memory: 128 pictures of 64 × 64, 2 of 512 × 512


@torch.no_grad()
def write_texts(table: Rows, texts, text_encoder, tokenizer, batch_size=256) -> None:
    """Add the states (tokens, d) of every text that the table lacks."""
    device, known = next(text_encoder.parameters()).device, table.numbers()
    keys = {short_name(text): text for text in texts}  # equal texts once, in order
    missing = [(key, text) for key, text in keys.items() if key not in known]
    with tqdm(total=len(keys), initial=len(keys) - len(missing), desc="texts") as bar:
        for start in range(0, len(missing), batch_size):
            names, batch = map(list, zip(*missing[start : start + batch_size]))
            states = text_encoder(tokenizer(batch).to(device))
            table.append(names, states.half().cpu().numpy())
            bar.update(len(batch))


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
    return dataset.size if isinstance(dataset, Scenes) else dataset.cut.size


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
    """The rows (n, 2) of each item's moments and text, without unreadable pictures."""
    row, number = moments.numbers(), texts.numbers()
    good = [(row[key], number[short_name(text)]) for key, text in items if key in row]
    if not good:
        raise ValueError(f"none of {len(items)} pictures can be read; mend the files")
    if len(good) < len(items):
        left_out = f"{len(items) - len(good)} of {len(items)} pictures left out"
        warnings.warn(f"{left_out}: they cannot be read", stacklevel=2)
    return np.array(good)


class Encoded(Dataset):
    """A dataset after its frozen parts: latents' moments and text states, in files.

    `moments` (rows, 2c, h, w) and `texts` (m, tokens, d), both float16, are mapped
    from `folder`, which several trainings may share; `rows` and `which` are the rows of
    each item. Text 0 is "". What is missing is computed first (`fill_cache`); pictures
    that cannot be read are left out, with a warning. Indexed with a list, it gives
    `(moments, text states)` of the whole batch at once. `sample` (m, tokens, d) are
    the states of `some_captions` (or of the first 1000 items').
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


def encode_dataset(config: RunConfig, accelerator, vae, text_encoder, tokenizer):
    """The pictures and captions of a run after the frozen parts."""
    dataset, some = open_dataset(config), ()
    if isinstance(dataset, Scenes):
        some = captions_of(open_dataset(replace(config, kinds=(), num_pictures=1000)))
    vae.to(accelerator.device, memory_format=torch.channels_last)
    text_encoder.to(accelerator.device)
    return Encoded(
        dataset, vae, text_encoder, tokenizer, Path(config.output_dir) / "cache",
        config.num_workers, some,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Train the UNet from zero on frozen latents and texts: `sdbook train`.

    Attributes:
        vae_path: folder with a trained vae/ (what train-vae wrote).
        text_encoder_path: folder with text_encoder/ and tokenizer/ (train-clip's).
        pretrained: a pipeline (what train wrote) whose UNet to go on from.
        unet_channels: width of each level.
        layers_per_block: residual blocks per level on the way down.
        attention_levels: levels that attend to the text, counted from 0 at the top.
        num_heads: attention heads.
        norm_num_groups: groups of every GroupNorm.
        beta_schedule: "scaled_linear", "linear" or "cosine".
        diffusion_steps: timesteps of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
        snr_power: on these weights; below 1, noisy timesteps (the layout) count more.
    """

    output_dir: str = "runs/unet"
    max_steps: int = 10_000
    checkpoint_every: int = 1000
    vae_path: str = "runs/vae"
    text_encoder_path: str = "runs/clip"
    pretrained: str | None = None
    unet_channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] = (1, 2)
    num_heads: int = 4
    norm_num_groups: int = 16
    beta_schedule: str = "scaled_linear"
    diffusion_steps: int = 1000
    prediction_type: str = "epsilon"
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    snr_power: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_unet_choices(self)


def check_unet_choices(config) -> None:
    """Raise ValueError for settings of the UNet's training that cannot be meant."""
    make_noise_schedule(config)  # refuses unknown schedules and prediction types
    if not 0 <= config.caption_dropout <= 1:
        raise ValueError(
            f"caption_dropout is {config.caption_dropout}; give a share from 0 to 1"
        )
    if config.snr_gamma < 0:
        raise ValueError(f"snr_gamma is {config.snr_gamma}; give 0 (none) or more")
    if not 0 <= config.snr_power <= 1:
        raise ValueError(f"snr_power is {config.snr_power}; give a number from 0 to 1")
    levels = len(config.unet_channels)
    if any(not 0 <= level < levels for level in config.attention_levels):
        raise ValueError(
            f"attention_levels {config.attention_levels}, but unet_channels has "
            f"{levels} levels; give numbers from 0 to {levels - 1}"
        )
    for name in ("norm_num_groups", "num_heads"):
        if any(width % getattr(config, name) for width in config.unet_channels):
            raise ValueError(
                f"unet_channels {config.unet_channels} do not split into {name} "
                f"{getattr(config, name)}; make every width a multiple of it"
            )


def make_noise_schedule(config) -> DDIMScheduler:
    """The noise schedule, with Stable Diffusion's betas, as a sampler to save."""
    return DDIMScheduler(
        num_train_timesteps=config.diffusion_steps,
        beta_schedule=config.beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=config.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def unet_config(config: TrainingConfig, vae, text_encoder) -> UNetConfig:
    """The UNet that fits the VAE's latents and the text model's width."""
    attends = [
        level in config.attention_levels for level in range(len(config.unet_channels))
    ]
    down = ("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    up = ("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return UNetConfig(
        sample_size=config.image_size // vae.config.downscale,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.unet_channels),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,
        cross_attention_dim=text_encoder.config.hidden_size,
        norm_num_groups=config.norm_num_groups,
    )


def open_frozen(config: TrainingConfig):
    """The trained VAE, text model and tokenizer; FileNotFoundError says what to run."""
    vae, texts = Path(config.vae_path), Path(config.text_encoder_path)
    needed = {
        "vae_path": (vae / "vae", "train-vae"),
        "text_encoder_path": (texts / "text_encoder", "train-clip"),
    }
    for name, (path, command) in needed.items():
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path}; run `sdbook {command} --output_dir "
                f"{path.parent}` first, or set {name}"
            )
    return (
        AutoencoderKL.from_pretrained(vae / "vae").eval(),
        CLIPTextModel.from_pretrained(texts / "text_encoder").eval(),
        Tokenizer.from_pretrained(texts / "tokenizer"),
    )


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


def new_unet(config: TrainingConfig, vae, text_encoder, states: Tensor) -> UNet:
    """A UNet that starts from zero, or from the one in `pretrained`.

    From zero, it starts as the identity, and white for the text states (m, n, d).
    """
    sizes = unet_config(config, vae, text_encoder)
    if config.pretrained is None:
        return start_white(start_as_identity(UNet(sizes)), states)
    unet = UNet.from_pretrained(Path(config.pretrained) / "unet")
    if unet.config != sizes:
        raise ValueError(
            f"the UNet in {config.pretrained} has other sizes than this run:\n"
            f"  {unet.config}\n  {sizes}\nset unet_channels, layers_per_block, "
            "attention_levels, num_heads and norm_num_groups as they were"
        )
    return unet


def as_it_is(batch):
    """The collation of a dataset that already gives whole batches."""
    return batch


def train(config: TrainingConfig) -> StableDiffusion:
    """Train a UNet on a frozen VAE and text model, and save the whole pipeline.

    The pictures and captions go through the frozen parts once, before the loop.
    Writes `output_dir/pipeline`.
    """
    accelerator = make_accelerator(config.mixed_precision)
    vae, text_encoder, tokenizer = open_frozen(config)
    encoded = encode_dataset(config, accelerator, vae, text_encoder, tokenizer)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    unet = new_unet(config, vae, text_encoder, torch.tensor(encoded.sample))
    scheduler = make_noise_schedule(config)
    loss = DiffusionLoss(
        scheduler,
        vae.config.scaling_factor,
        torch.tensor(encoded.texts[0]).float().to(accelerator.device),
        config.caption_dropout,
        config.snr_gamma,
        config.snr_power,
        (accelerator.process_index, accelerator.num_processes),
    )
    unet = optimise(config, unet, encoded, loss, collate=as_it_is)
    pipe = StableDiffusion(vae, text_encoder, tokenizer, unet.eval(), scheduler)
    if is_main_process():
        pipe.save_pretrained(Path(config.output_dir) / "pipeline")
    return pipe
