"""Philox words, and the normals and uniforms made of them: the contract that kernels will meet."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stopfast.kernels.noise import normal_pair, philox_4x32, positional_noise, uniform

# Random123's known answers of philox4x32-10: counter, key, words.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str):
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert philox_4x32((c0, c1, c2, c3), (k0, k1)) == words(expected)


def numpy_noise(
    seed: int,
    step: int,
    sample: int,
    block: int,
    copy: int,
    token: int,
    channel: int,
    context: bool,
) -> float:
    """One normal by the contract, with numpy's unsigned integers and fp64."""
    counter = [channel // 4, token | block << 16 | copy << 24 | int(context) << 31, sample, step]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ counter[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    pair = counter[:2] if channel % 4 < 2 else counter[2:]
    radius = math.sqrt(-2 * math.log((pair[0] + 0.5) * 2.0**-32))
    angle = 2 * math.pi * float(np.uint32(pair[1]).astype(np.int32)) * 2.0**-32
    return radius * (math.cos(angle) if channel % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
def test_contract(seed: int, context: bool):
    """Every coordinate goes to its own bits, in fp64 and in fp32."""
    ids = torch.tensor([3, 2**32 - 1])
    at = dict(blocks=3, copies=2, tokens=4, channels=7)
    exact = positional_noise(
        torch.tensor([seed, 9]), ids, context=context, dtype=torch.float64, **at
    )
    single = positional_noise(torch.tensor([seed, 9]), ids, context=context, **at)
    assert exact.shape == (3, 4, 4, 7)
    for block, copy, image, token, channel in [
        (0, 0, 0, 0, 0),
        (2, 1, 1, 3, 6),
        (1, 0, 1, 2, 5),
        (2, 1, 0, 1, 3),
    ]:
        expected = numpy_noise(seed, 9, int(ids[image]), block, copy, token, channel, context)
        assert exact[block, copy * 2 + image, token, channel].item() == pytest.approx(
            expected, abs=1e-12
        )
    assert (single - exact).abs().max() < 4e-6  # ln and the angle in fp32 near their steep ends


def test_parts_are_the_whole():
    """Noise of a sample depends neither on its neighbours nor on how the batch is split."""
    seed, ids = torch.tensor([5, 2]), torch.arange(8)
    whole = positional_noise(seed, ids, 2, 1, 3, 8)
    parts = [positional_noise(seed, part, 2, 1, 3, 8) for part in (ids[:3], ids[3:])]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole[:1, :, :2, :5], positional_noise(seed, ids, 1, 1, 2, 5))


def test_statistics():
    """Moments and cross-correlations of all axes; a repeated stream shows as a correlation of 1."""
    noise = positional_noise(
        torch.tensor([1, 1]), torch.arange(16), 4, 2, 16, 64, dtype=torch.float64
    )
    flat = noise.flatten()
    count = flat.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        z = ((flat**power).mean() - mean) / (variance / count) ** 0.5
        assert abs(z) < 5, f"moment {power}"
    assert flat.unique().numel() == count
    other_step = positional_noise(
        torch.tensor([1, 2]), torch.arange(16), 4, 2, 16, 64, dtype=torch.float64
    )
    context = positional_noise(
        torch.tensor([1, 1]), torch.arange(16), 4, 2, 16, 64, context=True, dtype=torch.float64
    )
    axes = noise.unflatten(1, (2, 16))
    pairs = [(noise, other_step), (noise, context)]
    pairs += [(axes.select(dim, 0), axes.select(dim, 1)) for dim in range(5)]
    for first, second in pairs:
        z = (first * second).mean() * first.numel() ** 0.5
        assert abs(z) < 5


def test_normal_pair_ends():
    """The extreme words give finite normals; the largest radius is that of 2**-33."""
    ends = torch.tensor([0, 1, 2**31, 2**32 - 1])
    for first in normal_pair(ends, ends.flip(0)):
        assert first.isfinite().all()
    radius = torch.hypot(*normal_pair(torch.tensor([0]), torch.tensor([0]), torch.float64))
    assert radius.item() == pytest.approx(math.sqrt(66 * math.log(2)))


def test_uniform():
    """Flat, in [0, 1), a function of the sample alone, and with independent streams."""
    seed, ids = torch.tensor([7, 0]), torch.arange(4096)
    draws = uniform(seed, ids, 5)
    assert draws.shape == (4096, 5) and draws.min() >= 0 and draws.max() < 1
    histogram = torch.histc(draws, bins=16, min=0, max=1)
    expected = draws.numel() / 16
    assert ((histogram - expected) ** 2 / expected).sum() < 45  # chi square, 15 degrees: p > 1e-4
    assert torch.equal(draws[10:20], uniform(seed, ids[10:20], 5))
    other = uniform(seed, ids, 5, stream=1)
    assert abs(((draws - 0.5) * (other - 0.5)).mean() * 12 * draws.numel() ** 0.5) < 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": torch.tensor([1])},
        {"seed": torch.tensor([1.0, 2.0])},
        {"blocks": 257},
        {"copies": 129},
        {"tokens": 65537},
    ],
)
def test_bad_input(arguments: dict):
    good = dict(
        seed=torch.tensor([1, 1]),
        sample_ids=torch.arange(1),
        blocks=1,
        copies=1,
        tokens=1,
        channels=1,
    )
    with pytest.raises(ValueError, match="positional_noise: expected"):
        positional_noise(**{**good, **arguments})
