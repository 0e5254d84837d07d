"""The mean of what programs summed: one more program adds up their sums, in fp64 and in a fixed order.

A mean over thousands of rows is then the rows' own, rounded once: which of them share a program, and so
the tiles, hardly matter to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stopfast.kernels._launch import launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["programs", "count"])
def _mean_kernel(
    partial, mean, total, programs, count, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    sums = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < programs
        sums += tl.load(partial + at, mask=inside, other=0.0)
        if WEIGHTED:
            weights += tl.load(partial + programs + at, mask=inside, other=0.0)
    weight = tl.sum(weights, 0) if WEIGHTED else count.to(tl.float64)
    found = tl.sum(sums, 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(mean, found.to(tl.float32))
    if WEIGHTED:
        tl.store(total, weight.to(tl.float32))


def mean_of(partial: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Add up ``partial``, fp64 [n, programs]; return the mean and what the sum was divided by.

    Args:
        partial: the programs' sums in its first row; without ``count``, their weights' in the second.
        count: how many numbers were summed.

    Returns:
        Two fp32 scalars; the mean of nothing is 0, and the second is empty with ``count``.
    """
    mean = torch.empty((), dtype=torch.float32, device=partial.device)
    total = torch.empty(() if count is None else 0, dtype=torch.float32, device=partial.device)
    launch(
        _mean_kernel,
        (1,),
        partial,
        mean,
        total,
        partial.shape[1],
        0 if count is None else count,
        writes=(mean, total),
        WEIGHTED=count is None,
        BLOCK=_BLOCK,
    )
    return mean, total
