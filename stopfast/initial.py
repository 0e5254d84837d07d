"""Initial weights, as the published programs end up with them."""

import math
from typing import Literal, get_args

import torch
from torch import nn

from stopfast.block import Block

Scheme = Literal["normal", "xavier", "truncated"]


def init_weights(
    model: nn.Module,
    blocks: nn.ModuleList,
    std: float = 0.02,
    rescale: bool = False,
    scheme: Scheme = "normal",
) -> None:
    """Draw the weights of a model's layers; LayerNorms get ones and zeros, linear biases zeros.

    * ``normal``, I-JEPA and StoP: normal weights, in linear layers and in the patch embedding, whose
      bias is zero. Their constructors also divide the output projections of block l by sqrt(2 l), and
      their training scripts then re-draw every Linear, which undoes it. ``rescale`` keeps the division.
    * ``xavier``, MAE and DropPos: uniform in +-sqrt(6 / (inputs + outputs)), the patch embedding seen as
      one matrix; its bias keeps torch's default.
    * ``truncated``, Beyond Masking: normal weights cut at one deviation; the patch embedding keeps
      torch's defaults, and so does a linear layer that says ``keeps_default``.

    Raises:
        ValueError: another scheme.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"expected init in {get_args(Scheme)}, got {scheme!r}")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            _draw(module, std, scheme)
    if rescale:
        with torch.no_grad():
            for number, block in enumerate(blocks, start=1):
                assert isinstance(block, Block)
                block.attn.proj.weight /= (2.0 * number) ** 0.5
                block.mlp.fc2.weight /= (2.0 * number) ** 0.5


def token(dim: int, std: float = 0.02, scheme: Scheme = "normal") -> nn.Parameter:
    """Return a learned token [1, 1, dim] as the scheme draws it."""
    value = torch.empty(1, 1, dim)
    if scheme == "xavier":
        return nn.Parameter(nn.init.normal_(value, std=std))
    cut = std if scheme == "truncated" else 2.0
    return nn.Parameter(nn.init.trunc_normal_(value, std=std, a=-cut, b=cut))


def _draw(layer: nn.Linear | nn.Conv2d, std: float, scheme: Scheme) -> None:
    convolution = isinstance(layer, nn.Conv2d)
    if scheme == "truncated":
        if convolution or getattr(layer, "keeps_default", False):
            return
        nn.init.trunc_normal_(layer.weight, std=std, a=-std, b=std)
    elif scheme == "xavier":
        rows = layer.weight.flatten(1)
        bound = math.sqrt(6.0 / sum(rows.shape))
        nn.init.uniform_(layer.weight, -bound, bound)
        if convolution:
            return
    else:
        # Cut at an absolute 2, a hundred deviations: as published, in effect not truncated.
        nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
