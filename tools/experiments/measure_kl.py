"""What the divergence is for: one small autoencoder, trained with different weights.

    tools/experiments/measure_kl.py              all, at most 3 CPU minutes for each
    tools/experiments/measure_kl.py --steps 30 --record /tmp/kl    a trial

Chapter 5 says what is compared. The network, the pictures (scenes, halved to 32 × 32
pixels) and their order are the same for each; only the loss differs: without a cloud
(z = μ); with one, and weights of the divergence from 0 over 0.01, which is about what
the bound itself asks for, to 1. Writes kl.json, numbers for each variant and seed, and
kl.png, what the first seed's decoders make of some latents: of two pictures' own, of
the middles of two walks, of two draws from N(0, 1), of two draws with the latents'
spread.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from sdbook.scenes import CrowdedScenes, Scenes
from sdbook.training.vae import VAELoss, latent_noise, start_certain
from sdbook.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = VAEConfig(
    block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8
)
# The name of a variant, the weight of its divergence; a point has no cloud.
VARIANTS = {"point": 0.0, "0": 0.0, "1e-6": 1e-6, "1e-5": 1e-5, "1e-2": 1e-2, "1": 1.0}
NOISES = (0.05, 0.1, 0.2, 0.5)  # in units of the latents' own spread
PLACES = 16  # steps of a walk


def train(name: str, seed: int, pictures: Tensor, steps: int) -> AutoencoderKL:
    """The small autoencoder after so many steps of eight pictures."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(CONFIG)
    start_certain(vae)
    loss_of = VAELoss(vae, kl_weight=VARIANTS[name])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (8,), generator=generator)
        x = pictures[chosen]
        noise = latent_noise(CONFIG, x, generator)
        loss, _ = loss_of(x, noise * (name != "point"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return vae.eval()


def halved(pictures: Tensor) -> Tensor:
    """Half as many pixels along each side."""
    return F.avg_pool2d(pictures, 2)


def psnr(one: Tensor, other: Tensor) -> float:
    """Of pictures in [-1, 1], in decibels, the mean over pictures."""
    error = (one.clamp(-1, 1) - other.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


def roughness(x: Tensor) -> float:
    """How much a pixel differs from its right and lower neighbour, in the mean."""
    x = x.clamp(-1, 1)
    gaps = (x[..., 1:, :] - x[..., :-1, :]), (x[..., 1:] - x[..., :-1])
    return (sum(gap.abs().mean() for gap in gaps) / 2).item()


def patch_distance(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance of two sets of pictures by their 4 × 4 patches."""
    means, covariances = [], []
    for x in (one, other):
        patches = F.unfold(x.clamp(-1, 1).double(), 4, stride=2)
        rows = patches.transpose(1, 2).flatten(0, 1)  # (n, 48)
        means.append(rows.mean(0))
        covariances.append(rows.T.cov())
    values = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0)
    trace = (covariances[0] + covariances[1]).trace() - 2 * values.sqrt().sum()
    return ((means[0] - means[1]).square().sum() + trace).item()


def rms(x: Tensor) -> Tensor:
    """The root of each picture's mean square."""
    return x.square().mean(dim=(-3, -2, -1)).sqrt()


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Tensor) -> tuple[dict, list[Tensor]]:
    """Numbers about one autoencoder on unseen pictures, and some to look at."""
    generator = torch.Generator().manual_seed(0)
    posterior = vae.encode(pictures)
    means, std = posterior.mean, posterior.std
    decoded = vae.decode(means)
    channel, spread = means.std(dim=(0, 2, 3)), means.std().item()
    noise = torch.randn(means.shape, generator=generator)
    found = {
        "psnr": psnr(pictures, decoded),
        "spread": spread,
        "channel_spread": channel.tolist(),
        "sigma": std.square().mean(dim=(0, 2, 3)).sqrt().tolist(),
        "largest": means.abs().max().item(),
        "kl_per_latent": (posterior.kl().mean() / means[0].numel()).item(),
        "own_noise": psnr(decoded, vae.decode(means + std * noise)),
        "noise": {
            str(size): psnr(decoded, vae.decode(means + size * spread * noise))
            for size in NOISES
        },
    }

    # A walk from each picture to the next: how far from the mixture of the pixels, how
    # even, how much longer than the straight way.
    others = means.roll(1, 0)
    path = torch.stack(
        [vae.decode(torch.lerp(means, others, i / PLACES)) for i in range(PLACES + 1)]
    )
    straight = torch.stack(
        [torch.lerp(path[0], path[-1], i / PLACES) for i in range(PLACES + 1)]
    )
    strides = rms(path[1:] - path[:-1])
    found["walk"] = {
        "from_mixture": rms(path - straight)[PLACES // 2].mean().item(),
        "longer": (strides.sum(0) / rms(path[-1] - path[0])).mean().item(),
        "largest_stride": (strides.amax(0) / strides.mean(0)).mean().item(),
        "roughness": roughness(path[PLACES // 2]),
        "mixture_roughness": roughness(straight[PLACES // 2]),
    }

    # Draws: from N(0, 1); and as far apart as this network's latents are, channel by
    # channel, which needs no divergence.
    center = means.mean(dim=(0, 2, 3), keepdim=True)
    draws = {
        "standard": vae.decode(noise),
        "fitted": vae.decode(center + channel[:, None, None] * noise),
    }
    found["draws"] = {
        kind: {"roughness": roughness(x), "distance": patch_distance(x, pictures)}
        for kind, x in draws.items()
    }
    found["roughness"] = roughness(pictures)
    half = len(pictures) // 2
    found["distance_of_real"] = patch_distance(pictures[:half], pictures[half:])
    shown = [*decoded[:2], *path[PLACES // 2, 1:3], *draws["standard"][:2]]
    return found, [*shown, *draws["fitted"][:2]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--record", type=Path, default=ROOT / "data/runs/kl")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    crowds, unseen = CrowdedScenes(64), Scenes(split="validation")
    training = halved(torch.stack([crowds[i][0] for i in range(1024)]))
    pictures = halved(torch.stack([unseen[i][0] for i in range(64)]))
    rows, sheets = [], {}
    for seed in options.seeds:
        for name in VARIANTS:
            start = time.process_time()
            vae = train(name, seed, training, options.steps)
            seconds = time.process_time() - start
            found, shown = measure(vae, pictures)
            row = {"variant": name, "weight": VARIANTS[name], "seed": seed}
            rows.append(row | {"cpu_seconds": round(seconds)} | rounded(found))
            sheets.setdefault(name, shown)
            print(json.dumps(rows[-1]), flush=True)
            write(options, given, rows, sheets)


def write(options, given: list[str], rows: list[dict], sheets: dict) -> None:
    """Keep what is measured so far."""
    options.record.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", "tools/experiments/measure_kl.py", *given]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "steps": options.steps,
        "rows": rows,
    }
    (options.record / "kl.json").write_text(json.dumps(record, indent=1) + "\n")
    flat = torch.stack([picture for row in sheets.values() for picture in row])
    sheet = make_grid(flat.clamp(-1, 1), nrow=8, padding=0)
    to_pil_image((sheet + 1) / 2).save(options.record / "kl.png", optimize=True)


def rounded(value):
    """Numbers to four digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
