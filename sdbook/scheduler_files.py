"""The scheduler in a model's folder, whether we have its class or not.

Written by hand.
"""

import warnings
from pathlib import Path

from .files import read_json
from .scheduler_options import read_options
from .schedulers import DDIMScheduler, Floats, Scheduler, Timesteps, scheduler_class
from .weights import about

__all__ = ["REPLACED", "UnsupportedScheduler", "load_scheduler"]

# Their ways lead through the same noise, so that another sampler does as well.
REPLACED = {
    "DEISMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
}  # fmt: skip


class UnsupportedScheduler(Scheduler):
    """The noise schedule of a sampler that we lack: to train with, to save, to change.

    Raises ValueError, for a `reason`, when it is to draw; and when it is to train, if
    its options say nothing of betas.
    """

    def __init__(self, name: str, options: dict, reason: str):
        super().__init__(**{k: v for k, v in options.items() if k in self.defaults})
        self.name, self.options, self.reason = name, options, reason

    def set_timesteps(self, num_inference_steps: int) -> None:
        raise ValueError(self.reason)

    def snr(self, t: Timesteps) -> Floats:
        if "beta_start" not in self.options:
            raise ValueError(self.reason)
        return super().snr(t)


def load_scheduler(folder: str | Path) -> Scheduler:
    """A model's scheduler, of the class that its model_index.json names.

    `folder` is the part `scheduler` of the model. As in diffusers' pipeline,
    `clip_sample` is off: latents have no range. For what we lack it is an
    UnsupportedScheduler or, where that is as good, DDIM with a warning. Raises
    FileNotFoundError or ValueError, naming the file, for what no scheduler could read.
    """
    path, model = Path(folder) / "scheduler_config.json", Path(folder).parent
    written, options = read_options(path)
    named = read_json(model / "model_index.json").get("scheduler")
    pair = isinstance(named, list) and len(named) == 2
    name, options["clip_sample"] = (named[1] if pair else written), False
    with about(path):
        if name in REPLACED:
            warnings.warn(f"{path}: there is no {name}; using ddim", stacklevel=3)
            return DDIMScheduler.from_options(options, foreign=True)
        try:
            return scheduler_class(name).from_options(options, foreign=name != written)
        except ValueError as error:
            advice = "take another: pipe.scheduler = 'ddim', or --scheduler ddim"
            return UnsupportedScheduler(name, options, f"{path}: {error}; {advice}")
