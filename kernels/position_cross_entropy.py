"""Fused loss of DropPos: smoothed labels, log-softmax, cross-entropy and its weighted mean.

A label is a product of one factor for the rows and one for the columns of the grid, so a program makes
its labels from two short tables, and nothing as large as the logits is written before their gradient.
Backward makes labels and softmax again; all it has from forward is the sum of the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import dense, launch, power_of_two, rows_contiguous
from stopfast.kernels._means import mean_of
from stopfast.kernels._tiles import shape_class, tiles
from stopfast.kernels.arguments import SMALLEST_SPREAD, Smoothing, check_positions

_ELEMENTS, _MOST_ROWS = 2048, 16  # of one program


@triton.jit
def _near(distance, sharpness):
    distance = distance.to(tl.float32)
    return tl.exp(-(distance * distance) * sharpness)


@triton.jit
def _shares(
    label,
    sharpness,
    SIDE: tl.constexpr,
    ALL: tl.constexpr,
    PLACES: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """How much of each label lies on each place of an axis of SIDE places, [labels, PLACES]."""
    place, every = tl.arange(0, PLACES), tl.arange(0, ALL)
    from_label = label[:, None] - place[None, :]
    apart = (label if BY_ROW else place)[:, None] - every[None, :]
    total = tl.sum(tl.where((every < SIDE)[None, :], _near(apart, sharpness), 0.0), 1)
    return _near(from_label, sharpness) / (total[:, None] if BY_ROW else total[None, :])


@triton.jit
def _own_share(shares, label, PLACES: tl.constexpr):
    own = tl.arange(0, PLACES)[None, :] == label[:, None]
    return tl.sum(tl.where(own, shares, 0.0), 1)


# How many patches are visible may follow a schedule: it is no reason to compile again.
@triton.jit(do_not_specialize=["rows", "visible"])
def _position_kernel(
    logits,
    index,
    weight,
    sigma,
    upstream,
    total,
    result,
    rows,
    visible,
    positions,
    logits_image,
    logits_patch,
    ROWS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ALL: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    SMALLEST_SPREAD: tl.constexpr,
    BY_ROW: tl.constexpr,
    IGNORE_CONFIDENT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """A tile is [ROWS, TALL, WIDE]: the positions of each patch as they lie on the grid."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    across = tl.arange(0, WIDE)
    position = (tl.arange(0, TALL) * ACROSS)[:, None] + across[None, :]
    held = ((across < ACROSS)[None, :] & (position < positions))[None, :, :]
    both = inside[:, None, None] & held

    place = row // visible * logits_image + row % visible * logits_patch
    source = logits + place[:, None, None] + position[None, :, :]
    value = tl.load(source, mask=both, other=-float("inf")).to(tl.float32)
    highest = tl.where(inside, tl.max(tl.max(value, 2), 1), 0.0)
    value = tl.where(both, value - highest[:, None, None], 0.0)
    mass = tl.where(both, tl.exp(value), 0.0)
    all_mass = tl.where(inside, tl.sum(tl.sum(mass, 2), 1), 1.0)

    label = tl.load(index + row, mask=inside, other=0).to(tl.int32)
    spread = tl.load(sigma).to(tl.float32)
    sharpness = 1.0 / tl.maximum(spread * spread, SMALLEST_SPREAD)
    by_row = _shares(label // ACROSS, sharpness, DOWN, ALL, TALL, BY_ROW)
    by_column = _shares(label % ACROSS, sharpness, ACROSS, WIDE, WIDE, BY_ROW)
    smoothed = tl.where(both, by_row[:, :, None] * by_column[:, None, :], 0.0)
    all_smoothed = tl.sum(tl.sum(smoothed, 2), 1)

    counted = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
    if IGNORE_CONFIDENT:
        own = tl.load(logits + place + label, mask=inside & (label < positions), other=0.0)
        likely = tl.exp(own.to(tl.float32) - highest - tl.log(all_mass))
        wanted = _own_share(by_row, label // ACROSS, TALL)
        wanted *= _own_share(by_column, label % ACROSS, WIDE)
        counted = tl.where(likely >= wanted, 0.0, counted)
    if BACKWARD:
        divisor = tl.load(total)
        slope = tl.where(divisor == 0.0, 0.0, tl.load(upstream) / divisor) * counted
        gradient = mass * (all_smoothed / all_mass)[:, None, None] - smoothed
        target = result + (row * positions)[:, None, None] + position[None, :, :]
        gradient = (gradient * slope[:, None, None]).to(result.dtype.element_ty)
        tl.store(target, gradient, mask=both)
    else:
        expected = tl.sum(tl.sum(smoothed * value, 2), 1)
        entropy = (tl.log(all_mass) * all_smoothed - expected) * counted
        tl.store(result + tl.program_id(0), tl.sum(entropy.to(tl.float64), 0))
        weights = tl.sum(counted.to(tl.float64), 0)
        tl.store(result + tl.num_programs(0) + tl.program_id(0), weights)


def _run(
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    sigma: Tensor,
    grid: list[int],
    by_row: bool,
    ignore_confident: bool,
    backward: tuple[Tensor, Tensor] | None,
) -> Tensor:
    logits = rows_contiguous(logits)
    batch, visible, positions = logits.shape
    down, across = grid
    tall = power_of_two(triton.cdiv(positions, across), 1)
    wide = power_of_two(across, 1)
    kernel = f"position_cross_entropy_{'forward' if backward is None else 'backward'}"
    own = {"ROWS": min(_MOST_ROWS, max(1, _ELEMENTS // (tall * wide))), "num_warps": 4}
    cut = tiles(kernel, shape_class(logits.dtype, l=tall * wide), logits.device, own)
    programs = triton.cdiv(batch * visible, cut["ROWS"])
    if backward is None:
        result = torch.empty(2, programs, dtype=torch.float64, device=logits.device)
    else:
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        _position_kernel,
        (programs,),
        logits,
        dense(index),
        dense(weight),
        sigma,
        *(backward or (None, None)),
        result,
        batch * visible,
        visible,
        positions,
        *logits.stride()[:2],
        writes=(result,),
        **cut,
        DOWN=down,
        ACROSS=across,
        ALL=power_of_two(down, 1),
        TALL=tall,
        WIDE=wide,
        SMALLEST_SPREAD=SMALLEST_SPREAD,
        BY_ROW=by_row,
        IGNORE_CONFIDENT=ignore_confident,
        BACKWARD=backward is not None,
    )
    return result


@torch.library.custom_op("stopfast::position_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    sigma: Tensor,
    grid: list[int],
    by_row: bool,
    ignore_confident: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the sum of the weights that counted."""
    return mean_of(_run(logits, index, weight, sigma, grid, by_row, ignore_confident, None))


@torch.library.custom_op("stopfast::position_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    total: Tensor,
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    sigma: Tensor,
    grid: list[int],
    by_row: bool,
    ignore_confident: bool,
) -> Tensor:
    passed = (upstream, total)
    return _run(logits, index, weight, sigma, grid, by_row, ignore_confident, passed)


@_forward.register_fake
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), logits.new_empty((), dtype=torch.float32)


@_backward.register_fake
def _(upstream: Tensor, total: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:4])
    ctx.settings = inputs[4:]


def _differentiate(ctx, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _backward(upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def position_cross_entropy(
    logits: Tensor, index: Tensor, weight: Tensor, sigma: Tensor, smoothing: Smoothing
) -> Tensor:
    """Fused :func:`stopfast.kernels.reference_losses.position_cross_entropy`; the result is fp32.

    Raises:
        ValueError: as there.
    """
    check_positions(logits, index, weight, sigma, smoothing)
    by_row = smoothing.norm == "row"
    return _forward(
        logits,
        index,
        weight.detach(),
        sigma.detach(),
        list(smoothing.grid),
        by_row,
        smoothing.ignore_confident,
    )[0]
