"""What a training of the UNet is asked on the way: its error, and some drawings."""

from itertools import islice

import torch
from torch.utils.data import Dataset

from ..images import labelled_grid
from ..pipeline import StableDiffusion
from ..run.configs import TrainingConfig
from .cache import caption_ids
from .loop import step_generator


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


def sheet_of(config: TrainingConfig, dataset, vae, text_encoder, tokenizer, scheduler):
    """A function that draws the sample prompts with a UNet, always from one noise."""
    pictures = islice(iter(dataset), min(4, len(dataset)))
    prompts = list(config.sample_prompts or (caption for _, caption in pictures))

    def draw_sheet(unet):
        pipe = StableDiffusion(vae, text_encoder, tokenizer, unet, scheduler)
        images = pipe(prompts, seed=config.seed, progress=False).images
        return labelled_grid(images, prompts)

    return draw_sheet
