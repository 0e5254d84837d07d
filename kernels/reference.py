"""The specification: the eager definition of every operation, in torch alone.

Shape legend: B images, E context masks, M target masks, N positions of the grid, Kx context tokens,
Ky target tokens of one mask, D encoder width, P predictor width. Rows are ordered (mask, context,
image) everywhere: row ``(m * E + e) * B + b``.

``lengths`` is int32 [2] on the tensors' device: how many of the Kx context and of the Ky target slots
are real, the same in every row. The others are padding: they are written as zeros, they influence
nothing, and they get zero gradients. None means that all are real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stopfast.kernels.arguments import (
    FAILURES_PER_TARGET,
    MASK_STREAM,
    AdamWBuffers,
    MaskSettings,
    Noise,
    Places,
)
from stopfast.kernels.noise import positional_noise, words


def real_slots(slots: int, length: Tensor) -> Tensor:
    """bool [slots], which of them are not padding."""
    return torch.arange(slots, device=length.device) < length


def predictor_tokens(
    x: Tensor,
    places: Places,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    offset: Tensor | None,
    noise: Noise | None = None,
) -> Tensor:
    """Every sequence of the predictor: context tokens, then the queries of one target mask.

    :func:`context_tokens` and :func:`query_tokens`, with the noise drawn here, packed.

    Args:
        x: [E * B, Kx, D] features of the context encoder.
        places: grid positions of the tokens.
        weight: [P, D].
        bias: [P] or None.
        pos_embed: [N, P].
        offset: [P] that every query carries, or None.
        noise: what is added to which tokens, or None.

    Returns:
        [M * E * B, Kx + Ky, P] in the order (mask, context, image).
    """
    blocks, batch, tokens = places.target.shape
    copies, kept = x.shape[0] // max(1, batch), x.shape[1]
    if places.lengths is not None:
        x = torch.where(real_slots(kept, places.lengths[0])[:, None], x, 0)
    context = context_tokens(x, places.context, weight, bias, pos_embed)
    drawn, noise_weight = None, None
    if noise is not None:
        noise_weight = noise.weight
        if noise.on_queries:
            drawn = noise.queries
            if drawn is None:
                drawn = _draw(noise, pos_embed, blocks, copies, tokens, context=False)
        if noise.on_context:
            added = noise.context
            if added is None:
                added = _draw(noise, pos_embed, 1, copies, kept, context=True)[0]
            context = context + (added if noise_weight is None else F.linear(added, noise_weight))
    queries = query_tokens(places.target, copies, pos_embed, offset, drawn, noise_weight)
    repeated = context.expand(blocks, *context.shape)  # a view: only the result is written
    packed = torch.cat(
        [repeated, queries.view(blocks, *context.shape[:1], tokens, context.shape[2])], dim=2
    ).flatten(0, 1)
    if places.lengths is None:
        return packed
    real = [real_slots(kept, places.lengths[0]), real_slots(tokens, places.lengths[1])]
    return torch.where(torch.cat(real)[:, None], packed, 0)


def _draw(
    noise: Noise, pos_embed: Tensor, blocks: int, copies: int, tokens: int, context: bool
) -> Tensor:
    if noise.seed is None or noise.sample_ids is None:
        raise ValueError("expected seed and sample_ids, or explicit draws for every noisy token")
    weight = pos_embed if noise.weight is None else noise.weight
    # Drawn in fp32 at least; a model that is itself in another precision takes the draws in its own.
    wide = torch.promote_types(torch.float32, weight.dtype)
    normals = positional_noise(
        noise.seed, noise.sample_ids, blocks, copies, tokens, weight.shape[1], context, wide
    )
    return (normals * noise.std).to(weight.dtype)


def context_tokens(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor
) -> Tensor:
    """Context tokens of the predictor: ``x @ weight.T + bias + pos_embed[index]``.

    Args:
        x: [E * B, Kx, D] features.
        index: int64 [E * B, Kx] grid positions.
        weight: [P, D].
        bias: [P] or None.
        pos_embed: [N, P].

    Returns:
        [E * B, Kx, P]; the position keeps its own precision under autocast.
    """
    return F.linear(x, weight, bias) + pos_embed[index]


def query_tokens(
    index: Tensor,
    copies: int,
    pos_embed: Tensor,
    offset: Tensor | None,
    noise: Tensor | None,
    noise_weight: Tensor | None,
) -> Tensor:
    """Target queries of the predictor: position, plus a shared offset, plus projected noise.

    I-JEPA has an offset (its mask token) and no noise; StoP (Bar et al., ICML 2024, Eq. 3-6) has both.

    Args:
        index: int64 [M, B, Ky] grid positions.
        copies: context masks E; queries are repeated for each.
        pos_embed: [N, P].
        offset: [P] or None.
        noise: [M, E * B, Ky, D], scaled; or None.
        noise_weight: [P, D]; None adds the noise as it is ([M, E * B, Ky, P]).

    Returns:
        [M * E * B, Ky, P] in the order (mask, context, image).
    """
    blocks, batch, tokens = index.shape
    queries = pos_embed[index] if offset is None else pos_embed[index] + offset
    queries = queries[:, None].expand(blocks, copies, batch, tokens, -1)
    queries = queries.reshape(blocks, copies * batch, tokens, queries.shape[-1])
    if noise is not None:
        projected = noise if noise_weight is None else F.linear(noise, noise_weight)
        queries = queries + projected
    return queries.flatten(0, 1)


def attention(
    packed: Tensor,
    num_heads: int,
    scale: float,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    context_slots: int = 0,
) -> Tensor:
    """Softmax attention of whole rows, heads side by side in the last axis.

    Args:
        packed: [B, N, 3 * H * d], queries, keys and values in that order; or, with ``queries``,
            [B, N, 2 * H * d], keys and values.
        num_heads: H.
        scale: what the scores are multiplied by.
        queries: [B, R, H * d], those of the target slots alone.
        lengths: real context and target slots, or None.
        context_slots: how many of the N slots, the first, are the context's.

    Returns:
        [B, N, H * d], or [B, R, H * d].
    """
    q, k, v = packed.chunk(3, dim=-1) if queries is None else (queries, *packed.chunk(2, dim=-1))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    target = real_slots(k.shape[2] - context_slots, lengths[1])
    keys = torch.cat([real_slots(context_slots, lengths[0]), target])
    rows = keys if queries is None else target
    # Padding may hold anything, NaN too, which a weight of zero would let through.
    q = torch.where(rows[:, None], q, 0)
    k, v = (torch.where(keys[:, None], t, 0) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[None], scale=scale)
    return torch.where(rows[:, None], out, 0).transpose(1, 2).flatten(2)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + residual`` and its LayerNorm over the last axis (biased variance, eps inside the root).

    Args:
        x: [..., C].
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.
        residual: [..., C], or None: then the sum is x itself.

    Returns:
        The sum, and its norm: under autocast in autocast's dtype, which the linear layer that reads it
        would cast it to, otherwise in the sum's.
    """
    total = x if residual is None else x + residual
    normed = F.layer_norm(total, (total.shape[-1],), weight, bias, eps)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        normed = normed.to(torch.get_autocast_dtype(device))
    return total, normed


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ weight.T + bias)`` with the exact (erf) GELU; x [..., C], weight [F, C], bias [F]."""
    return F.gelu(F.linear(x, weight, bias))


def target_smooth_l1(
    prediction: Tensor, features: Tensor, index: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Mean smooth-L1 (beta 1) between predictions and layer-normed target features.

    The features are normalised over channels without parameters and with eps 1e-5, as I-JEPA does.

    Args:
        prediction: [M * E * B, Ky, D] in the order (mask, context, image).
        features: [B, T, D] output of the target encoder; it gets no gradient.
        index: int64 [M, B, Ky], which of the T rows each query predicts.
        lengths: real context and target slots, or None; padding is no part of the mean.

    Returns:
        The loss, a scalar in the wider of fp32 and the prediction's dtype.
    """
    blocks, batch, tokens = index.shape
    width = features.shape[-1]
    rows = features.detach().gather(
        1, index.transpose(0, 1).reshape(batch, -1, 1).expand(-1, -1, width)
    )
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    target = F.layer_norm(rows.to(dtype), (width,)).view(batch, blocks, tokens, width)
    target = target.transpose(0, 1)[:, None]
    prediction = prediction.to(dtype).view(blocks, -1, batch, tokens, width)
    if lengths is None:
        return F.smooth_l1_loss(prediction, target.expand_as(prediction))
    real = real_slots(tokens, lengths[1])[:, None]
    # Selected before the difference: padding may hold NaN, and would send it into the gradient.
    each = F.smooth_l1_loss(
        torch.where(real, prediction, 0),
        torch.where(real, target, 0).expand_as(prediction),
        reduction="sum",
    )
    return each / (prediction.numel() // tokens * lengths[1])


@torch.no_grad()
def adamw_ema(
    buffers: AdamWBuffers,
    scalars: Tensor,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW update (Loshchilov and Hutter, ICLR 2019), then the average of the updated weights.

    Decay is decoupled and comes first; then moments, bias correction, and
    ``average += (1 - momentum) * (param - average)``. The copies are the new values, rounded.

    Args:
        buffers: what is updated.
        scalars: fp64 [7] on the buffers' device: learning rate, weight decay, momentum, number of
            this update (1, 2, ...), beta1, beta2, eps.
        found_inf: fp32 scalar; where it is not 0 nothing is written.
        grad_scale: fp32 scalar that the gradient is divided by.
    """
    param, average = buffers.param, buffers.average
    lr, decay, momentum, step, beta1, beta2, eps = scalars.to(torch.float64).unbind()
    grad = buffers.grad.to(param.dtype)
    if grad_scale is not None:
        grad = grad / grad_scale
    decayed = param * (1 - lr * decay).to(param.dtype)
    exp_avg = buffers.exp_avg + (1 - beta1).to(param.dtype) * (grad - buffers.exp_avg)
    exp_avg_sq = buffers.exp_avg_sq * beta2.to(param.dtype)
    exp_avg_sq = exp_avg_sq + (1 - beta2).to(param.dtype) * grad * grad
    step_size = (lr / (1 - beta1**step)).to(param.dtype)
    root = (1 - beta2**step).sqrt().to(param.dtype)
    updated = decayed - step_size * exp_avg / (exp_avg_sq.sqrt() / root + eps.to(param.dtype))
    results: list[tuple[Tensor | None, Tensor]] = [
        (param, updated),
        (buffers.exp_avg, exp_avg),
        (buffers.exp_avg_sq, exp_avg_sq),
        (buffers.param_copy, updated),
    ]
    if average is not None:
        moved = average + (1 - momentum).to(param.dtype) * (updated - average)
        results += [(average, moved), (buffers.average_copy, moved)]
    for buffer, result in results:
        if buffer is not None:
            keep = result if found_inf is None else torch.where(found_inf != 0, buffer, result)
            buffer.copy_(keep)


def multiblock_masks(
    seed: Tensor,
    sample_ids: Tensor,
    target_size: tuple[int, int],
    context_size: tuple[int, int],
    settings: MaskSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-block masks of a batch (I-JEPA, Assran et al., CVPR 2023), as a pure function of the draws.

    A block's top left corner is ``(word * span) >> 32`` in each axis, the words being numbers 2j and
    2j + 1 of the image's stream for block j (targets, then contexts). A context loses what its image's
    targets cover. One with at most ``min_keep`` patches left is drawn again, the attempt's number
    being part of the draw; every 20 attempts one more of the last targets stops to constrain it.

    Args:
        seed: int64 [2], the seed and the iteration.
        sample_ids: int64 [B].
        target_size: (height, width) of a target block.
        context_size: (height, width) of a context block.
        settings: grid, counts and rules.

    Returns:
        Targets int64 [M, B, Ky] and contexts int64 [E, B, height * width], positions ascending, and
        int32 [E, B], how many of each context's are real; 0 stands in the others.
    """
    rows, columns = settings.grid
    npred, nenc = settings.npred, settings.nenc
    sizes = [target_size] * npred + [context_size] * nenc
    edge = int(settings.edge_inclusive)
    spans = [
        side - size + edge
        for block in sizes
        for side, size in zip(settings.grid, block, strict=True)
    ]
    span = torch.tensor(spans, device=seed.device)
    row = torch.arange(rows * columns, device=seed.device) // columns
    column = torch.arange(rows * columns, device=seed.device) % columns

    def draw(attempt: int) -> Tensor:
        """What each block covers: bool [B, M + E, N]."""
        drawn = words(seed, sample_ids, len(spans), MASK_STREAM, attempt)
        corner = ((drawn * span) >> 32).view(-1, len(sizes), 2, 1)
        size = torch.tensor(sizes, device=seed.device)[:, :, None]
        down, right = row - corner[:, :, 0], column - corner[:, :, 1]
        inside = (down >= 0) & (down < size[:, 0]) & (right >= 0) & (right < size[:, 1])
        return inside

    first = draw(0)
    targets, contexts = first.split([npred, nenc], dim=1)
    member = torch.zeros_like(contexts)
    for attempt in range(FAILURES_PER_TARGET * npred + 1):
        binding = 0 if settings.allow_overlap else npred - attempt // FAILURES_PER_TARGET
        covered = targets[:, :binding].any(1, keepdim=True)
        drawn = (contexts if attempt == 0 else draw(attempt)[:, npred:]) & ~covered
        small = member.sum(-1, keepdim=True) <= settings.min_keep
        if not small.any():
            break
        member = torch.where(small, drawn, member)

    def positions(mask: Tensor, count: int) -> Tensor:
        order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True)[..., :count]
        return torch.where(mask.gather(-1, order), order, 0).transpose(0, 1)

    counts = member.sum(-1, dtype=torch.int32).transpose(0, 1)
    target = positions(targets, target_size[0] * target_size[1])
    return target, positions(member, context_size[0] * context_size[1]), counts
