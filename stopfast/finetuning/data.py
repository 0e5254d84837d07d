"""Labelled images for fine-tuning: decoded, augmented by timm, in batches."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stopfast.config import Transforms
from stopfast.data.batch import unreadable
from stopfast.data.images import Images
from stopfast.data.loader import TrainPlan
from stopfast.data.pixels import open_stored, to_rgb
from stopfast.evaluation.probes import stratified
from stopfast.finetuning.chance import Stream, seed_host, words
from stopfast.finetuning.settings import Recipe

Labelled = tuple[Tensor, Tensor]
"""Images fp32 [B, 3, H, W] and labels int64 [B]."""
Key = tuple[int, int]
"""Epoch and sample: what an augmented image is a function of."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and labels by (epoch, sample); any process may ask for any of them.

    Args:
        images: what is decoded.
        transform: from a picture to fp32 [3, H, W]; it may draw from the global generators.
        seed: of what is drawn.
    """

    def __init__(
        self, images: Images, transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, index: Key) -> tuple[Tensor, int]:
        epoch, sample = index
        seed_host(self.seed, Stream.IMAGE, epoch, sample)
        try:
            picture = to_rgb(open_stored(self.images.read(sample)))
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError as error:
            reason = str(error)
        else:
            return self.transform(picture), self.images.labels[sample]
        raise unreadable(self.images, {self.images.names[sample]: reason})


class TrainKeys:
    """The micro-batches of steps ``first..last``, as keys; may be walked through more than once."""

    def __init__(self, plan: TrainPlan, first: int, last: int, accumulate: int) -> None:
        self.plan, self.first, self.last, self.accumulate = plan, first, last, accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        batches = self.plan.batches(self.first, self.last)
        for step, samples in enumerate(batches, start=self.first):
            epoch = (step - 1) // self.plan.steps_per_epoch
            for part in np.split(samples, self.accumulate):
                yield [(epoch, int(sample)) for sample in part]


def train_transform(transforms: Transforms, recipe: Recipe) -> Callable[[Image.Image], Tensor]:
    """Return timm's augmentation: crop, flip, RandAugment or colour jitter, erasing by noise."""
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(
        input_size=(3, *transforms.size),
        is_training=True,
        scale=recipe.crop_scale,
        hflip=recipe.flip,
        color_jitter=recipe.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=recipe.rand_augment or None,
        interpolation="bicubic",
        re_prob=recipe.erase,
        re_mode="pixel",
        mean=transforms.mean,
        std=transforms.std,
    )
    _allow_no_bits(transform.transforms)
    return transform


def _allow_no_bits(transforms: Iterable[Any]) -> None:
    """Let RandAugment, where there is one, posterize to less than a bit."""
    from timm.data.auto_augment import RandAugment, posterize

    for augment in transforms:
        for op in augment.ops if isinstance(augment, RandAugment) else ():
            if op.aug_fn is posterize:
                op.aug_fn = partial(_posterize, posterize)


def _posterize(
    several_bits: Callable[..., Image.Image], image: Image.Image, bits: int, **rest: object
) -> Image.Image:
    # At its highest level, which a deviation of levels reaches, timm asks for 0 bits. For the published
    # programs Pillow made that a black image; from version 13 it refuses.
    if bits < 1:
        return Image.new(image.mode, image.size)
    return several_bits(image, bits, **rest)


def eval_transform(transforms: Transforms, recipe: Recipe) -> Callable[[Image.Image], Tensor]:
    """Return timm's resize (bicubic) and centred crop."""
    from timm.data.transforms_factory import create_transform

    return create_transform(  # type: ignore[return-value]
        input_size=(3, *transforms.size),
        interpolation="bicubic",
        crop_pct=recipe.center,
        mean=transforms.mean,
        std=transforms.std,
    )


def share_of(images: Images, recipe: Recipe) -> Images:
    """Return the share of each class's images that the recipe asks for, a function of its seed."""
    if recipe.share == 1:
        return images
    generator = np.random.default_rng(words(recipe.seed, Stream.SHARE))
    return images.subset(stratified(np.asarray(images.labels), recipe.share, generator))


def default_workers() -> int:
    """Return one less than the processors that this process may use."""
    return len(os.sched_getaffinity(0)) - 1


def in_order(count: int, batch_size: int) -> list[list[Key]]:
    """Return keys of all of ``count`` samples once; the last batch may be smaller."""
    keys = [(0, sample) for sample in range(count)]
    return [keys[start : start + batch_size] for start in range(0, count, batch_size)]


def load(
    images: LabelledImages, batches: Iterable[list[Key]], workers: int, device: torch.device
) -> DataLoader[Labelled]:
    """Return what loads these batches of keys, on the host.

    Workers are started afresh, not forked: a fork of a process with threads and a GPU may hang. They
    stay for the next time that the batches are walked through.
    """
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        persistent_workers=workers > 0,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_worker if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )


def _begin_worker(_: int) -> None:
    """Leave Ctrl-C, which every process of a terminal gets, to the process that saves the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
