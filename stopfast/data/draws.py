"""What is random about a sample: its place in the epoch, its crop, its flip.

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
_CROP, _FLIP = 0, 1  # streams


class Boxes(NamedTuple):
    """What is cut from each photograph, in pixels, and whether it is mirrored."""

    top_left: np.ndarray
    """int32 [B, 2], row and column."""
    size: np.ndarray
    """int32 [B, 2], height and width."""
    flip: np.ndarray
    """int32 [B], 0 or 1."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of an epoch's samples, a permutation of 0..count-1."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 0]))
    return generator.permutation(count)


def random_boxes(
    seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray, transforms: Transforms
) -> Boxes:
    """Draw crops and flips as torchvision's RandomResizedCrop and RandomHorizontalFlip distribute them.

    Args:
        seed, epoch, samples: what the draws are a function of; samples int64 [B] number the data set.
        sizes: int [B, 2], height and width of each photograph.
        transforms: the ranges.
    """
    key = torch.tensor([seed, epoch])
    ids = torch.from_numpy(np.asarray(samples, dtype=np.int64))
    drawn = uniform(key, ids, 4 * _ATTEMPTS, _CROP).numpy().reshape(-1, _ATTEMPTS, 4)
    height, width = (sizes[:, None, axis].astype(np.float64) for axis in (0, 1))
    low, high = transforms.crop_scale
    area = height * width * (low + drawn[..., 0] * (high - low))
    low, high = (math.log(ratio) for ratio in transforms.crop_ratio)
    ratio = np.exp(low + drawn[..., 1] * (high - low))
    crop = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))], axis=-1)
    fits = (crop[..., 0] <= height) & (crop[..., 1] <= width) & np.all(crop > 0, axis=-1)
    first = fits.argmax(1)
    rows = np.arange(len(ids))
    size = np.where(
        np.any(fits, axis=1, keepdims=True), crop[rows, first], _largest_crop(sizes, transforms)
    )
    room = sizes - size + 1
    place = np.where(
        np.any(fits, axis=1, keepdims=True),
        np.floor(drawn[rows, first, 2:] * room),
        (sizes - size) // 2,
    )
    mirrored = uniform(key, ids, 1, _FLIP).numpy()[:, 0] < transforms.flip
    return Boxes(place.astype(np.int32), size.astype(np.int32), mirrored.astype(np.int32))


def center_boxes(sizes: np.ndarray, transforms: Transforms) -> Boxes:
    """Return the centred squares that evaluation looks at."""
    side = np.maximum(1, np.rint(sizes.min(1, keepdims=True) * transforms.center)).repeat(2, axis=1)
    return Boxes(
        ((sizes - side) // 2).astype(np.int32),
        side.astype(np.int32),
        np.zeros(len(sizes), dtype=np.int32),
    )


def _largest_crop(sizes: np.ndarray, transforms: Transforms) -> np.ndarray:
    """Largest centred crop of an admitted ratio, for photographs that no drawn crop fits into."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    low, high = transforms.crop_ratio
    return np.stack(
        [np.minimum(height, np.rint(width / low)), np.minimum(width, np.rint(height * high))],
        axis=-1,
    )
