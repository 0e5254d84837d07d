"""Fused residual sum and LayerNorm: each row is read and written once, forwards and backwards.

At the widths of vision transformers a row is a few hundred bytes, so a program takes several. Backward
adds the gradient that comes through the sum in the pass that computes the norm's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import (
    check_shapes,
    compute_dtype,
    dense,
    launch,
    power_of_two,
    rows_contiguous,
)
from stopfast.kernels._tiles import shape_class, tiles

_ELEMENTS = 4096  # of the rows that one program holds at a time
_MAX_WIDTH = 8192  # a row of it fits the registers of a backward program
# Programs of backward at most, each with its partial sum of gradients: about two a multiprocessor.
_PARTIALS = 256


@triton.jit
def _forward_kernel(
    x, residual, weight, bias, total, normed, rstd, rows, width, x_row, residual_row, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
        value = rounded.to(tl.float32)  # what backward reads is what is normed
    centre = tl.sum(value, 1) / width
    centred = tl.where(both, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(rstd + row, scale, mask=inside)
    result = centred * scale[:, None]
    if weight is not None:
        result *= tl.load(weight + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=both)


@triton.jit
def _backward_kernel(
    through_total, upstream, total, rstd, weight, dx, dresidual, partial,
    rows, width, through_row, upstream_row, total_row, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program takes every tile of rows whose number is its own, modulo the number of programs.

    The mean is taken again, of what is in registers anyway, so that it is that of the rounded sum.
    """
    channel = tl.arange(0, WIDTH)
    held = channel < width
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    dbias = tl.zeros([ROWS, WIDTH], tl.float32)
    if weight is not None:
        factor = tl.load(weight + channel, mask=held, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        both = inside[:, None] & held[None, :]
        at = row[:, None] * total_row + channel[None, :]
        value = tl.load(total + at, mask=both, other=0.0).to(tl.float32)
        at = row[:, None] * upstream_row + channel[None, :]
        slope = tl.load(upstream + at, mask=both, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        centre = tl.sum(value, 1)[:, None] / width
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


@torch.library.custom_op("stopfast::layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without a residual: no result may be an argument), its norm, and 1 / deviation."""
    total, normed, rstd = _empty(x, residual, dtype)
    lines, added = _rows(x), None if residual is None else _rows(residual)
    rows, width = lines.shape
    wide = power_of_two(width)
    own = {"ROWS": max(1, _ELEMENTS // wide), "num_warps": max(4, wide // 1024)}
    cut = tiles("layer_norm_forward", shape_class(x.dtype, dtype, c=wide), x.device, own)
    launch(
        _forward_kernel,
        (triton.cdiv(rows, cut["ROWS"]),),
        *(lines, added, weight, bias),
        *(None if residual is None else total, normed, rstd),
        *(rows, width, lines.stride(0), 0 if added is None else added.stride(0), eps),
        writes=(total, normed, rstd),
        **cut,
        WIDTH=wide,
    )
    return total, normed, rstd


def _empty(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    device, rows = x.device, x.shape[:-1].numel()
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty(x.shape if residual is not None else 0, dtype=wide, device=device)
    normed = torch.empty(x.shape, dtype=dtype, device=device)
    return total, normed, torch.empty(rows, dtype=torch.float32, device=device)


_forward.register_fake(lambda x, residual, weight, bias, eps, dtype: _empty(x, residual, dtype))


@torch.library.custom_op("stopfast::layer_norm_backward", mutates_args=())
def _backward(
    through_total: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual where its dtype differs from x's, and of weight and bias, [2, C]."""
    dx, dresidual = _gradients(total, x_dtype, residual_dtype)
    lines, slopes = _rows(total), _rows(upstream)
    through = None if through_total is None else _rows(through_total)
    rows, width = lines.shape
    wide = power_of_two(width)
    tall = max(1, _ELEMENTS // wide)
    own = {"ROWS": tall, "num_warps": max(8, wide // 256), "programs": _PARTIALS}
    shapes = shape_class(total.dtype, upstream.dtype, c=wide)
    cut = tiles("layer_norm_backward", shapes, total.device, own)
    count, most = triton.cdiv(rows, cut["ROWS"]), cut.pop("programs")
    # As many programs as give each the same number of tiles, the last ones apart.
    programs = triton.cdiv(count, triton.cdiv(count, most)) if count else 0
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=total.device)
    launch(
        _backward_kernel,
        (programs,),
        *(through, slopes, lines, rstd, weight),
        *(dx, dresidual if dresidual.dtype != dx.dtype else None, partial if affine else None),
        *(rows, width, 0 if through is None else through.stride(0)),
        *(slopes.stride(0), lines.stride(0)),
        writes=(dx, dresidual, partial),
        **cut,
        WIDTH=wide,
    )
    return dx, dresidual, partial.sum(0) if affine else partial.new_empty(0)


def _gradients(
    total: Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(total.shape, dtype=x_dtype, device=total.device)
    if residual_dtype in (None, x_dtype):
        return dx, torch.empty(0, dtype=x_dtype, device=total.device)
    return dx, torch.empty(total.shape, dtype=residual_dtype, device=total.device)


@_backward.register_fake
def _(through_total, upstream, total, rstd, weight, x_dtype, residual_dtype, affine):
    shape = (2, total.shape[-1]) if affine else (0,)
    return *_gradients(total, x_dtype, residual_dtype), rstd.new_empty(shape)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, _ = inputs
    total, _, rstd = output
    ctx.set_materialize_grads(False)  # a sum that nothing else reads has no gradient to add
    ctx.mark_non_differentiable(*([total] if residual is None else []), rstd)
    ctx.save_for_backward(x if residual is None else total, rstd, weight)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias))


def _differentiate(ctx, through_total: Tensor | None, upstream: Tensor | None, *_: None) -> tuple:
    total, rstd, weight = ctx.saved_tensors
    of_x, of_residual, of_weight, of_bias = ctx.dtypes
    if upstream is None:
        assert through_total is not None  # only the sum is used
        return through_total.to(of_x), through_total.to(of_residual), None, None, None, None
    through = through_total if of_residual is not None else None
    affine = of_weight is not None or of_bias is not None
    dx, other, sums = _backward(through, upstream, total, rstd, weight, of_x, of_residual, affine)
    dresidual = None if of_residual is None else dx if of_residual == of_x else other
    dweight = None if of_weight is None else sums[0].to(of_weight)
    dbias = None if of_bias is None else sums[1].to(of_bias)
    return dx, dresidual, dweight, dbias, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused :func:`stopfast.kernels.reference.layer_norm`; without a residual the sum is x itself.

    Raises ValueError for a residual of another shape than x's, other shapes, or rows too wide.
    """
    if x.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"layer_norm: expected rows of at most {_MAX_WIDTH}, got {x.shape[-1]}")
    check_shapes("layer_norm", residual=(residual, x.shape))
    check_shapes("layer_norm", weight=(weight, x.shape[-1:]), bias=(bias, x.shape[-1:]))
    weight, bias = dense(weight), dense(bias)
    dtype = compute_dtype(x)
    if residual is not None and not torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(dtype, residual.dtype)
    total, normed, _ = _forward(x, residual, weight, bias, eps, dtype)
    return x if residual is None else total, normed
