"""The settings of every training: flags of the command line, keys of its YAML files.

What all have in common is `settings.RunConfig`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .settings import RunConfig, check_multiple, check_places, check_side, setting

# Widths of the levels, residual blocks a level, which levels read the text (counted
# from 0 at the top), attention heads, groups of every GroupNorm.
PRESETS = {
    "tiny": ((32, 64), 1, (1,), 2, 8),
    "scenes": ((48, 96, 128), 1, (1, 2), 4, 16),
    "small": ((64, 128, 192), 1, (1, 2), 4, 16),
    "base": ((128, 256, 384, 512), 2, (1, 2, 3), 8, 32),
    "sd15": ((320, 640, 1280, 1280), 2, (0, 1, 2), 8, 32),
}
SHARE = {"at_least": 0, "at_most": 1}
BETA_SCHEDULES = ("scaled_linear", "linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def sized_preset(name: str, width: int | None = None) -> tuple:
    """A preset's row in `PRESETS`, whose first level may have another `width`."""
    widths, *rest = PRESETS[name]
    if width:
        widths = tuple(w * width // widths[0] for w in widths)
    return widths, *rest


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Train a UNet on frozen latents and texts: `sdbook train`.

    Attributes:
        pretrained: a model to go on from: "scenes", a folder, a hub id or one file.
        vae_weights_path: the output of train-vae, or any model (or file) with a VAE:
            a folder, a hub id, "scenes"; by default `pretrained`, or runs/vae.
        text_encoder_path: the output of train-clip, or any model with a text encoder
            and a tokenizer; by default `pretrained`, or runs/clip.
        unet_preset: how large a UNet from zero is: "tiny", "scenes" (the shipped
            one's), "small" (where nothing is said), "base" or "sd15".
        unet_dim: width of the first level; the preset's others keep their proportion.
        unet_config: a UNet of any other shape: a file like diffusers' config.json.
        beta_schedule: "scaled_linear", "linear" or "cosine".
        diffusion_steps: timesteps of the noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        rescale_betas_zero_snr: let the schedule end in pure noise (Lin et al., 2024).
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
        snr_power: on these weights; below 1, noisy timesteps (the layout) count more.
        noisy_share: of the timesteps, moved to the noisiest quarter; 0 for none.
        gradient_checkpointing: compute the insides of blocks twice to save memory.
        num_validation: pictures to validate on, not trained on (a tenth at most).
        sample_prompts: what to draw every sample_every steps; by default captions of
            held-out pictures.
    """

    output_dir: str = "runs/unet"
    max_steps: int = 10_000
    checkpoint_every: int = 1000

    pretrained: str | None = None
    vae_weights_path: str | None = None
    text_encoder_path: str | None = None
    unet_preset: str | None = setting(None, choices=tuple(PRESETS))
    unet_dim: int | None = setting(None, at_least=1)
    unet_config: str | None = None

    beta_schedule: str = setting("scaled_linear", choices=BETA_SCHEDULES)
    diffusion_steps: int = setting(1000, at_least=1, at_most=2**20)
    prediction_type: str = setting("epsilon", choices=PREDICTION_TYPES)
    rescale_betas_zero_snr: bool = False
    caption_dropout: float = setting(0.1, **SHARE)
    snr_gamma: float = setting(5.0, at_least=0)
    snr_power: float = setting(1.0, **SHARE)
    noisy_share: float = setting(0.0, **SHARE)

    gradient_checkpointing: bool = setting(False, affects_steps=False)
    num_validation: int = setting(64, at_least=0)
    sample_prompts: tuple[str, ...] = setting((), affects_steps=False)

    @property
    def enough(self) -> int:
        """Who goes on from a finished model needs fewer pictures."""
        return 100 if self.pretrained else RunConfig.enough

    def __post_init__(self):
        super().__post_init__()
        check_places(self, "pretrained")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr makes the last timestep pure noise, from which "
                "prediction_type 'epsilon' says nothing about the picture; set "
                "prediction_type to v_prediction, or rescale_betas_zero_snr to false"
            )
        if self.unet_config and (self.unet_preset or self.unet_dim):
            raise ValueError(
                f"unet_config is {self.unet_config}, and unet_preset or unet_dim is "
                "given, too; give one of them"
            )
        if self.unet_config and not Path(self.unet_config).is_file():
            raise FileNotFoundError(
                f"unet_config: there is no file {self.unet_config}; give one like the "
                "config.json in a model's unet/, or leave it out"
            )
        if self.unet_preset or self.unet_dim:
            preset = self.unet_preset or "small"
            widths, *_, groups = sized_preset(preset, self.unet_dim)
            check_multiple("the widths", widths, "norm_num_groups", groups)


@dataclass(frozen=True)
class VAETrainingConfig(RunConfig):
    """Train an AutoencoderKL from zero: `sdbook train-vae`.

    Attributes:
        block_out_channels: width of each level; one halving between two levels.
        layers_per_block: residual blocks per level of the encoder.
        norm_num_groups: groups of every GroupNorm.
        l1_weight: of the absolute error.
        l2_weight: of the squared error.
        kl_weight: of the divergence from the standard normal, per pixel number.
    """

    output_dir: str = "runs/vae"
    batch_size: int = 32
    weight_decay: float = 0.0

    block_out_channels: tuple[int, ...] = setting((32, 64, 64), at_least=1)
    layers_per_block: int = setting(1, at_least=1)
    norm_num_groups: int = setting(8, at_least=1)
    l1_weight: float = setting(0.1, at_least=0)
    l2_weight: float = setting(1.0, at_least=0)
    kl_weight: float = setting(3e-4, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        widths, groups = self.block_out_channels, self.norm_num_groups
        check_multiple("block_out_channels", widths, "norm_num_groups", groups)
        check_side(self.image_size, 2 ** (len(widths) - 1))
        if not self.l1_weight and not self.l2_weight:
            raise ValueError(
                "l1_weight and l2_weight are both 0; give one of them more"
            )


@dataclass(frozen=True)
class CLIPTrainingConfig(RunConfig):
    """Train a CLIP text model and its tokenizer from zero: `sdbook train-clip`.

    Attributes:
        vocab_size: tokens to learn from the captions, at most; 514 are there already.
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

    vocab_size: int = setting(800, at_least=514)
    max_length: int = setting(24, at_least=3)
    hidden_size: int = setting(128, at_least=1)
    num_hidden_layers: int = setting(4, at_least=1)
    num_attention_heads: int = setting(4, at_least=1)
    twins: bool = True


@dataclass(frozen=True)
class FinetuningConfig(RunConfig):
    """What every fine-tuning needs to know, besides what every training does.

    Attributes:
        pretrained: the model to start from: a shipped one's name, a folder, a hub id.
        caption_dropout: share of captions replaced by "" (for guidance).
        snr_gamma: min-SNR weighting (Hang et al., 2023); 0 for none.
    """

    enough: ClassVar[int] = 1

    dataset_path: str = "my-pictures"
    batch_size: int = 8
    max_steps: int = 400
    warmup_steps: int = 20
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    pretrained: str = "scenes"
    caption_dropout: float = setting(0.1, **SHARE)
    snr_gamma: float = setting(5.0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        check_places(self, "pretrained")


@dataclass(frozen=True)
class LoRATrainingConfig(FinetuningConfig):
    """Fine-tune a UNet on a few pictures, with LoRA or whole: `sdbook train-lora`.

    Attributes:
        rank: of the change of each layer; 0 trains the UNet itself.
        alpha: the change counts alpha / rank; none given, or 0: the rank.
        layers: "attention", or "all" linear and convolution layers.
        train_text_encoder: change the text model, too, in the same way.
        class_prompts: what to keep: the model draws these before, and is trained on
            its own pictures as well (DreamBooth's prior preservation).
        num_class_pictures: how many of these pictures.
        prior_weight: how much they count, against 1 for the new ones.
    """

    output_dir: str = "runs/lora"
    rank: int = setting(4, at_least=0)
    alpha: float | None = setting(None, at_least=0)
    layers: str = setting("attention", choices=("attention", "all"))
    train_text_encoder: bool = False
    class_prompts: tuple[str, ...] = ()
    num_class_pictures: int = setting(100, at_least=1)
    prior_weight: float = setting(1.0, at_least=0)


@dataclass(frozen=True)
class WordTrainingConfig(FinetuningConfig):
    """Teach a text model a new word for a few pictures: `sdbook train-word`.

    Attributes:
        word: the new word; the captions of the pictures say it.
        like: a known word to start from, of one token; none: the mean of all.
    """

    output_dir: str = "runs/word"
    learning_rate: float = 5e-3
    word: str = "<new>"
    like: str | None = None
    caption_dropout: float = 0.0
