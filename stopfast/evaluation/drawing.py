"""What drawn scenes and clips share: draws, textures, and the way to an encoder's input."""

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Transforms

_WAVES = 3


def sampler(seed: int, index: int, stream: int) -> np.random.Generator:
    """Return a generator whose draws are a pure function of seed, index and stream."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, stream]))


def gratings(
    draws: np.random.Generator, rows: np.ndarray, columns: np.ndarray, side: int
) -> np.ndarray:
    """Return a texture in -1..1 at places in pixels: a mean of plane waves, 2 to 8 in ``side``."""
    total = np.zeros(np.shape(rows))
    for _ in range(_WAVES):
        angle, phase = draws.uniform(0, 2 * np.pi, 2)
        frequency = 2 * np.pi * draws.uniform(2, 8) / side
        total += np.sin(frequency * (np.sin(angle) * rows + np.cos(angle) * columns) + phase)
    return total / _WAVES


def to_input(pixels: np.ndarray, transforms: Transforms) -> Tensor:
    """Return pixels fp32 [B, H, W, 3] in 0..1 as an encoder's input, fp32 [B, 3, H, W], normalised."""
    mean, std = (np.array(v, dtype=np.float32) for v in (transforms.mean, transforms.std))
    return (
        torch.from_numpy((pixels.astype(np.float32) - mean) / std).permute(0, 3, 1, 2).contiguous()
    )
