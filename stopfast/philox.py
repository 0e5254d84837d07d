"""Philox4x32-10 in numpy, in few calls: the words of ``stopfast.kernels.noise``, for host code."""

import sys
from functools import lru_cache

import numpy as np

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.arange(10, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


@lru_cache(maxsize=4)
def _constants(key: tuple[int, int], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers [2 * n], and each round's key [10, 2 * n] where the upper half of a product is."""
    keys = (_KEY_STEPS + np.array(key, np.uint64)) << np.uint64(32)
    # Crosswise: the product of word 0 becomes word 2, which takes the key's second word.
    return np.repeat(_MULTIPLIERS, n), np.repeat(keys[:, ::-1], n, axis=1)


def philox_4x32(
    even: np.ndarray, odd: np.ndarray, key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the four words of Philox4x32-10 (Salmon et al., SC 2011) for each of n counters.

    What a round multiplies lies in one array, and every call runs over arrays of one axis, numpy's
    fastest: four calls a round.

    Args:
        even: uint64 [2 * n], words 0 of the counters and then words 2; it is overwritten.
        odd: uint32 [2, n or 1], words 1 and 3.
        key: two words of 32 bits.

    Returns:
        Words 0, 1, 2 and 3 of the results: uint32 [n] each.
    """
    n = len(even) // 2
    multipliers, keys = _constants(key, n)
    words = even.view(np.uint32)[_LOW::2]
    word0, word2 = words[:n], words[n:]
    word1, word3 = odd
    buffers = []
    for product in np.empty((2, 2 * n), np.uint64):  # in turn: the odd words lie in the other one
        low, high = (product.view(np.uint32)[half::2] for half in (_LOW, _HIGH))
        buffers.append((product, high[n:], high[:n], low[n:], low[:n]))
    for number, round_key in enumerate(keys):
        product, high2, high0, low2, low0 = buffers[number % 2]
        np.multiply(even, multipliers, out=product)
        np.bitwise_xor(product, round_key, out=product)
        np.bitwise_xor(high2, word1, out=word0)
        np.bitwise_xor(high0, word3, out=word2)
        word1, word3 = low2, low0
    return word0, word1, word2, word3


def words(
    seed: tuple[int, int], samples: range, quads: range, stream: int, attempt: int = 0
) -> np.ndarray:
    """Words ``4 * quads.start`` to ``4 * quads.stop`` of ``stopfast.kernels.noise.words``.

    Args:
        seed: the run's seed, less than 2**63, and the epoch or step.
        samples: whose words.
        quads: which words of each, in fours.
        stream: which independent set of words.
        attempt: which set of this stream.

    Returns:
        uint64 [samples, 4 * quads], each less than 2**32.
    """
    shape = len(samples), len(quads)
    even = np.empty((2, *shape), np.uint64)
    even[0] = np.arange(quads.start, quads.stop)
    even[1] = np.arange(samples.start, samples.stop)[:, None]
    odd = np.array([[attempt], [seed[1] & 0xFFFFFFFF]], np.uint32)
    key = (seed[0] & 0xFFFFFFFF, seed[0] >> 32 ^ (stream + 1) << 16)
    drawn = np.empty((*shape, 4), np.uint64)
    for number, word in enumerate(philox_4x32(even.reshape(-1), odd, key)):
        drawn[..., number] = word.reshape(shape)
    return drawn.reshape(len(samples), -1)
