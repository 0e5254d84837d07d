"""What is random in fine-tuning: a function of the seed and of what it is drawn for, and of nothing else.

timm and torchvision draw from the global generators of Python, NumPy and torch. So these are seeded anew
for every image and every micro-batch; then neither workers nor a resume change a run.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What is drawn for."""

    WEIGHTS = 0
    SHARE = 1
    IMAGE = 2
    STEP = 3


def words(seed: int, stream: Stream, *path: int) -> np.ndarray:
    """Return uint32 [4], all that a generator is seeded with."""
    return np.random.SeedSequence([seed, stream, *path]).generate_state(4)


def seed_host(seed: int, stream: Stream, *path: int) -> None:
    """Seed Python's, NumPy's and torch's generators of the CPU.

    Those of the GPU are left out: workers have no business with them, and to seed what has not begun yet
    takes torch long.
    """
    state = words(seed, stream, *path)
    random.seed(state.tobytes())
    np.random.seed(state)
    torch.default_generator.manual_seed(_int64(state))


def seed_device(device: torch.device, seed: int, stream: Stream, *path: int) -> None:
    """Seed the generators of the CPU and, if that is where the run computes, of the GPU."""
    seed_host(seed, stream, *path)
    if device.type == "cuda":
        torch.cuda.manual_seed(_int64(words(seed, stream, *path)))


def _int64(state: np.ndarray) -> int:
    return int(state[0]) << 31 | int(state[1]) >> 1


@contextmanager
def borrowed_generators(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were, whatever is drawn inside."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
