"""Random numbers of degradations, which share no stream with masks and noise."""

import torch
from torch import Tensor

from stopfast.kernels.ops import uniform

_OF_AN_IMAGE, _OF_THE_STEP, _OF_THE_RUN = 240, 241, 242  # streams


def of_images(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    """Return uniform numbers of each image, fp64 [B, count] in [0, 1).

    Args:
        seed: int64 [2], the run's seed and the step.
        sample_ids: int64 [B], places in the step's global batch.
        count: how many of each image.
    """
    return uniform(seed, sample_ids, count, _OF_AN_IMAGE)


def of_step(seed: Tensor, count: int) -> Tensor:
    """Return uniform numbers that all images of a step share, fp64 [count] in [0, 1)."""
    return uniform(seed, seed.new_zeros(1), count, _OF_THE_STEP)[0]


def of_run(seed: int, count: int) -> list[float]:
    """Return uniform numbers of a whole run, in [0, 1)."""
    pair = torch.tensor([seed, 0], device="cpu")  # read here, wherever modules are made
    return uniform(pair, pair.new_zeros(1), count, _OF_THE_RUN)[0].tolist()
