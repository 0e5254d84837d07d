"""Time drawing the masks of a batch: `python -m benchmarks.masks`.

Goals on one thread, batch 128, 14 x 14: 40 times the torch loop, 8 times the numpy loop. Each sample
is the mean of some calls in a row, as a worker that draws masks ahead makes them; `--calls 1` gives
the time of a call that finds its code and tables out of the caches, as one between two training steps.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import tyro

from benchmarks.harness import Timing, compare, print_table, write_results
from benchmarks.mask_loops import PUBLISHED, Masks, numpy_loop_masks, torch_loop_masks
from stopfast.masking import MultiBlockMasks

GOALS = {"torch loop": 40.0, "numpy loop": 8.0}
OURS = "stopfast"


@dataclass(frozen=True)
class Args:
    """Masks of a batch: a Python loop of torch, of numpy, and the library."""

    batch: int = 128
    rounds: int = 30
    calls: int = 20
    """Calls in a row of one sample."""
    warmup: int = 5
    threads: int = 1
    check_steps: int = 8
    """Steps whose masks are checked in every arm before anything is timed."""
    save: bool = False
    """Write the samples and their provenance under benchmarks/results."""


def samplers(batch: int) -> dict[str, Callable[[int], Masks]]:
    """Every arm as a function of the step, with the published configuration."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shared = PUBLISHED._asdict()
    grid = (shared.pop("height"), shared.pop("width"))
    library = MultiBlockMasks(grid=grid, **shared)

    def ours(step: int) -> Masks:
        drawn = library(batch, step)
        return drawn.context, drawn.target

    return {
        "torch loop": lambda step: torch_loop_masks(batch, step),
        "numpy loop": lambda step: numpy_loop_masks(batch, step, rng=rng),
        OURS: ours,
    }


def check(name: str, masks: Masks, batch: int, step: int) -> None:
    """Refuse masks that break a published rule."""
    contexts, targets = masks
    high, wide = PUBLISHED.block_sizes(step)[0]
    last_row = (PUBLISHED.height - 1) * PUBLISHED.width
    assert len(contexts) == PUBLISHED.nenc and len(targets) == PUBLISHED.npred, name
    for mask in (*contexts, *targets):
        assert mask.dtype == torch.int64 and mask.shape[0] == batch, (name, mask.shape)
        assert (mask.diff(dim=1) > 0).all(), f"{name}: not ascending"
        assert mask.min() >= 0 and mask.max() < last_row, f"{name}: reaches the last row"
        assert (mask % PUBLISHED.width < PUBLISHED.width - 1).all(), f"{name}: the last column"
    assert len({mask.shape for mask in contexts}) == 1, name
    for target in targets:
        offsets = torch.arange(high)[:, None] * PUBLISHED.width + torch.arange(wide)
        assert torch.equal(target, target[:, :1] + offsets.flatten()), f"{name}: not the rectangle"
        for context in contexts:
            shared = (context[:, :, None] == target[:, None]).any()
            assert not shared, f"{name}: a context meets its own target"
            assert context.shape[1] > PUBLISHED.min_keep, name


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    arms = samplers(args.batch)
    for name, sample in arms.items():
        for step in range(args.check_steps):
            check(name, sample(step), args.batch, step)

    def timed(sample: Callable[[int], Masks]) -> Callable[[], object]:
        steps = itertools.count()  # every arm walks through the same block sizes

        def run() -> None:
            for _ in range(args.calls):
                sample(next(steps))

        return run

    runs = compare({n: timed(s) for n, s in arms.items()}, args.rounds, args.warmup)
    timings = {n: Timing([ms / args.calls for ms in run.samples]) for n, run in runs.items()}
    title = (
        f"masks of {args.batch} images, {PUBLISHED.height}x{PUBLISHED.width}, {args.calls} calls"
    )
    print_table(f"{title}, {args.threads} thread(s)", timings, list(GOALS))
    ratios = {name: timings[name].median / timings[OURS].median for name in GOALS}
    for name, ratio in ratios.items():
        print(f"{OURS} is {ratio:.1f} times as fast as the {name} (goal: {GOALS[name]:.0f})")
    if args.save:
        figures = {name: timing.as_dict() for name, timing in timings.items()}
        payload = {"args": asdict(args), "timings": figures, "ratios": ratios, "goals": GOALS}
        print(write_results(f"masks-{args.calls}-calls", payload))


if __name__ == "__main__":
    main(tyro.cli(Args))
