"""The gradients of the predictor's sequences."""

import torch
import triton
from torch import Tensor

from stopfast.kernels._launch import launch, power_of_two
from stopfast.kernels._tiles import shape_class, tiles
from stopfast.kernels._token_kernels import (
    RANGE,
    WARPS,
    noise_weight_kernel,
    noise_weight_tiles,
    position_kernel,
)

_RANGES = 16  # of rows, that are summed apart: enough programs for the largest GPUs


@torch.library.custom_op("stopfast::predictor_tokens_backward", mutates_args=())
def predictor_tokens_backward(
    gradient: Tensor,
    x: Tensor,
    context: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    weight: Tensor,
    pos_embed: Tensor,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    noise_weight: Tensor | None,
    queries: Tensor | None,
    context_draws: Tensor | None,
    std: float,
    on_queries: bool,
    on_context: bool,
    projected: bool,
    learned: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias, pos_embed, offset, noise_weight and both explicit draws.

    Those that are not wanted, or whose argument is not there, are empty. A vector's are fp32.
    """
    blocks, tokens = target.shape[0], target.shape[2]
    sequences, kept = context.shape
    if lengths is not None:
        slots = torch.arange(kept + tokens, device=x.device)
        real = (slots < lengths[0]) | ((slots >= kept) & (slots < kept + lengths[1]))
        gradient = torch.where(real[:, None], gradient, 0)
        x = torch.where(real[:kept, None], x, 0)
    gradient = gradient.view(blocks, sequences, kept + tokens, gradient.shape[2])
    on_x = gradient[:, :, :kept].sum(0, dtype=torch.float32)
    on_query = gradient[:, :, kept:].flatten(0, 1)
    low = on_x.to(x.dtype)
    to_noise, to_draws, to_position = None, [x.new_empty(0), x.new_empty(0)], x.new_empty(0)
    projection = (noise_weight if noise_weight is not None else weight) if projected else None
    kinds = ((on_query, target, queries, on_queries), (on_x, context, context_draws, on_context))
    for number, (wide, index, draws, noisy) in enumerate(kinds):
        if not noisy:
            continue
        operand = wide.to(x.dtype).contiguous()
        if draws is not None:
            flat = operand.flatten(0, 1)
            to = wide if projection is None else flat @ projection
            to_draws[number] = to.reshape(draws.shape).to(draws.dtype, copy=True)
            if projection is not None:
                held = draws.to(x.dtype).view(-1, draws.shape[-1])
                part = flat.t() @ held
                to_noise = part if to_noise is None else to_noise + part
        elif projection is not None:
            assert seed is not None and sample_ids is not None
            part = _noise_weight(
                operand, index, lengths, seed, sample_ids, std, projection.shape[1], number == 1
            )
            to_noise = part if to_noise is None else to_noise + part
    flat = low.flatten(0, 1)
    to_weight = flat.t() @ x.reshape(-1, x.shape[2])
    if to_noise is not None and noise_weight is None:
        to_weight, to_noise = to_weight.float() + to_noise, None
    if learned:
        to_position = _positions(on_query, target, lengths, pos_embed, False)
        to_position = to_position + _positions(on_x, context, lengths, pos_embed, True)
        to_position = to_position.to(pos_embed.dtype)
    return [
        (flat @ weight).view(x.shape),
        to_weight.to(weight.dtype),
        on_x.sum((0, 1)),
        to_position,
        on_query.sum((0, 1), dtype=torch.float32),
        x.new_empty(0) if to_noise is None else to_noise.to(weight.dtype),
        *to_draws,
    ]


def _noise_weight(
    gradient: Tensor,
    index: Tensor,
    lengths: Tensor | None,
    seed: Tensor,
    sample_ids: Tensor,
    std: float,
    channels: int,
    is_context: bool,
) -> Tensor:
    sequences, tokens, columns = gradient.shape
    batch = sample_ids.shape[0]
    most = noise_weight_tiles(gradient.dtype)
    own = {
        "ROWS": most.rows,
        "DEPTH": most.depth,
        "COLUMNS": power_of_two(min(columns, most.columns)),
        "num_warps": WARPS,
        "num_stages": 2,
    }
    shapes = shape_class(gradient.dtype, c=channels, p=columns)
    cut = tiles("predictor_tokens_noise_weight", shapes, gradient.device, own)
    rows = sequences * tokens
    rows_each, ranges = _ranges(rows)
    partial = torch.empty((ranges, columns, channels), dtype=torch.float32, device=gradient.device)
    blocks = 1 if is_context else index.shape[0]
    launch(
        noise_weight_kernel,
        (triton.cdiv(channels, cut["DEPTH"]), triton.cdiv(columns, cut["COLUMNS"]), ranges),
        gradient,
        lengths,
        seed,
        sample_ids,
        partial,
        std,
        rows,
        batch,
        sequences // max(1, batch * blocks),
        tokens,
        channels,
        columns,
        *gradient.stride()[:2],
        rows_each,
        writes=(partial,),
        **cut,
        CONTEXT=is_context,
    )
    return partial.sum(0)


def _positions(
    gradient: Tensor, index: Tensor, lengths: Tensor | None, pos_embed: Tensor, is_context: bool
) -> Tensor:
    sequences, tokens, columns = gradient.shape
    positions = pos_embed.shape[0]
    rows_each, ranges = _ranges(sequences * tokens)
    partial = torch.empty((ranges, positions, columns), dtype=torch.float32, device=gradient.device)
    batch = sequences if is_context else index.shape[1]
    blocks = 1 if is_context else index.shape[0]
    launch(
        position_kernel,
        (triton.cdiv(positions, 64), triton.cdiv(columns, 64), ranges),
        gradient,
        index,
        lengths,
        partial,
        sequences * tokens,
        batch,
        sequences // max(1, batch * blocks),
        tokens,
        positions,
        columns,
        *gradient.stride()[:2],
        rows_each,
        writes=(partial,),
        num_warps=8,
        ROWS=16,
        POSITIONS=64,
        COLUMNS=64,
        CONTEXT=is_context,
    )
    return partial.sum(0)


def _ranges(rows: int) -> tuple[int, int]:
    rows_each = max(1, triton.cdiv(triton.cdiv(rows, RANGE), _RANGES)) * RANGE
    return rows_each, triton.cdiv(rows, rows_each)


@predictor_tokens_backward.register_fake
def _(gradient: Tensor, x: Tensor, context: Tensor, target: Tensor, lengths: Tensor | None,
      weight: Tensor, pos_embed: Tensor, seed: Tensor | None, sample_ids: Tensor | None,
      noise_weight: Tensor | None, queries: Tensor | None, context_draws: Tensor | None, std: float,
      on_queries: bool, on_context: bool, projected: bool, learned: bool) -> list[Tensor]:  # fmt: skip
    own = noise_weight if on_queries or on_context else None
    draws = [queries if on_queries else None, context_draws if on_context else None]
    vector = x.new_empty(pos_embed.shape[1], dtype=torch.float32)

    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    position = like(pos_embed if learned else None)
    return [like(x), like(weight), vector, position, like(vector), like(own), *map(like, draws)]
