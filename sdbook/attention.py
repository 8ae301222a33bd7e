"""Attention

Generated from chapters/01_attention.ipynb; do not edit.
"""

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "attention", "fused_attention", "Attention", "GEGLU", "FeedForward",
    "TransformerBlock", "SpatialTransformer",
]


def attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m v"],
    mask: Bool[Tensor, "*masked n m"] | None = None,
) -> Float[Tensor, "b heads n v"]:
    """Scaled dot-product attention, softmax(QKᵀ/√d)V, written out.

    `mask` is True where a query may look. From Vaswani et al. (2017), eq. 1.
    """
    # Scaling the n x d queries is cheaper than scaling the n x m scores.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def fused_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m v"],
    mask: Bool[Tensor, "*masked n m"] | None = None,
) -> Float[Tensor, "b heads n v"]:
    """`attention` through PyTorch's fused kernel, which never stores the scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention from tokens to a context, or to themselves.

    x (b, n, query_dim) and context (b, m, context_dim) give (b, n, query_dim).
    Without `context_dim` it is self-attention. Raises ValueError when the heads do
    not divide `query_dim`. From Vaswani et al. (2017), section 3.2.2.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        qkv_bias: bool = False,
    ):
        super().__init__()
        if query_dim % num_heads:
            raise ValueError(
                f"{query_dim} channels do not split into {num_heads} heads; "
                "choose a number of heads that divides the channels"
            )
        context_dim = context_dim or query_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, query_dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, query_dim, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))

    def split(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b heads n d"]:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        mask: Bool[Tensor, "*masked n m"] | None = None,
    ) -> Float[Tensor, "b n dim"]:
        context = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        out = fused_attention(*map(self.split, (query, key, value)), mask)
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first: value * GELU(gate).

    (…, dim_in) -> (…, dim_out). From Shazeer (2020), eq. 5; the GELU is exact.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b out"]:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a GEGLU between them, for each token alone.

    (b, n, dim) -> (b, n, dim), `mult` times as wide inside.
    """

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        # Published weights call the last layer net.2: net.1 was a dropout.
        self.net = nn.Sequential(
            GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim)
        )

    def forward(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n dim"]:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to its input.

    x (b, n, dim) and context (b, m, context_dim) give (b, n, dim).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int = 768):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads=num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"],
    ) -> Float[Tensor, "b n dim"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to the map.

    x (b, channels, h, w) and context (b, m, context_dim) give (b, channels, h, w).
    From Rombach et al. (2022), appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int = 1,
        context_dim: int = 768,
        num_groups: int = 32,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b m context_dim"],
    ) -> Float[Tensor, "b c h w"]:
        height, width = x.shape[-2:]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out = rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)
        return x + self.proj_out(out)
