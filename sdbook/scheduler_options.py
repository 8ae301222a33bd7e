"""Options of schedulers: which values they may have, and the file that keeps them.

Written by hand. Chapters 7 and 10 teach what the options do.
"""

import math
from pathlib import Path
from typing import SupportsFloat

import torch
from torch import Tensor

from .files import read_json

__all__ = ["FIXED", "IGNORED", "check_batch", "check_options", "read_options"]

_sigmas = dict(use_exponential_sigmas=(False, None), use_beta_sigmas=(False, None))
_solver = _sigmas | dict(
    thresholding=(False,), solver_order=(2,), final_sigmas_type=("zero",),
    use_flow_sigmas=(False,), use_dynamic_shifting=(False,),
)  # fmt: skip

# What diffusers' classes can do and ours cannot: the only values of such an option.
FIXED = {
    "DDPMScheduler": dict(thresholding=(False,)),
    "DDIMScheduler": dict(thresholding=(False,)),
    "LMSDiscreteScheduler": _sigmas,
    "HeunDiscreteScheduler": _sigmas,
    "EulerDiscreteScheduler": _sigmas | dict(
        interpolation_type=("linear",), timestep_type=("discrete",),
        final_sigmas_type=("zero",), sigma_min=(None,), sigma_max=(None,),
    ),
    "DPMSolverMultistepScheduler": _solver | dict(
        use_lu_lambdas=(False,), lambda_min_clipped=(-math.inf,),
        algorithm_type=("dpmsolver++", "deis"),
        solver_type=("midpoint", "bh1", "bh2", "logrho"),  # all taken as the first
    ),
    "UniPCMultistepScheduler": _solver | dict(
        predict_x0=(True,), lower_order_final=(True,), disable_corrector=([],),
        solver_p=(None,), shift_terminal=(None,), sigma_min=(None,), sigma_max=(None,),
        solver_type=("bh2", "midpoint", "heun", "logrho"),  # all taken as the first
    ),
}  # fmt: skip
# Options that do nothing without those.
IGNORED = {
    "dynamic_thresholding_ratio", "sample_max_value", "euler_at_final", "flow_shift",
    "time_shift_type",
}  # fmt: skip
MOST_STEPS = 2**20


def check_options(kind: type, options: dict) -> None:
    """Hold options to the `defaults` and `choices` of a class of schedulers.

    Raises ValueError for a name that the class has not, and for what cannot be meant.
    """
    allowed = kind.choices | FIXED.get(kind.__name__, {})
    for name, value in options.items():
        if name not in kind.defaults | allowed:
            raise ValueError(
                f"{kind.__name__} has no option {name!r}; "
                f"its options are {', '.join(kind.defaults)}"
            )
        if value not in allowed.get(name, (value,)):
            raise ValueError(
                f"{kind.__name__}: {name}={value!r} is not implemented; "
                f"choose from {', '.join(map(str, allowed[name]))}"
            )
    own = kind.defaults | options
    for name, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
        if type(own[name]) is not int or not least <= own[name] <= MOST_STEPS:
            raise ValueError(f"{name}={own[name]!r:.40}: expected an integer from "
                             f"{least} to {MOST_STEPS}")  # more is a slip, or a trap
    reach = own.get("clip_sample_range", 1.0)
    if type(reach) not in (int, float) or not 0 < reach < math.inf:
        raise ValueError(f"clip_sample_range={reach!r}: expected a number above 0")
    betas = own["beta_start"], own["beta_end"]
    if {*map(type, betas)} - {int, float} or not 0 < betas[0] <= betas[1] < 1:
        raise ValueError(f"betas {betas}: expected 0 < beta_start <= beta_end < 1")


def read_options(path: Path) -> tuple[str, dict]:
    """The class that a scheduler_config.json names, and its options."""
    values = read_json(path)
    options = {key: v for key, v in values.items() if not key.startswith("_")}
    return str(values.get("_class_name")), options


def check_batch(t: SupportsFloat, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """t as a tensor: one number, or one for each item of x; noise for all of x."""
    t = torch.as_tensor(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
        raise ValueError(
            f"timesteps of shape {tuple(t.shape)} for a batch of {len(x)}; "
            "pass one, or one per item of the batch"
        )
    if noise is not None and noise.shape != x.shape:
        raise ValueError(
            f"x0 has shape {tuple(x.shape)} but noise {tuple(noise.shape)}; "
            "every value of x0 needs noise of its own"
        )
    return t
