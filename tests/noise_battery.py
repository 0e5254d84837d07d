"""A battery for noise that should be standard normals, each a pure function of what it belongs to.

A *draw* is anything with the signature of :func:`stopfast.kernels.noise.positional_noise`. The battery
draws with it, and gives every property a p-value: how likely something so far off is if the property
holds. Those below 1e-6 have failed; seeds are fixed, so a draw that passes once passes always.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from stopfast.kernels.ops import FUSED, Noise, Places

Draw = Callable[..., Tensor]
Report = dict[str, float]
LIMIT = 1e-6
AXES = ("stream", "block", "copy", "sample", "token", "channel")


class Stream(NamedTuple):
    """What one step's noise is drawn for."""

    seed: int
    step: int
    context: bool = False


STREAMS = (
    Stream(7, 3),
    Stream(7, 4),
    Stream(8, 3),
    Stream(6, 4),  # the sum of seed and step is the first stream's
    Stream(7 + (1 << 32), 3),
    Stream(7 + (1 << 31), 3),
    Stream(7, 3 + (1 << 31)),
    Stream(7, 3, context=True),
)
"""They differ from each other in one thing, and in the upper bits of it."""


class Sizes(NamedTuple):
    """Of one stream."""

    blocks: int
    copies: int
    samples: int
    tokens: int
    channels: int


LARGE = Sizes(4, 2, 16, 16, 64)  # 2**20 normals in all
SMALL = Sizes(2, 2, 16, 8, 32)  # 2**17
WIDE = Sizes(2, 2, 8, 8, 160)  # more channels than one tile of a kernel has

LAST_IDS = [0, 1 << 31, (1 << 32) - 1]
BOUNDARIES = {
    "tokens": Sizes(1, 1, 1, 1 << 16, 4),
    "blocks": Sizes(1 << 8, 1, 3, 1, 16),
    "copies": Sizes(1, 1 << 7, 3, 1, 16),
    "channels": Sizes(1, 1, 1, 1, 4 * (1 << 16) + 8),
}
"""The ends of the counter's fields."""
LAST = Stream((1 << 63) - 1, (1 << 32) - 1)


