"""What benchmarks and tests measure beside time: memory, and the distance of two results."""

from collections.abc import Callable

import torch


def peak_bytes(arm: Callable[[], object], device: torch.device) -> int | None:
    """What the arm allocates at most beyond its inputs; not known on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(value: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """|value - expected| / |expected| in double precision; an absent gradient counts as zero."""
    if value is None or expected is None:
        present = value if expected is None else expected
        return 0.0 if present is None or not present.any() else float("inf")
    expected = expected.detach().double()
    difference = (value.detach().double() - expected).norm().item()
    size = expected.norm().item()
    return (difference / size if size else float("inf")) if difference else 0.0
