"""The few images that the pictures are drawn of."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Config, Transforms
from stopfast.data.folder import ImageFolder, scan_folder, split_folder
from stopfast.data.loader import eval_batches


def sample_images(data: Path, config: Config, count: int) -> Tensor:
    """Return images spread evenly over a folder (its test split, if it has one), as evaluation sees them.

    Returns:
        fp32 [count, 3, H, W], normalised; fewer where the folder has fewer.

    Raises:
        ValueError: no folder, or no readable image in it.
    """
    folder = scan_folder(split_folder(data, "test", "val", "train"))
    # The middle of each of ``count`` equal stretches: classes lie one after another.
    chosen = np.unique(((np.arange(count) + 0.5) * len(folder) / count).astype(int))
    few = ImageFolder(
        tuple(folder.files[i] for i in chosen),
        tuple(folder.labels[i] for i in chosen),
        folder.classes,
    )
    batches = eval_batches(
        few,
        config.data.transforms,
        batch_size=len(few),
        device=torch.device("cpu"),
        threads=config.data.threads,
    )
    return torch.cat([batch.images for batch in batches])


def to_pixels(images: Tensor, transforms: Transforms) -> Tensor:
    """Undo the normalisation: fp32 [B, 3, H, W] to [B, H, W, 3] in 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.mean, transforms.std))
    return (images.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
