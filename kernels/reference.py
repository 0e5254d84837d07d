"""The specification: the eager definition of every operation, in torch alone.

Shape legend: B images, E context masks, M target masks, N positions of the grid, Kx context tokens,
Ky target tokens of one mask, D encoder width, P predictor width. Rows are ordered (mask, context,
image) everywhere: row ``(m * E + e) * B + b``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

MAX_TOKENS, MAX_BLOCKS, MAX_COPIES = 1 << 16, 1 << 8, 1 << 7
"""What one counter word can name; see :func:`positional_noise`."""


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10 (Salmon et al., SC 2011) for each counter.

    ``counter`` and ``key`` are int64 tensors that hold unsigned 32-bit words and broadcast against
    each other; so are the words returned.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps, but its 64 bits are the right ones, so masking recovers both halves.
        product0, product1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        high0, high1 = product0.bitwise_right_shift(32), product1.bitwise_right_shift(32)
        c0, c1, c2, c3 = (
            high1.bitwise_and_(_MASK) ^ (c1 ^ k0),
            product1.bitwise_and_(_MASK),
            high0.bitwise_and_(_MASK) ^ (c3 ^ k1),
            product0.bitwise_and_(_MASK),
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def normal_pair(
    radius_word: Tensor, angle_word: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Turn two 32-bit words into two standard normals (Box and Muller, 1958), computed in ``dtype``.

    The radius takes ``(word + 1/2) / 2**32``, which is never 0; the angle takes the word as a signed
    number, so that it lies in [-pi, pi) and a kernel needs no range reduction for it.
    """
    uniform = radius_word.to(dtype) * 2.0**-32 + 2.0**-33
    signed = torch.where(angle_word >= 1 << 31, angle_word - (1 << 32), angle_word)
    angle = signed.to(dtype) * (math.pi * 2.0**-31)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def positional_noise(
    seed: Tensor,
    sample_ids: Tensor,
    blocks: int,
    copies: int,
    tokens: int,
    channels: int,
    context: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of one step, as a pure function of what they belong to.

    Philox4x32-10 with key = seed and counter = (channel // 4, token | target block << 16 |
    context copy << 24 | context-token flag << 31, sample, step); the four words of a counter give
    the normals of channels 4q..4q+3 (two from words 0 and 1, two from words 2 and 3).

    Args:
        seed: int64 [2], the run's seed and the optimiser step.
        sample_ids: int64 [B], each image's position in the step's global batch (over ranks and
            micro-batches), in [0, 2**32).
        blocks: target blocks M, at most 256.
        copies: context copies E, at most 128.
        tokens: tokens of one block, at most 65536.
        channels: channels of one token.
        context: whether the noise belongs to context tokens rather than to target queries.
        dtype: dtype of the result and of its computation; the words are the same in each.

    Returns:
        [blocks, copies * B, tokens, channels].

    Raises:
        ValueError: a count that does not fit its bits of the counter, or a seed that is not int64 [2].
    """
    if seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(
            f"positional_noise: expected seed as int64 (2,), got {seed.dtype} {tuple(seed.shape)}"
        )
    if blocks > MAX_BLOCKS or copies > MAX_COPIES or tokens > MAX_TOKENS:
        raise ValueError(
            f"positional_noise: expected at most {MAX_BLOCKS} blocks, {MAX_COPIES} copies and "
            f"{MAX_TOKENS} tokens, got {blocks}, {copies} and {tokens}"
        )
    device = seed.device

    def axis(size: int, dim: int) -> Tensor:
        shape = [1] * 5
        shape[dim] = size
        return torch.arange(size, device=device, dtype=torch.int64).view(shape)

    # Axes: block, copy, sample, token, quad of channels.
    quads = -(-channels // 4)
    place = axis(tokens, 3) | axis(blocks, 0) << 16 | axis(copies, 1) << 24 | int(context) << 31
    sample = (sample_ids.to(device=device, dtype=torch.int64) & _MASK).view(1, 1, -1, 1, 1)
    shape = (blocks, copies, sample.numel(), tokens, quads)
    counter = (axis(quads, 4), place, sample, seed[1] & _MASK)
    key = (seed[0] & _MASK, (seed[0] >> 32) & _MASK)
    words = [word.expand(shape) for word in philox_4x32(counter, key)]
    normals = (*normal_pair(words[0], words[1], dtype), *normal_pair(words[2], words[3], dtype))
    noise = torch.stack(normals, dim=-1).view(blocks, copies * sample.numel(), tokens, 4 * quads)
    return noise[..., :channels]


def uniform(seed: Tensor, sample_ids: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniform numbers of each sample, as a pure function of (seed, epoch or step, sample, stream).

    Philox4x32-10 with key = seed, its high word xor ``(stream + 1) << 16`` so that no stream shares
    words with :func:`positional_noise`, and counter = (number // 4, 0, sample, epoch or step).

    Args:
        seed: int64 [2], the run's seed and the epoch or step.
        sample_ids: int64 [B].
        count: how many numbers for each sample.
        stream: which independent set of numbers.

    Returns:
        fp64 [B, count] in [0, 1), each a multiple of 2**-32.
    """
    quads = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(quads)
    sample = (sample_ids.to(seed.device) & _MASK)[:, None]
    key = (seed[0] & _MASK, ((seed[0] >> 32) & _MASK) ^ ((stream + 1) << 16))
    words = philox_4x32((quads, zero, sample, seed[1] & _MASK), key)
    return (torch.stack(words, dim=-1).flatten(1)[:, :count]).double() * 2.0**-32


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
    queries = queries.reshape(blocks, copies * batch, tokens, -1)
    if noise is not None:
        projected = noise if noise_weight is None else F.linear(noise, noise_weight)
        queries = queries + projected
    return queries.flatten(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Softmax attention of whole rows, heads side by side in the last axis.

    Args:
        q: [B, Nq, H * d].
        k: [B, N, H * d].
        v: [B, N, H * d].
        num_heads: H.
        scale: what the scores are multiplied by.

    Returns:
        [B, Nq, H * d].
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ weight.T + bias)`` with the exact (erf) GELU; x [..., C], weight [F, C], bias [F]."""
    return F.gelu(F.linear(x, weight, bias))


def target_smooth_l1(prediction: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """Mean smooth-L1 (beta 1) between predictions and layer-normed target features.

    The features are normalised over channels without parameters and with eps 1e-5, as I-JEPA does.

    Args:
        prediction: [M * E * B, Ky, D] in the order (mask, context, image).
        features: [B, T, D] output of the target encoder; it gets no gradient.
        index: int64 [M, B, Ky], which of the T rows each query predicts.

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
    return F.smooth_l1_loss(prediction, target.expand_as(prediction))