def sample_ids(count: int) -> list[int]:
    """The first places of a batch, and places that share their lower 16, 31 or 32 bits with them."""
    near, far = count - count // 2, count // 2
    twins = [(i // 3) | (1 << 16, 1 << 31, (1 << 32) - (1 << 8))[i % 3] for i in range(far)]
    return [*range(near), *twins]


# The definition once more, in numpy.


def numpy_words(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 of uint64 arrays that hold 32-bit words."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (high >> half) ^ c1 ^ np.uint64(k0), (low >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = high & mask, low & mask
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


def numpy_normals(words: Sequence[np.ndarray]) -> np.ndarray:
    """The four normals of each four words, fp64 [..., 4]."""
    found = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = np.sqrt(-2 * np.log((radius_word.astype(np.float64) + 0.5) * 2.0**-32))
        angle = angle_word.astype(np.uint32).view(np.int32).astype(np.float64) * (np.pi * 2.0**-31)
        found += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(found, axis=-1)


def numpy_noise(stream: Stream, ids: list[int], sizes: Sizes) -> Tensor:
    """What a draw should be, fp64."""
    shape = (sizes.blocks, sizes.copies, len(ids), sizes.tokens, sizes.channels // 4)
    block, copy, image, token, quad = np.indices(shape, sparse=True)
    place = token + (block << 16) + (copy << 24) + (int(stream.context) << 31)
    counter = (quad, place, np.array(ids, dtype=np.uint64)[image], np.array(stream.step))
    words = numpy_words(counter, (stream.seed % (1 << 32), stream.seed >> 32))
    normals = numpy_normals([np.broadcast_to(w, shape) for w in words])
    return torch.from_numpy(
        normals.reshape(shape[0], shape[1] * shape[2], sizes.tokens, sizes.channels)
    )


def error_limit(exact: Tensor, least: float) -> Tensor:
    """What fp32 may be off by: more near radius 0, since fp32 has no number between 1 - 2**-24 and 1."""
    radius = exact.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    return (2.0**-24 / radius.clamp(min=2.0**-12)).clamp(min=least)


def fused_draw(
    seed: Tensor,
    sample_ids: Tensor,
    blocks: int,
    copies: int,
    tokens: int,
    channels: int,
    context: bool = False,
) -> Tensor:
    """The noise that the fused predictor_tokens adds: everything else that it adds is zero."""
    device, batch = seed.device, len(sample_ids)
    kept, queried = (tokens, 1) if context else (1, tokens)
    places = Places(
        torch.zeros(copies * batch, kept, dtype=torch.int64, device=device),
        torch.zeros(blocks, batch, queried, dtype=torch.int64, device=device),
    )
    noise = Noise(seed, sample_ids, 1.0, None, on_queries=not context, on_context=context)
    x = torch.zeros(copies * batch, kept, 16, device=device)
    zeros = torch.zeros(channels, 16, device=device)
    out = FUSED.predictor_tokens(x, places, zeros, None, zeros[None, :, 0], None, noise)
    out = out.view(blocks, copies * batch, kept + queried, channels)
    return out[:, :, :kept] if context else out[:, :, kept:]


# The battery.


def battery(draw: Draw, sizes: Sizes, device: torch.device | str = "cpu") -> Report:
    """The p-value of every property of the noise of all streams, and of the counter's boundaries."""
    report = of_streams(draw, sizes, device)
    for name in BOUNDARIES:
        report |= boundary(draw, name, device)
    return report


def of_streams(draw: Draw, sizes: Sizes, device: torch.device | str) -> Report:
    """The properties of the noise of all streams."""
    ids = sample_ids(sizes.samples)
    drawn = [_drawn(draw, stream, ids, sizes, device) for stream in STREAMS]
    values = torch.cat([d.flatten() for d in drawn])
    queries = torch.stack([d for d, s in zip(drawn, STREAMS, strict=True) if not s.context])
    queries = queries.unflatten(2, (sizes.copies, sizes.samples))
    report = {**distribution(values), **_lags(queries), "repeats": repeats(values)}
    for number, axis in enumerate(AXES):
        report[f"across {axis}"] = across(queries.movedim(number, 0).flatten(1))
    report["across stream"] = across(torch.stack([d[0].flatten() for d in drawn]))
    kept = [
        _is_noise(d, stream, ids, _of(sizes, stream))
        for d, stream in zip(drawn, STREAMS, strict=True)
    ]
    report["contract"] = float(all(kept))
    return report


def boundary(draw: Draw, name: str, device: torch.device | str) -> Report:
    """The properties of the noise at the end of one of the counter's fields."""
    sizes = BOUNDARIES[name]
    ids = LAST_IDS[-sizes.samples :]
    noise = _drawn(draw, LAST, ids, sizes, device)
    return {
        f"last {name}: repeats": repeats(noise.flatten()),
        f"last {name}: contract": float(_is_noise(noise, LAST, ids, sizes)),
    }


def failures(report: Report) -> set[str]:
    """What has failed."""
    return {name for name, p in report.items() if not p >= LIMIT}


def _of(sizes: Sizes, stream: Stream) -> Sizes:
    """The context's noise is of no block."""
    return sizes._replace(blocks=1) if stream.context else sizes


def _drawn(
    draw: Draw, stream: Stream, ids: list[int], sizes: Sizes, device: torch.device | str
) -> Tensor:
    sizes = _of(sizes, stream)
    seed = torch.tensor([stream.seed, stream.step], device=device)
    noise = draw(
        seed, torch.tensor(ids, device=device), sizes.blocks, sizes.copies, sizes.tokens, sizes.channels,
        context=stream.context,
    )  # fmt: skip
    assert noise.shape == (sizes.blocks, sizes.copies * len(ids), sizes.tokens, sizes.channels)
    return noise.cpu()


def _is_noise(noise: Tensor, stream: Stream, ids: list[int], sizes: Sizes) -> bool:
    exact = numpy_noise(stream, ids, sizes)
    return bool(((noise.double() - exact).abs() <= error_limit(exact, least=2e-6)).all())


def distribution(values: Tensor) -> Report:
    """Moments, Kolmogorov-Smirnov, Anderson-Darling, 64 equal classes, and tails, of fp32 [n]."""
    x = values.double()
    count = len(x)
    # Hermite polynomials: of mean 0 and variance k! where x is normal, and uncorrelated.
    moments = {
        "mean": (x, 1),
        "variance": (x**2 - 1, 2),
        "skewness": (x**3 - 3 * x, 6),
        "kurtosis": (x**4 - 6 * x**2 + 3, 24),
    }
    report = {
        name: float(_two_sided(polynomial.mean() * (count / variance) ** 0.5))
        for name, (polynomial, variance) in moments.items()
    }
    ordered = np.sort(x.numpy())
    report["Kolmogorov-Smirnov"] = float(stats.kstest(ordered, "norm", method="asymp").pvalue)
    odd = 2 * np.arange(1, count + 1) - 1
    below, above = stats.norm.logcdf(ordered), stats.norm.logsf(ordered)[::-1]
    statistic = -count - np.mean(odd * (below + above))
    # Its limit is the sum of chi2(1) / (j (j + 1)); far out the first term has sqrt(3) times its own tail.
    report["Anderson-Darling"] = float(3**0.5 * stats.chi2.sf(2 * statistic, 1))
    edges = stats.norm.ppf(np.arange(1, 64) / 64)
    classes = np.diff(np.searchsorted(ordered, edges), prepend=0, append=count)
    report["histogram"] = float(stats.chisquare(classes).pvalue)
    tails = [
        stats.binomtest(int((side > edge).sum()), count, stats.norm.sf(edge)).pvalue
        for edge in (3, 4, 4.5)
        for side in (ordered, -ordered)
    ]
    report["tails"] = float(min(1.0, len(tails) * min(tails)))
    return report


def _lags(noise: Tensor) -> Report:
    """Correlation of neighbours along each axis, of the values and of their sizes."""
    report = {}
    for number, axis in enumerate(AXES):
        for lag in (1, 2, 4) if axis == "channel" else (1,):
            pairs = []
            for x in _centred(noise.double()):
                length = x.shape[number] - lag
                products = x.narrow(number, 0, length) * x.narrow(number, lag, length)
                pairs.append(_two_sided(products.mean() * products.numel() ** 0.5))
            report[f"lag {axis} {lag}"] = float(min(1.0, 2 * min(pairs)))
    return report


def across(slices: Tensor) -> float:
    """Correlation of every pair of [slices, n], of the values and of their sizes."""
    count, length = slices.shape
    pairs = count * (count - 1)  # of both kinds
    worst = 0.0
    for x in _centred(slices.double()):
        correlation = (x @ x.T / length**0.5).fill_diagonal_(0)
        worst = max(worst, float(correlation.abs().max()))
    return float(min(1.0, pairs * _two_sided(worst)))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values, and their sizes less their mean and over their deviation."""
    return x, (x.abs() - (2 / np.pi) ** 0.5) / (1 - 2 / np.pi) ** 0.5


def repeats(values: Tensor) -> float:
    """Whether fours of one counter occur twice, or pairs more often than fp32 makes them.

    A pair is made of 64 bits, of which fp32 keeps some 50, so that 2**19 pairs have less than 2**-10
    repetitions to be expected.
    """
    pairs = values.float().contiguous().view(torch.int64)
    fours = pairs[0::2] * 0x2545F4914F6CDD1D + pairs[1::2]
    twice = [len(x) - len(x.unique()) for x in (pairs, fours)]
    if twice[1]:
        return 0.0
    return float(stats.poisson.sf(twice[0] - 1, 2.0**-10))


def _two_sided(z: Tensor | float) -> float:
    return float(2 * stats.norm.sf(abs(float(z))))
