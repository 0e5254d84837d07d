"""Decoding with PIL: for machines without DALI, and to compare with."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Transforms
from stopfast.data.ahead import read_ahead
from stopfast.data.batch import Batch, Encoded, host_batch, unreadable
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
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    decoded = _decoded(encoded, images, transforms, copies, threads)
    with closing(read_ahead(decoded, _PREFETCH)) as batches:
        for batch in batches:
            if copies is not None:
                # Or its memory would be given to a later batch as soon as Python drops this one, while
                # steps still read it.
                batch.images.record_stream(torch.cuda.current_stream(copies.device))
            yield batch


def _decoded(
    encoded: Iterator[Encoded],
    images: Images,
    transforms: Transforms,
    copies: torch.cuda.Stream | None,
    threads: int,
) -> Generator[Batch, None, None]:
    """Decode each batch, all of whose work is done when it is yielded, on a GPU too."""
    size, mean, std = transforms.size, *_scale(transforms)

    def part(batch: Encoded, indices: np.ndarray, out: np.ndarray) -> None:
        for index in indices:
            try:
                pixels = cut(open_stored(batch.data[index]), batch.draws, index, size)
            except ValueError as error:
                name = images.names[batch.samples[index]]
                raise unreadable(images, {name: str(error)}) from None
            if copies is None:
                np.subtract(pixels.transpose(2, 0, 1), mean, out=out[index])
                np.divide(out[index], std, out=out[index])
            else:
                out[index] = pixels

    with ThreadPoolExecutor(threads, "stopfast-decode") as pool:
        for batch in encoded:
            count = len(batch.samples)
            # To a GPU go the bytes, a quarter of the numbers.
            out = (
                host_batch(count, 3, *size)
                if copies is None
                else torch.empty(count, *size, 3, dtype=torch.uint8, pin_memory=True)
            )
            array = out.numpy()
            tasks = np.array_split(np.arange(count), min(count, _TASKS * threads))
            list(pool.map(lambda indices, b=batch, a=array: part(b, indices, a), tasks))
            samples = torch.from_numpy(np.asarray(batch.samples, dtype=np.int64))
            yield Batch(out if copies is None else _sent(out, copies, mean, std), samples)


def _scale(transforms: Transforms) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of 0..255 as fp32 [3, 1, 1]."""
    mean, std = (
        np.asarray(values, dtype=np.float32)[:, None, None] * np.float32(255)
        for values in (transforms.mean, transforms.std)
    )
    return mean, std


def _sent(pixels: Tensor, copies: torch.cuda.Stream, mean: np.ndarray, std: np.ndarray) -> Tensor:
    """Return pinned uint8 [B, H, W, 3] as normalised fp32 [B, 3, H, W] on the GPU.

    By a stream for nothing else, and from pinned memory: on that of the steps the copy would wait for
    these, and from other memory the host would too.
    """
    with torch.cuda.stream(copies):
        sent = pixels.to(copies.device, non_blocking=True).permute(0, 3, 1, 2)
        sent = sent.to(torch.float32, memory_format=torch.contiguous_format)
        sent.sub_(torch.from_numpy(mean).to(copies.device))
        sent.div_(torch.from_numpy(std).to(copies.device))
    copies.synchronize()
    return sent
