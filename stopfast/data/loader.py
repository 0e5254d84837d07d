"""Batches of training and evaluation images, decoded by DALI or by PIL."""

import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from stopfast.config import DataConfig, Transforms
from stopfast.data.ahead import read_ahead
from stopfast.data.batch import Batch, Encoded, unreadable
from stopfast.data.dali import decode_with_dali
from stopfast.data.draws import Draws, center_draws, epoch_order, random_draws
from stopfast.data.images import Images
from stopfast.data.pil import decode_with_pil
from stopfast.data.pixels import open_stored
from stopfast.env import dali_problem

_PREFETCH = 2  # batches that are read ahead of decoding
_TASKS = 4  # of a thread and batch


class TrainPlan:
    """Which samples each step reads, and what is drawn for each: whole batches, an order per epoch.

    Raises:
        ValueError: fewer images than one batch.
    """

    def __init__(self, count: int, batch_size: int, transforms: Transforms, seed: int) -> None:
        if count < batch_size:
            raise ValueError(f"expected at least one batch of {batch_size} images, got {count}")
        self.count, self.batch_size = count, batch_size
        self.steps_per_epoch = count // batch_size
        self.transforms, self.seed = transforms, seed

    def batches(self, first_step: int, last_step: int) -> Iterator[np.ndarray]:
        """Yield the sample numbers of steps ``first_step..last_step``."""
        order, known = np.empty(0), -1
        for step in range(first_step, last_step + 1):
            epoch, place = divmod(step - 1, self.steps_per_epoch)
            if epoch != known:
                order, known = epoch_order(self.seed, epoch, self.count), epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]

    def draws(self, step: int, samples: np.ndarray, sizes: np.ndarray) -> Draws:
        """Return what is drawn for a step's samples, of these stored sizes."""
        epoch = (step - 1) // self.steps_per_epoch
        return random_draws(self.seed, epoch, samples, sizes, self.transforms)


def resolve_loader(loader: Literal["auto", "dali", "pil"]) -> Literal["dali", "pil"]:
    """Return what decodes; ``auto`` is DALI where it works, else PIL with a warning.

    Raises:
        ValueError: ``dali`` where it does not work.
    """
    if loader == "pil":
        return "pil"
    problem = dali_problem()
    if problem is None:
        return "dali"
    if loader == "dali":
        raise ValueError(f"expected NVIDIA DALI for --data.loader dali, got {problem}")
    # Shown once a process, wherever it is asked for, since the place it is said to come from is this one.
    warnings.warn(
        f"NVIDIA DALI cannot be used, so PIL decodes, slower. {problem}",
        RuntimeWarning,
        stacklevel=1,
    )
    return "pil"


def train_batches(
    images: Images,
    plan: TrainPlan,
    *,
    first_step: int,
    last_step: int,
    device: torch.device,
    data: DataConfig,
) -> Generator[Batch, None, None]:
    """Return the batches of optimiser steps ``first_step..last_step``, decoded ahead.

    A batch depends on the images, the plan and its step alone, but for the decoder's rounding (see
    :func:`resolve_loader`). Closing the generator ends its threads.

    Raises:
        ValueError: DALI asked for where it does not work; or, from the generator, an image that cannot be
            decoded.
        OSError: from the generator, an image that cannot be read.
    """
    steps = range(first_step, last_step + 1)
    numbered = zip(steps, plan.batches(first_step, last_step), strict=True)
    source = _encoded(images, numbered, plan.draws, data.threads)
    return _decoded(source, images, plan.transforms, plan.batch_size, device, data)


def eval_batches(
    images: Images,
    transforms: Transforms,
    *,
    batch_size: int,
    device: torch.device,
    data: DataConfig,
) -> Generator[Batch, None, None]:
    """Return every image once, in order, cut to the centre; the last batch may be smaller.

    Of ``transforms``, size, center, mean and std are used; of ``data``, what concerns the decoder.

    Raises:
        ValueError, OSError: as :func:`train_batches`.
    """

    def draws(_: int, __: np.ndarray, sizes: np.ndarray) -> Draws:
        return center_draws(sizes, transforms)

    starts = range(0, len(images), batch_size)
    numbered = ((s, np.arange(s, min(s + batch_size, len(images)))) for s in starts)
    source = _encoded(images, numbered, draws, data.threads)
    plain = replace(transforms, flip=0.0, gray=0.0, blur=0.0)
    return _decoded(source, images, plain, batch_size, device, data)


def _decoded(
    source: Generator[Encoded, None, None],
    images: Images,
    transforms: Transforms,
    batch_size: int,
    device: torch.device,
    data: DataConfig,
) -> Generator[Batch, None, None]:
    loader = resolve_loader(data.loader)  # before the generator begins: an error comes at once

    def batches() -> Generator[Batch, None, None]:
        with closing(read_ahead(source, _PREFETCH)) as encoded:
            if loader == "dali":
                yield from decode_with_dali(
                    encoded, images, transforms, batch_size=batch_size, device=device, data=data
                )
            else:
                yield from decode_with_pil(
                    encoded, images, transforms, device=device, threads=data.threads
                )

    return batches()


def _encoded(
    images: Images,
    numbered: Iterator[tuple[int, np.ndarray]],
    draws: Callable[[int, np.ndarray, np.ndarray], Draws],
    threads: int,
) -> Generator[Encoded, None, None]:
    """Read the files of each batch, and draw for the sizes that their headers state."""

    def read(samples: np.ndarray) -> list[tuple[bytes, tuple[int, int]]]:
        found = []
        for sample in samples:
            stored = images.read(sample)
            try:
                width, height = open_stored(stored).size
            except ValueError as error:
                raise unreadable(images, {images.names[sample]: str(error)}) from None
            found.append((stored, (height, width)))
        return found

    with ThreadPoolExecutor(threads, "stopfast-read") as pool:
        for number, samples in numbered:
            tasks = np.array_split(samples, min(len(samples), _TASKS * threads))
            found = [one for part in pool.map(read, tasks) for one in part]
            sizes = np.array([size for _, size in found])
            yield Encoded(samples, [stored for stored, _ in found], draws(number, samples, sizes))
