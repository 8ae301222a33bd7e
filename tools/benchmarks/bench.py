"""How fast the parts are on this machine, and beside diffusers.

    python tools/benchmarks/bench.py  a table; about a minute on two cores
    python tools/benchmarks/bench.py --threads 1

Seconds depend on the machine; the ratios (our time over theirs, measured in turns
with the same weights) should not. Below 1.00 we are faster.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import tempfile
from statistics import median

import torch
from timing import in_turns, ratios, seconds

from sdbook import StableDiffusion
from sdbook.data import Scenes
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

PROMPT = "a red star above a blue house"


def import_time() -> float:
    """What `import sdbook` with its pipeline adds to `import torch`."""
    code = (
        "import time, torch; start = time.perf_counter(); "
        "import sdbook; sdbook.StableDiffusion; print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    return min(float(subprocess.check_output(command)) for _ in range(3))


def shipped_pipeline() -> StableDiffusion | None:
    """The model that ships with the book, if it is there."""
    try:
        return StableDiffusion.from_pretrained("scenes")
    except FileNotFoundError as error:
        print(f"no pictures drawn: {error}\n", file=sys.stderr)
        return None


def small_parts() -> tuple[UNet, AutoencoderKL]:
    """A UNet and a VAE of the size that the book trains, with random weights."""
    unet = UNetConfig(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    vae = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1)
    return UNet(unet), AutoencoderKL(vae)


def beside_diffusers(unet: UNet, vae: AutoencoderKL, rounds: int):
    """Rows of the table: (what, our times, their times)."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    their_unet = diffusers.UNet2DConditionModel(**unet.config.to_dict())
    their_unet.load_state_dict(unet.state_dict())
    their_vae = diffusers.AutoencoderKL(**vae.config.to_dict())
    their_vae.load_state_dict(vae.state_dict())
    size, batch = unet.config.sample_size, 8
    x = torch.randn(batch, unet.config.in_channels, size, size)
    t = torch.randint(1000, (batch,))
    context = torch.randn(batch, 77, unet.config.cross_attention_dim)

    def step(model, read):
        model.zero_grad()
        read(model(x, t, context)).square().mean().backward()

    def sample(output):
        return output.sample

    yield (
        f"UNet, training step, batch {batch}",
        *in_turns(
            [lambda: step(unet, lambda y: y), lambda: step(their_unet, sample)], rounds
        ),
    )
    with torch.inference_mode():
        yield (
            f"UNet, forward, batch {batch}",
            *in_turns(
                [lambda: unet(x, t, context), lambda: their_unet(x, t, context)],
                rounds,
            ),
        )
        z = torch.randn(batch, vae.config.latent_channels, size, size)
        yield (
            f"VAE, decode, batch {batch}",
            *in_turns([lambda: vae.decode(z), lambda: their_vae.decode(z)], rounds),
        )


def pipelines_beside_diffusers(pipe: StableDiffusion, rounds: int, steps: int = 25):
    """Rows for whole pictures, prompt to array, from the same noise."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae.config.downscale
    for count, scale in itertools.product((1, 4), (3.0, 1.0)):
        options = {"prompt": [PROMPT] * count, "guidance_scale": scale}
        options |= {"num_inference_steps": steps, "output_type": "np"}
        options |= {"height": side, "width": side}
        ours = functools.partial(pipe, progress=False, **options)
        reference = functools.partial(theirs, **options)
        guided = "guided" if scale > 1 else "not guided"
        what = f"batch of {count}, {steps} steps, {guided}"
        yield what, *in_turns([ours, reference], rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast the parts are.")
    parser.add_argument("--threads", type=int, help="threads for PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each (5)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU\n")

    print(f"{'import sdbook, after torch':<34}{import_time():8.2f} s")
    scenes = Scenes(size=64, split="train")
    scenes[0]
    time_of_scenes = seconds(lambda: [scenes[i] for i in range(200)])
    print(f"{'Scenes, one worker':<34}{200 / time_of_scenes:8.0f} pictures/s")
    pipe = shipped_pipeline()
    if pipe is None:
        unet, vae = small_parts()
    else:
        unet, vae = pipe.unet, pipe.vae
        pipe(PROMPT, num_inference_steps=1, seed=0)
        once = seconds(lambda: pipe(PROMPT, num_inference_steps=25, seed=0))
        print(f"{'one picture, 25 steps':<34}{once:8.2f} s")

    print(f"\n{'':<38}{'ours':>10}{'diffusers':>12}{'ratio':>8}")
    rows = beside_diffusers(unet.float(), vae.float(), options.rounds)
    if pipe is not None:
        whole = pipelines_beside_diffusers(pipe, options.rounds)
        rows = itertools.chain(rows, whole)
    for what, ours, theirs in rows:
        row = median(ours), median(theirs), median(ratios(ours, theirs))
        print("{:<38}{:8.3f} s{:10.3f} s{:8.2f}".format(what, *row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
