"""The loss of diffusion: noise a latent, ask the UNet, compare.

Generated from chapters/08_training.ipynb; do not edit.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..vae import DiagonalGaussian

__all__ = ["min_snr_weights", "ALL_ROWS", "DiffusionLoss", "lean_to_noise"]


def min_snr_weights(
    scheduler, gamma: int | float, power: float = 1.0
) -> Float[Tensor, "timesteps"]:
    """What an error at each timestep is worth (Hang et al., 2023); gamma 0: all 1.

    It makes the weight of an error in x0 min(SNR, gamma), whatever is predicted; a
    `power` below 1 evens these weights out, in favour of noisy timesteps.
    """
    snr = scheduler.snr(torch.arange(scheduler.num_train_timesteps))
    if not gamma:
        return torch.ones_like(snr)
    error_in_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}
    worth = snr.clamp(max=gamma) ** power
    return worth / error_in_x0[scheduler.config.prediction_type]


ALL_ROWS = slice(0, None, 1)  # of a step that one process takes at once


class DiffusionLoss:
    """Noise a latent, ask the UNet what was added, compare (Ho et al., 2020).

    `scale` is the VAE's scaling factor and `empty` (n, d) the states of the empty
    caption, which replace a share `caption_dropout` of the captions. Where `unet`
    reads token ids (it has its text model inside), `empty` (n,) are those.
    """

    def __init__(
        self, scheduler, scale, empty, caption_dropout=0.0, snr_gamma=0.0,
        snr_power=1.0, noisy_share=0.0,
    ):  # fmt: skip
        self.scheduler, self.scale, self.empty = scheduler, scale, empty
        self.caption_dropout, self.noisy_share = caption_dropout, noisy_share
        weights = min_snr_weights(scheduler, snr_gamma, snr_power)
        self.weights = weights.to(empty.device)

    def errors(self, unet, x0, noise, t, context) -> Float[Tensor, "b"]:
        """Mean squared error of the UNet's answer, for each latent."""
        signal, spread = self.scheduler.levels(t, x0, noise)
        x = signal * x0 + spread * noise  # of variance 1, whatever sampler will draw
        answer = unet(x.contiguous(memory_format=torch.channels_last), t, context)
        target = self.scheduler.target(x0, noise, t)
        return (answer - target).square().mean((1, 2, 3))

    def draw(self, moments: Float[Tensor, "b c2 h w"], generator, rows=ALL_ROWS):
        """All that chance decides: x0, noise, timesteps, whose caption is dropped.

        Drawn for the whole step, of which these are the `rows`, so that the number of
        processes and micro-batches changes nothing. The timesteps are spread evenly.
        """
        device, count = generator.device, len(moments) * rows.step
        posterior = DiagonalGaussian(moments)
        shape = (count, *posterior.mean.shape[1:])
        means = torch.randn(shape, generator=generator, device=device)[rows]
        x0 = self.scale * (posterior.mean + posterior.std * means)
        chance = torch.rand(count, generator=generator, device=device)[rows]
        place = torch.arange(count, device=device)
        place = (place + torch.rand(count, generator=generator, device=device)) / count
        place = lean_to_noise(place[rows], self.noisy_share)
        last = self.scheduler.num_train_timesteps - 1
        t = (place * (last + 1)).long().clamp(max=last)  # place can round up to 1
        noise = torch.randn(shape, generator=generator, device=device)[rows]
        return x0, noise, t, chance < self.caption_dropout

    def __call__(self, unet, batch, generator: torch.Generator, rows: slice = ALL_ROWS):
        """The loss of a batch (moments, states or ids), and numbers for the log."""
        moments, texts = batch[0].to(generator.device).float(), batch[1].to(self.empty)
        x0, noise, t, dropped = self.draw(moments, generator, rows)
        dropped = dropped.view(-1, *[1] * self.empty.ndim)
        context = torch.where(dropped, self.empty, texts)
        error = self.errors(unet, x0, noise, t, context)
        third, log = self.scheduler.num_train_timesteps // 3, {"error": error.mean()}
        thirds = (("low", t < third), ("high", t >= len(self.weights) - third))
        for name, chosen in thirds:
            total = torch.where(chosen, error, 0.0).sum()
            log[f"error_{name}_noise"] = total / chosen.sum()
        return (self.weights[t] * error).mean(), log


def lean_to_noise(place: Float[Tensor, "b"], share: float) -> Float[Tensor, "b"]:
    """Move a `share` of the first three quarters of [0, 1) to the last, in order."""
    early = 0.75 * (1 - share)  # what the first three quarters keep
    late = 0.75 + 0.25 * (place - early) / (1 - early)
    return torch.where(place < early, 0.75 * place / max(early, 1e-9), late)
