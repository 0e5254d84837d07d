"""Fused loss of MAE and Beyond Masking: patches read from the images, normalised, squared error, mean.

No image is laid out as patches: a program reads the pixels of its patches where they are. Backward reads
and normalises them again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import dense, launch, power_of_two, rows_contiguous
from stopfast.kernels._means import mean_of
from stopfast.kernels._tiles import shape_class, tiles
from stopfast.kernels.arguments import PatchTarget, check_patches

_ELEMENTS = 2048  # of one program
_MOST_CHANNELS = 4


# How many patches are predicted may follow a schedule: it is no reason to compile again.
@triton.jit(do_not_specialize=["rows", "tokens"])
def _patch_kernel(
    prediction,
    images,
    index,
    upstream,
    result,
    rows,
    tokens,
    patches_across,
    prediction_image,
    prediction_token,
    images_image,
    images_channel,
    images_row,
    images_column,
    eps0,
    eps1,
    eps2,
    eps3,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
    NORM: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """A tile is [ROWS, PIXELS, WIDE]: the pixels of each patch, and their channels."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    pixel, channel = tl.arange(0, PIXELS), tl.arange(0, WIDE)
    held = ((pixel < SIDE * SIDE)[:, None] & (channel < CHANNELS)[None, :])[None, :, :]
    both = inside[:, None, None] & held

    image, patch = row // tokens, row % tokens
    place = image * prediction_image + patch * prediction_token
    if index is not None:
        patch = tl.load(index + row, mask=inside, other=0)
    down = patch // patches_across * SIDE
    corner = image * images_image + down * images_row
    corner += patch % patches_across * SIDE * images_column
    within = (pixel // SIDE).to(tl.int64) * images_row + (pixel % SIDE).to(tl.int64) * images_column
    within = within[:, None] + channel.to(tl.int64)[None, :] * images_channel
    source = images + corner[:, None, None] + within[None, :, :]
    target = tl.load(source, mask=both, other=0.0).to(tl.float32)
    if NORM == "patch":
        mean = tl.sum(tl.sum(target, 2), 1) / (SIDE * SIDE * CHANNELS)
        target = tl.where(both, target - mean[:, None, None], 0.0)
        square = tl.sum(tl.sum(target * target, 2), 1)
        deviation = tl.sqrt(square / (SIDE * SIDE * CHANNELS - 1) + eps0)
        target = target / deviation[:, None, None]
    if NORM == "channel":
        mean = tl.sum(target, 1) / (SIDE * SIDE)
        target = tl.where(both, target - mean[:, None, :], 0.0)
        deviation = tl.sqrt(tl.sum(target * target, 1) / (SIDE * SIDE - 1))
        eps = tl.where(
            channel < 2, tl.where(channel < 1, eps0, eps1), tl.where(channel < 3, eps2, eps3)
        )
        target = target / (deviation + eps[None, :])[:, None, :]

    value = (pixel * CHANNELS)[:, None] + channel[None, :]
    source = prediction + place[:, None, None] + value[None, :, :]
    error = tl.load(source, mask=both, other=0.0).to(tl.float32) - target
    error = tl.where(both, error, 0.0)
    if BACKWARD:
        count = rows.to(tl.float32) * (SIDE * SIDE * CHANNELS)
        gradient = error * (2.0 * tl.load(upstream) / count)
        place = (row * (SIDE * SIDE * CHANNELS))[:, None, None] + value[None, :, :]
        tl.store(result + place, gradient.to(result.dtype.element_ty), mask=both)
    else:
        square = tl.sum(tl.sum(error * error, 2), 1)
        tl.store(result + tl.program_id(0), tl.sum(square.to(tl.float64), 0))


def _run(
    prediction: Tensor,
    images: Tensor,
    index: Tensor | None,
    side: int,
    norm: str,
    eps: list[float],
    upstream: Tensor | None,
) -> Tensor:
    prediction = rows_contiguous(prediction)
    batch, tokens, _ = prediction.shape
    channels = images.shape[1]
    pixels, wide = power_of_two(side * side), power_of_two(channels, 1)
    kernel = f"patch_mse_{'forward' if upstream is None else 'backward'}"
    own = {"ROWS": max(1, _ELEMENTS // (pixels * wide)), "num_warps": 4}
    shapes = shape_class(prediction.dtype, images.dtype, p=side, c=channels)
    cut = tiles(kernel, shapes, prediction.device, own)
    programs = triton.cdiv(batch * tokens, cut["ROWS"])
    if upstream is None:
        result = torch.empty(1, programs, dtype=torch.float64, device=prediction.device)
    else:
        result = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    launch(
        _patch_kernel,
        (programs,),
        prediction,
        images,
        dense(index),
        upstream,
        result,
        batch * tokens,
        tokens,
        images.shape[3] // side,
        *prediction.stride()[:2],
        *images.stride(),
        *[*eps, *[1.0] * (_MOST_CHANNELS - len(eps))],
        writes=(result,),
        **cut,
        SIDE=side,
        CHANNELS=channels,
        PIXELS=pixels,
        WIDE=wide,
        NORM=norm,
        BACKWARD=upstream is not None,
    )
    return result


@torch.library.custom_op("stopfast::patch_mse", mutates_args=())
def _forward(
    prediction: Tensor, images: Tensor, index: Tensor | None, side: int, norm: str, eps: list[float]
) -> Tensor:
    sums = _run(prediction, images, index, side, norm, eps, None)
    return mean_of(sums, prediction.numel())[0]


@torch.library.custom_op("stopfast::patch_mse_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    prediction: Tensor,
    images: Tensor,
    index: Tensor | None,
    side: int,
    norm: str,
    eps: list[float],
) -> Tensor:
    return _run(prediction, images, index, side, norm, eps, upstream)


@_forward.register_fake
def _(prediction: Tensor, *_: object) -> Tensor:
    return prediction.new_empty((), dtype=torch.float32)


@_backward.register_fake
def _(upstream: Tensor, prediction: Tensor, *_: object) -> Tensor:
    return torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_save)


def patch_mse(
    prediction: Tensor, images: Tensor, index: Tensor | None, target: PatchTarget
) -> Tensor:
    """Fused :func:`stopfast.kernels.reference_losses.patch_mse`; the result is fp32.

    Raises:
        ValueError: as there, or more than 4 channels.
    """
    check_patches(prediction, images, index, target)
    if images.shape[1] > _MOST_CHANNELS:
        raise ValueError(
            f"patch_mse: expected at most {_MOST_CHANNELS} channels, got {images.shape[1]}"
        )
    return _forward(
        prediction, images.detach(), index, target.patch_size, target.norm, list(target.eps)
    )
