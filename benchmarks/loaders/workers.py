"""Loaders of torch's DataLoader, as others build them: processes that decode, crop and draw masks."""

import io
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.engine.refusals import NotHere
from benchmarks.loaders.feeds import ENDLESS, Batches, Fed, Feed, moved
from benchmarks.mask_loops import Masks, Rules, numpy_loop_masks, torch_loop_masks
from stopfast.config import Transforms
from stopfast.data.images import Images

Kind = Literal["published", "torchvision"]
_AHEAD = 2  # batches of each worker, torch's default
_BLUR_KERNEL = 9  # pixels; what recipes of torchvision's blur usually ask for


def worker_batches(feed: Feed, kind: Kind) -> Batches:
    """Return the endless batches of ``feed.workers`` processes; with 0 this one does their work.

    * ``published``: as the published programs do it. PIL decodes and torchvision's transforms of PIL
      images follow, normalising included; masks are drawn in two loops of torch operations.
    * ``torchvision``: what a careful person assembles. ``decode_jpeg``, transforms of uint8 tensors,
      masks by numpy, and batches that a GPU normalises.

    Raises:
        NotHere: torchvision is missing.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise NotHere("torchvision is not installed") from None
    on_gpu = feed.device.type == "cuda"
    normalises = kind == "published" or not on_gpu
    loader = DataLoader(
        _Photographs(feed.images, feed.transforms, kind, normalises),
        batch_sampler=_Order(feed),
        num_workers=feed.workers,
        collate_fn=_Collate(feed, torch_loop_masks if kind == "published" else numpy_loop_masks),
        pin_memory=on_gpu,
        persistent_workers=feed.workers > 0,
        prefetch_factor=_AHEAD if feed.workers else None,
        # Never forked: what asks has threads of torch's.
        multiprocessing_context="spawn" if feed.workers else None,
    )
    return _fed(feed, loader, normalises)


def _fed(feed: Feed, loader: Any, normalises: bool) -> Batches:  # noqa: ANN401
    for (pixels, samples), (context, target) in loader:
        images = moved(pixels, feed.device)
        if not normalises:
            images = _normalised(images, feed.transforms)
        yield Fed(
            images,
            samples,
            [moved(mask, feed.device) for mask in context],
            [moved(mask, feed.device) for mask in target],
        )


class _Order:
    """The samples of each step, without end, so that no epoch's end interrupts what is measured."""

    def __init__(self, feed: Feed) -> None:
        self.plan = feed.plan()

    def __iter__(self) -> Iterator[list[int]]:
        for samples in self.plan.batches(1, ENDLESS):
            yield samples.tolist()


class _Photographs(Dataset[tuple[Tensor, int]]):
    """Stored images to training images."""

    def __init__(
        self, images: Images, transforms: Transforms, kind: Kind, normalises: bool
    ) -> None:
        self.images, self.transforms = images, transforms
        self.kind: Kind = kind
        self.normalises = normalises
        self._pipeline: Callable[[Any], Tensor] | None = None

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        if self._pipeline is None:  # made in the worker
            published = self.kind == "published"
            self._pipeline = (
                _published(self.transforms)
                if published
                else _tensors(self.transforms, self.normalises)
            )
        return self._pipeline(self.images.read(sample)), sample


class _Collate:
    """Stacks a batch and draws its masks; workers share the count of batches, as published."""

    def __init__(self, feed: Feed, draw: Callable[[int, int, Rules], Masks]) -> None:
        self.rules, self.draw = feed.rules, draw
        self.count = torch.multiprocessing.get_context("spawn").Value("i", -1)

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Any, Masks]:
        with self.count.get_lock():
            self.count.value += 1
            step = self.count.value
        return default_collate(samples), self.draw(len(samples), step, self.rules)


def _published(transforms: Transforms) -> Callable[[bytes], Tensor]:
    """Return the published programs' transforms, from an image's bytes."""
    import torchvision.transforms as tv

    steps: list[Any] = [
        tv.RandomResizedCrop(
            list(transforms.size),
            transforms.crop_scale,
            transforms.crop_ratio,
            tv.InterpolationMode[transforms.interpolation.upper()],
        ),
        tv.RandomHorizontalFlip(transforms.flip),
        tv.RandomGrayscale(transforms.gray),
        _PillowBlur(transforms),
        tv.ToTensor(),
        tv.Normalize(transforms.mean, transforms.std),
    ]
    pipeline: Any = tv.Compose(steps)

    def decode(stored: bytes) -> Tensor:
        with Image.open(io.BytesIO(stored)) as image:
            return pipeline(image.convert("RGB"))

    return decode


class _PillowBlur:
    """PIL's Gaussian blur with some probability."""

    def __init__(self, transforms: Transforms) -> None:
        self.probability, (self.low, self.high) = transforms.blur, transforms.blur_radius

    def __call__(self, image: Image.Image) -> Image.Image:
        draw, place = torch.rand(2).tolist()
        if draw >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(self.low + place * (self.high - self.low)))


def _tensors(transforms: Transforms, normalises: bool) -> Callable[[bytes], Tensor]:
    """Return the same in operations on uint8 tensors [3, H, W]."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    blur = v2.GaussianBlur(_BLUR_KERNEL, transforms.blur_radius)
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(
            list(transforms.size),
            transforms.crop_scale,
            transforms.crop_ratio,
            v2.InterpolationMode[transforms.interpolation.upper()],
            antialias=True,
        ),
        v2.RandomHorizontalFlip(transforms.flip),
        v2.RandomGrayscale(transforms.gray),
        v2.RandomApply([blur], transforms.blur),
    ]
    if normalises:
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(transforms.mean, transforms.std),
        ]
    # Transforms that are off would cost draws and calls.
    used = [step for step in steps if getattr(step, "p", 1) > 0]
    pipeline = v2.Compose(used)

    def decode(stored: bytes) -> Tensor:
        # frombuffer warns of bytes, which nothing writes to here.
        data = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        return pipeline(decode_image(data, ImageReadMode.RGB))

    return decode


def _normalised(pixels: Tensor, transforms: Transforms) -> Tensor:
    from torchvision.transforms.v2 import functional

    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    return functional.normalize(scaled, list(transforms.mean), list(transforms.std), inplace=True)
