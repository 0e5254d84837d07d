"""Networks."""

from dataclasses import dataclass
from typing import Literal

from stopfast.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The encoder, and the narrow transformer behind it: a predictor, or a decoder."""

    patch_size: int = 16
    """Side of a patch, in pixels."""
    embed_dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    class_token: bool = False
    """Whether the encoder has a class token."""
    positions: Literal["2d", "1d"] = "2d"
    """Sines and cosines of row and column, or of the number in raster order alone."""
    qkv_bias: Literal["qkv", "qv"] = "qkv"
    """Which projections of attention have a bias; a bias of the keys changes no result."""
    init: Literal["normal", "xavier", "truncated"] = "normal"
    """Initial weights; see :func:`stopfast.initial.init_weights`."""
    init_rescale: bool = False
    """Divide the residual projections of block l by sqrt(2 l) at the start."""
    predictor_embed_dim: int = 384
    predictor_depth: int = 6
    predictor_num_heads: int | None = None
    """Default: the encoder's."""
    predictor_mlp_ratio: float = 4.0
    predictor_embed_bias: bool = True
    """Whether the projection from the encoder's width to the predictor's has a bias."""

    def __post_init__(self) -> None:
        require(self.depth > 0, f"expected depth > 0, got {self.depth}")
        require(
            self.predictor_depth >= 0, f"expected predictor_depth >= 0, got {self.predictor_depth}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """What the queries of predictor or decoder are made of; see ``stopfast.Predictor``."""

    variant: Literal["ijepa", "stop", "stop_off", "stop_paper"] = "ijepa"
    """``ijepa``: mask token and position; ``stop``: position and projected noise; ``stop_off``: position
    alone; ``stop_paper``: the paper's own form of ``stop``."""
    noise_var: float = 0.25
    """Standard deviation of the noise (published name), or its variance with ``stop_paper``."""
    apply_to: Literal["masked", "context", "both"] = "masked"
    """Which tokens are noisy."""
    cov: Literal["learned", "fixed"] = "learned"
    """Whether the noise is projected, or added to the position as it is."""
    noise_dim: Literal["encoder", "predictor"] | None = None
    """Width that the noise is drawn in; default: the one that ``cov`` needs."""
    tie: bool = True
    """Whether the noise shares the projection of the context."""
    learned_pos_emb: bool = False
    """Learn the predictor's positions, from random ones."""
