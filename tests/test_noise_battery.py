"""The noise passes its battery, in torch and in the kernel; each of many planted mistakes fails it."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from stopfast.kernels._launch import interpreted
from stopfast.kernels._token_kernels import Tiles, tokens_kernel
from stopfast.kernels.noise import positional_noise
from tests.noise_battery import (
    LARGE,
    SMALL,
    WIDE,
    battery,
    boundary,
    failures,
    fused_draw,
    of_streams,
)

Mistake = Callable[..., Tensor]
"""Draws ``noise(blocks, copies, tokens, channels, ...)`` of a seed and sample ids, with a mistake."""


def test_torch():
    """2**20 normals of eight streams, and the ends of the counter's fields."""
    report = battery(positional_noise, LARGE)
    assert not failures(report), report


def test_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """300,000 normals that the fused operation adds, and the ends that one of its calls can reach."""
    report = of_streams(fused_draw, WIDE, device)
    for name in ("blocks", "copies"):
        report |= boundary(fused_draw, name, device)
    if interpreted(tokens_kernel):  # which takes as long for a program of few rows as of many
        large = Tiles(8192, 32, 128, 4)
        monkeypatch.setattr("stopfast.kernels.predictor_tokens.token_tiles", lambda dtype: large)
    report |= boundary(fused_draw, "tokens", device)
    assert not failures(report), report


def test_battery_is_deterministic():
    assert battery(positional_noise, SMALL) == battery(positional_noise, SMALL)


# Mistakes in the arguments.


def ignored_block(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, 1, copies, tokens, channels, context)
    return noise.expand(blocks, -1, -1, -1)


def ignored_copy(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, blocks, 1, tokens, channels, context)
    return noise.repeat(1, copies, 1, 1)


def ignored_sample(seed, ids, *sizes):
    return positional_noise(seed, torch.zeros_like(ids), *sizes)


def ignored_token(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, blocks, copies, 1, channels, context)
    return noise.expand(-1, -1, tokens, -1)


