"""The UNet against diffusers' UNet2DConditionModel, with the same random weights."""

import json

import jaxtyping
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import relative_error

from sdbook.files import WeightsError, read_weights, save_weights
from sdbook.unet import (
    UNet,
    UNetConfig,
    check_inputs,
    pushed_channels,
    start_as_identity,
)
from sdbook.weights import load_strictly

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
WIDTH = 20

CONFIGS = {
    "one level": dict(
        block_out_channels=(24,),
        down_block_types=(CROSS_DOWN,),
        up_block_types=(CROSS_UP,),
        attention_head_dim=3,
    ),
    "two levels, odd channels": dict(
        block_out_channels=(24, 40),
        down_block_types=(DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, UP),
        layers_per_block=1,
        attention_head_dim=4,
    ),
    "channels that are odd numbers": dict(
        block_out_channels=(9, 15),
        down_block_types=(CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP),
        attention_head_dim=3,
        norm_num_groups=3,
        in_channels=3,
        out_channels=6,
    ),
    "three levels, own heads and depths": dict(
        block_out_channels=(24, 40, 48),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 1),
    ),
    "four levels as in SD 1.5": dict(
        block_out_channels=(16, 24, 32, 32), attention_head_dim=8
    ),
}


def small(name):
    shared = {"sample_size": 16, "cross_attention_dim": WIDTH, "norm_num_groups": 8}
    return {**shared, **CONFIGS[name]}


def pair(name):
    """The reference and ours with the same weights, norms and biases random too."""
    options = small(name)
    reference = UNet2DConditionModel(**options)
    for parameter in reference.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    ours = UNet(UNetConfig(**options))
    ours.load_state_dict(reference.state_dict())
    return ours.eval(), reference.eval()


def inputs(config, batch=3, size=(8, 16)):
    latents = torch.randn(batch, config.in_channels, *size)
    t = torch.tensor([0, 500, 999])[:batch]
    return latents, t, torch.randn(batch, 7, config.cross_attention_dim)


