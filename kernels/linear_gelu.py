"""Fused linear layer and exact (erf) GELU: the activation is the product's epilogue.

The epilogues of the vendor's library know the tanh approximation alone. Forward also writes the
pre-activation where a gradient will need it; backward reads that once for dGELU and the bias's
gradient, and leaves the two products to the vendor's library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import (
    check_shapes,
    compute_dtype,
    launch,
    power_of_two,
    rows_contiguous,
)
from stopfast.kernels._tiles import Tiles, shape_class, tiles

_ELEMENTS = 2048  # that one program of backward holds at a time
# Programs of backward at most, in all; each has a partial sum of the bias's gradient: about four for each
# multiprocessor. Where no table says otherwise, the order of summation is the same on every GPU.
_PROGRAMS = 512


@triton.jit
def _distribution(x):
    """The distribution function of a standard normal, ``(1 + erf(x / sqrt(2))) / 2``.

    Its lower half is 2 to a power that is nearly quadratic; the polynomial was fitted so that the
    greatest error of the result is least: 1.5e-9, and in the lower tail, where ``1 + erf`` cancels, a
    few 1e-5 of its own size. That is 14 instructions and half of what the vendor's erf takes: at a
    width of 384 an epilogue of those would, by their count, outlast the product.
    """
    u = tl.abs(x)
    power = -3.4200372083524696e-08 * u + 9.852437462294733e-07
    power = power * u - 1.2167288376526025e-05
    power = power * u + 8.2350513805208e-05
    power = power * u - 0.0002956963632008999
    power = power * u + 2.4084051306397873e-05
    power = power * u + 0.006928173836987073
    power = power * u - 0.05243506069498521
    power = power * u - 0.4592211149012888
    power = power * u - 1.1511043066860487
    lower = tl.exp2(power * u - 1.0)
    return tl.where(x < 0, lower, 1.0 - lower)


@triton.jit
def _halves(value):
    """The left and the right columns of a tile."""
    half: tl.constexpr = value.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(value, [value.shape[0], 2, half]), [0, 2, 1]))


@triton.jit
def _activate(value, bias, result, pre, row, column, rows, columns):
    """Write the activation of some of a tile's columns, and their pre-activation if it is wanted."""
    held = column < columns
    both = (row < rows)[:, None] & held[None, :]
    at = row[:, None] * columns + column[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=held, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + at, value.to(pre.dtype.element_ty), mask=both)
    tl.store(result + at, (value * _distribution(value)).to(result.dtype.element_ty), mask=both)


