"""The predictor's tokens as kernels: the tokens themselves, and the gradients that need the noise again.

A program has a tile of rows and the whole width of the predictor (512 columns at most; in tiles of
128, since 384 is no power of two), so that the noise of a row, which is as wide as the encoder, is
drawn once and never written. Rows are (context mask, image, token) or (target mask, context mask,
image, token).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stopfast.kernels._philox import noise_tile

WARPS = 8
RANGE = 64  # rows are divided among programs by multiples of this, which every tile of rows divides


class Tiles(NamedTuple):
    """How a kernel is cut: rows, depth of a product's step, and columns, of which it has several tiles."""

    rows: int
    depth: int
    columns: int
    most: int = 1


def token_tiles(dtype: torch.dtype) -> Tiles:
    """Tiles of :func:`tokens_kernel`.

    Products of fp32 do without matrix instructions and take their operands from registers, so that only
    small tiles fit; the noise is then drawn twice for a predictor's width of 384.
    """
    return Tiles(16, 16, 64, 4) if dtype == torch.float32 else Tiles(64, 32, 128, 4)


def noise_weight_tiles(dtype: torch.dtype) -> Tiles:
    """Tiles of :func:`noise_weight_kernel`."""
    return Tiles(16, 16, 128) if dtype == torch.float32 else Tiles(32, 32, 512)


@triton.jit
def _locate(row, batch, copies, tokens, CONTEXT: tl.constexpr):
    """Sequence, token, image, place in the index tensor, and counter word 1 of each row."""
    sequence, token = row // tokens, row % tokens
    image = sequence % batch
    copy, block = sequence // batch % copies, sequence // batch // copies
    if CONTEXT:
        at, place = row, token | (copy << 24) | 0x80000000
    else:
        at = (block * batch + image) * tokens + token
        place = token | (block << 16) | (copy << 24)
    return sequence, token, image, at, place


