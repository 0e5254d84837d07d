"""Batches of decoded images through NVIDIA DALI, on the CPU or on the GPU."""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stopfast.config import Transforms
from stopfast.data.draws import Boxes, center_boxes, epoch_order, random_boxes
from stopfast.data.folder import ImageFolder
from stopfast.env import dali_problem

_PREFETCH = 2  # batches that are decoded ahead


class Batch(NamedTuple):
    """Images and what they are."""

    images: Tensor
    """fp32 [B, 3, H, W] on the loader's device, normalised."""
    samples: Tensor
    """int64 [B], the images' numbers in the folder."""


class TrainPlan:
    """Which samples each step reads, and how each is cropped: whole batches, an order per epoch.

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

    def boxes(self, step: int, samples: np.ndarray, sizes: np.ndarray) -> Boxes:
        """Return a step's crops."""
        epoch = (step - 1) // self.steps_per_epoch
        return random_boxes(self.seed, epoch, samples, sizes, self.transforms)


def train_batches(
    folder: ImageFolder,
    plan: TrainPlan,
    *,
    first_step: int,
    last_step: int,
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    """Yield the batches of optimiser steps ``first_step..last_step``."""

    def source() -> Iterator[tuple[np.ndarray, list[np.ndarray], Boxes]]:
        steps = range(first_step, last_step + 1)
        for step, samples in zip(steps, plan.batches(first_step, last_step), strict=True):
            encoded, sizes = _read(folder, samples)
            yield samples, encoded, plan.boxes(step, samples, sizes)

    yield from _decode(folder, source(), plan.transforms, plan.batch_size, device, threads)


def eval_batches(
    folder: ImageFolder,
    transforms: Transforms,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    """Yield every image once, in order, cut to the centre; the last batch may be smaller."""

    def source() -> Iterator[tuple[np.ndarray, list[np.ndarray], Boxes]]:
        for start in range(0, len(folder), batch_size):
            samples = np.arange(start, min(start + batch_size, len(folder)))
            encoded, sizes = _read(folder, samples)
            yield samples, encoded, center_boxes(sizes, transforms)

    yield from _decode(folder, source(), transforms, batch_size, device, threads)


def _read(folder: ImageFolder, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the files' bytes, and the (height, width) that their headers state."""
    encoded, sizes = [], []
    for sample in samples:
        path = folder.files[sample]
        data = path.read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except OSError:
            raise ValueError(f"expected a JPEG file, got {path}, which is none") from None
        encoded.append(np.frombuffer(data, dtype=np.uint8))
        sizes.append((height, width))
    return encoded, np.array(sizes)


def _broken(folder: ImageFolder, samples: Iterable[int]) -> list[str]:
    """Return the files among these samples that PIL cannot decode either."""
    broken = []
    for sample in samples:
        try:
            with Image.open(folder.files[sample]) as image:
                image.load()
        except OSError:
            broken.append(str(folder.files[sample]))
    return broken


def _decode(
    folder: ImageFolder,
    source: Iterator[tuple[np.ndarray, list[np.ndarray], Boxes]],
    transforms: Transforms,
    batch_size: int,
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    problem = dali_problem()
    if problem is not None:
        raise RuntimeError(problem)
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    on_gpu = device.type == "cuda"
    under_way: deque[np.ndarray] = deque(maxlen=2 * _PREFETCH + 1)  # what a failure may be about

    def feed() -> Iterator[tuple[Any, ...]]:
        for samples, encoded, boxes in source:
            under_way.append(samples)
            yield (encoded, *(list(values) for values in boxes), list(samples[:, None]))

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,  # pyright: ignore[reportArgumentType]
        prefetch_queue_depth=_PREFETCH,
    )
    def pipeline() -> tuple[Any, ...]:
        images: Any
        encoded, top_left, size, flip, samples = fn.external_source(
            source=feed(), num_outputs=5, batch=True
        )
        # The boxes are in the coordinates of the stored pixels, so decoding must not turn the image.
        images = fn.decoders.image_slice(
            encoded,
            start=top_left,
            shape=size,
            axis_names="HW",
            device="mixed" if on_gpu else "cpu",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
        )
        images = fn.resize(
            images,
            size=transforms.size,
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
        images = fn.crop_mirror_normalize(
            images,
            mirror=flip,
            dtype=types.DALIDataType.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in transforms.mean],
            std=[255 * s for s in transforms.std],
        )
        return images, samples

    graph = pipeline()
    graph.build()
    while True:
        try:
            images, samples = graph.run()
        except StopIteration:
            return
        except RuntimeError:
            broken = _broken(folder, np.concatenate(under_way)) if under_way else []
            if not broken:
                raise
            raise ValueError(
                f"expected JPEG files that can be decoded, got {', '.join(broken)}; "
                "repair or remove them"
            ) from None
        # The pipeline reuses its buffers, so the batch is copied out of them.
        yield Batch(
            torch.from_dlpack(images.as_tensor()).clone(),
            torch.from_dlpack(samples.as_tensor()).clone().flatten().to(torch.int64),
        )
