"""Random numbers as pure functions of what they belong to: Philox words, normals, uniforms, in torch."""

import math

import torch
from torch import Tensor

from stopfast.kernels.arguments import check_draws

_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


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
        high0, high1 = product0 >> 32, product1 >> 32
        c0, c1, c2, c3 = (
            (high1 & _MASK) ^ (c1 ^ k0),
            product1 & _MASK,
            (high0 & _MASK) ^ (c3 ^ k1),
            product0 & _MASK,
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
    check_draws(seed, blocks, copies, tokens)
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


def words(
    seed: Tensor, sample_ids: Tensor, count: int, stream: int = 0, attempt: int = 0
) -> Tensor:
    """Random words of each sample, as a pure function of (seed, epoch or step, sample, stream, attempt).

    Philox4x32-10 with key = seed, its high word xor ``(stream + 1) << 16`` so that no stream shares
    words with :func:`positional_noise`, and counter = (number // 4, attempt, sample, epoch or step).

    Args:
        seed: int64 [2], the run's seed and the epoch or step.
        sample_ids: int64 [B].
        count: how many words for each sample.
        stream: which independent set of words.
        attempt: which set of this stream.

    Returns:
        int64 [B, count] in [0, 2**32).
    """
    quads = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    again = torch.full_like(quads, attempt)
    sample = (sample_ids.to(seed.device) & _MASK)[:, None]
    key = (seed[0] & _MASK, ((seed[0] >> 32) & _MASK) ^ ((stream + 1) << 16))
    drawn = philox_4x32((quads, again, sample, seed[1] & _MASK), key)
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


def uniform(seed: Tensor, sample_ids: Tensor, count: int, stream: int = 0) -> Tensor:
    """:func:`words` as uniform numbers: fp64 [B, count] in [0, 1), each a multiple of 2**-32."""
    return words(seed, sample_ids, count, stream).double() * 2.0**-32
