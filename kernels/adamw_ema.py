"""Fused AdamW and teacher's average: one pass over flat buffers, compute copies included.

An element of each buffer is read and written once: 36 bytes, and 2 for each copy, where torch's fused
AdamW and a pass for the average move 40, and casts 6 each. The step's numbers are read from the device,
so that one captured graph serves every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import launch
from stopfast.kernels._tiles import shape_class, tiles
from stopfast.kernels.arguments import AdamWBuffers

_BLOCK = 1024  # elements, eight of each buffer for a thread
# Blocks of one program. Every thread works out the coefficients, in fp64, at which most GPUs are 64 times
# slower than in fp32: done for eight elements alone it would take about as long as their memory traffic.
_BLOCKS = 4
_HALF = (torch.bfloat16, torch.float16)


@triton.jit
def _adamw_ema_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    average,
    param_copy,
    average_copy,
    scalars,
    found_inf,
    grad_scale,
    numel,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Differences are rounded to fp32, never what is near 1: 0.999 in fp32 would shift a second moment."""
    lr, decay = tl.load(scalars), tl.load(scalars + 1)
    momentum, step = tl.load(scalars + 2), tl.load(scalars + 3)
    beta1, beta2, eps = tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    root = tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))
    # param - lr / correction1 * exp_avg / (sqrt(exp_avg_sq) / root + eps), with one division of elements.
    rate = (lr / (1.0 - tl.exp(step * tl.log(beta1))) * root).to(tl.float32)
    floor = (eps * root).to(tl.float32)
    shrink = (lr * decay).to(tl.float32)
    gain1, gain2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    follow = (1.0 - momentum).to(tl.float32)

    end = numel  # of what is written
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, numel, 0)
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for block in range(BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        value = tl.load(param + at, mask=inside, other=0.0)
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(exp_avg + at, mask=inside, other=0.0)
        square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        if average is not None:
            teacher = tl.load(average + at, mask=inside, other=0.0)
        if grad_scale is not None:
            slope = tl.div_rn(slope, scale)

        kept = at < end
        mean += gain1 * (slope - mean)
        square += gain2 * (slope * slope - square)
        value -= shrink * value + tl.div_rn(rate * mean, tl.sqrt_rn(square) + floor)
        tl.store(param + at, value, mask=kept)
        tl.store(exp_avg + at, mean, mask=kept)
        tl.store(exp_avg_sq + at, square, mask=kept)
        if param_copy is not None:
            tl.store(param_copy + at, value.to(param_copy.dtype.element_ty), mask=kept)
        if average is not None:
            teacher += follow * (value - teacher)
            tl.store(average + at, teacher, mask=kept)
            if average_copy is not None:
                tl.store(average_copy + at, teacher.to(average_copy.dtype.element_ty), mask=kept)


@torch.library.custom_op(
    "stopfast::adamw_ema",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "average", "param_copy", "average_copy"),
)
def _update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    param_copy: Tensor | None,
    average_copy: Tensor | None,
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    written = (param, exp_avg, exp_avg_sq, average, param_copy, average_copy)
    own = {"BLOCK": _BLOCK, "BLOCKS": _BLOCKS, "num_warps": 4}
    cut = tiles("adamw_ema", shape_class(grad.dtype), param.device, own)
    launch(
        _adamw_ema_kernel,
        (triton.cdiv(param.numel(), cut["BLOCK"] * cut["BLOCKS"]),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        average,
        param_copy,
        average_copy,
        scalars,
        found_inf,
        grad_scale,
        param.numel(),
        writes=[buffer for buffer in written if buffer is not None],
        **cut,
    )


@_update.register_fake
def _(*arguments: Tensor | None) -> None:
    return None


def adamw_ema(
    buffers: AdamWBuffers,
    scalars: Tensor,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Fused :func:`stopfast.kernels.reference.adamw_ema`.

    Raises:
        ValueError: a buffer of another length or dtype, or with gaps; all that a kernel would overwrite.
    """
    numel = buffers.param.numel()
    for name, buffer in buffers._asdict().items():
        if buffer is None:
            continue
        if buffer.shape != (numel,) or not buffer.is_contiguous():
            raise ValueError(f"{name}: expected flat and contiguous [{numel}], got {buffer.shape}")
        half = name == "grad" or "copy" in name
        if buffer.dtype != torch.float32 and not (half and buffer.dtype in _HALF):
            raise ValueError(
                f"{name}: expected fp32{' or half precision' * half}, got {buffer.dtype}"
            )
    if scalars.shape != (7,) or scalars.dtype != torch.float64 or not scalars.is_contiguous():
        raise ValueError(f"scalars: expected fp64 [7], got {scalars.dtype} {tuple(scalars.shape)}")
    _update(*buffers, scalars, found_inf, grad_scale)
