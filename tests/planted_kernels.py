"""Kernels with one fault each, for the ahead-of-time gate to name: ``python -m tests.planted_kernels``.

They are compiled in a process of their own: under TRITON_INTERPRET a kernel cannot be compiled.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from stopfast.kernels._launch import Launch
from tests.aot import Configuration, configuration, examine


@triton.jit
def product(x, out, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """A square matrix times itself, in the precision asked for."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + at)
    tl.store(out + at, tl.dot(value, value, input_precision=PRECISION))


@triton.jit
def product_by_hand(x, out, BLOCK: tl.constexpr):
    """The same without ``tl.dot``, which leaves the tensor cores idle."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(BLOCK):
        left, right = tl.load(x + row * BLOCK + k), tl.load(x + k * BLOCK + column)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + row * BLOCK + column, total)


@triton.jit
def many_registers(x, out, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of which every thread holds more than it has registers for."""
    at = tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    value = tl.load(x + at)
    total = tl.sum(value, 0)
    tl.store(out + at, value / total[None, :])


@triton.jit
def narrow_offset(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * width + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, tl.load(x + at))


@triton.jit
def widened_too_late(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (row * width).to(tl.int64)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, tl.load(x + at))


@triton.jit
def narrow_constant_width(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The length of a row is a constant here."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, tl.load(x + at))


@triton.jit
def narrow_range(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The length of a row is read from memory."""
    at = tl.arange(0, BLOCK)[:, None] * tl.load(x).to(tl.int32) + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, 0.0)


@triton.jit
def narrow_in_a_loop(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    place = tl.program_id(0)
    total = tl.zeros((WIDTH,), tl.float32)
    for _ in range(BLOCK):
        total += tl.load(x + place + at)
        place += width
    tl.store(out + at, total)


@triton.jit
def narrow_in_a_loop_sometimes(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    place = tl.program_id(0)
    for _ in range(BLOCK):
        if tl.load(x + place) > 0:
            place = place + 1 + width
    tl.store(out + place + at, 0.0)


@triton.jit
def narrow_under_a_condition(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    row = tl.program_id(0)
    if tl.load(x) > 0:
        row = width * row
    tl.store(out + row + at, tl.load(x + at))


@triton.jit
def narrow_in_a_while(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    row = tl.program_id(0)
    while tl.load(x) > row:
        row = width * row + 1
    tl.store(out + row.to(tl.int64) + at, tl.load(x + at))


@triton.jit
def narrow_before_a_loop(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """What the loop puts in its place is no fault, but there may be no round."""
    place = tl.program_id(0) * width
    for _ in range(width):
        place = tl.load(x).to(tl.int32)
    tl.store(out + place, 0.0)


@triton.jit
def narrow_steps(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The loop's counter is the number of a row, of a constant length."""
    at = tl.arange(0, WIDTH)
    for start in range(0, width, BLOCK):
        tl.store(out + start * WIDTH + at, 0.0)


@triton.jit
def narrow_after_steps(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    row = 0
    for _ in range(width):
        tl.store(out + row * WIDTH + at, 0.0)
        row += BLOCK


@triton.jit
def narrowed_again(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = row.to(tl.int32) + tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def wide_offset(x, out, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """No fault: 64 bits from the row on, through a loop, conditions and divisions."""
    column = tl.arange(0, WIDTH)
    rows = width * BLOCK  # 32 bits do for a number of rows
    first = tl.program_id(0) * BLOCK
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, rows, BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        row = tl.where(row < rows, row // (width * rows), 0)
        total += tl.sum(tl.load(x + row[:, None] * width + column[None, :]), 0)
    place = first.to(tl.int64) * width + first // WIDTH * BLOCK
    while place > rows:
        place -= width
    if tl.load(x) > 0:
        place += width
    tl.store(out + tl.where(first * width < rows, place, 0) + column, total)


_NARROW = (narrow_offset, widened_too_late, narrow_constant_width, narrow_range, narrow_in_a_loop,
           narrow_in_a_loop_sometimes, narrow_under_a_condition, narrow_in_a_while, narrow_before_a_loop,
           narrow_steps, narrow_after_steps, narrowed_again, wide_offset)  # fmt: skip


def planted() -> dict[str, Configuration]:
    """Every planted kernel as the harness takes it."""
    wide, half = torch.empty(64, 64), torch.empty(64, 64, dtype=torch.bfloat16)
    options = {"num_warps": 4, "num_stages": 2}
    tile = {"BLOCK": 64}
    large = {"BLOCK": 64, "WIDTH": 256}
    launches = {
        "tf32": Launch("", product, (wide, wide), {**tile, "PRECISION": "tf32"}, options),
        "ieee": Launch("", product, (wide, wide), {**tile, "PRECISION": "ieee"}, options),
        "dot": Launch("", product, (half, wide), {**tile, "PRECISION": "ieee"}, options),
        "by hand": Launch("", product_by_hand, (half, wide), tile, options),
        "spills": Launch("", many_registers, (wide, wide, 512), large, {**options, "num_warps": 1}),
    }
    for kernel in _NARROW:
        constants = {"BLOCK": 4, "WIDTH": 64}
        launches[kernel.__name__] = Launch("", kernel, (wide, wide, 64), constants, options)
    return {name: configuration(launch) for name, launch in launches.items()}


if __name__ == "__main__":
    json.dump([m._asdict() for m in examine(planted(), (80, 90))], sys.stdout)
