"""The training of the UNet.

Generated from chapters/08_training.ipynb; do not edit.
"""

from pathlib import Path

import torch
from torch.utils.data import Subset

from ..pipeline import StableDiffusion
from ..run.configs import TrainingConfig
from ..run.folder import owns_output_dir
from ..run.processes import is_main_process, this_process
from ..run.unet import make_noise_schedule, new_unet, open_frozen, prepare
from .cache import Encoded, as_it_is
from .loop import optimise
from .loss import DiffusionLoss
from .validation import Validation, sheet_of

__all__ = ["train"]


@owns_output_dir
def train(config: TrainingConfig) -> StableDiffusion | None:
    """Train a UNet on a frozen VAE and text model, and save the whole pipeline.

    Says the plan first; with `dry_run` that is all. Writes the model to `output_dir`,
    which diffusers and `StableDiffusion.from_pretrained` open.
    """
    device = this_process().device
    sizes, dataset, shown, held = prepare(config)
    if config.dry_run:
        return None

    frozen = vae, _, _ = open_frozen(config, device)
    folder = Path(config.output_dir) / "cache"
    encoded = Encoded(dataset, *frozen, folder, config.num_workers)
    torch.manual_seed(config.seed)  # here: filling the cache may have drawn numbers
    unet = new_unet(config, sizes, torch.tensor(encoded.sample))
    scheduler = make_noise_schedule(config)
    empty = torch.tensor(encoded.texts[0]).float().to(device)
    loss = DiffusionLoss(
        scheduler, vae.config.scaling_factor, empty, config.caption_dropout,
        config.snr_gamma, config.snr_power, config.noisy_share,
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
