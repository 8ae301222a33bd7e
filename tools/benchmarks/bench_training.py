"""Pictures per second of a training step: ours, with and without the cache, and theirs.

    python tools/benchmarks/bench_training.py  the book's sizes, on the CPU
    python tools/benchmarks/bench_training.py --gpu --mixed_precision bf16
    python tools/benchmarks/bench_training.py --gpu --sizes sd15 --batch_size 8

"Theirs" is the step of diffusers' examples/text_to_image/train_text_to_image.py, stated
again with diffusers' own VAE, UNet and scheduler and transformers' text model, at the
script's defaults: encode the pictures and the ids, add noise, predict it, mean squared
error, backward, clip, AdamW. The weights are the same. Pictures and ids lie ready in
memory for it; ours with the cache reads its rows from the disk, and keeps an average of
the weights, as our training does. The three are timed in turns, and the ratios are of
each round's times. Writes data/runs/training_speed/SIZES-DEVICE.json.
"""

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from timing import in_turns, ratios, write_record
from torch.nn import functional as F

from sdbook.clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from sdbook.data import Scenes
from sdbook.schedulers import DDIMScheduler
from sdbook.training import (
    EMA,
    DiffusionLoss,
    Encoded,
    RunConfig,
    make_accelerator,
    step_generator,
)
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs" / "training_speed"
DATA_SIZE = {"tiny": 64, "book": 64, "sd15": 512}  # pixels
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEARNING_RATE, MAX_NORM = 1e-4, 1.0


def parts(sizes: str, tokenizer: Tokenizer):
    """UNet, VAE and text model with random weights, in one of three sizes."""
    torch.manual_seed(0)
    ids = dict(bos_token_id=tokenizer.start_id, eos_token_id=tokenizer.end_id)
    text = dict(max_position_embeddings=tokenizer.max_length, **ids)
    if sizes == "sd15":
        return UNet(), AutoencoderKL(), CLIPTextModel(CLIPTextConfig(**text))
    book = sizes == "book"
    channels, width = ((48, 96, 128), 128) if book else ((16, 16), 32)
    plain, levels = 1, len(channels) - 1  # the first level has no attention
    unet = UNetConfig(
        sample_size=16, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels + ("UpBlock2D",) * plain,
        attention_head_dim=4, cross_attention_dim=width, norm_num_groups=16,
    )  # fmt: skip
    vae = VAEConfig(
        block_out_channels=(32, 64, 64) if book else (8, 8, 8), layers_per_block=1,
        norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    text |= dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=4 if book else 1, num_attention_heads=4,
    )  # fmt: skip
    return UNet(unet), AutoencoderKL(vae), CLIPTextModel(CLIPTextConfig(**text))


def our_step(accelerator, unet, data, encode=None):
    """A function that makes our step; `encode(batch)` if there is no cache."""
    unet.to(accelerator.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, fused=True)
    ema, scheduler = EMA(unet, 0.999), DDIMScheduler(**BETAS)
    empty = torch.tensor(data["empty"]).float().to(accelerator.device)
    loss_of = DiffusionLoss(scheduler, data["scale"], empty, 0.1, 5.0)
    wrapped, optimiser = accelerator.prepare(unet, optimiser)

    def step(number: int) -> None:
        batch = data["batch"](number)
        generator = step_generator(0, number, device=accelerator.device)
        with accelerator.autocast():
            batch = encode(batch) if encode else batch
            loss, _ = loss_of(wrapped, batch, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), MAX_NORM)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(unet, number)

    return step


def our_encoder(accelerator, vae, text_encoder):
    """What our step does first when nothing is kept: both frozen parts."""

    @torch.no_grad()
    def encode(batch):
        pixels, ids = batch
        pixels = pixels.to(accelerator.device, memory_format=torch.channels_last)
        posterior = vae.encode(pixels)
        moments = torch.cat([posterior.mean, posterior.logvar], 1)
        return moments, text_encoder(ids.to(accelerator.device))

    return encode


