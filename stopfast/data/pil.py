"""Decoding with PIL: for machines without DALI, and to compare with."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Transforms
from stopfast.data.ahead import read_ahead
from stopfast.data.batch import Batch, Encoded, unreadable
from stopfast.data.images import Images
from stopfast.data.pixels import cut, open_stored

_PREFETCH = 2  # batches that are decoded ahead
_TASKS = 4  # of a thread and batch: few enough to cost little, enough to keep all threads at work


def decode_with_pil(
    encoded: Iterator[Encoded],
    images: Images,
    transforms: Transforms,
    *,
    device: torch.device,
    threads: int,
) -> Generator[Batch, None, None]:
    """Yield decoded batches; decoding releases Python's lock, so threads share the work.

    EXIF orientations are not applied: pixels are as stored, like DALI's here.

    Raises:
        ValueError: an image cannot be decoded; it is named.
    """
    with closing(read_ahead(_pixels(encoded, images, transforms, threads), _PREFETCH)) as batches:
        for samples, pixels in batches:
            yield Batch(
                _normalised(torch.from_numpy(pixels).to(device), transforms),
                torch.from_numpy(samples),
            )


def _pixels(
    encoded: Iterator[Encoded], images: Images, transforms: Transforms, threads: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    def part(batch: Encoded, indices: np.ndarray, out: np.ndarray) -> None:
        for index in indices:
            try:
                out[index] = cut(
                    open_stored(batch.data[index]), batch.draws, index, transforms.size
                )
            except ValueError as error:
                name = images.names[batch.samples[index]]
                raise unreadable(images, {name: str(error)}) from None

    with ThreadPoolExecutor(threads, "stopfast-decode") as pool:
        for batch in encoded:
            count = len(batch.samples)
            out = np.empty((count, *transforms.size, 3), dtype=np.uint8)
            tasks = np.array_split(np.arange(count), min(count, _TASKS * threads))
            list(pool.map(lambda indices, b=batch, o=out: part(b, indices, o), tasks))
            yield np.asarray(batch.samples, dtype=np.int64), out


def _normalised(pixels: Tensor, transforms: Transforms) -> Tensor:
    """Return uint8 [B, H, W, 3] as normalised fp32 [B, 3, H, W]."""
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] * 255
        for values in (transforms.mean, transforms.std)
    )
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images.sub_(mean).div_(std)
