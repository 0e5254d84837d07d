"""Drawing the masks of a batch: Python loops over images, of torch and of numpy, and the library.

Calls in a row are how a worker draws masks ahead; a single call after other code, out of the caches, is how
they are drawn between two steps. Goals on one thread, 128 images, 14 x 14: 40 times the torch loop and 8
times the numpy loop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from benchmarks.engine.options import Cell, Options
from benchmarks.engine.refusals import Disagreement, NotHere
from benchmarks.engine.runner import Bench
from benchmarks.mask_loops import PUBLISHED, Masks, numpy_loop_masks, torch_loop_masks
from stopfast.masking import MultiBlockMasks

Sampler = Callable[[int], Masks]
ON_DEVICE = "stopfast, on the GPU"
ARMS = ("torch loop", "numpy loop", "stopfast", ON_DEVICE)


@dataclass(frozen=True, kw_only=True)
class MaskOptions(Options):
    """Masks of a batch."""

    images: tuple[int, ...] = (128,)
    calls: tuple[int, ...] = (20, 1)
    """Calls in a row of one sample."""
    threads: int | None = 1
    sweeps: int = 5
    check_steps: int = 8
    """Steps whose masks are checked before anything is timed."""


OPTIONS = MaskOptions


def plan(options: MaskOptions) -> Iterator[Cell]:
    """Every arm, in a row and alone."""
    grid = f"{PUBLISHED.height}x{PUBLISHED.width}"
    for images in options.images:
        for calls in options.calls:
            for arm in ARMS:
                yield Cell("masks", arm, {"grid": grid, "images": images, "calls": calls})


def sampler(arm: str, batch: int, device: torch.device) -> Sampler:
    """Return an arm as a function of the step, with the published configuration.

    Raises:
        NotHere: the GPU's arm without one.
    """
    if arm == "torch loop":
        torch.manual_seed(0)
        return lambda step: torch_loop_masks(batch, step)
    if arm == "numpy loop":
        rng = np.random.default_rng(0)
        return lambda step: numpy_loop_masks(batch, step, rng=rng)
    if arm == ON_DEVICE and device.type != "cuda":
        raise NotHere("no GPU")
    shared = PUBLISHED._asdict()
    library = MultiBlockMasks(grid=(shared.pop("height"), shared.pop("width")), **shared)
    place = device if arm == ON_DEVICE else torch.device("cpu")

    def draw(step: int) -> Masks:
        drawn = library(batch, step, device=place)
        return drawn.context, drawn.target

    return draw


def check(masks: Masks, batch: int, step: int) -> None:
    """Refuse masks that break a published rule.

    Raises:
        Disagreement: which one.
    """
    contexts, targets = ([mask.cpu() for mask in group] for group in masks)
    high, wide = PUBLISHED.block_sizes(step)[0]
    last_row = (PUBLISHED.height - 1) * PUBLISHED.width

    def require(holds: bool | torch.Tensor, rule: str) -> None:
        if not holds:
            raise Disagreement(f"step {step}: {rule}")

    require(len(contexts) == PUBLISHED.nenc and len(targets) == PUBLISHED.npred, "number of masks")
    for mask in (*contexts, *targets):
        require(mask.dtype == torch.int64 and mask.shape[0] == batch, "dtype or batch")
        require((mask.diff(dim=1) > 0).all(), "not ascending")
        require(mask.min() >= 0 and mask.max() < last_row, "reaches the last row")
        require((mask % PUBLISHED.width < PUBLISHED.width - 1).all(), "reaches the last column")
    require(len({mask.shape for mask in contexts}) == 1, "contexts of several lengths")
    for target in targets:
        offsets = torch.arange(high)[:, None] * PUBLISHED.width + torch.arange(wide)
        require(torch.equal(target, target[:, :1] + offsets.flatten()), "not the rectangle")
        for context in contexts:
            shared = (context[:, :, None] == target[:, None]).any()
            require(not shared, "a context meets its own target")
            require(context.shape[1] > PUBLISHED.min_keep, "too short a context")


def test_masks(cell: Cell, bench: Bench) -> None:
    """Milliseconds of one call."""
    batch, calls = int(cell.problem["images"]), int(cell.problem["calls"])
    draw = sampler(cell.arm, batch, bench.device)
    for step in range(bench.options.check_steps):  # type: ignore[attr-defined]
        check(draw(step), batch, step)
    steps = count()  # every arm walks through the same block sizes
    others = [sampler(arm, batch, bench.device) for arm in ARMS[:3] if arm != cell.arm]

    def between() -> None:
        for other in others:
            other(0)

    bench.time(
        lambda: draw(next(steps)),
        rounds=10 if calls > 1 else 40,
        warmup=5,
        iterations=calls,
        setup=between if calls == 1 else None,
    )
