"""The multi-block sampler: published sizes, rules and lengths, and what the switches change."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.mask_loops import numpy_loop_masks, torch_loop_masks
from stopfast.masking import MaskCollator, MultiBlockMasks

SIZES_14 = "6x6 7x5 7x5 5x6 6x5 7x5 6x5 6x5 6x5 7x5"
SIZES_16 = "7x6 8x6 7x6 5x7 7x6 8x6 7x6 7x6 7x6 8x6"


def covered(masks: list[Tensor], patches: int) -> Tensor:
    """bool [B, N]: what the masks cover together."""
    cover = torch.zeros(len(masks[0]), patches, dtype=torch.bool)
    for mask in masks:
        cover.scatter_(1, mask, True)
    return cover


@pytest.mark.spec(1)
@pytest.mark.parametrize(("side", "sizes"), [(14, SIZES_14), (16, SIZES_16)])
def test_sizes(side: int, sizes: str):
    sampler = MultiBlockMasks(grid=(side, side))
    drawn = [sampler.sizes(iteration) for iteration in range(10)]
    assert " ".join(f"{h}x{w}" for (h, w), _ in drawn) == sizes
    assert {context for _, context in drawn} == {(side - 1, side - 1)}


@pytest.mark.spec(2)
@pytest.mark.parametrize("edge_inclusive", [False, True])
def test_last_row_and_column(edge_inclusive: bool):
    sampler = MultiBlockMasks(edge_inclusive=edge_inclusive)
    count = torch.zeros(196)
    for iteration in range(1000):
        masks = sampler(2, iteration)
        for mask in masks.context + masks.target:
            count += torch.bincount(mask.flatten(), minlength=196)
    edge = torch.cat([count.view(14, 14)[-1], count.view(14, 14)[:, -1]])
    assert (edge > 0).all() if edge_inclusive else (edge == 0).all()
    assert (count.view(14, 14)[:-1, :-1] > 0).all()


@pytest.mark.spec(3)
@pytest.mark.parametrize(
    ("grid", "scale", "min_keep", "redraws"),
    [
        ((14, 14), (0.85, 1.0), 10, False),
        ((8, 8), (0.4, 0.5), 5, True),
        ((6, 10), (0.4, 0.5), 4, True),
    ],
)
def test_context_leaves_out_its_targets(grid, scale, min_keep, redraws, monkeypatch):
    """Small contexts are often drawn again, so the rule is seen to hold after a redraw too."""
    drawn_again = []
    redraw = MultiBlockMasks._redraw
    monkeypatch.setattr(MultiBlockMasks, "_redraw", lambda *a: drawn_again.append(1) or redraw(*a))
    sampler = MultiBlockMasks(grid, scale, min_keep=min_keep, nenc=2, edge_inclusive=True)
    patches = grid[0] * grid[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fallback, which alone may overlap, must not fire
        for iteration in range(40):
            masks = sampler(4, iteration)
            for context in masks.context:
                assert not (covered([context], patches) & covered(masks.target, patches)).any()
                assert context.shape[1] > min_keep
    assert bool(drawn_again) == redraws


@pytest.mark.spec(3)
def test_shortest_context_is_one_more_than_min_keep():
    """A context of exactly min_keep patches is not valid; one more is."""
    sampler = MultiBlockMasks((8, 8), (0.4, 0.5), min_keep=5, edge_inclusive=True)
    kept = {sampler(4, iteration).context[0].shape[1] for iteration in range(100)}
    assert min(kept) == 6


@pytest.mark.spec(3)
def test_fallback_drops_the_last_targets():
    """Where contexts find no room beside all targets, the last targets bind them no more."""
    sampler = MultiBlockMasks((8, 8), pred_mask_scale=(0.4, 0.4), aspect_ratio=(1, 1), min_keep=22)
    with pytest.warns(UserWarning, match="overlap"):
        masks = sampler(16, 0)
    context = covered(masks.context, 64)
    met = [(context & covered([target], 64)).any(1) for target in masks.target]
    assert masks.context[0].shape[1] > 22
    assert not met[0].any() and met[3].any()


def test_allow_overlap():
    masks = MultiBlockMasks(allow_overlap=True)(4, 0)
    assert masks.context[0].shape == (4, 169)
    assert (covered(masks.context, 196) & covered(masks.target, 196)).any()


@pytest.mark.spec(4)
def test_contexts_are_cut_to_the_shortest_of_the_batch():
    sampler = MultiBlockMasks()
    batch = sampler(16, 3)
    alone = [sampler(16, 3, start=i, stop=i + 1).context[0][0] for i in range(16)]
    kept = batch.context[0].shape[1]
    assert kept == min(len(indices) for indices in alone)
    for row, indices in zip(batch.context[0], alone, strict=True):
        assert torch.equal(row, indices[:kept]) and (row.diff() > 0).all()


@pytest.mark.spec(4)
def test_contexts_are_shorter_the_larger_the_batch():
    """Beside the published sampler's loop over images, which has the same block sizes at each iteration."""
    sampler, rng = MultiBlockMasks(), np.random.default_rng(0)
    means, expected = [], []
    for size in (1, 16, 64, 128):
        iterations = range(400 if size < 64 else 200)
        means.append(np.mean([sampler(size, i).context[0].shape[1] for i in iterations]))
        loops = (numpy_loop_masks(size, i, rng=rng)[0][0] for i in iterations)
        expected.append(np.mean([mask.shape[1] for mask in loops]))
    assert means == sorted(means, reverse=True) and means[0] - means[-1] > 25
    assert np.allclose(means, expected, atol=2.5)
    assert np.allclose(means[1:], expected[1:], atol=1.5)


