"""Fused loss: layer-norm of the wanted target rows, smooth-L1 and its mean; one pass each way.

Backward normalises again instead of keeping a gradient: a saved one would be as large as what is read
again, and in fp16 its elements, 1 / numel each, would be subnormal before the loss scale reached them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import check_shapes, dense, launch, power_of_two, rows_contiguous
from stopfast.kernels._tiles import shape_class, tiles

_ELEMENTS = 4096  # of one program


# Lengths change from step to step: were they specialised, the kernel would compile again for some.
@triton.jit(do_not_specialize=["rows", "tokens"])
def _smooth_l1_kernel(
    prediction,
    features,
    index,
    lengths,
    upstream,
    result,
    rows,
    batch,
    copies,
    tokens,
    width,
    prediction_row,
    prediction_token,
    features_image,
    features_token,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rows are (mask, context, image, token); the forward result is a sum of each program's rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    sequence, token = row // tokens, row % tokens
    image = sequence % batch
    place = (sequence // (batch * copies) * batch + image) * tokens + token
    inside = row < rows
    real = inside
    count = rows.to(tl.float32) * width
    if lengths is not None:
        length = tl.load(lengths + 1)
        real = inside & (token < length)
        count = (rows // tokens * length).to(tl.float32) * width
    channel = tl.arange(0, WIDTH)
    held = channel < width
    both = real[:, None] & held[None, :]

    at = tl.load(index + place, mask=real, other=0)
    source = features + image[:, None] * features_image + at[:, None] * features_token
    target = tl.load(source + channel[None, :], mask=both, other=0.0).to(tl.float32)
    mean = tl.sum(target, 1) / width
    centred = tl.where(both, target - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / width + 1e-5)
    target = centred / deviation[:, None]

    place = sequence[:, None] * prediction_row + token[:, None] * prediction_token
    value = tl.load(prediction + place + channel[None, :], mask=both, other=0.0).to(tl.float32)
    error = tl.where(both, value - target, 0.0)
    size = tl.abs(error)
    if BACKWARD:
        slope = tl.where(size < 1.0, error, tl.where(error > 0, 1.0, -1.0))
        gradient = tl.where(both, slope * (tl.load(upstream) / count), 0.0)
        place = row[:, None] * width + channel[None, :]
        tl.store(
            result + place,
            gradient.to(result.dtype.element_ty),
            mask=inside[:, None] & held[None, :],
        )
    else:
        loss = tl.where(size < 1.0, 0.5 * error * error, size - 0.5)
        tl.store(result + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0) / count)


def _run(
    prediction: Tensor,
    features: Tensor,
    index: Tensor,
    lengths: Tensor | None,
    upstream: Tensor | None,
) -> Tensor:
    blocks, batch, tokens = index.shape
    prediction, features = rows_contiguous(prediction), rows_contiguous(features)
    sequences, width = prediction.shape[0], prediction.shape[2]
    wide = power_of_two(width)
    own = {"ROWS": max(1, _ELEMENTS // wide), "num_warps": 4}
    kernel = f"target_smooth_l1_{'forward' if upstream is None else 'backward'}"
    cut = tiles(kernel, shape_class(prediction.dtype, c=wide), prediction.device, own)
    programs = triton.cdiv(sequences * tokens, cut["ROWS"])
    if upstream is None:
        result = torch.empty(programs, dtype=torch.float32, device=prediction.device)
    else:
        result = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    launch(
        _smooth_l1_kernel,
        (programs,),
        prediction,
        features,
        index.contiguous(),
        lengths,
        upstream,
        result,
        sequences * tokens,
        batch,
        sequences // max(1, blocks * batch),
        tokens,
        width,
        *prediction.stride()[:2],
        *features.stride()[:2],
        writes=(result,),
        **cut,
        WIDTH=wide,
        BACKWARD=upstream is not None,
    )
    return result


@torch.library.custom_op("stopfast::target_smooth_l1", mutates_args=())
def _forward(prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
    return _run(prediction, features, index, lengths, None).sum()


@torch.library.custom_op("stopfast::target_smooth_l1_backward", mutates_args=())
def _backward(
    upstream: Tensor, prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None
) -> Tensor:
    return _run(prediction, features, index, lengths, upstream)


@_forward.register_fake
def _(prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
    return prediction.new_empty((), dtype=torch.float32)


@_backward.register_fake
def _(
    upstream: Tensor, prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None
) -> Tensor:
    return torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward(upstream, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def target_smooth_l1(
    prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Fused :func:`stopfast.kernels.reference.target_smooth_l1`; the result is fp32.

    Raises:
        ValueError: arguments whose shapes do not fit each other.
    """
    (blocks, batch, tokens), (sequences, _, width) = index.shape, prediction.shape
    if sequences % max(1, blocks * batch):
        raise ValueError(
            f"target_smooth_l1: expected {blocks} x {batch} sequences for each context, got {sequences}"
        )
    check_shapes(
        "target_smooth_l1",
        prediction=(prediction, (sequences, tokens, width)),
        features=(features, (batch, features.shape[1], width)),
        lengths=(lengths, (2,)),
    )
    return _forward(prediction, features.detach(), index, dense(lengths))
