"""What is watched while a run trains, since a loss that falls says nothing about collapse."""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stopfast.config import Config, Transforms
from stopfast.data.batch import Batch
from stopfast.data.images import Images
from stopfast.data.loader import eval_batches
from stopfast.data.scan import usable_images
from stopfast.evaluation.online import feature_std, knn_accuracy, rankme, target_variance
from stopfast.evaluation.rows import labelled_splits
from stopfast.objectives import Objective
from stopfast.step import autocast

LEAST_VARIANCE = 0.01
"""Of target features over images and patches; their variance over channels is 1."""
_VARIANCE_IMAGES = 64
"""Images whose patches are compared: of a large model, all patches of more would take gigabytes."""
LEAST_STD = 0.002
"""Of the images' features, where 1 is the most."""
_LOOK = 2**31 - 1
"""Step of the draws that a look takes: none of the run's."""


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
        self.labelled = _labelled(config, console) if config.monitor.every else None
        self.warned = False

    def due(self, step: int, last_step: int) -> bool:
        """Whether to look after this step, or before the first (0)."""
        every = self.config.monitor.every
        return every > 0 and (step % every == 0 or step == last_step)

    def look(self, objective: Objective, *, warn: bool = True) -> dict[str, float]:
        """Return ``feature_std``, ``rankme``, ``target_variance``, with labels ``knn`` (a share), and what
        the objective measures itself.
        """
        pooled, tokens = self._features(objective, self.watched, _VARIANCE_IMAGES)
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
                self._features(objective, train)[0],
                torch.tensor(train.labels),
                self._features(objective, test)[0],
                torch.tensor(test.labels),
            )
        seen |= self._measures(objective)
        fallen = seen["target_variance"] < LEAST_VARIANCE or seen["feature_std"] < LEAST_STD
        if warn and fallen:
            self._warn(seen)
        return seen

    @torch.inference_mode()
    def _measures(self, objective: Objective) -> dict[str, float]:
        """What the objective tells of some watched images, always with the same draws."""
        images = self.watched.subset(_spread(len(self.watched), _VARIANCE_IMAGES))
        totals: dict[str, float] = {}
        done = 0
        with closing(self._batches(images, objective.transforms)) as batches:
            for batch in batches:
                part = slice(done, done + len(batch.images))
                with autocast(self.device, self.config.step.precision):
                    draws = objective.draws(_LOOK, len(images), part)
                    found = objective.measures(batch.images, draws)
                if not found:
                    break
                share = len(batch.images) / len(images)
                for name, value in found.items():
                    totals[name] = totals.get(name, 0.0) + share * value.item()
                done = part.stop
        return totals

    def _batches(self, images: Images, transforms: Transforms) -> Generator[Batch, None, None]:
        data = self.config.data
        return eval_batches(
            images,
            transforms,
            # What fits in training fits here.
            batch_size=min(len(images), 256, data.batch_size // self.config.step.accumulate),
            device=self.device,
            data=data,
        )

    @torch.inference_mode()
    def _features(
        self, objective: Objective, images: Images, kept: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Means over patches fp32 [images, D], and the first images' patches [kept, N, D], on the CPU."""
        pooled, tokens = [], []
        for batch in self._batches(images, self.config.data.transforms):
            with autocast(self.device, self.config.step.precision):
                features = objective.features(batch.images).float()
            pooled.append(features.mean(1).cpu())
            if kept > 0:
                tokens.append(features[:kept].cpu())
                kept -= len(tokens[-1])
        return torch.cat(pooled), torch.cat(tokens) if tokens else torch.empty(0)

    def _warn(self, seen: dict[str, float]) -> None:
        if self.warned:
            return
        self.warned = True
        self.console.print(
            f"warning: the features have collapsed: target variance {seen['target_variance']:.4f} (below "
            f"{LEAST_VARIANCE} all patches look alike), feature std {seen['feature_std']:.4f} (below "
            f"{LEAST_STD} all images look alike); lower the learning rate, or raise the momentum of the "
            "target encoder"
        )


def _labelled(config: Config, console: Console) -> tuple[Images, Images] | None:
    """The two labelled sets, or None where nobody asked and there are none."""
    root = config.monitor.labelled or config.data.root
    if root is None:
        return None
    splits = labelled_splits(root)
    if splits is None:
        if config.monitor.labelled is None:
            return None
        raise ValueError(
            f"expected train/ and val/ (or test/) of the same two classes or more in {root}"
        )
    few = config.monitor.labelled_images
    train, test = (images.subset(_spread(len(images), few)) for images in splits)
    # Broken ones are told here, not in the middle of the run.
    return usable_images(train, config.data, console=console), usable_images(
        test, config.data, console=console
    )


def _spread(count: int, wanted: int) -> np.ndarray:
    """Numbers of at most ``wanted`` samples, evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
