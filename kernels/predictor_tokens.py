"""The predictor's sequences in one write: projection, position, and noise that exists only in registers.

Backward draws the noise again for the gradient of what projects it. Gradients that are plain matrix
products are left to the vendor's library.
"""

import torch
import triton
from torch import Tensor

from stopfast.kernels._launch import (
    check_shapes,
    compute_dtype,
    dense,
    launch,
    power_of_two,
    rows_contiguous,
)
from stopfast.kernels._tiles import Tiles, shape_class, tiles
from stopfast.kernels._token_gradients import predictor_tokens_backward
from stopfast.kernels._token_kernels import WARPS, token_tiles, tokens_kernel
from stopfast.kernels.arguments import Noise, Places, check_draws


def predictor_tokens(
    x: Tensor,
    places: Places,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    offset: Tensor | None,
    noise: Noise | None = None,
) -> Tensor:
    """Fused :func:`stopfast.kernels.reference.predictor_tokens`.

    The products are computed in x's dtype (autocast's inside autocast), everything else in fp32.
    That indices lie in 0..N-1 is not checked, which would wait for the device.

    Raises:
        ValueError: arguments whose shapes do not fit each other, another precision than fp32, bf16 and
            fp16, or noise without seed and sample_ids where it has to be drawn.
    """
    dtype = compute_dtype(x)
    _check(x, places, weight, bias, pos_embed, offset)
    if noise is not None:
        _check_noise(x, places, pos_embed, noise)
    tied = noise is not None and noise.weight is weight
    projected = noise is not None and noise.weight is not None
    own = noise.weight if noise is not None and not tied else None
    return _forward(
        rows_contiguous(x.to(dtype)),
        places.context.contiguous(),
        places.target.contiguous(),
        dense(places.lengths),
        rows_contiguous(weight.to(dtype)),
        dense(bias),
        pos_embed.contiguous(),
        dense(offset),
        *_draws(noise, x, places),
        None if own is None else rows_contiguous(own.to(dtype)),
        None if noise is None else dense(noise.queries),
        None if noise is None else dense(noise.context),
        0.0 if noise is None else float(noise.std),
        noise is not None and noise.on_queries,
        noise is not None and noise.on_context,
        projected,
    )


def _check(
    x: Tensor,
    places: Places,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    offset: Tensor | None,
) -> None:
    batch, columns = places.target.shape[1], pos_embed.shape[1]
    if x.shape[0] % max(1, batch):
        raise ValueError(
            f"predictor_tokens: expected contexts of {batch} images each, got {x.shape[0]} of them"
        )
    check_shapes(
        "predictor_tokens",
        context=(places.context, x.shape[:2]),
        lengths=(places.lengths, (2,)),
        weight=(weight, (columns, x.shape[2])),
        bias=(bias, (columns,)),
        offset=(offset, (columns,)),
    )


def _check_noise(x: Tensor, places: Places, pos_embed: Tensor, noise: Noise) -> None:
    blocks, batch, tokens = places.target.shape
    columns = pos_embed.shape[1]
    channels = columns if noise.weight is None else noise.weight.shape[1]
    check_shapes(
        "predictor_tokens",
        noise_weight=(noise.weight, (columns, channels)),
        sample_ids=(noise.sample_ids, (batch,)),
        queries=(noise.queries, (blocks, x.shape[0], tokens, channels)),
        context_noise=(noise.context, (*x.shape[:2], channels)),
    )
    drawn = (noise.on_queries and noise.queries is None) or (
        noise.on_context and noise.context is None
    )
    if drawn and (noise.seed is None or noise.sample_ids is None):
        raise ValueError("expected seed and sample_ids, or explicit draws for every noisy token")


def _draws(noise: Noise | None, x: Tensor, places: Places) -> tuple[Tensor | None, Tensor | None]:
    """Seed and ids as the kernels read them: checked, on the device, without gaps."""
    if noise is None or noise.seed is None or noise.sample_ids is None:
        return None, None
    blocks, batch, tokens = places.target.shape
    copies = x.shape[0] // max(1, batch)
    check_draws(noise.seed, blocks, copies, max(tokens, x.shape[1]))
    ids = noise.sample_ids.to(x.device, torch.int64)
    return noise.seed.to(x.device).contiguous(), ids.contiguous()


