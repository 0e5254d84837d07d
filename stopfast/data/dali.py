"""Decoding with NVIDIA DALI, on the CPU or on the GPU; the draws are handed to it as parameters."""

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from stopfast.config import DataConfig, Transforms
from stopfast.data.batch import Batch, Encoded, host_batch, unreadable
from stopfast.data.draws import Draws
from stopfast.data.images import Images
from stopfast.data.pixels import check_stored, open_stored

_PREFETCH = 2  # batches that are decoded ahead


def decode_with_dali(
    encoded: Iterator[Encoded],
    images: Images,
    transforms: Transforms,
    *,
    batch_size: int,
    device: torch.device,
    data: DataConfig,
) -> Generator[Batch, None, None]:
    """Yield decoded batches; on a GPU, ``data.hardware_share`` of the JPEGs go to its JPEG hardware.

    EXIF orientations are not applied: pixels are as stored, and the crops are in their coordinates.

    Raises:
        ValueError: an image cannot be decoded; it is named. The pipeline is dead then, as DALI's are.
    """
    # What a failure may be about: what waits in the pipeline, and the batch that is being made.
    under_way: deque[Encoded] = deque(maxlen=2 * _PREFETCH + 1)

    def feed() -> Iterator[tuple[list[np.ndarray], ...]]:
        for batch in encoded:
            under_way.append(batch)
            yield _inputs(batch, transforms)

    graph = _pipeline(feed(), transforms, batch_size, device, data)
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    while True:
        try:
            pixels, samples = graph.run()
        except StopIteration:
            return
        except RuntimeError as error:
            if "decode" not in str(error):
                raise
            broken = _broken(under_way, images, transforms, device, data)
            if not broken:
                raise
            raise unreadable(images, broken) from None
        # The pipeline reuses its buffers, so the batch is copied out of them.
        yield Batch(
            _copied(pixels.as_tensor(), copies),
            torch.from_dlpack(samples.as_tensor()).clone().flatten().to(torch.int64),
        )


def _copied(tensor: Any, copies: torch.cuda.Stream | None) -> torch.Tensor:  # noqa: ANN401
    """Return a copy of DALI's tensor that has been made, not one that is only queued.

    DALI writes on streams of its own, which know nothing of torch's: run again before the copy was made,
    it may overwrite what is to be copied. So the host waits for the copy; on a stream for nothing else,
    since on that of the steps it would wait for these too.
    """
    if copies is None:
        own = torch.from_dlpack(tensor)
        return host_batch(*own.shape).copy_(own)
    with torch.cuda.stream(copies):
        copy = torch.from_dlpack(tensor).clone()
    copies.synchronize()
    # Or its memory would be given to a later copy as soon as Python drops it, while steps still read it.
    copy.record_stream(torch.cuda.current_stream(copies.device))
    return copy


def _inputs(batch: Encoded, transforms: Transforms) -> tuple[list[np.ndarray], ...]:
    """Return a batch as DALI takes it: lists of arrays, without those that no operator reads."""
    draws = batch.draws
    inputs = [
        [np.frombuffer(data, dtype=np.uint8) for data in batch.data],
        list(np.asarray(batch.samples, dtype=np.int64)[:, None]),
        list(draws.top_left),
        list(draws.size),
        list(draws.flip),
    ]
    if transforms.gray > 0:
        inputs.append(list(draws.gray > 0))
    if transforms.blur > 0:
        inputs.append(list(draws.sigma))
    return tuple(inputs)


def _pipeline(
    source: Iterator[tuple[list[np.ndarray], ...]],
    transforms: Transforms,
    batch_size: int,
    device: torch.device,
    data: DataConfig,
) -> Any:  # noqa: ANN401 (DALI has no types)
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    on_gpu = device.type == "cuda"
    kinds = {
        "bilinear": types.DALIInterpType.INTERP_LINEAR,
        "bicubic": types.DALIInterpType.INTERP_CUBIC,
    }
    interpolation = kinds[transforms.interpolation]
    decoder: dict[str, Any] = {"device": "cpu"}
    if on_gpu:
        # Chroma upsampled as on the CPU and in PIL, which nvJPEG does otherwise unless told so.
        decoder = {
            "device": "mixed",
            "hw_decoder_load": data.hardware_share,
            "jpeg_fancy_upsampling": True,
        }

    @pipeline_def(
        batch_size=batch_size,
        num_threads=data.threads,
        device_id=(device.index or 0) if on_gpu else None,  # pyright: ignore[reportArgumentType]
        prefetch_queue_depth=_PREFETCH,
        enable_conditionals=True,
    )
    def pipeline() -> tuple[Any, ...]:
        images: Any
        drawn: list[Any]
        count = 5 + (transforms.gray > 0) + (transforms.blur > 0)
        stored, samples, top_left, size, flip, *drawn = fn.external_source(
            source=source, num_outputs=count, batch=True
        )
        images = fn.decoders.image_slice(
            stored,
            start=top_left,
            shape=size,
            axis_names="HW",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            **decoder,
        )
        images = fn.resize(
            images,
            size=transforms.size,
            interp_type=interpolation,
            antialias=True,
        )
        # The mirroring comes last here, for both are blind to it. The inner conditions are splits of the
        # batch to DALI: an image that is not to be changed costs nothing.
        if transforms.gray > 0:
            gray = drawn.pop(0)
            if gray:
                images = fn.saturation(images, saturation=0.0)
        if transforms.blur > 0:
            sigma = drawn.pop(0)
            if sigma > 0:
                images = fn.gaussian_blur(images, sigma=sigma)
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
    return graph


def _broken(
    under_way: deque[Encoded],
    images: Images,
    transforms: Transforms,
    device: torch.device,
    data: DataConfig,
) -> dict[str, str]:
    """Return which of these images cannot be decoded, by their numbers' names, and why."""
    broken: dict[str, str] = {}
    for batch in under_way:
        for sample, stored in zip(batch.samples, batch.data, strict=True):
            try:
                check_stored(stored)
            except ValueError as error:
                broken[images.names[sample]] = str(error)
    if broken:
        return broken
    # Nothing that the scan would have found: each alone, in a pipeline of its own.
    for batch in under_way:
        for index, sample in enumerate(batch.samples):
            alone = Encoded(
                batch.samples[[index]],
                [batch.data[index]],
                Draws(*(values[[index]] for values in batch.draws)),
            )
            try:
                _pipeline(iter([_inputs(alone, transforms)]), transforms, 1, device, data).run()
            except RuntimeError:
                shown = open_stored(batch.data[index])
                broken[images.names[sample]] = f"DALI refuses this {shown.format} ({shown.mode})"
    return broken
