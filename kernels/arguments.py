"""Arguments of the operations that belong together, and the constants of their contracts."""

from typing import NamedTuple

import torch
from torch import Tensor

MASK_STREAM = 255
"""Which of the streams of :func:`stopfast.kernels.noise.words` places the masks."""
FAILURES_PER_TARGET = 20
"""Contexts that may be too small before one more target stops to constrain them (published)."""


class Places(NamedTuple):
    """Where on the grid the predictor's tokens lie."""

    context: Tensor
    """int64 [E * B, Kx]."""
    target: Tensor
    """int64 [M, B, Ky]."""
    lengths: Tensor | None = None


class Noise(NamedTuple):
    """The noise of the predictor's tokens; see :func:`stopfast.kernels.noise.positional_noise`."""

    seed: Tensor | None
    """int64 [2], the run's seed and the optimiser step; None where all draws are explicit."""
    sample_ids: Tensor | None
    """int64 [B], places in the step's global batch; None where all draws are explicit."""
    std: float
    weight: Tensor | None
    """[P, C] that projects draws of C channels; None adds draws of P channels as they are."""
    on_queries: bool = True
    on_context: bool = False
    queries: Tensor | None = None
    """Explicit draws [M, E * B, Ky, C], scaled, that replace the queries' own."""
    context: Tensor | None = None
    """Explicit draws [E * B, Kx, C], scaled, that replace the context's own."""


class AdamWBuffers(NamedTuple):
    """Flat buffers of one parameter group, each [numel]; all but the gradient are written in place."""

    param: Tensor
    """fp32."""
    grad: Tensor
    """fp32, bf16 or fp16."""
    exp_avg: Tensor
    """fp32."""
    exp_avg_sq: Tensor
    """fp32."""
    average: Tensor | None = None
    """fp32, the teacher's weights."""
    param_copy: Tensor | None = None
    """bf16 or fp16, the weights to compute with."""
    average_copy: Tensor | None = None
    """bf16 or fp16, the teacher's weights to compute with."""


class MaskSettings(NamedTuple):
    """What decides the multi-block masks besides their sizes; see ``stopfast.MultiBlockMasks``."""

    grid: tuple[int, int]
    nenc: int
    npred: int
    min_keep: int
    allow_overlap: bool
    edge_inclusive: bool


_MOST_TOKENS, _MOST_BLOCKS, _MOST_COPIES = (
    1 << 16,
    1 << 8,
    1 << 7,
)  # what the bits of a counter can name


def check_draws(seed: Tensor, blocks: int, copies: int, tokens: int) -> None:
    """Refuse noise whose counters would run into each other.

    Raises:
        ValueError: a count that does not fit its bits of the counter, or a seed that is not int64 [2].
    """
    if seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(
            f"positional_noise: expected seed as int64 (2,), got {seed.dtype} {tuple(seed.shape)}"
        )
    if blocks > _MOST_BLOCKS or copies > _MOST_COPIES or tokens > _MOST_TOKENS:
        raise ValueError(
            f"positional_noise: expected at most {_MOST_BLOCKS} blocks, {_MOST_COPIES} copies and "
            f"{_MOST_TOKENS} tokens, got {blocks}, {copies} and {tokens}"
        )
