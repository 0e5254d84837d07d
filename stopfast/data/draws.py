"""What is random about a sample: its place in the epoch, its crop, flip, grayscale and blur.

Each is a pure function of (seed, epoch, sample), so that neither workers nor shards nor a resume can
change what a sample looks like.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from stopfast.config import Transforms
from stopfast.kernels.ops import uniform

_ATTEMPTS = 10  # crops that are tried before the centre is taken, as torchvision does
_CROP, _FLIP, _GRAY, _BLUR = range(4)  # streams


class Draws(NamedTuple):
    """What happens to each photograph, in this order."""

    top_left: np.ndarray
    """int32 [B, 2], row and column of the crop, in stored pixels."""
    size: np.ndarray
    """int32 [B, 2], height and width of the crop, in stored pixels."""
    flip: np.ndarray
    """int32 [B], 1 for mirrored, else 0."""
    gray: np.ndarray
    """int32 [B], 1 for grayscale, else 0."""
    sigma: np.ndarray
    """fp32 [B], standard deviation of the blur, in pixels of the training image; 0 for none."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of an epoch's samples, a permutation of 0..count-1."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 0]))
    return generator.permutation(count)


def random_draws(
    seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray, transforms: Transforms
) -> Draws:
    """Draw as torchvision's RandomResizedCrop, RandomHorizontalFlip and RandomGrayscale distribute.

    Args:
        seed, epoch, samples: what the draws are a function of; samples int64 [B] number the data set.
        sizes: int [B, 2], height and width of each photograph.
        transforms: the ranges.
    """
    key = torch.tensor([seed, epoch])
    ids = torch.from_numpy(np.asarray(samples, dtype=np.int64))
    top_left, size = _crops(
        uniform(key, ids, 4 * _ATTEMPTS, _CROP).numpy().reshape(-1, _ATTEMPTS, 4), sizes, transforms
    )
    flipped = uniform(key, ids, 1, _FLIP).numpy()[:, 0] < transforms.flip
    gray = uniform(key, ids, 1, _GRAY).numpy()[:, 0] < transforms.gray
    decision, place = uniform(key, ids, 2, _BLUR).numpy().T
    low, high = transforms.blur_radius
    sigma = np.where(decision < transforms.blur, low + place * (high - low), 0.0)
    return Draws(
        top_left.astype(np.int32),
        size.astype(np.int32),
        flipped.astype(np.int32),
        gray.astype(np.int32),
        sigma.astype(np.float32),
    )


def center_draws(sizes: np.ndarray, transforms: Transforms) -> Draws:
    """Return the centred squares that evaluation looks at, and nothing else done to them."""
    side = np.maximum(1, np.rint(sizes.min(1, keepdims=True) * transforms.center)).repeat(2, axis=1)
    return Draws(
        ((sizes - side) // 2).astype(np.int32),
        side.astype(np.int32),
        np.zeros(len(sizes), dtype=np.int32),
        np.zeros(len(sizes), dtype=np.int32),
        np.zeros(len(sizes), dtype=np.float32),
    )


def _crops(
    drawn: np.ndarray, sizes: np.ndarray, transforms: Transforms
) -> tuple[np.ndarray, np.ndarray]:
    """Turn uniform numbers [B, attempts, 4] into corner and size [B, 2] of the first crop that fits."""
    height, width = (sizes[:, None, axis].astype(np.float64) for axis in (0, 1))
    low, high = transforms.crop_scale
    area = height * width * (low + drawn[..., 0] * (high - low))
    low, high = (math.log(ratio) for ratio in transforms.crop_ratio)
    ratio = np.exp(low + drawn[..., 1] * (high - low))
    crop = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))], axis=-1)
    fits = (crop[..., 0] <= height) & (crop[..., 1] <= width) & np.all(crop > 0, axis=-1)
    any_fits = np.any(fits, axis=1, keepdims=True)
    first, rows = fits.argmax(1), np.arange(len(sizes))
    size = np.where(any_fits, crop[rows, first], _largest_crop(sizes, transforms))
    room = sizes - size + 1
    place = np.where(any_fits, np.floor(drawn[rows, first, 2:] * room), (sizes - size) // 2)
    return place, size


def _largest_crop(sizes: np.ndarray, transforms: Transforms) -> np.ndarray:
    """Largest centred crop of an admitted ratio, for photographs that no drawn crop fits into."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    low, high = transforms.crop_ratio
    crop = [np.minimum(height, np.rint(width / low)), np.minimum(width, np.rint(height * high))]
    return np.maximum(1, np.stack(crop, axis=-1))
