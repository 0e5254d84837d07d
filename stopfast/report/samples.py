"""The few images that the pictures are drawn of."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Config, Transforms
from stopfast.data.images import open_images, split_folder
from stopfast.data.loader import eval_batches


def sample_images(data: Path, config: Config, count: int) -> Tensor:
    """Return images spread evenly over a folder (its test split, if it has one), as evaluation sees them.

    Returns:
        fp32 [count, 3, H, W], normalised; fewer where the folder has fewer.

    Raises:
        ValueError: no folder, or no readable image in it.
    """
    images = open_images(split_folder(data, "test", "val", "train"))
    few = images.subset(spread(len(images), count))
    batches = eval_batches(
        few,
        config.data.transforms,
        batch_size=len(few),
        device=torch.device("cpu"),
        data=config.data,
    )
    return torch.cat([batch.images for batch in batches])


def spread(length: int, count: int) -> np.ndarray:
    """Return the middles of ``count`` equal stretches of 0..length-1, each number once.

    Classes lie one after another, so the middles are of as many classes as there can be.
    """
    return np.unique(((np.arange(count) + 0.5) * length / count).astype(np.int64))


def to_pixels(images: Tensor, transforms: Transforms) -> Tensor:
    """Undo the normalisation: fp32 [B, 3, H, W] to [B, H, W, 3] in 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.mean, transforms.std))
    return (images.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
