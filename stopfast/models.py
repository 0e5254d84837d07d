"""Model sizes by the names that the published programs call them by."""

from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

from stopfast.encoder import VisionTransformer
from stopfast.predictor import Predictor

Size = Literal["tiny", "small", "base", "large", "huge", "giant"]
published_norm = partial(nn.LayerNorm, eps=1e-6)
"""Both programs build their models with this eps, although their constructors default to torch's."""


class Shape(NamedTuple):
    """What makes an encoder's size."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(192, 12, 3),
    "small": Shape(384, 12, 6),
    "base": Shape(768, 12, 12),
    "large": Shape(1024, 24, 16),
    "huge": Shape(1280, 32, 16),
    "giant": Shape(1408, 40, 16, 48 / 11),
}


def heads_of_width(width: int, given: int | None = None) -> int:
    """Return the heads of the published size of an encoder's width, which weights do not tell.

    Args:
        width: of the encoder.
        given: heads that were said, which are returned.

    Raises:
        ValueError: a width that is no published size, without heads.
    """
    heads = given or next((s.num_heads for s in SHAPES.values() if s.embed_dim == width), None)
    if heads is None:
        raise ValueError(f"expected num_heads for a width of {width}, which is no published size")
    return heads


def encoder_of_size(size: Size, patch_size: int = 16, **kwargs: Any) -> VisionTransformer:  # noqa: ANN401
    """Return an encoder of a published size; ``kwargs`` go to :class:`VisionTransformer`."""
    settings = {**SHAPES[size]._asdict(), "norm_layer": published_norm, **kwargs}
    return VisionTransformer(patch_size=patch_size, **settings)


def vit_predictor(**kwargs: Any) -> Predictor:  # noqa: ANN401
    """Return a predictor as the published I-JEPA program builds it."""
    return Predictor(**{"norm_layer": published_norm, **kwargs})


def deit_predictor(apply_stop: bool = False, **kwargs: Any) -> Predictor:  # noqa: ANN401
    """Return a predictor as the published StoP program builds it: StoP is off unless asked for."""
    return vit_predictor(apply_stop=apply_stop, **kwargs)


vit_tiny = deit_tiny = partial(encoder_of_size, "tiny")
vit_small = deit_small = partial(encoder_of_size, "small")
vit_base = deit_base = partial(encoder_of_size, "base")
vit_large = deit_large = partial(encoder_of_size, "large")
vit_huge = deit_huge = partial(encoder_of_size, "huge")
vit_giant = deit_giant = partial(encoder_of_size, "giant")
