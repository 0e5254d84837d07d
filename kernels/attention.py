"""Fused softmax attention of short rows, read from the packed projection, written head by head.

Nothing but the inputs is kept for backward, which makes the probabilities again: the rows are short
enough that this costs less than reading saved statistics, and the projection is kept by others anyway.
"""

import torch
import triton
from torch import Tensor

from stopfast.kernels._attention_kernels import (
    MAX_TOKENS,
    backward_kernel,
    backward_tiles,
    forward_kernel,
    forward_tiles,
)
from stopfast.kernels._launch import (
    check_shapes,
    compute_dtype,
    dense,
    launch,
    rows_contiguous,
)


def supports(head_dim: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether :func:`attention` takes heads of this width, with this many keys, in this precision."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    most = next((most for widest, most in MAX_TOKENS.items() if head_dim <= widest), 0)
    return known and tokens <= most


def attention(
    packed: Tensor,
    num_heads: int,
    scale: float,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    context_slots: int = 0,
) -> Tensor:
    """Fused :func:`stopfast.kernels.reference.attention`, for the shapes that :func:`supports` names.

    Raises:
        ValueError: another shape or precision, or queries that do not go with the keys.
    """
    dtype = compute_dtype(packed)
    packed = packed.to(dtype)
    parts = 3 if queries is None else 2
    tokens, head_dim = packed.shape[1], packed.shape[2] // (parts * num_heads)
    if packed.shape[2] != parts * num_heads * head_dim or not supports(head_dim, tokens, dtype):
        taken = " or ".join(f"{most} tokens of head dims to {d}" for d, most in MAX_TOKENS.items())
        raise ValueError(
            f"attention: expected [B, N, {parts} * {num_heads} * d] of at most {taken}, "
            f"got {list(packed.shape)}"
        )
    if queries is not None:
        queries = queries.to(compute_dtype(queries))
        expected = (packed.shape[0], queries.shape[1], num_heads * head_dim)
        if queries.shape != expected or queries.dtype != dtype:
            raise ValueError(
                f"attention: expected queries {list(expected)} in {dtype}, got "
                f"{list(queries.shape)} in {queries.dtype}"
            )
    check_shapes("attention", lengths=(lengths, (2,)))
    return _forward(packed, queries, dense(lengths), num_heads, scale, context_slots)


def _split(packed: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views."""
    if queries is None:
        q, k, v = packed.chunk(3, dim=-1)
        return q, k, v
    k, v = packed.chunk(2, dim=-1)
    return queries, k, v


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@torch.library.custom_op("stopfast::attention", mutates_args=())
def _forward(
    packed: Tensor,
    queries: Tensor | None,
    lengths: Tensor | None,
    num_heads: int,
    scale: float,
    context_slots: int,
) -> Tensor:
    q, k, v = (rows_contiguous(t) for t in _split(packed, queries))
    images, rows, width = q.shape
    out = _empty(q)
    tiles = forward_tiles(width // num_heads, k, rows)
    launch(
        forward_kernel,
        (triton.cdiv(rows, tiles["ROWS"]) * num_heads * images,),
        q,
        k,
        v,
        lengths,
        out,
        scale,
        k.shape[1],
        rows,
        context_slots,
        0 if queries is None else context_slots,
        num_heads,
        *q.stride()[:2],
        *k.stride()[:2],
        writes=(out,),
        **tiles,
    )
    return out


@torch.library.custom_op("stopfast::attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    packed: Tensor,
    queries: Tensor | None,
    lengths: Tensor | None,
    num_heads: int,
    scale: float,
    context_slots: int,
) -> list[Tensor]:
    q, k, v = (rows_contiguous(t) for t in _split(packed, queries))
    upstream = rows_contiguous(upstream)
    images, rows, width = q.shape
    gradients = _empty_gradients(packed, queries)
    dq, dk, dv = _split(*gradients) if queries is not None else _split(gradients[0], None)
    launch(
        backward_kernel,
        (num_heads * images,),
        q,
        k,
        v,
        lengths,
        upstream,
        dq,
        dk,
        dv,
        scale,
        k.shape[1],
        rows,
        context_slots,
        0 if queries is None else context_slots,
        num_heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *upstream.stride()[:2],
        dq.stride(1),
        dk.stride(1),
        writes=(dq, dk, dv),
        **backward_tiles(width // num_heads, k, rows),
    )
    return gradients


def _empty_gradients(packed: Tensor, queries: Tensor | None) -> list[Tensor]:
    return [_empty(packed)] if queries is None else [_empty(packed), _empty(queries)]


@_forward.register_fake
def _(packed: Tensor, queries: Tensor | None, *_: object) -> Tensor:
    return _empty(_split(packed, queries)[0])


@_backward.register_fake
def _(upstream: Tensor, packed: Tensor, queries: Tensor | None, *_: object) -> list[Tensor]:
    return _empty_gradients(packed, queries)


def _save(ctx, inputs, output) -> None:
    packed, queries, lengths, *ctx.settings = inputs
    ctx.save_for_backward(packed, queries, lengths)


def _differentiate(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(upstream, *ctx.saved_tensors, *ctx.settings)
    return found[0], found[1] if len(found) > 1 else None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
