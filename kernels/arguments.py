"""Arguments of the operations that belong together, and the constants of their contracts."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MASK_STREAM = 255
"""Which of the streams of :func:`stopfast.kernels.noise.words` places the masks."""
FAILURES_PER_TARGET = 20
"""Contexts that may be too small before one more target stops to constrain them (published)."""
SMALLEST_SPREAD = 1e-30
"""What sigma**2 of smoothed positions is at least: not 0, and far below what still smooths."""


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


class Smoothing(NamedTuple):
    """How the label of a position is smoothed; see ``reference_losses.position_map``."""

    grid: tuple[int, int]
    """Rows and columns that distances are measured on: label i lies at (i // columns, i % columns)."""
    norm: Literal["row", "column"] = "column"
    ignore_confident: bool = False


class PatchTarget(NamedTuple):
    """What becomes of the pixels of a patch before they are predicted; see ``patch_mse``."""

    patch_size: int
    norm: Literal["none", "patch", "channel"]
    eps: tuple[float, ...] = ()
    """One for "patch", one for each channel for "channel", none for "none"."""


def check_positions(
    logits: Tensor, index: Tensor, weight: Tensor, sigma: Tensor, smoothing: Smoothing
) -> None:
    """Refuse what ``position_cross_entropy`` cannot take.

    Raises:
        ValueError: shapes that do not fit each other, a grid of fewer positions than there are logits
            for, or an unknown norm.
    """
    rows, columns = smoothing.grid
    shapes = [tuple(t.shape) for t in (index, weight, sigma)]
    if logits.ndim != 3 or shapes != [tuple(logits.shape[:2])] * 2 + [()]:
        raise ValueError(
            "position_cross_entropy: expected logits (B, V, L), index and weight (B, V) and sigma (), "
            f"got {tuple(logits.shape)}, {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if not 0 < logits.shape[2] <= rows * columns:
        raise ValueError(
            f"position_cross_entropy: expected logits for 1 to {rows} x {columns} positions, got "
            f"{logits.shape[2]}"
        )
    if smoothing.norm not in ("row", "column"):
        raise ValueError(
            f"position_cross_entropy: expected norm 'row' or 'column', got {smoothing.norm!r}"
        )


def check_patches(
    prediction: Tensor, images: Tensor, index: Tensor | None, target: PatchTarget
) -> None:
    """Refuse what ``patch_mse`` cannot take.

    Raises:
        ValueError: images that are not whole patches, shapes that do not fit them, an unknown norm, or
            one without its eps or over a single value.
    """
    if images.ndim != 4 or any(side % target.patch_size for side in images.shape[2:]):
        raise ValueError(
            f"patch_mse: expected images (B, C, H, W) of whole patches of {target.patch_size}, got "
            f"{tuple(images.shape)}"
        )
    batch, channels, height, width = images.shape
    pixels = target.patch_size**2
    every = height * width // pixels
    rows = (batch, every) if index is None else tuple(index.shape)
    if len(rows) != 2 or rows[0] != batch:
        raise ValueError(f"patch_mse: expected index ({batch}, K), got {rows}")
    if tuple(prediction.shape) != (*rows, pixels * channels):
        raise ValueError(
            f"patch_mse: expected prediction {(*rows, pixels * channels)}, got "
            f"{tuple(prediction.shape)}"
        )
    wanted = {"none": 0, "patch": 1, "channel": channels}.get(target.norm)
    if wanted is None:
        raise ValueError(
            f"patch_mse: expected norm 'none', 'patch' or 'channel', got {target.norm!r}"
        )
    if len(target.eps) != wanted:
        raise ValueError(
            f"patch_mse: expected {wanted} eps for norm {target.norm!r}, got {target.eps}"
        )
    if target.norm != "none" and pixels * (channels if target.norm == "patch" else 1) < 2:
        raise ValueError(f"patch_mse: expected at least 2 values for norm {target.norm!r}, got 1")
