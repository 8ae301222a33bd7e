"""What several test files need: how far off a result is, and a small pipeline."""

import importlib.util
import sys
from pathlib import Path

import torch

from sdbook.clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from sdbook.pipeline import StableDiffusion
from sdbook.schedulers import make_scheduler
from sdbook.unet import UNet, UNetConfig
from sdbook.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["a red star above a blue house", "two green fish", "a boat and a moon"] * 4
# What `tools/book/execute.py --measure` writes onto a card.
MEASURED = (
    r"<!-- measured -->about (?P<time>[\d.]+) (s|min) and (?P<gigabytes>[\d.]+) GB of "
    r"memory<!-- end -->"
)


def load_tool(name):
    """A script of tools/ as a module, which finds its neighbours as it always does."""
    (path,) = ROOT.glob(f"tools/*/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    tool = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@torch.no_grad()
def relative_error(ours, reference):
    """The largest difference, as a share of the largest reference value."""
    assert ours.shape == reference.shape
    return float(abs(ours - reference).max() / abs(reference).max())


def randomise(module):
    """Give every bias and norm a random value too: ones and zeros prove little."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return module.eval()


def small_pipeline(
    channels=(32, 64), vae_channels=(16, 32), width=32, image_size=16, seed=0
):
    """An untrained Stable Diffusion; 16×16 pixels and 8×8 latents unless told."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(WORDS, vocab_size=560, max_length=16)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.end_id,
    )
    plain = len(channels) - 1
    unet_config = UNetConfig(
        sample_size=image_size // 2 ** (len(vae_channels) - 1),
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=width,
        norm_num_groups=8,
    )
    vae_config = VAEConfig(
        block_out_channels=vae_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=image_size,
    )
    schedule = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        steps_offset=1, clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    return StableDiffusion(
        AutoencoderKL(vae_config).eval(),
        CLIPTextModel(text_config).eval(),
        tokenizer,
        UNet(unet_config).eval(),
        make_scheduler("ddim", **schedule),
    )
