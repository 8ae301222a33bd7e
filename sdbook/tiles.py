"""A function of a large picture in overlapping tiles, to save memory.

Written by hand. Chapter 5 says why they overlap.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["tile_starts", "fading", "in_tiles"]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length` and share at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def fading(length: int, overlap: int) -> Float[Tensor, "length"]:
    """Weights that rise over the first `overlap` places, and fall over the last."""
    rising = torch.arange(1, length + 1).clamp(max=overlap) / overlap
    return torch.minimum(rising, rising.flip(0))


def in_tiles(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    tile: int,
    cell: int = 1,
) -> Float[Tensor, "b c2 h2 w2"]:
    """`function` of overlapping square tiles of x, blended by weighted means.

    `tile` is their side in cells, of which a quarter or more overlaps; a cell is
    `cell` × `cell` places of x: the VAE's factor to encode, 1 to decode. `function`
    may change the size, as these two do.
    """
    height, width = (side // cell for side in x.shape[-2:])
    overlap = max(1, tile // 4)
    total = weights = None
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            rows = slice(top * cell, (top + tile) * cell)
            columns = slice(left * cell, (left + tile) * cell)
            part = function(x[..., rows, columns])
            scale = part.shape[-1] // min(tile, width)
            high, wide = (fading(side, overlap * scale) for side in part.shape[-2:])
            weight = (high[:, None] * wide).to(part)
            if total is None:
                total = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                weights = total[0, 0].clone()
            rows = slice(top * scale, top * scale + part.shape[-2])
            columns = slice(left * scale, left * scale + part.shape[-1])
            total[..., rows, columns] += weight * part
            weights[rows, columns] += weight
    return total / weights
