"""The words and normals of the functions that draw noise inside kernels, in kernels of the tests' own."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import interpreted, launch
from stopfast.kernels._philox import noise_tile, normal_pair, signed_turns_to_sine_cosine
from stopfast.kernels.noise import philox_4x32
from tests.noise_battery import error_limit, numpy_normals, numpy_words
from tests.test_noise import KNOWN

ENDS = [0, 1, 2, (1 << 16) - 1, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]


@triton.jit
def words_kernel(seed, counters, words, count, BLOCK: tl.constexpr):
    """Words [4, count] of counters [4, count]; words are int64 in memory."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    c0 = tl.load(counters + at, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(counters + count + at, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(counters + 2 * count + at, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(counters + 3 * count + at, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(words + at, w0.to(tl.int64), mask=inside)
    tl.store(words + count + at, w1.to(tl.int64), mask=inside)
    tl.store(words + 2 * count + at, w2.to(tl.int64), mask=inside)
    tl.store(words + 3 * count + at, w3.to(tl.int64), mask=inside)


@triton.jit
def normals_kernel(words, results, count, BLOCK: tl.constexpr):
    """Normals [2, count] of words [2, count], then the cosine and sine of the second."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    radius_word = tl.load(words + at, mask=inside, other=0).to(tl.uint32)
    angle_word = tl.load(words + count + at, mask=inside, other=0).to(tl.uint32)
    first, second = normal_pair(radius_word, angle_word)
    cosine, sine = signed_turns_to_sine_cosine(angle_word)
    tl.store(results + at, first, mask=inside)
    tl.store(results + count + at, second, mask=inside)
    tl.store(results + 2 * count + at, cosine, mask=inside)
    tl.store(results + 3 * count + at, sine, mask=inside)


@triton.jit
def tile_kernel(
    seed, samples, places, results, first_quad, ROWS: tl.constexpr, QUADS: tl.constexpr
):
    """Normals [ROWS, 4 * QUADS] from ``first_quad`` on."""
    row = tl.arange(0, ROWS)
    sample, place = tl.load(samples + row), tl.load(places + row)
    noise = noise_tile(tl.load(seed), tl.load(seed + 1), sample, place, first_quad, QUADS)
    at = row[:, None] * (4 * QUADS) + tl.arange(0, 4 * QUADS)[None, :]
    tl.store(results + at, noise)


def kernel_words(key: tuple[int, int], counters: Tensor) -> Tensor:
    seed = np.array(key[0] | key[1] << 32, dtype=np.uint64).astype(np.int64)
    words, count = torch.zeros_like(counters), counters.shape[1]
    launch(
        words_kernel, (triton.cdiv(count, 4096),), torch.tensor([int(seed)], device=counters.device),
        counters, words, count, writes=(words,), BLOCK=4096,
    )  # fmt: skip
    return words.cpu()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str, device: torch.device):
    """Random123's vectors, in a kernel and in the numpy that the other tests believe."""
    c, k, e = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    found = kernel_words((k[0], k[1]), torch.tensor(c, device=device)[:, None])
    assert found.flatten().tolist() == e
    assert [int(w) for w in numpy_words([np.array(x) for x in c], (k[0], k[1]))] == e


@pytest.mark.parametrize("key", [(0, 0), (1, 1 << 31), ((1 << 32) - 1, (1 << 31) - 1)])
def test_words(key: tuple[int, int], device: torch.device):
    """Bit for bit the same in a kernel, in torch and in numpy, at random counters and at all ends."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.cartesian_prod(*[torch.tensor(ENDS)] * 4).T
    drawn = torch.randint(0, 1 << 32, (4, 1 << 15), generator=generator)
    counters = torch.cat([ends, drawn], dim=1)
    c0, c1, c2, c3 = counters
    in_torch = torch.stack(
        philox_4x32((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    )
    in_numpy = np.stack(numpy_words(list(counters.numpy()), key)).astype(np.int64)
    assert torch.equal(in_torch, torch.from_numpy(in_numpy))
    assert torch.equal(in_torch, kernel_words(key, counters.to(device)))


def of_words(words: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normals, and cosine and sine of the second word, of the pairs of words [2, n]; fp64 [2, n] each."""
    count = words.shape[1]
    results = torch.zeros(4, count, device=device)
    block = 1 << 16 if interpreted(normals_kernel) else 1 << 10
    launch(
        normals_kernel, (triton.cdiv(count, block),), words.to(device), results, count,
        writes=(results,), BLOCK=block,
    )  # fmt: skip
    return results[:2].cpu().double(), results[2:].cpu().double()


def test_sine_and_cosine(device: torch.device):
    """On every 4099th word, and on 4000 about each sixteenth of a turn, quadrants' edges among them."""
    edges = [(turn << 28) + torch.arange(-2000, 2000) for turn in range(16)]
    words = torch.cat([*edges, torch.arange(0, 1 << 32, 4099)]) % (1 << 32)
    _, found = of_words(torch.stack([words, words]), device)
    angle = torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32) * (np.pi * 2.0**-31))
    exact = torch.stack([angle.cos(), angle.sin()])
    assert (found - exact).abs().max() <= 1.2e-7
    assert found.abs().max() <= 1 and (found.square().sum(0) - 1).abs().max() <= 2e-7


def test_normals(device: torch.device):
    """Within 1e-6 of fp64 wherever the radius is above 0.06, and by fp32's gap below 1 under it."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 1 << 32, (2, 1 << 20), generator=generator)
    words[0, :4000] = torch.cat([torch.arange(2000), (1 << 32) - 1 - torch.arange(2000)])
    found, _ = of_words(words, device)
    pair = [word.numpy().astype(np.uint64) for word in words]
    exact = torch.from_numpy(numpy_normals([*pair, *pair])[:, :2])
    assert ((found.T - exact).abs() <= error_limit(exact, least=1e-6)).all()
    assert exact.abs().max() > 6 and error_limit(exact, 1e-6).median() == 1e-6


@pytest.mark.parametrize("first_quad", [0, 5, (1 << 16) - 2, 1 << 16, (1 << 30) - 4])
def test_tile(first_quad: int, device: torch.device):
    """A tile's normals are those of its rows and quads, in their order, at any end of the counter."""
    step, seed = (1 << 32) - 2, (1 << 63) - 12
    samples = torch.tensor([*ENDS, *range(3, 10)])
    places = torch.tensor(
        [
            token | block << 16 | copy << 24 | flag << 31
            for token in (0, (1 << 16) - 1)
            for block in (0, 255)
            for copy in (0, 127)
            for flag in (0, 1)
        ]
    )
    results = torch.zeros(16, 32, device=device)
    given = (torch.tensor([seed, step]), samples, places)
    launch(
        tile_kernel, (1,), *(t.to(device) for t in given), results, first_quad, writes=(results,),
        ROWS=16, QUADS=8,
    )  # fmt: skip
    quads = first_quad + np.arange(8)[None, :]
    rows = [t.numpy()[:, None] for t in (places, samples)]
    words = numpy_words([quads, *rows, np.array(step)], (seed % (1 << 32), seed >> 32))
    exact = torch.from_numpy(numpy_normals(words).reshape(16, 32))
    assert ((results.cpu() - exact).abs() <= error_limit(exact, least=1e-6)).all()
