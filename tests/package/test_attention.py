"""Attention against loops, torch's kernel, and diffusers' classes."""

import math

import pytest
import torch
from diffusers.models import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from helpers import randomise, relative_error

from sdbook.attention import (
    GEGLU,
    Attention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
    attention,
    fused_attention,
)


def qkv(b=2, heads=3, n=5, m=7, d=4, v=6):
    shapes = (b, heads, n, d), (b, heads, m, d), (b, heads, m, v)
    return [torch.randn(shape) for shape in shapes]


def test_attention_is_a_weighted_mean_of_values():
    query, key, value = qkv()
    ours = attention(query, key, value)
    for b, head, i in [(0, 0, 0), (1, 2, 4), (1, 0, 3)]:
        q = query[b, head, i]
        scores = [q.dot(k).item() / math.sqrt(4) for k in key[b, head]]
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        mean = sum(w * v for w, v in zip(weights, value[b, head], strict=True))
        torch.testing.assert_close(ours[b, head, i], mean)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_kernel_agrees(masked):
    query, key, value = qkv(m=5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    torch.testing.assert_close(
        attention(query, key, value, mask), fused_attention(query, key, value, mask)
    )


def test_mask_hides_the_future():
    query, key, value = qkv(n=5, m=5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    before = attention(query, key, value, mask)
    value[:, :, 3:] = 100.0
    after = attention(query, key, value, mask)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_through_the_fused_kernel(masked):
    inputs = [x.requires_grad_() for x in qkv()]
    mask = torch.rand(2, 1, 5, 7) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True  # nobody hears nothing
    found = [
        torch.autograd.grad(function(*inputs, mask).square().sum(), inputs)
        for function in (attention, fused_attention)
    ]
    for written_out, fused in zip(*found):
        torch.testing.assert_close(fused, written_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context_dim", [None, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_diffusers(context_dim, bias):
    reference = DiffusersAttention(
        24, context_dim, heads=3, dim_head=8, bias=bias, out_bias=True
    )
    ours = Attention(24, context_dim, num_heads=3, qkv_bias=bias)
    ours.load_state_dict(randomise(reference).state_dict())
    x = torch.randn(3, 11, 24)
    context = None if context_dim is None else torch.randn(3, 5, context_dim)
    with torch.no_grad():
        error = relative_error(ours(x, context), reference(x, context))
    assert error <= 1e-5


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="24 channels do not split into 5 heads"):
        Attention(24, num_heads=5)


def test_geglu_gates_with_its_second_half():
    layer = GEGLU(4, 3)
    x = torch.randn(2, 5, 4)
    value, gate = layer.proj(x)[..., :3], layer.proj(x)[..., 3:]
    exact = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(layer(x), value * exact)


def test_feed_forward_keys():
    keys = set(FeedForward(8).state_dict())
    assert keys == {f"net.{k}" for k in ("0.proj.weight", "0.proj.bias")} | {
        "net.2.weight",
        "net.2.bias",
    }


@pytest.mark.parametrize("dim, heads", [(24, 3), (40, 8)])
def test_transformer_block_equals_diffusers(dim, heads):
    reference = BasicTransformerBlock(
        dim, heads, dim // heads, cross_attention_dim=20, activation_fn="geglu"
    )
    ours = TransformerBlock(dim, heads, context_dim=20)
    ours.load_state_dict(randomise(reference).state_dict())
    x, context = torch.randn(3, 12, dim), torch.randn(3, 7, 20)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context)
        assert relative_error(ours(x, context), expected) <= 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels, heads, depth", [(24, 3, 1), (40, 8, 2)])
def test_spatial_transformer_equals_diffusers(channels, heads, depth, layout):
    reference = Transformer2DModel(
        heads,
        channels // heads,
        channels,
        num_layers=depth,
        norm_num_groups=8,
        cross_attention_dim=20,
    )
    ours = SpatialTransformer(channels, heads, depth, context_dim=20, num_groups=8)
    ours.load_state_dict(randomise(reference).state_dict())
    x, context = torch.randn(3, channels, 4, 6), torch.randn(3, 7, 20)
    ours.to(memory_format=layout)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context).sample
        output = ours(x.to(memory_format=layout), context)
    assert relative_error(output, expected) <= 1e-5
    assert output.is_contiguous(memory_format=layout)


def test_group_norm_epsilon_shows_on_faint_input():
    reference = Transformer2DModel(3, 8, 24, norm_num_groups=8, cross_attention_dim=20)
    ours = SpatialTransformer(24, 3, context_dim=20, num_groups=8)
    ours.load_state_dict(randomise(reference).state_dict())
    x, context = 1e-3 * torch.randn(1, 24, 4, 4), torch.randn(1, 7, 20)
    with torch.no_grad():
        expected = reference(x, encoder_hidden_states=context).sample
        assert relative_error(ours(x, context), expected) <= 1e-5
        ours.norm.eps = 1e-5
        assert relative_error(ours(x, context), expected) > 1e-2


def test_tokens_do_not_know_their_place():
    ours = randomise(SpatialTransformer(24, 3, context_dim=20, num_groups=8))
    x, context = torch.randn(1, 24, 4, 6), torch.randn(1, 7, 20)
    with torch.no_grad():
        flipped = ours(x.flip(-1), context).flip(-1)
        torch.testing.assert_close(flipped, ours(x, context), atol=1e-5, rtol=1e-5)
