"""AutoencoderKL against diffusers', with the same random weights."""

import json

import diffusers
import pytest
import torch
from helpers import relative_error

from sdbook.files import WeightsError, write_json
from sdbook.vae import AutoencoderKL, DiagonalGaussian, VAEConfig

CONFIGS = {
    "four levels": VAEConfig(
        block_out_channels=(8, 16, 24, 32), layers_per_block=1, norm_num_groups=8
    ),
    "three levels, two layers": VAEConfig(
        block_out_channels=(16, 32, 32), norm_num_groups=16
    ),
    "odd channels": VAEConfig(
        block_out_channels=(9, 15), norm_num_groups=3, latent_channels=3
    ),
    "one level, no attention": VAEConfig(
        block_out_channels=(8,),
        norm_num_groups=1,
        latent_channels=5,
        mid_block_add_attention=False,
    ),
    "no quant convolutions, one channel": VAEConfig(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def reference_class(config):
    values = config.to_dict()
    return diffusers.AutoencoderKL(**values).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch, size", [(1, (32, 32)), (3, (16, 40))])
@torch.no_grad()
def test_equals_diffusers(name, batch, size):
    torch.manual_seed(0)
    config = CONFIGS[name]
    reference = reference_class(config)
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.rand(batch, config.in_channels, *size) * 2 - 1
    expected, got = reference.encode(x).latent_dist, ours.encode(x)
    assert relative_error(ours.encoder(x), reference.encoder(x)) <= 1e-5
    assert relative_error(got.mode(), expected.mode()) <= 1e-5
    assert relative_error(got.std, expected.std) <= 1e-5
    assert relative_error(got.kl(), expected.kl()) <= 1e-5
    seeded = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert relative_error(got.sample(seeded[0]), expected.sample(seeded[1])) <= 1e-5
    z = expected.mode()
    assert z.shape[-1] == size[1] // config.downscale
    assert relative_error(ours.decode(z), reference.decode(z).sample) <= 1e-5


@torch.no_grad()
def test_channels_last_gives_the_same_picture():
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIGS["three levels, two layers"]).eval()
    x = torch.rand(2, 3, 32, 16)
    before = vae.decode(vae.encode(x).mode())
    vae.to(memory_format=torch.channels_last)
    after = vae.decode(vae.encode(x.to(memory_format=torch.channels_last)).mode())
    assert relative_error(after, before) <= 1e-5


def test_stable_diffusion_shape():
    config = VAEConfig()
    with torch.device("meta"):
        ours, reference = AutoencoderKL(config), reference_class(config)
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {k: t.shape for k, t in ours.state_dict().items()} == expected
    assert len(expected) == 248
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863


def test_group_norms_have_the_small_epsilon():
    vae = AutoencoderKL(CONFIGS["four levels"])
    norms = [m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(norm.eps == 1e-6 for norm in norms)


def test_distribution():
    wide = DiagonalGaussian(torch.tensor([1.0, 99.0, 0.0, -99.0]).view(1, 4, 1, 1))
    assert wide.logvar.flatten().tolist() == [0.0, -30.0]
    standard = DiagonalGaussian(torch.zeros(2, 8, 3, 3))
    assert torch.equal(standard.kl(), torch.zeros(2))
    draws = DiagonalGaussian(torch.full((1, 2, 100, 100), 2.0)).sample(
        torch.Generator().manual_seed(0)
    )
    assert abs(draws.mean() - 2) < 0.1 and abs(draws.std() - torch.e) < 0.1


def test_forward_trains_every_parameter():
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIGS["four levels"])
    x = torch.rand(2, 3, 16, 16)
    reconstruction, distribution = vae(x, torch.Generator().manual_seed(0))
    loss = (reconstruction - x).square().mean() + 1e-3 * distribution.kl().mean()
    loss.backward()
    # to_k's bias adds the same number to every score, which softmax cancels.
    silent = [
        name
        for name, parameter in vae.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert all(name.endswith("to_k.bias") for name in silent), silent


@pytest.mark.parametrize("name", ["four levels", "no quant convolutions, one channel"])
def test_folders_are_read_in_both_directions(name, tmp_path):
    torch.manual_seed(0)
    ours = AutoencoderKL(CONFIGS[name]).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs, said = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(said.values()), said
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key])
        assert torch.equal(tensor, again.state_dict()[key])


def test_old_attention_names_are_accepted(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIGS["odd channels"])
    vae.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in vae.state_dict().items():
        for new_name, old_name in names.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        # original LDM files hold these matrices as 1x1 convolutions
        is_matrix = "attentions" in key and tensor.ndim == 2
        old[key] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    assert any("proj_attn" in key for key in old)
    from safetensors.torch import save_file

    save_file(old, tmp_path / AutoencoderKL.weights_name)
    again = AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], t) for key, t in vae.state_dict().items())


def test_published_config_is_read():
    published = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
    }
    assert VAEConfig.from_dict(published) == VAEConfig()
    full = dict(diffusers.AutoencoderKL(block_out_channels=(32,)).config)
    assert VAEConfig.from_dict(full).block_out_channels == (32,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"act_fn": "relu"},
        {"shift_factor": 0.1},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
        {"latents_mean": [0.0] * 4},
    ],
)
def test_unsupported_options_are_named(wrong, tmp_path):
    vae = AutoencoderKL(CONFIGS["four levels"])
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    write_json({**json.loads(path.read_text()), **wrong}, path)
    with pytest.raises(WeightsError, match=f"config.json.*{next(iter(wrong))}"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="30×32 pixels.*multiples of 8; resize"):
        AutoencoderKL(CONFIGS["four levels"]).encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"norm_num_groups=32 groups; make every"):
        VAEConfig(block_out_channels=(32, 48))
