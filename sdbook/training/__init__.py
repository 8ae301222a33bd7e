# ruff: noqa: F401
"""Training: the loss, the loop and the cache, and with them UNet, VAE and CLIP.

Written by hand, like `cache` and `validation`; the other modules are generated from
chapters 05, 06 and 08. It hands on their names, and those of `sdbook.run` that a
training of one's own needs.
"""

from ..images import short_name
from ..run.checkpoints import (
    SettingsRecord,
    check_fits,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from ..run.configs import (
    PRESETS,
    CLIPTrainingConfig,
    TrainingConfig,
    VAETrainingConfig,
)
from ..run.logs import Log, Meter
from ..run.memory import keep_all, kept_bytes, memory_needed, recompute_blocks
from ..run.plan import describe_plan, say_plan
from ..run.processes import count_steps, is_main_process, make_accelerator
from ..run.settings import RunConfig, check_side, open_dataset, setting
from ..run.tables import Rows, fingerprint
from ..run.unet import (
    find_sizes,
    new_unet,
    preset_shape,
    start_white,
    whitening,
)
from ..twins import Twins, exchange, invent_twin
from .cache import Encoded, as_it_is, caption_ids
from .clip import train_clip
from .loop import (
    EMA,
    Run,
    StepSampler,
    learning_rate_at,
    optimise,
    step_generator,
    take_step,
)
from .loss import ALL_ROWS, DiffusionLoss, lean_to_noise, min_snr_weights
from .unet import train
from .vae import (
    VAELoss,
    latent_noise,
    latent_spread,
    new_vae,
    reconstruction_psnr,
    start_certain,
    train_vae,
)
from .validation import Validation
