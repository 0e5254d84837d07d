"""Softmax attention of short rows as two kernels, and what decides their tiles.

A row of scores is whole in registers, so there is no running softmax. Backward is one pass: a program
holds all keys and values of one head, walks over the queries, makes their probabilities again, writes
their gradients at once and accumulates those of keys and values. ``delta``, the sum over a row of
probability times its gradient, is taken from the row itself, and so needs no output and no kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from stopfast.kernels._launch import power_of_two
from stopfast.kernels._tiles import shape_class, tiles

MAX_TOKENS = {64: 256, 80: 128}
"""For heads up to a width, how many keys both kernels take. At the widths of published models (24, 32, 64
and 80) bf16 and fp16 spill nothing; of other widths a few registers may, with 128 keys on sm_80."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3e38)  # not infinity: a row without any key must not become NaN


@triton.jit
def _lengths(lengths, context_slots, slots):
    """How many slots of the context and of the target are real."""
    context, target = context_slots, slots
    if lengths is not None:
        context, target = tl.load(lengths), tl.load(lengths + 1)
    return context, target


@triton.jit
def _real(slot, context_slots, context, target):
    return tl.where(slot < context_slots, slot < context, slot - context_slots < target)


# Lengths change from step to step; specialised by their divisibility, each kernel would compile again.
@triton.jit(do_not_specialize=["tokens", "rows", "context_slots", "first"])
def forward_kernel(
    q, k, v, lengths, out, scale, tokens, rows, context_slots, first, heads, q_batch, q_row,
    kv_batch, kv_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for each image, head and block of rows; ``first`` is the slot of row 0."""
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    head = program // blocks % heads * HEAD
    image = (program // blocks // heads).to(tl.int64)
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    held = column[None, :] < HEAD
    context, target = _lengths(lengths, context_slots, tokens + rows)
    keys = (key < tokens) & _real(key, context_slots, context, target)
    real = (row < rows) & _real(first + row, context_slots, context, target)

    far = row.to(tl.int64)[:, None]
    place = image * q_batch + head + far * q_row + column[None, :]
    q_tile = tl.load(q + place, mask=real[:, None] & held, other=0.0)
    place = image * kv_batch + head + key.to(tl.int64)[:, None] * kv_row + column[None, :]
    k_tile = tl.load(k + place, mask=keys[:, None] & held, other=0.0)
    v_tile = tl.load(v + place, mask=keys[:, None] & held, other=0.0)

    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = scores * (scale * _LOG2_E) + tl.where(keys, 0.0, _LOWEST)[None, :]
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    mixed = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
    mixed *= tl.where(real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]
    place = (image * rows + far) * heads * HEAD + head + column[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=(row[:, None] < rows) & held)


@triton.jit(do_not_specialize=["tokens", "rows", "context_slots", "first"])
def backward_kernel(
    q, k, v, lengths, upstream, dq, dk, dv, scale, tokens, rows, context_slots, first, heads,
    q_batch, q_row, kv_batch, kv_row, upstream_batch, upstream_row, dq_row, dkv_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for each image and head. Padding is loaded as zeros, so its gradients are zeros."""
    program = tl.program_id(0)
    head = program % heads * HEAD
    image = (program // heads).to(tl.int64)
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    held = column[None, :] < HEAD
    context, target = _lengths(lengths, context_slots, tokens + rows)
    keys = (key < tokens) & _real(key, context_slots, context, target)
    source = image * kv_batch + head + key.to(tl.int64)[:, None] * kv_row + column[None, :]
    k_tile = tl.load(k + source, mask=keys[:, None] & held, other=0.0)
    v_tile = tl.load(v + source, mask=keys[:, None] & held, other=0.0)
    bias = tl.where(keys, 0.0, _LOWEST)[None, :]
    dk_tile = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_tile = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        real = (row < rows) & _real(first + row, context_slots, context, target)
        far = row.to(tl.int64)[:, None]
        place = image * q_batch + head + far * q_row + column[None, :]
        q_tile = tl.load(q + place, mask=real[:, None] & held, other=0.0)
        place = image * upstream_batch + head + far * upstream_row + column[None, :]
        up_tile = tl.load(upstream + place, mask=real[:, None] & held, other=0.0)

        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores = scores * (scale * _LOG2_E) + bias
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        low = weights.to(v_tile.dtype)
        dv_tile = tl.dot(tl.trans(low), up_tile, dv_tile, input_precision="ieee")
        slope = tl.dot(up_tile, tl.trans(v_tile), input_precision="ieee")
        slope = weights * (slope - tl.sum(weights * slope, 1)[:, None])
        # The scale waits for the products: before them it would push fp16 towards its subnormals.
        low = slope.to(v_tile.dtype)
        dk_tile = tl.dot(tl.trans(low), q_tile, dk_tile, input_precision="ieee")
        dq_tile = tl.dot(low, k_tile, input_precision="ieee") * scale
        place = (image * rows + far) * dq_row + head + column[None, :]
        tl.store(dq + place, dq_tile.to(dq.dtype.element_ty), mask=(row[:, None] < rows) & held)
    sink = (image * tokens + key[:, None]) * dkv_row + head + column[None, :]
    inside = (key[:, None] < tokens) & held
    tl.store(dk + sink, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + sink, dv_tile.to(dv.dtype.element_ty), mask=inside)


def forward_tiles(head_dim: int, k: torch.Tensor, rows: int) -> dict[str, Any]:
    """Constants and warps of the forward kernel for keys ``k`` and so many queries.

    Hopper's matrix instructions take 64 rows at least. Scores of 64 rows and 256 keys would spill, and
    so would fp32, which is multiplied without matrix instructions, from operands in registers.
    """
    constants, shapes = _constants(head_dim, k, rows)
    if k.dtype == torch.float32:
        own = {"ROWS": 16, "num_warps": 8}
    elif constants["KEYS"] <= 128:
        own = {"ROWS": 64, "num_warps": 4}
    elif constants["WIDTH"] > 32:
        own = {"ROWS": 32, "num_warps": 4}
    else:
        own = {"ROWS": 16, "num_warps": 2}
    return {**constants, **tiles("attention_forward", shapes, k.device, own)}


def backward_tiles(head_dim: int, k: torch.Tensor, rows: int) -> dict[str, Any]:
    """Constants, warps and stages of the backward kernel for keys ``k`` and so many queries.

    The gradients of keys and values fill most registers; only few rows at a time leave room for the
    scores, and for other programs on the multiprocessor. In fp32 even that spills.
    """
    constants, shapes = _constants(head_dim, k, rows)
    keys, width = constants["KEYS"], constants["WIDTH"]
    warps = 4 if keys <= 128 and keys * width <= 8192 else 8
    if k.dtype == torch.float32:
        warps = 8 if keys * width <= 4096 else 16
    own = {"ROWS": 16, "num_warps": warps, "num_stages": 2}
    return {**constants, **tiles("attention_backward", shapes, k.device, own)}


def _constants(head_dim: int, k: torch.Tensor, rows: int) -> tuple[dict[str, int], str]:
    """What shapes alone decide, and their class in a table."""
    keys, width = power_of_two(k.shape[1], at_least=32), power_of_two(head_dim, at_least=32)
    shapes = shape_class(k.dtype, d=head_dim, k=keys, r=power_of_two(rows, at_least=32))
    return {"HEAD": head_dim, "WIDTH": width, "KEYS": keys}, shapes