@pytest.fixture
def unchecked():
    """As readers run the package: without the tests' own shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name, batch, layout):
    ours, reference = pair(name)
    latents, t, context = inputs(ours.config, batch)
    ours.to(memory_format=layout)
    with torch.no_grad():
        expected = reference(latents, t, context).sample
        output = ours(latents.to(memory_format=layout), t, context)
    assert relative_error(output, expected) <= 1e-5
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "t", [7, 749.25, torch.tensor(7), torch.tensor([7]), torch.tensor([749.25] * 3)]
)
def test_timestep_forms(t):
    ours, reference = pair("two levels, odd channels")
    latents, _, context = inputs(ours.config)
    with torch.no_grad():
        expected = reference(latents, t, context).sample
        assert relative_error(ours(latents, t, context), expected) <= 1e-5


@pytest.mark.parametrize("size", [(9, 8), (5, 7), (1, 3), (11, 16)])
@pytest.mark.parametrize(
    "name", ["two levels, odd channels", "four levels as in SD 1.5"]
)
def test_sizes_that_cannot_be_halved(name, size):
    ours, reference = pair(name)
    latents, t, context = inputs(ours.config, size=size)
    with torch.no_grad():
        expected = reference(latents, t, context).sample
        assert relative_error(ours(latents, t, context), expected) < 1e-5


def test_gradients_equal_diffusers():
    ours, reference = pair("three levels, own heads and depths")
    latents, t, context = inputs(ours.config)
    target = torch.randn_like(latents)
    (ours(latents, t, context) - target).square().mean().backward()
    (reference(latents, t, context).sample - target).square().mean().backward()
    expected = dict(reference.named_parameters())
    largest = max(p.grad.abs().max().item() for p in expected.values())
    for key, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[key].grad).abs().max().item()
        assert difference <= 1e-5 * largest, key


def test_stable_diffusion_1_5_has_the_published_tensors():
    with torch.device("meta"):
        ours = UNet().state_dict()
        reference = UNet2DConditionModel(cross_attention_dim=768).state_dict()
    shapes = {key: tensor.shape for key, tensor in ours.items()}
    assert shapes == {key: tensor.shape for key, tensor in reference.items()}
    assert len(shapes) == 686
    assert sum(tensor.numel() for tensor in ours.values()) == 859_520_964


def test_pushed_channels_of_stable_diffusion():
    assert pushed_channels(UNetConfig()) == [320] * 4 + [640] * 3 + [1280] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, _ = pair("two levels, odd channels")
    latents, t, context = inputs(ours.config)
    with torch.no_grad():
        expected = ours(latents, t, context)
        output = ours.to(dtype)(latents.to(dtype), t, context.to(dtype))
    assert output.dtype == dtype
    assert relative_error(output.float(), expected) <= 0.05


@pytest.mark.slow
def test_compiles_into_one_graph(unchecked):
    ours, _ = pair("two levels, odd channels")
    latents, t, context = inputs(ours.config)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(latents, t, context), ours(latents, t, context)
        )


def test_start_as_identity_predicts_nothing_and_still_learns():
    ours = start_as_identity(UNet(UNetConfig(**small("two levels, odd channels"))))
    latents, t, context = inputs(ours.config)
    output = ours(latents, t, context)
    assert output.eq(0).all()
    (output - torch.randn_like(latents)).square().mean().backward()
    assert ours.conv_out.weight.grad.abs().max() > 0


# Folders that diffusers writes and reads -----------------------------------------


def test_opens_what_diffusers_saves(tmp_path):
    _, reference = pair("two levels, odd channels")
    reference.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    latents, t, context = inputs(ours.config)
    with torch.no_grad():
        expected = reference(latents, t, context).sample
        assert relative_error(ours(latents, t, context), expected) <= 1e-5


def test_diffusers_opens_what_we_save(tmp_path):
    ours, _ = pair("three levels, own heads and depths")
    ours.save_pretrained(tmp_path)
    reference = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    latents, t, context = inputs(ours.config)
    with torch.no_grad():
        expected = reference(latents, t, context).sample
        assert relative_error(ours(latents, t, context), expected) <= 1e-5


def test_config_of_stable_diffusion_1_5():
    published = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    }
    assert UNetConfig.from_dict(published) == UNetConfig()


def test_every_default_of_diffusers_is_known():
    config = UNet2DConditionModel(**small("two levels, odd channels")).config
    ours = UNetConfig.from_dict(json.loads(json.dumps(dict(config))))
    assert ours == UNetConfig(**small("two levels, odd channels"))


# Bad input --------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents, t, context, message",
    [
        ((3, 4, 8, 8), 5, (3, 7, 21), "width 21 .* reads width 20.*text encoder"),
        ((3, 3, 8, 8), 5, (3, 7, 20), "3 channels but this UNet takes 4"),
        ((2, 4, 8, 8), 5, (3, 7, 20), "prompt batch of 3 but latents for 2"),
        ((3, 4, 8, 8), 5, (6, 7, 20), "prompt batch of 6 but latents for 3"),
        ((3, 4, 8, 8), [5, 6], (3, 7, 20), r"shape \(2,\) but latents for 3"),
    ],
)
def test_inputs_that_do_not_fit(unchecked, latents, t, context, message):
    unet = UNet(UNetConfig(**small("two levels, odd channels")))
    latents, context = torch.randn(latents), torch.randn(context)
    t = torch.tensor(t)
    for call in (unet, lambda *given: check_inputs(unet.config, *given)):
        with pytest.raises(ValueError, match=message):
            call(latents, t, context)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_head_dim": (8, 8)}, "attention_head_dim has 2 .* has 4"),
        ({"block_out_channels": (32, 64)}, "down_block_types has 4 .* has 2"),
        (
            {"down_block_types": (DOWN, DOWN, DOWN, "AttnDownBlock2D")},
            "AttnDownBlock2D is not implemented; use DownBlock2D or CrossAttn",
        ),
    ],
)
def test_configs_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**options)


@pytest.mark.parametrize(
    "option, value",
    [
        ("class_embed_type", "timestep"),
        ("class_embed_type", "timestep"),
        ("a_new_option", 3),
    ],
)
def test_options_that_we_do_not_have_are_refused_by_name(option, value):
    with pytest.raises(WeightsError, match=f"{option}="):
        UNetConfig.from_dict({"cross_attention_dim": 768, option: value})


def test_strict_loading_lists_what_is_missing(tmp_path):
    unet = UNet(UNetConfig(**small("two levels, odd channels")))
    unet.save_pretrained(tmp_path)
    path = tmp_path / UNet.weights_name
    state = read_weights(path)
    state["conv_extra.weight"] = state.pop("mid_block.resnets.0.conv1.weight")
    save_weights(state, path)
    with pytest.raises(WeightsError) as error:
        UNet.from_pretrained(tmp_path)
    for word in ("mid_block.resnets.0.conv1.weight", "conv_extra.weight", str(path)):
        assert word in str(error.value)
    with pytest.raises(WeightsError, match="of another shape"):
        load_strictly(unet, {**unet.state_dict(), "conv_in.bias": torch.zeros(3)})


def test_every_norm_has_the_reference_s_epsilon():
    with torch.device("meta"):
        unet = UNet()
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            in_transformer = (
                name.rsplit(".", 1)[0].rsplit(".", 1)[0].endswith("attentions")
            )
            assert module.eps == (1e-6 if in_transformer else 1e-5), name
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5, name