def ignored_quad(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, blocks, copies, tokens, 4, context)
    return noise.repeat(1, 1, 1, channels // 4)


def ignored_step(seed, ids, *sizes):
    return positional_noise(seed * torch.tensor([1, 0]), ids, *sizes)


def ignored_seed(seed, ids, *sizes):
    return positional_noise(seed * torch.tensor([0, 1]), ids, *sizes)


def ignored_upper_seed(seed, ids, *sizes):
    return positional_noise(seed & 0xFFFFFFFF, ids, *sizes)


def ignored_flag(seed, ids, blocks, copies, tokens, channels, _context):
    return positional_noise(seed, ids, blocks, copies, tokens, channels)


def step_added_to_the_seed(seed, ids, *sizes):
    return positional_noise(torch.stack([seed.sum(), seed[1] * 0]), ids, *sizes)


def seed_in_31_bits(seed, ids, *sizes):
    return positional_noise(seed & 0x7FFFFFFF | seed & -(1 << 32), ids, *sizes)


def sample_in_31_bits(seed, ids, *sizes):
    return positional_noise(seed, ids & 0x7FFFFFFF, *sizes)


def sample_in_16_bits(seed, ids, *sizes):
    return positional_noise(seed, ids & 0xFFFF, *sizes)


def shared_between_ranks(seed, ids, *sizes):
    """Each of two ranks counts its own images from zero."""
    return positional_noise(seed, torch.arange(len(ids)) % max(1, len(ids) // 2), *sizes)


def fields_overlap(seed, ids, blocks, copies, tokens, channels, context):
    """``token + block`` where they belong to bits of their own."""
    wide = positional_noise(seed, ids, 1, copies, tokens + blocks - 1, channels, context)[0]
    return torch.stack([wide[:, block : block + tokens] for block in range(blocks)])


def token_in_15_bits(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, blocks, copies, min(tokens, 1 << 15), channels, context)
    return noise.repeat(1, 1, -(-tokens // (1 << 15)), 1)


def block_in_7_bits(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, min(blocks, 1 << 7), copies, tokens, channels, context)
    return noise.repeat(-(-blocks // (1 << 7)), 1, 1, 1)


def copy_in_6_bits(seed, ids, blocks, copies, tokens, channels, context):
    noise = positional_noise(seed, ids, blocks, min(copies, 1 << 6), tokens, channels, context)
    return noise.repeat(1, -(-copies // (1 << 6)), 1, 1)


def quad_in_16_bits(seed, ids, blocks, copies, tokens, channels, context):
    held = min(channels, 1 << 18)
    noise = positional_noise(seed, ids, blocks, copies, tokens, held, context)
    return noise.repeat(1, 1, 1, -(-channels // held))[..., :channels]


def quad_of_two_channels(seed, ids, blocks, copies, tokens, channels, context):
    """``channel // 2`` as the counter: the first pair of each counter, and no second one."""
    noise = positional_noise(seed, ids, blocks, copies, tokens, 2 * channels, context)
    return noise.unflatten(-1, (-1, 4))[..., :2].flatten(-2)


# Mistakes in the normals.


def after(change: Callable[[Tensor], Tensor]) -> Mistake:
    """The four normals of each counter, [..., 4], changed."""
    return lambda *call: change(positional_noise(*call).unflatten(-1, (-1, 4))).flatten(-2)


SINES = torch.tensor([False, True, False, True])


def one_radius(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, 2)).unbind(-2)
    radii = [pair.norm(dim=-1, keepdim=True) for pair in (first, second)]
    return torch.cat([first, second * radii[0] / radii[1]], dim=-1)


MISTAKES: dict[str, tuple[Mistake, str]] = {
    "block ignored": (ignored_block, "across block"),
    "copy ignored": (ignored_copy, "across copy"),
    "sample ignored": (ignored_sample, "across sample"),
    "token ignored": (ignored_token, "across token"),
    "quad ignored": (ignored_quad, "lag channel 4"),
    "step ignored": (ignored_step, "lag stream 1"),
    "seed ignored": (ignored_seed, "across stream"),
    "upper word of the seed ignored": (ignored_upper_seed, "across stream"),
    "flag of the context ignored": (ignored_flag, "across stream"),
    "step added to the seed": (step_added_to_the_seed, "across stream"),
    "seed in 31 bits": (seed_in_31_bits, "across stream"),
    "sample in 31 bits": (sample_in_31_bits, "across sample"),
    "sample in 16 bits": (sample_in_16_bits, "across sample"),
    "sample shared between ranks": (shared_between_ranks, "across sample"),
    "fields overlap": (fields_overlap, "repeats"),
    "token in 15 bits": (token_in_15_bits, "last tokens: repeats"),
    "block in 7 bits": (block_in_7_bits, "last blocks: repeats"),
    "copy in 6 bits": (copy_in_6_bits, "last copies: repeats"),
    "quad in 16 bits": (quad_in_16_bits, "last channels: repeats"),
    "quad of two channels": (quad_of_two_channels, "contract"),
    "deviation for variance": (after(lambda x: x * 0.5**0.5), "variance"),
    "deviation 2 % too large": (after(lambda x: x * 1.02), "variance"),
    "shifted": (after(lambda x: x + 0.02), "mean"),
    "skewed": (after(lambda x: x + 0.02 * x**2), "skewness"),
    "long tails": (after(lambda x: x + 0.01 * x**3), "kurtosis"),
    "cut at 3": (after(lambda x: x.clamp(-3, 3)), "tails"),
    "uniform": (after(lambda x: (torch.special.ndtr(x) - 0.5) * 12**0.5), "Anderson-Darling"),
    "of two values": (after(lambda x: x.sign()), "Kolmogorov-Smirnov"),
    "bf16": (after(lambda x: x.bfloat16().float()), "repeats"),
    "sine without sign": (after(lambda x: torch.where(SINES, x.abs(), x)), "mean"),
    "one pair twice": (after(lambda x: x[..., [0, 1, 0, 1]]), "lag channel 2"),
    "one normal twice": (after(lambda x: x[..., [0, 1, 0, 3]]), "lag channel 2"),
    "one radius for both pairs": (after(one_radius), "lag channel 2"),
    "sign of the sine": (after(lambda x: torch.where(SINES, -x, x)), "contract"),
    "order of the four": (after(lambda x: x[..., [0, 2, 1, 3]]), "contract"),
}
EXACT_ONLY = {"quad of two channels", "sign of the sine", "order of the four"}
"""Normals as good as the right ones: only the contract tells them apart."""


@cache
def reported(name: str) -> set[str]:
    """What fails of a mistake's noise."""
    mistake, _ = MISTAKES[name]

    def draw(seed, ids, blocks, copies, tokens, channels, context):
        return mistake(seed, ids, blocks, copies, tokens, channels, context)

    return failures(battery(draw, SMALL))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_fail(name: str):
    found = reported(name)
    assert MISTAKES[name][1] in found
    assert any("contract" in failure for failure in found)
    assert all("contract" in failure for failure in found) == (name in EXACT_ONLY)


def test_every_check_can_fail():
    assert set().union(*map(reported, MISTAKES)) == set(battery(positional_noise, SMALL))