def their_step(accelerator, unet, vae, text_encoder, batch_of):
    """A function that makes the step of train_text_to_image, from the same weights."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    device = accelerator.device
    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16}
    weight_dtype = precisions.get(accelerator.mixed_precision, torch.float32)
    their_unet = diffusers.UNet2DConditionModel(**unet.config.to_dict())
    their_unet.load_state_dict(unet.state_dict())
    their_vae = diffusers.AutoencoderKL(**vae.config.to_dict())
    their_vae.load_state_dict(vae.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        text_encoder.save_pretrained(folder)
        their_text = transformers.CLIPTextModel.from_pretrained(folder)
    for frozen in (their_vae, their_text):
        frozen.requires_grad_(False).to(device, dtype=weight_dtype)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, **BETAS)
    their_unet.train().to(device)
    optimiser = torch.optim.AdamW(their_unet.parameters(), lr=LEARNING_RATE)
    rate = diffusers.optimization.get_scheduler("constant", optimiser)
    their_unet, optimiser, rate = accelerator.prepare(their_unet, optimiser, rate)

    def step(number: int) -> None:
        pixels, ids = batch_of(number)
        with accelerator.accumulate(their_unet), accelerator.autocast():
            pixels = pixels.to(device, dtype=weight_dtype)
            latents = their_vae.encode(pixels).latent_dist.sample()
            latents = latents * their_vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(latents),), device=device).long()
            noisy = scheduler.add_noise(latents, noise, t)
            context = their_text(ids.to(device), return_dict=False)[0]
            answer = their_unet(noisy, t, context, return_dict=False)[0]
            loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
        accelerator.gather(loss.repeat(len(latents))).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(their_unet.parameters(), MAX_NORM)
        optimiser.step()
        rate.step()
        optimiser.zero_grad()

    return step


def make_steps(options, folder: str) -> dict:
    """{name: step} of the three, on the same pictures."""
    size, count = DATA_SIZE[options.sizes], 4 * options.batch_size
    scenes = Scenes(size, length=count)
    captions = [scenes.scene(i).caption for i in range(count)]
    length = 77 if options.sizes == "sd15" else 24
    tokenizer = Tokenizer.train(captions, 560, length)
    accelerator = make_accelerator(RunConfig(mixed_precision=options.mixed_precision))
    unet, vae, text_encoder = parts(options.sizes, tokenizer)
    for frozen in (vae, text_encoder):
        frozen.eval().requires_grad_(False).to(accelerator.device)
    cache = Encoded(scenes, vae, text_encoder, tokenizer, folder)
    pixels, ids = torch.stack([pixels for pixels, _ in scenes]), tokenizer(captions)

    def numbers(step: int) -> list[int]:
        start = step % 4 * options.batch_size
        return list(range(start, start + options.batch_size))

    def from_memory(step: int):
        return pixels[numbers(step)], ids[numbers(step)]

    facts = {"scale": vae.config.scaling_factor, "empty": cache.texts[0]}
    again = UNet(unet.config)
    again.load_state_dict(unet.state_dict())
    return {
        "diffusers": their_step(accelerator, unet, vae, text_encoder, from_memory),
        "ours, no cache": our_step(
            accelerator, again, {**facts, "batch": from_memory},
            our_encoder(accelerator, vae, text_encoder),
        ),
        "ours, cached": our_step(
            accelerator, unet,
            {**facts, "batch": lambda step: cache.__getitems__(numbers(step))},
        ),
    }  # fmt: skip


def next_steps(step, count: int):
    """A function that takes the next `count` steps each time it is called."""
    numbers = itertools.count()

    def take():
        for _ in range(count):
            step(next(numbers))

    return take


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast a training step is.")
    parser.add_argument("--sizes", choices=DATA_SIZE, default="book")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="in each turn (5)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    parser.add_argument("--mixed_precision", default="no", help="no, fp16 or bf16")
    parser.add_argument("--gpu", action="store_true", help="on the GPU")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of records")
    options = parser.parse_args(arguments)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu, but PyTorch sees no GPU here; leave it out for the CPU")
    if not options.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steps(options, folder)
        functions = [next_steps(step, options.steps) for step in steps.values()]
        times = dict(zip(steps, in_turns(functions, options.rounds), strict=True))
    theirs, rows = times["diffusers"], []
    print(f"{'':<18}{'pictures/s':>12}{'ratio':>8}")
    for name, ours in times.items():
        speed = options.batch_size * options.steps / median(ours)
        ratio = median(ratios(theirs, ours))
        print(f"{name:<18}{speed:12.1f}{ratio:8.2f}")
        each = [seconds / options.steps for seconds in ours]
        rows.append({"who": name, "pictures_per_second": speed, "ratio": ratio,
                     "seconds_per_step": each})  # fmt: skip
    facts = {"sizes": options.sizes, "batch_size": options.batch_size,
             "mixed_precision": options.mixed_precision}  # fmt: skip
    device = "cuda" if options.gpu else "cpu"
    file = options.output / f"{options.sizes}-{'gpu' if options.gpu else 'cpu'}.json"
    what = {**facts, "rows": rows}
    write_record(file, "bench_training.py", arguments, device, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
