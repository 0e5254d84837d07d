"""One set of masks, wherever it is drawn: the host's sampler, the definition, and the fused operation."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stopfast.kernels import noise, reference
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.multiblock_masks import multiblock_masks
from stopfast.kernels.ops import EAGER, FUSED, MaskSettings
from stopfast.masking import Masks, MultiBlockMasks
from stopfast.philox import philox_4x32, words
from tests.test_noise import KNOWN

SMALL = {"grid": (8, 8), "enc_mask_scale": (0.4, 0.5), "min_keep": 5, "edge_inclusive": True}
# Two targets leave too little unless they nearly coincide, and one always leaves enough.
CROWDED = {"grid": (8, 8), "pred_mask_scale": (0.4, 0.4), "aspect_ratio": (1, 1)}
CROWDED |= {"npred": 2, "min_keep": 23, "edge_inclusive": True}
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "published": ({}, False),
    "largest seed": ({"seed": 2**63 - 1, "nenc": 2}, False),
    "7 x 9": ({"grid": (7, 9), "enc_mask_scale": (0.5, 0.7), "nenc": 2, "min_keep": 12}, True),
    "redraws": ({**SMALL, "nenc": 2, "seed": 2**40 + 7}, True),
    "redraws after an odd number of targets": ({**SMALL, "nenc": 2, "npred": 3}, True),
    "overlap": ({**SMALL, "allow_overlap": True}, False),
    "targets dropped": (CROWDED, True),
    "32 x 32": ({"grid": (32, 32), "nenc": 2}, False),
}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str):
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    drawn = philox_4x32(np.array([c0, c2], np.uint64), np.array([[c1], [c3]], np.uint32), (k0, k1))
    assert [f"{word[0]:08x}" for word in drawn] == expected.split()


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 2**31 + 3])
def test_words_are_those_of_the_definition(seed: int, step: int):
    """Of any part of the samples and of their words."""
    ids = torch.arange(3, 10)
    expected = noise.words(torch.tensor([seed, step]), ids, 24, stream=255, attempt=81)
    for quads in (range(6), range(2, 5)):
        drawn = torch.from_numpy(words((seed, step), range(3, 10), quads, 255, 81).astype(np.int64))
        assert torch.equal(drawn, expected[:, 4 * quads.start : 4 * quads.stop])


def defined(sampler: MultiBlockMasks, ids: Tensor, iteration: int) -> Masks:
    """The masks of some images by the definition, cut to the shortest."""
    settings = MaskSettings(
        sampler.grid, sampler.nenc, sampler.npred, sampler.min_keep, sampler.allow_overlap,
        sampler.edge_inclusive,
    )  # fmt: skip
    seed = torch.tensor([sampler.seed, iteration])
    sizes = sampler.sizes(iteration)
    targets, contexts, counts = reference.multiblock_masks(seed, ids, *sizes, settings)
    return Masks(list(contexts[:, :, : int(counts.min())]), list(targets))


def assert_equal(first: Masks, second: Masks) -> None:
    for ours, theirs in zip(chain(*first[:2]), chain(*second[:2]), strict=True):
        assert ours.dtype == theirs.dtype == torch.int64
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.filterwarnings("ignore:no context of more")
@pytest.mark.parametrize("name", SETTINGS)
def test_host_definition_and_kernel_agree(name: str, device: torch.device, monkeypatch):
    """Exactly, whole batches and parts of them, with contexts drawn again where the settings are tight."""
    settings, redraws = SETTINGS[name]
    again = []
    redraw = MultiBlockMasks._redraw
    monkeypatch.setattr(MultiBlockMasks, "_redraw", lambda *a: again.append(1) or redraw(*a))
    host, fused = (MultiBlockMasks(**settings, ops=ops) for ops in (EAGER, FUSED))
    for iteration, start, stop in ((0, 0, 4), (3, 2, 4), (70001, 3, 4)):
        ids = torch.arange(start, stop)
        masks = host(4, iteration, start=start, stop=stop)
        assert_equal(masks, defined(host, ids, iteration))
        with watch_launches() as launches:
            assert_equal(masks, fused(4, iteration, start=start, stop=stop, device=device))
        assert [launch.name for launch in launches] == ["_multiblock_masks_kernel"]
    assert bool(again) == redraws


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["host", "fused"])
def test_global_parts_equal_the_batch(ops, device: torch.device):
    sampler = MultiBlockMasks(truncate_over="global", nenc=2, ops=ops)
    whole = sampler(9, 5, device=device)
    parts = [sampler(9, 5, start=start, stop=start + 3, device=device) for start in (0, 3, 6)]
    for kind in ("context", "target"):
        for number, mask in enumerate(getattr(whole, kind)):
            assert torch.equal(mask, torch.cat([getattr(part, kind)[number] for part in parts]))
    assert_equal(whole, MultiBlockMasks(truncate_over="global", nenc=2)(9, 5))


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["host", "fused"])
def test_overlapping_contexts_are_told_of(ops, device: torch.device):
    with pytest.warns(UserWarning, match="overlap") as caught:
        MultiBlockMasks(**CROWDED, ops=ops)(4, 0, device=device)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.filterwarnings("error")
def test_intended_overlaps_are_not(device: torch.device):
    for ops in (EAGER, FUSED):
        MultiBlockMasks(**CROWDED, allow_overlap=True, ops=ops)(4, 0, device=device)
        MultiBlockMasks(ops=ops)(4, 0, device=device)


def test_which_masks_are_drawn_on_the_device(device: torch.device):
    """Not those of EAGER, not the CPU's by default, and not those cut at random."""
    with watch_launches() as launches:
        MultiBlockMasks(ops=EAGER)(2, 0, device=device)
        MultiBlockMasks()(2, 0)
        cut = [MultiBlockMasks(truncate="random", ops=ops)(2, 0) for ops in (EAGER, FUSED)]
    assert not launches
    assert_equal(*cut)


@pytest.mark.parametrize(
    ("grid", "target"), [((4, 4), (5, 2)), ((4, 4), (2, 0)), ((91, 91), (2, 2))]
)
def test_bad_sizes(grid: tuple[int, int], target: tuple[int, int]):
    settings = MaskSettings(grid, 1, 1, 1, False, False)
    with pytest.raises(ValueError, match="inside the grid"):
        multiblock_masks(torch.zeros(2).long(), torch.arange(1), target, (3, 3), settings)
