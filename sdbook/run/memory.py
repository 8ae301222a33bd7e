"""Memory: an estimate of what a training needs, and a way to need less of it.

PyTorch's meta device computes shapes without numbers, so that nothing is computed.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..attention import SpatialTransformer
from ..resblocks import ResBlock
from .settings import RunConfig


def recompute_blocks(module: nn.Module) -> None:
    """Keep no values inside residual and transformer blocks for the backward pass."""
    for block in module.modules():
        if isinstance(block, (ResBlock, SpatialTransformer)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_all(module: nn.Module) -> None:
    """Undo `recompute_blocks`."""
    for block in module.modules():
        vars(block).pop("forward", None)


class Fused(TorchFunctionMode):
    """While it is open, attention stores no scores on the meta device either."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return function(*args, **(kwargs or {}))


def kept_bytes(model: nn.Module, *inputs: Tensor, beside=()) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the weights.

    Model and inputs are on the meta device: nothing is computed. `beside`: modules
    that take part and are none of the model's own.
    """
    weights = {
        weight.untyped_storage()._cdata
        for module in (model, *beside)
        for weight in module.parameters()
    }
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, Fused():
        result = model(*inputs)  # alive, so that no storage's number is used twice
    del result
    return sum(kept.values())


def memory_needed(
    config: RunConfig, model: nn.Module, *inputs: Tensor, beside: tuple = ()
) -> dict:
    """An estimate in bytes: what is kept all the time, and what one batch adds.

    `model` and the `inputs` for one batch are on the meta device, and so are the
    modules `beside` it, such as a LoRA. Weights that need no gradient count once.
    """
    weights = {w for module in (model, *beside) for w in module.parameters()}
    extra = 3 + bool(config.ema_decay)  # gradients, two means of AdamW's, average
    copies = sum(4 * w.numel() * (1 + extra * w.requires_grad) for w in weights)
    batch = kept_bytes(model, *inputs, beside=beside)
    if getattr(config, "gradient_checkpointing", False):
        batch = batch // 4  # at most, in the presets (chapter 13)
    half = config.mixed_precision != "no"
    return {"weights": copies, "batch": batch // 2 if half else batch}