@torch.library.custom_op("stopfast::predictor_tokens", mutates_args=())
def _forward(
    x: Tensor,
    context: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    offset: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    noise_weight: Tensor | None,
    queries: Tensor | None,
    context_draws: Tensor | None,
    std: float,
    on_queries: bool,
    on_context: bool,
    projected: bool,
) -> Tensor:
    """Written twice over: the context to each of its sequences, then every query."""
    result = _empty(x, target, pos_embed)
    blocks, batch, tokens = target.shape
    sequences, kept = context.shape
    depth, columns = x.shape[2], pos_embed.shape[1]
    projection = (noise_weight if noise_weight is not None else weight) if projected else None
    channels = columns if projection is None else projection.shape[1]
    slots = kept + tokens
    copies = sequences // max(1, batch)
    for is_context, noisy in ((True, on_context), (False, on_queries)):
        rows = sequences * kept if is_context else blocks * sequences * tokens
        cut = _cut(x, columns, is_context, noisy)
        launch(
            tokens_kernel,
            (triton.cdiv(rows, cut["ROWS"]), triton.cdiv(columns, cut["TILES"] * cut["COLUMNS"])),
            x if is_context else None,
            weight if is_context else None,
            projection if noisy else None,
            context_draws if is_context else queries,
            bias if is_context else offset,
            pos_embed,
            context if is_context else target,
            lengths,
            seed,
            sample_ids,
            result,
            std,
            rows,
            batch,
            copies,
            kept if is_context else tokens,
            depth,
            channels,
            columns,
            *x.stride()[:2],
            weight.stride(0),
            0 if projection is None else projection.stride(0),
            slots,
            0 if is_context else kept,
            blocks if is_context else 1,
            sequences * slots * columns,
            writes=(result,),
            **cut,
            CONTEXT=is_context,
            NOISY=noisy,
        )
    return result


def _cut(x: Tensor, columns: int, is_context: bool, noisy: bool) -> Tiles:
    most = token_tiles(x.dtype)
    width = min(most.columns, power_of_two(columns))
    own = {
        # Without a product it is a copy, which smaller programs spread better.
        "ROWS": most.rows if is_context or noisy else min(32, most.rows),
        "DEPTH": most.depth,
        "COLUMNS": width,
        "TILES": min(most.most, triton.cdiv(columns, width)),
        "num_warps": WARPS,
        "num_stages": 2,
    }
    kernel = f"predictor_tokens_{'context' if is_context else 'queries'}"
    shapes = shape_class(x.dtype, c=x.shape[2], p=columns) + " noisy" * noisy
    return tiles(kernel, shapes, x.device, own)


def _empty(x: Tensor, target: Tensor, pos_embed: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, pos_embed.dtype)
    slots = x.shape[1] + target.shape[2]
    return x.new_empty((target.shape[0] * x.shape[0], slots, pos_embed.shape[1]), dtype=dtype)


@_forward.register_fake
def _(x: Tensor, context: Tensor, target: Tensor, lengths: Tensor | None, weight: Tensor,
      bias: Tensor | None, pos_embed: Tensor, *others: object) -> Tensor:  # fmt: skip
    return _empty(x, target, pos_embed)


def _save(ctx, inputs, output) -> None:
    x, context, target, lengths, weight, bias, pos_embed, offset, seed, *others = inputs
    ids, noise_weight, queries, context_draws, *ctx.plain = others
    known = (x, context, target, lengths, weight, pos_embed, seed, ids)
    ctx.save_for_backward(*known, noise_weight, queries, context_draws)
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, offset)]


def _differentiate(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = predictor_tokens_backward(
        gradient.contiguous(), *ctx.saved_tensors, *ctx.plain, ctx.needs_input_grad[6]
    )
    x, weight, bias, position, offset, noise_weight, queries, context = found
    bias, offset = (
        None if dtype is None else t.to(dtype)
        for t, dtype in zip((bias, offset), ctx.dtypes, strict=True)
    )
    position, noise_weight, queries, context = (
        t if t.numel() else None for t in (position, noise_weight, queries, context)
    )
    return (
        x, None, None, None, weight, bias, position, offset, None, None, noise_weight, queries, context,
        None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_save)
