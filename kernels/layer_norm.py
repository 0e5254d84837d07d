"""Fused residual sum and LayerNorm: each row is read and written once, forwards and backwards.

At the widths of vision transformers a row is a few hundred bytes, so a program takes several. Backward
adds the gradient that comes through the sum in the pass that computes the norm's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import launch, power_of_two, rows_contiguous

_ELEMENTS = 4096  # of the rows that one program holds at a time
_MAX_WIDTH = 8192  # a row of it fits the registers of a backward program
# Partial sums of the parameters' gradients. Not a count of the GPU's multiprocessors: the order of
# summation, and so the result, is the same on every GPU. It is about two programs for each on an A100 or
# H100, which all run at once.
_PARTIALS = 256


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    normed,
    mean,
    rstd,
    rows,
    width,
    x_row,
    residual_row,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside, held = row < rows, channel < width
    both = inside[:, None] & held[None, :]
    place = row[:, None] * width + channel[None, :]

    at = row[:, None] * x_row + channel[None, :]
    value = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
    if residual is not None:
        at = row[:, None] * residual_row + channel[None, :]
        value += tl.load(residual + at, mask=both, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=both)
        value = rounded.to(tl.float32)  # backward reads the rounded sum: its norm is what is differentiated
    centre = tl.sum(value, 1) / width
    centred = tl.where(both, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean + row, centre, mask=inside)
    tl.store(rstd + row, scale, mask=inside)
    result = centred * scale[:, None]
    if weight is not None:
        result *= tl.load(weight + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=both)


@triton.jit
def _backward_kernel(
    through_total,
    upstream,
    total,
    mean,
    rstd,
    weight,
    dx,
    dresidual,
    partial,
    rows,
    width,
    through_row,
    upstream_row,
    total_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program takes every tile of rows whose number is its own, modulo the number of programs."""
    channel = tl.arange(0, WIDTH)
    held = channel < width
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    dbias = tl.zeros([ROWS, WIDTH], tl.float32)
    if weight is not None:
        factor = tl.load(weight + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        both = inside[:, None] & held[None, :]
        at = row[:, None] * total_row + channel[None, :]
        value = tl.load(total + at, mask=both, other=0.0).to(tl.float32)
        at = row[:, None] * upstream_row + channel[None, :]
        slope = tl.load(upstream + at, mask=both, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=inside, other=0.0)[:, None]
        scale = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        normal = tl.where(both, (value - centre) * scale, 0.0)
        if partial is not None:
            dweight += slope * normal
            dbias += slope
        if weight is not None:
            slope *= factor
        along = tl.sum(slope * normal, 1)[:, None] / width
        gradient = (slope - tl.sum(slope, 1)[:, None] / width - normal * along) * scale
        if through_total is not None:
            at = row[:, None] * through_row + channel[None, :]
            gradient += tl.load(through_total + at, mask=both, other=0.0).to(tl.float32)
        place = row[:, None] * width + channel[None, :]
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=both)
        if dresidual is not None:
            tl.store(dresidual + place, gradient.to(dresidual.dtype.element_ty), mask=both)
    if partial is not None:
        at = tl.program_id(0).to(tl.int64) * 2 * width + channel
        tl.store(partial + at, tl.sum(dweight, 0), mask=held)
        tl.store(partial + at + width, tl.sum(dbias, 0), mask=held)


def _rows(tensor: Tensor) -> Tensor:
    return rows_contiguous(tensor.reshape(-1, tensor.shape[-1]))


def _sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


@torch.library.custom_op("stopfast::layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without a residual: a result may not be an argument), its norm, mean and 1 / deviation."""
    total, normed, mean, rstd = _empty(x, residual, dtype)
    lines, added = _rows(x), None if residual is None else _rows(residual)
    rows, width = lines.shape
    wide = power_of_two(width)
    rows_each = max(1, _ELEMENTS // wide)
    launch(
        _forward_kernel,
        (triton.cdiv(rows, rows_each),),
        lines,
        added,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else total,
        normed,
        mean,
        rstd,
        rows,
        width,
        lines.stride(0),
        0 if added is None else added.stride(0),
        eps,
        writes=(total, normed, mean, rstd),
        num_warps=max(4, wide // 1024),
        ROWS=rows_each,
        WIDTH=wide,
    )
    return total, normed, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(x, residual, dtype)


def _empty(
    x: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, rows = x.device, x.shape[:-1].numel()
    if residual is None:
        total = torch.empty(0, dtype=x.dtype, device=device)
    else:
        total = torch.empty(x.shape, dtype=_sum_dtype(x, residual), device=device)
    normed = torch.empty(x.shape, dtype=dtype, device=device)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=device).unbind()
    return total, normed, mean, rstd


@torch.library.custom_op("stopfast::layer_norm_backward", mutates_args=())
def _backward(
    through_total: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dtypes: list[torch.dtype],
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pass