@triton.jit
def _draws(
    explicit, row, real, image, place, seed, sample_ids, std, channel, channels, DEPTH: tl.constexpr
):
    """Scaled noise of a tile, fp32 [ROWS, DEPTH] from ``channel`` on: drawn, or read where it is given."""
    if explicit is None:
        sample = tl.load(sample_ids + image, mask=real, other=0)
        first_quad = channel // 4
        noise = (
            noise_tile(tl.load(seed), tl.load(seed + 1), sample, place, first_quad, DEPTH // 4)
            * std
        )
    else:
        c = channel + tl.arange(0, DEPTH)
        both = real[:, None] & (c < channels)[None, :]
        given = explicit + row[:, None] * channels + c[None, :]
        noise = tl.load(given, mask=both, other=0.0).to(tl.float32)
    return noise


@triton.jit
def _product(
    total, left, weight, weight_row, column, columns, channel, channels,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``total + left @ weight[column:, channel:].T`` of one tile, operands in the weight's dtype."""
    c = column + tl.arange(0, COLUMNS)
    k = channel + tl.arange(0, DEPTH)
    both = (c < columns)[:, None] & (k < channels)[None, :]
    tile = tl.load(
        (weight + c.to(tl.int64) * weight_row)[:, None] + k[None, :], mask=both, other=0.0
    )
    return tl.dot(left.to(tile.dtype), tl.trans(tile), total, input_precision="ieee")


@triton.jit
def _project(
    t0, t1, t2, t3, left, weight, weight_row, column, columns, channel, channels,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """:func:`_product` for each tile of columns, with the one left operand."""
    t0 = _product(t0, left, weight, weight_row, column, columns, channel, channels, COLUMNS, DEPTH)
    if TILES > 1:
        c = column + COLUMNS
        t1 = _product(t1, left, weight, weight_row, c, columns, channel, channels, COLUMNS, DEPTH)
    if TILES > 2:
        c = column + 2 * COLUMNS
        t2 = _product(t2, left, weight, weight_row, c, columns, channel, channels, COLUMNS, DEPTH)
    if TILES > 3:
        c = column + 3 * COLUMNS
        t3 = _product(t3, left, weight, weight_row, c, columns, channel, channels, COLUMNS, DEPTH)
    return t0, t1, t2, t3


@triton.jit
def _write(
    total, noise, added, pos_embed, position, real, inside, place, column, columns, result, repeats,
    repeat_stride, lengths, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add what a tile's tokens have besides products, and write it to every sequence that they are in."""
    c = column + tl.arange(0, COLUMNS)
    held = c < columns
    source = (pos_embed + position * columns)[:, None] + c[None, :]
    total += tl.load(source, mask=real[:, None] & held[None, :], other=0.0).to(tl.float32)
    if noise is not None:
        total += noise
    if added is not None:
        total += tl.load(added + c, mask=held, other=0.0).to(tl.float32)[None, :]
    if lengths is not None:
        total = tl.where(real[:, None], total, 0.0)
    total = total.to(result.dtype.element_ty)
    out = (result + place)[:, None] + c[None, :]
    for _ in range(repeats):
        tl.store(out, total, mask=inside[:, None] & held[None, :])
        out += repeat_stride


# Lengths change from step to step: were they specialised, a kernel would compile again for some.
@triton.jit(do_not_specialize=["rows", "tokens", "slots", "first_slot"])
def tokens_kernel(
    x, weight, noise_weight, explicit, added, pos_embed, index, lengths, seed, sample_ids, result,
    std, rows, batch, copies, tokens, depth, channels, columns, x_sequence, x_token, weight_row,
    noise_row, slots, first_slot, repeats, repeat_stride,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    CONTEXT: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """One kind of token: ``x @ weight.T``, noise, shared vector and position, written to its sequences."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * (TILES * COLUMNS)
    inside = row < rows
    sequence, token, image, at, place = _locate(row, batch, copies, tokens, CONTEXT)
    real = inside
    if lengths is not None:
        real = inside & (token < tl.load(lengths + (0 if CONTEXT else 1)))
    t0 = tl.zeros([ROWS, COLUMNS], tl.float32)
    t1, t2, t3 = t0, t0, t0
    if x is not None:
        source = (x + sequence * x_sequence + token * x_token)[:, None]
        for k in range(0, depth, DEPTH):
            d = k + tl.arange(0, DEPTH)
            both = real[:, None] & (d < depth)[None, :]
            left = tl.load(source + d[None, :], mask=both, other=0.0)
            t0, t1, t2, t3 = _project(
                t0,
                t1,
                t2,
                t3,
                left,
                weight,
                weight_row,
                column,
                columns,
                k,
                depth,
                COLUMNS,
                DEPTH,
                TILES,
            )
    if NOISY and noise_weight is not None:
        for k in range(0, channels, DEPTH):
            left = _draws(
                explicit, row, real, image, place, seed, sample_ids, std, k, channels, DEPTH
            )
            t0, t1, t2, t3 = _project(
                t0, t1, t2, t3, left, noise_weight, noise_row, column, columns, k, channels, COLUMNS,
                DEPTH, TILES,
            )  # fmt: skip
    position = tl.load(index + at, mask=real, other=0)
    out = (sequence * slots + first_slot + token) * columns
    for tile in tl.static_range(TILES):
        c = column + tile * COLUMNS
        total = t0 if tile == 0 else (t1 if tile == 1 else (t2 if tile == 2 else t3))
        noise = None
        if NOISY and noise_weight is None:
            noise = _draws(
                explicit, row, real, image, place, seed, sample_ids, std, c, columns, COLUMNS
            )
        _write(
            total, noise, added, pos_embed, position, real, inside, out, c, columns, result, repeats,
            repeat_stride, lengths, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"])
def noise_weight_kernel(
    gradient, lengths, seed, sample_ids, partial,
    std, rows, batch, copies, tokens, channels, columns, gradient_sequence, gradient_token, rows_each,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    """``gradient.T @ noise`` of each range of rows: partial [ranges, columns, channels]."""
    channel = tl.program_id(0) * DEPTH
    column = tl.program_id(1) * COLUMNS
    first = tl.program_id(2).to(tl.int64) * rows_each
    c = column + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        sequence, token, image, _, place = _locate(row, batch, copies, tokens, CONTEXT)
        real = row < rows
        if lengths is not None:
            real = real & (token < tl.load(lengths + (0 if CONTEXT else 1)))
        noise = _draws(
            None, row, real, image, place, seed, sample_ids, std, channel, channels, DEPTH
        )
        source = (
            gradient + (sequence * gradient_sequence + token * gradient_token)[:, None] + c[None, :]
        )
        tile = tl.load(source, mask=real[:, None] & (c < columns)[None, :], other=0.0)
        total = tl.dot(tl.trans(tile), noise.to(tile.dtype), total, input_precision="ieee")
    k = channel + tl.arange(0, DEPTH)
    place = (tl.program_id(2).to(tl.int64) * columns + c[:, None]) * channels + k[None, :]
    tl.store(partial + place, total, mask=(c < columns)[:, None] & (k < channels)[None, :])


@triton.jit(do_not_specialize=["rows", "tokens"])
def position_kernel(
    gradient, index, lengths, partial,
    rows, batch, copies, tokens, positions, columns, gradient_sequence, gradient_token, rows_each,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    """Each position's sum of the gradients of its rows: partial [ranges, positions, columns].

    A product with a matrix of zeros and ones, whose order of summation is fixed, unlike that of atomics.
    """
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2).to(tl.int64) * rows_each
    total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        sequence, token, _, at, _ = _locate(row, batch, copies, tokens, CONTEXT)
        real = row < rows
        if lengths is not None:
            real = real & (token < tl.load(lengths + (0 if CONTEXT else 1)))
        position = tl.load(index + at, mask=real, other=-1)
        source = (
            gradient + (sequence * gradient_sequence + token * gradient_token)[:, None] + c[None, :]
        )
        tile = tl.load(source, mask=real[:, None] & (c < columns)[None, :], other=0.0)
        chosen = (n[:, None] == position[None, :]).to(tile.dtype)
        total = tl.dot(chosen, tile, total, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * positions + n[:, None]) * columns + c[None, :]
    tl.store(partial + place, total, mask=(n < positions)[:, None] & (c < columns)[None, :])
