"""Time embedding, residual block and resampling against diffusers' classes."""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from helpers import randomise, relative_error

from sdbook.resblocks import (
    Downsample,
    ResBlock,
    TimestepMLP,
    Upsample,
    timestep_embedding,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dim", [2, 24, 25, 320])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_timestep_embedding_equals_diffusers(dim, dtype):
    t = torch.tensor([0, 1, 500, 999]).to(dtype)
    reference = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert relative_error(timestep_embedding(t, dim), reference(t)) <= 1e-5


def test_timestep_embedding_starts_with_cosines():
    embedding = timestep_embedding(torch.tensor([0]), 8)
    assert embedding.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_timestep_embedding_is_float32_for_half_precision_steps():
    t = torch.tensor([998.0, 999.0])
    embedding = timestep_embedding(t.half(), 64)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, timestep_embedding(t, 64))


def test_timestep_mlp_equals_diffusers():
    reference = randomise(TimestepEmbedding(24, 96))
    ours = TimestepMLP(24, 96)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 24)
    assert relative_error(ours(x), reference(x)) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(24, 24), (24, 40), (40, 24)])
def test_resblock_equals_diffusers(channels, layout):
    c_in, c_out = channels
    reference = randomise(
        ResnetBlock2D(
            in_channels=c_in, out_channels=c_out, temb_channels=96, groups=8, eps=1e-5
        )
    )
    ours = ResBlock(c_in, c_out, time_dim=96, num_groups=8)
    ours.load_state_dict(reference.state_dict())
    ours.to(memory_format=layout)
    x, time = torch.randn(3, c_in, 6, 4), torch.randn(3, 96)
    with torch.no_grad():
        output = ours(x.to(memory_format=layout), time)
        assert relative_error(output, reference(x, time)) <= 1e-5
    assert output.is_contiguous(memory_format=layout)


def test_resblock_without_time_equals_diffusers():
    reference = randomise(
        ResnetBlock2D(in_channels=24, temb_channels=None, groups=8, eps=1e-6)
    )
    ours = ResBlock(24, num_groups=8, eps=1e-6)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 24, 5, 7)
    assert relative_error(ours(x), reference(x, None)) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
def test_downsample_equals_diffusers(symmetric, layout, size):
    reference = Downsample2D(24, use_conv=True, padding=int(symmetric), name="op")
    ours = Downsample(24, symmetric)
    weights = {f"conv.{k}": v for k, v in reference.conv.state_dict().items()}
    ours.load_state_dict(weights)
    ours.to(memory_format=layout)
    x = torch.randn(2, 24, *size)
    output = ours(x.to(memory_format=layout))
    assert relative_error(output, reference(x)) <= 1e-5
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsample_equals_diffusers(layout):
    reference = Upsample2D(24, use_conv=True)
    ours = Upsample(24)
    ours.load_state_dict(reference.state_dict())
    ours.to(memory_format=layout)
    x = torch.randn(2, 24, 3, 5)
    output = ours(x.to(memory_format=layout))
    assert relative_error(output, reference(x)) <= 1e-5
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    block = ResBlock(16, 24, time_dim=32, num_groups=8).to(dtype)
    x, time = torch.randn(1, 16, 4, 4, dtype=dtype), torch.randn(1, 32, dtype=dtype)
    output = Upsample(24).to(dtype)(Downsample(24).to(dtype)(block(x, time)))
    assert output.dtype == dtype and output.isfinite().all()