@pytest.mark.spec(5)
def test_target_shapes():
    sampler = MultiBlockMasks(nenc=2, npred=3)
    for iteration in range(20):
        (height, width), _ = sampler.sizes(iteration)
        masks = sampler(5, iteration)
        assert [m.shape for m in masks.target] == [(5, height * width)] * 3
        assert len(masks.context) == 2
        assert all(m.dtype == torch.int64 for m in (*masks.target, *masks.context))


def test_loop_reproduces_the_golden_draw():
    """The per-image loop that benchmarks compare with is the published sampler, draw for draw."""
    torch.manual_seed(0)
    contexts, targets = torch_loop_masks(2, 0)
    corners = [[divmod(int(mask[image, 0]), 14) for mask in targets] for image in range(2)]
    assert corners == [[(4, 7), (5, 0), (3, 3), (3, 7)], [(5, 2), (4, 7), (6, 0), (0, 4)]]
    assert targets[0].shape == (2, 36) and contexts[0].shape == (2, 59)
    (context,) = contexts
    assert not (covered([context], 196) & covered(targets, 196)).any()


@pytest.mark.parametrize("truncate", ["first", "random"])
def test_global_truncation_makes_parts_equal_the_batch(truncate: str):
    sampler = MultiBlockMasks(truncate=truncate, truncate_over="global", nenc=2)  # pyright: ignore
    whole = sampler(12, 5)
    parts = [sampler(12, 5, start=start, stop=start + 4) for start in (0, 4, 8)]
    for kind in ("context", "target"):
        for number, mask in enumerate(getattr(whole, kind)):
            assert torch.equal(mask, torch.cat([getattr(part, kind)[number] for part in parts]))


def test_random_truncation_reaches_the_bottom():
    """Published truncation favours the top of the image; the random choice does not."""
    share = {}
    for truncate in ("first", "random"):
        sampler = MultiBlockMasks(truncate=truncate)  # pyright: ignore
        rows = torch.cat([sampler(64, i).context[0].flatten() // 14 for i in range(20)])
        share[truncate] = (rows >= 7).double().mean().item()
        assert (sampler(64, 0).context[0].diff(dim=1) > 0).all()
    assert share["first"] < 0.3 < 0.4 < share["random"]


def test_draws_are_a_function_of_seed_and_iteration():
    first, again, other = (MultiBlockMasks(seed=seed)(4, 1) for seed in (1, 1, 2))
    assert all(map(torch.equal, first.target + first.context, again.target + again.context))
    assert not torch.equal(first.target[0], other.target[0])
    assert not torch.equal(first.target[0], first.target[1])


def test_collator():
    collator = MaskCollator(input_size=(64, 64), patch_size=8, min_keep=4)
    assert collator.step() == 0
    images, contexts, targets = collator([torch.full((3, 64, 64), float(i)) for i in range(5)])
    assert images.shape == (5, 3, 64, 64)
    assert len(contexts) == 1 and len(targets) == 2
    assert targets[0].shape[1] == np.prod(collator.masks.sizes(1).target)
    assert collator.step() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enc_mask_scale": (0.5, 1.5)}, "enc_mask_scale"),
        ({"pred_mask_scale": (0.0, 0.2)}, "pred_mask_scale"),
        ({"aspect_ratio": (2.0, 1.0)}, "aspect_ratio"),
        ({"npred": 0}, "npred"),
        ({"truncate": "last"}, "truncate"),
        ({"grid": (4, 4)}, "min_keep=10"),
        ({"grid": (200, 200)}, "at most 8192 patches"),
        ({"seed": -1}, "seed"),
        ({"grid": (2, 2), "min_keep": 0}, "target blocks"),
    ],
)
def test_bad_settings(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MultiBlockMasks(**arguments)


def test_bad_part():
    with pytest.raises(ValueError, match="start < stop"):
        MultiBlockMasks()(4, 0, start=3, stop=5)
