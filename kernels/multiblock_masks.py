"""Multi-block masks of a batch on the device: one program draws, cuts and compacts those of one image.

Places are integers made of the definition's own words, so the masks are exactly the definition's. A
context that is too small is drawn again inside the kernel: nothing waits for the device but whoever
reads the counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import launch, power_of_two
from stopfast.kernels.arguments import (
    FAILURES_PER_TARGET,
    MASK_STREAM,
    MaskSettings,
    check_draws,
)

_STREAM = (MASK_STREAM + 1) << 48  # what it changes in a seed: see stopfast.kernels.noise.words
_MAX_PATCHES = 1 << 13  # of one grid, which a program holds in registers


@triton.jit
def _place(key, block, attempt, sample, iteration, down, right):
    """Top row and left column of an image's block, less than ``down`` and ``right``."""
    w0, w1, w2, w3 = tl.philox(key, block // 2, attempt, sample, iteration)
    odd = block % 2 == 1
    top = tl.where(odd, w2, w0).to(tl.int64) * down >> 32
    left = tl.where(odd, w3, w1).to(tl.int64) * right >> 32
    return top.to(tl.int32), left.to(tl.int32)


@triton.jit
def _covers(row, column, top, left, height, width):
    below, beside = row - top, column - left
    return (below >= 0) & (below < height) & (beside >= 0) & (beside < width)


@triton.jit
def _multiblock_masks_kernel(
    seed, sample_ids, target, context, counts, batch, rows, columns,
    target_height, target_width, context_height, context_width, min_keep,
    NPRED: tl.constexpr, NENC: tl.constexpr, OVERLAP: tl.constexpr, EDGE: tl.constexpr,
    FAILURES: tl.constexpr, STREAM: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    key, iteration = tl.load(seed) ^ STREAM, tl.load(seed + 1).to(tl.uint32)
    sample = tl.load(sample_ids + tl.program_id(0)).to(tl.uint32)
    patch = tl.arange(0, PATCHES)
    row, column = patch // columns, patch % columns
    target_down, target_right = rows - target_height + EDGE, columns - target_width + EDGE
    context_down, context_right = rows - context_height + EDGE, columns - context_width + EDGE

    line = tl.program_id(0).to(tl.int64)  # of the results, [mask, image]
    for block in range(NPRED):
        top, left = _place(key, block, 0, sample, iteration, target_down, target_right)
        position = (top + patch // target_width) * columns + left + patch % target_width
        at = target + line * target_height * target_width + patch
        tl.store(at, position.to(tl.int64), mask=patch < target_height * target_width)
        line += batch

    line = tl.program_id(0).to(tl.int64)
    for copy in range(NENC):
        # An int32 each: bools that a loop carries are packed by way of the stack.
        member = tl.zeros([PATCHES], tl.int32)
        kept, attempt = 0, 0
        while (kept <= min_keep) & (attempt <= FAILURES * NPRED):
            top, left = _place(
                key, NPRED + copy, attempt, sample, iteration, context_down, context_right
            )
            inside = _covers(row, column, top, left, context_height, context_width)
            member = inside.to(tl.int32)
            for block in range(0 if OVERLAP else NPRED - attempt // FAILURES):
                top, left = _place(key, block, 0, sample, iteration, target_down, target_right)
                inside = _covers(row, column, top, left, target_height, target_width)
                member = tl.where(inside, 0, member)
            kept = tl.sum(member, 0)
            attempt += 1
        tl.store(counts + line, kept)
        at = context + line * context_height * context_width
        slot = tl.cumsum(member, 0) - 1
        tl.store(at + slot, patch.to(tl.int64), mask=member > 0)
        unused = (patch >= kept) & (patch < context_height * context_width)
        tl.store(at + patch, tl.zeros([PATCHES], tl.int64), mask=unused)
        line += batch


@torch.library.custom_op("stopfast::multiblock_masks", mutates_args=())
def _draw(
    seed: Tensor,
    sample_ids: Tensor,
    sizes: list[int],
    npred: int,
    nenc: int,
    min_keep: int,
    overlap: bool,
    edge: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sizes``: height and width of the grid, of a target and of a context."""
    results = _empty(seed, sample_ids, sizes, npred, nenc)
    patches = power_of_two(sizes[0] * sizes[1])
    launch(
        _multiblock_masks_kernel,
        (len(sample_ids),),
        *(seed.contiguous(), sample_ids.contiguous(), *results),
        *(len(sample_ids), *sizes, min_keep),
        writes=results,
        num_warps=max(1, min(16, patches // 256)),
        NPRED=npred,
        NENC=nenc,
        OVERLAP=overlap,
        EDGE=int(edge),
        FAILURES=FAILURES_PER_TARGET,
        STREAM=_STREAM,
        PATCHES=patches,
    )
    return results


def _empty(
    seed: Tensor, sample_ids: Tensor, sizes: list[int], npred: int, nenc: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = sample_ids.shape[0]
    _, _, target_height, target_width, context_height, context_width = sizes
    return (
        seed.new_empty(npred, batch, target_height * target_width),
        seed.new_empty(nenc, batch, context_height * context_width),
        seed.new_empty(nenc, batch, dtype=torch.int32),
    )


@_draw.register_fake
def _(seed, sample_ids, sizes, npred, nenc, min_keep, overlap, edge):
    return _empty(seed, sample_ids, sizes, npred, nenc)


def multiblock_masks(
    seed: Tensor,
    sample_ids: Tensor,
    target_size: tuple[int, int],
    context_size: tuple[int, int],
    settings: MaskSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused :func:`stopfast.kernels.reference.multiblock_masks`; exactly equal to it.

    Raises:
        ValueError: blocks that do not fit the grid, a grid that is too large, or another seed.
    """
    check_draws(seed, 0, 0, 0)
    rows, columns = settings.grid
    blocks = (target_size, context_size)
    fit = all(0 < height <= rows and 0 < width <= columns for height, width in blocks)
    if not fit or rows * columns > _MAX_PATCHES:
        raise ValueError(
            f"multiblock_masks: expected at most {_MAX_PATCHES} patches and blocks inside the grid, "
            f"got a grid of {rows}x{columns} and blocks of {target_size} and {context_size}"
        )
    return _draw(
        seed,
        sample_ids.to(seed.device, torch.int64),
        [rows, columns, *target_size, *context_size],
        settings.npred,
        settings.nenc,
        settings.min_keep,
        settings.allow_overlap,
        settings.edge_inclusive,
    )
