"""Decoding with PIL: for machines without DALI, and to compare with."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

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
_IMAGES = 24  # of each thread, that are begun before a batch is waited for


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
    decoded = _Decoder(images, transforms, copies, threads).batches(encoded)
    with closing(read_ahead(decoded, _PREFETCH)) as batches:
        for batch in batches:
            if copies is not None:
                # Or its memory would be given to a later batch as soon as Python drops this one, while
                # steps still read it.
                batch.images.record_stream(torch.cuda.current_stream(copies.device))
            yield batch


class _Begun(NamedTuple):
    """A batch whose images are being decoded."""

    samples: Tensor
    out: Tensor
    parts: list[Future[None]]


class _Decoder:
    """Threads that decode: for the host to normalised fp32, for a GPU to bytes, which are sent there."""

    def __init__(
        self,
        images: Images,
        transforms: Transforms,
        copies: torch.cuda.Stream | None,
        threads: int,
    ) -> None:
        self.images, self.transforms, self.copies = images, transforms, copies
        self.mean, self.std = _scale(transforms)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "stopfast-decode")

    def batches(self, encoded: Iterator[Encoded]) -> Generator[Batch, None, None]:
        """Yield batches all of whose work is done, on a GPU too; then end the threads.

        One photograph may take as long as twenty others, so many threads begin later batches before one is
        waited for.
        """
        under_way: deque[_Begun] = deque()
        try:
            for begun in self._begun(encoded):
                under_way.append(begun)
                while sum(len(b.samples) for b in under_way) > _IMAGES * self.threads:
                    yield self._ended(under_way.popleft())
            while under_way:
                yield self._ended(under_way.popleft())
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _begun(self, encoded: Iterator[Encoded]) -> Iterator[_Begun]:
        try:
            yield from map(self._begin, encoded)
        except Exception as error:  # raised when it is this batch's turn
            failed: Future[None] = Future()
            failed.set_exception(error)
            yield _Begun(torch.empty(0), torch.empty(0), [failed])

    def _begin(self, batch: Encoded) -> _Begun:
        count = len(batch.samples)
        # To a GPU go the bytes, a quarter of the numbers.
        out = (
            host_batch(count, 3, *self.transforms.size)
            if self.copies is None
            else torch.empty(count, *self.transforms.size, 3, dtype=torch.uint8, pin_memory=True)
        )
        tasks = np.array_split(np.arange(count), min(count, _TASKS * self.threads))
        parts = [self.pool.submit(self._decode, batch, some, out.numpy()) for some in tasks]
        return _Begun(torch.from_numpy(np.asarray(batch.samples, dtype=np.int64)), out, parts)

    def _decode(self, batch: Encoded, indices: np.ndarray, out: np.ndarray) -> None:
        for index in indices:
            try:
                pixels = cut(open_stored(batch.data[index]), batch.draws, index, self.transforms)
            except ValueError as error:
                name = self.images.names[batch.samples[index]]
                raise unreadable(self.images, {name: str(error)}) from None
            if self.copies is None:
                np.subtract(pixels.transpose(2, 0, 1), self.mean, out=out[index])
                np.divide(out[index], self.std, out=out[index])
            else:
                out[index] = pixels

    def _ended(self, begun: _Begun) -> Batch:
        for part in begun.parts:
            part.result()
        if self.copies is None:
            return Batch(begun.out, begun.samples)
        return Batch(_sent(begun.out, self.copies, self.mean, self.std), begun.samples)


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