@triton.jit
def _forward_kernel(
    x, weight, bias, result, pre, rows, columns, depth, x_row, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result. ``WHOLE``: DEPTH divides depth, and no load of the loop needs a mask."""
    # Tiles that run at the same time share GROUP stripes of x and few of the weight, which stay in L2.
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    row = (first + place % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (place // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.arange(0, DEPTH)
    # Rows and columns beyond the last read the last one, and are not written.
    x_at = x + tl.minimum(row, rows - 1)[:, None] * x_row + channel[None, :]
    weight_at = weight + tl.minimum(column, columns - 1)[None, :] * weight_row + channel[:, None]
    value = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if WHOLE:
            left, right = tl.load(x_at), tl.load(weight_at)
        else:
            held = channel < depth - start
            left = tl.load(x_at, mask=held[None, :], other=0.0)
            right = tl.load(weight_at, mask=held[:, None], other=0.0)
        value = tl.dot(left, right, value, input_precision="ieee")
        x_at += DEPTH
        weight_at += DEPTH
    # A quarter of the columns at a time: with all of them in the midst of the GELU a program would take
    # more than 128 registers a thread, and one's epilogue could not run beside another's product.
    column = (place // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS // 4)
    left, right = _halves(value)
    first_quarter, second_quarter = _halves(left)
    _activate(first_quarter, bias, result, pre, row, column, rows, columns)
    _activate(second_quarter, bias, result, pre, row, column + COLUMNS // 4, rows, columns)
    first_quarter, second_quarter = _halves(right)
    _activate(first_quarter, bias, result, pre, row, column + COLUMNS // 2, rows, columns)
    _activate(second_quarter, bias, result, pre, row, column + COLUMNS // 4 * 3, rows, columns)


@triton.jit
def _backward_kernel(
    upstream, pre, result, partial, rows, columns, upstream_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``upstream * gelu'(pre)`` in one stripe of columns, and its sum over the program's rows."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        both = (row < rows)[:, None] & held[None, :]
        at = row[:, None] * columns + column[None, :]
        value = tl.load(pre + at, mask=both, other=0.0).to(tl.float32)
        slope = row[:, None] * upstream_row + column[None, :]
        slope = tl.load(upstream + slope, mask=both, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * value * value)
        slope *= _distribution(value) + value * density
        tl.store(result + at, slope.to(result.dtype.element_ty), mask=both)
        if partial is not None:
            total += slope
    if partial is not None:
        at = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(partial + at, tl.sum(total, 0), mask=held)


def _forward_tiles(lines: Tensor, columns: int) -> Tiles:
    rows, depth = lines.shape
    large = rows * columns >= 128 * 128 * 256  # enough of the large tiles for every multiprocessor
    own = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3, "GROUP": 8}
    if lines.dtype == torch.float32:
        own |= {"DEPTH": 32, "num_stages": 2}
    elif large:
        own |= {"ROWS": 128, "COLUMNS": 128, "num_warps": 8}
    shapes = shape_class(lines.dtype, c=depth, f=columns) + " large" * large
    return tiles("linear_gelu_forward", shapes, lines.device, own)


@torch.library.custom_op("stopfast::linear_gelu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    """The result, and the pre-activation [rows, F]: empty unless it is to be saved."""
    result, pre = _empty(x, weight, save)
    lines, weight = rows_contiguous(x.reshape(-1, x.shape[-1])), rows_contiguous(weight)
    (rows, depth), columns = lines.shape, weight.shape[0]
    cut = _forward_tiles(lines, columns)
    group = cut.pop("GROUP")
    launch(
        _forward_kernel,
        (triton.cdiv(rows, cut["ROWS"]) * triton.cdiv(columns, cut["COLUMNS"]),),
        *(lines, weight, bias, result, pre if save else None),
        *(rows, columns, depth, lines.stride(0), weight.stride(0)),
        writes=(result, pre),
        **cut,
        WHOLE=depth % cut["DEPTH"] == 0,
        GROUP=group,
    )
    return result, pre


def _empty(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[:-1].numel(), weight.shape[0]
    result = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    pre = torch.empty((rows, columns) if save else 0, dtype=x.dtype, device=x.device)
    return result, pre


_forward.register_fake(lambda x, weight, bias, save: _empty(x, weight, save))


@torch.library.custom_op("stopfast::linear_gelu_backward", mutates_args=())
def _backward(upstream: Tensor, pre: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activation and, in fp32, of the bias (empty without one)."""
    rows, columns = pre.shape
    slopes = rows_contiguous(upstream.reshape(rows, columns))
    wide = min(256, power_of_two(columns))
    own = {"ROWS": _ELEMENTS // wide, "COLUMNS": wide, "num_warps": 8, "programs": _PROGRAMS}
    shapes = shape_class(pre.dtype, f=power_of_two(columns))
    cut = tiles("linear_gelu_backward", shapes, pre.device, own)
    stripes, count = triton.cdiv(columns, cut["COLUMNS"]), triton.cdiv(rows, cut["ROWS"])
    # As many programs as give each the same number of tiles, the last ones apart.
    each = triton.cdiv(count, max(1, cut.pop("programs") // stripes))
    programs = triton.cdiv(count, each) if count else 0
    result = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=pre.device)
    launch(
        _backward_kernel,
        (programs, stripes),
        *(slopes, pre, result, partial if biased else None),
        *(rows, columns, slopes.stride(0)),
        writes=(result, partial),
        **cut,
    )
    return result, partial.sum(0) if biased else partial.new_empty(0)


@_backward.register_fake
def _(upstream: Tensor, pre: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    total = torch.empty(pre.shape[1] if biased else 0, dtype=torch.float32, device=pre.device)
    return torch.empty(pre.shape, dtype=pre.dtype, device=pre.device), total


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.biased = bias is not None


def _differentiate(ctx, upstream: Tensor, _: None) -> tuple:
    x, weight, pre = ctx.saved_tensors
    slopes, dbias = _backward(upstream, pre, ctx.biased)
    dx, dweight = None, None
    if ctx.needs_input_grad[0]:
        dx = torch.mm(slopes, weight).view(x.shape)
    if ctx.needs_input_grad[1]:
        dweight = torch.mm(slopes.t(), x.reshape(-1, x.shape[-1]))
    return dx, dweight, dbias.to(weight.dtype) if ctx.biased else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fused :func:`stopfast.kernels.reference.linear_gelu`; the pre-activation is kept in x's dtype.

    Raises ValueError where shapes or dtypes do not fit each other.
    """
    dtype = compute_dtype(x)
    given = [x, weight] if bias is None else [x, weight, bias.contiguous()]
    if torch.is_autocast_enabled(x.device.type):
        given = [tensor.to(dtype) for tensor in given]
    if any(tensor.dtype != dtype for tensor in given):
        raise ValueError(f"linear_gelu: expected one dtype, got {[t.dtype for t in given]}")
    width = (weight.shape[0], x.shape[-1])
    check_shapes("linear_gelu", weight=(weight, width), bias=(bias, width[:1]))
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return _forward(given[0], given[1], None if bias is None else given[2], save)[0]
