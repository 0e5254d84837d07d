"""What is watched while a run trains, since a loss that falls says nothing about collapse."""

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stopfast.config import Config
from stopfast.data.images import Images, open_images, split_folder
from stopfast.data.loader import eval_batches
from stopfast.evaluation.online import feature_std, knn_accuracy, rankme, target_variance
from stopfast.objectives import Objective

_LEAST_VARIANCE = 0.01
"""Of target features over images and patches; their variance over channels is 1."""
_LEAST_STD = 0.002
"""Of the images' features, where 1 is the most."""


class Monitors:
    """Feature statistics of fixed training images, and a kNN accuracy where there are labels.

    A look changes nothing that the run computes. It warns once where the features have collapsed: target
    features that hardly differ between patches, or image features that hardly differ between images. RankMe
    gives no such bound: it begins near 1, since the features of an untrained encoder are mostly their mean.

    Args:
        config: the run's settings.
        images: its training images.
        console: where the warning goes.
        device: of the objective.

    Raises:
        ValueError: ``monitor.labelled`` without the folders that it needs.
    """

    def __init__(
        self, config: Config, images: Images, console: Console, device: torch.device
    ) -> None:
        self.config, self.console, self.device = config, console, device
        self.watched = images.subset(_spread(len(images), config.monitor.images))
        self.labelled = _labelled(config)
        self.warned = False

    def due(self, step: int, last_step: int) -> bool:
        """Whether to look after this step."""
        every = self.config.monitor.every
        return every > 0 and (step % every == 0 or step == last_step)

    def look(self, objective: Objective) -> dict[str, float]:
        """Return ``feature_std``, ``rankme``, ``target_variance`` and, with labels, ``knn`` (a share)."""
        tokens = self._tokens(objective, self.watched)
        pooled = tokens.mean(1)
        seen = {
            "feature_std": feature_std(pooled),
            "rankme": rankme(pooled),
            "target_variance": target_variance(
                torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
            ),
        }
        if self.labelled is not None:
            train, test = self.labelled
            seen["knn"] = knn_accuracy(
                self._tokens(objective, train).mean(1),
                torch.tensor(train.labels),
                self._tokens(objective, test).mean(1),
                torch.tensor(test.labels),
            )
        if seen["target_variance"] < _LEAST_VARIANCE or seen["feature_std"] < _LEAST_STD:
            self._warn(seen)
        return seen

    @torch.inference_mode()
    def _tokens(self, objective: Objective, images: Images) -> Tensor:
        """Patch features fp32 [images, N, D] on the CPU."""
        batches = eval_batches(
            images,
            self.config.data.transforms,
            batch_size=min(256, len(images)),
            device=self.device,
            data=self.config.data,
        )
        return torch.cat([objective.features(batch.images).float().cpu() for batch in batches])

    def _warn(self, seen: dict[str, float]) -> None:
        if self.warned:
            return
        self.warned = True
        self.console.print(
            f"warning: the features have collapsed: target variance {seen['target_variance']:.4f} (below "
            f"{_LEAST_VARIANCE} all patches look alike), feature std {seen['feature_std']:.4f} (below "
            f"{_LEAST_STD} all images look alike); lower the learning rate, or raise the momentum of the "
            "target encoder"
        )


def _labelled(config: Config) -> tuple[Images, Images] | None:
    """The two labelled sets, or None where nobody asked and there are none."""
    root = config.monitor.labelled or config.data.root
    if root is None:
        return None
    folders = split_folder(root, "train"), split_folder(root, "test", "val")
    if folders[0] != folders[1]:
        train, test = map(open_images, folders)
        if train.classes == test.classes and len(train.classes) > 1:
            few = config.monitor.labelled_images
            return train.subset(_spread(len(train), few)), test.subset(_spread(len(test), few))
    if config.monitor.labelled is not None:
        raise ValueError(
            f"expected train/ and test/ (or val/) of the same two classes or more in {root}"
        )
    return None


def _spread(count: int, wanted: int) -> np.ndarray:
    """Numbers of at most ``wanted`` samples, evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
