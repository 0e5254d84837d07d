"""Whether a loader shows what it should, before it is timed."""

import io
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.engine.refusals import Disagreement
from benchmarks.loaders.feeds import Batches, Fed, Feed
from stopfast.config import Transforms
from stopfast.data.images import Images, open_images
from stopfast.data.pixels import open_stored

_CHECKED = 8
"""Photographs that are compared."""

_CASES: dict[str, tuple[dict[str, float], float]] = {
    # Of 255, mean over an image: antialiasing left out, or a JPEG decoded at half its size, are 2 and more.
    "crop": ({}, 0.8),
    "flip, gray": ({"flip": 1.0, "gray": 1.0}, 0.9),
    # Blurs continue an image beyond its border in ways of their own.
    "blur": ({"blur": 1.0}, 2.0),
}


def check_loader(begin: Callable[[Feed], Batches], feed: Feed) -> dict[str, float]:
    """Compare what a loader makes of photographs with PIL, each transform always on.

    The photographs are squares cut out of ``feed.images``, and the crop is all of each, so that nothing
    is left to chance.

    Returns:
        the largest mean difference of an image, of 255, by case.

    Raises:
        Disagreement: another shape, type, device or normalisation, other pixels, or masks that break a
            rule.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        squares = _squares(feed.images, Path(folder), feed.transforms)
        for name, (probabilities, allowed) in _CASES.items():
            transforms = replace(
                feed.transforms,
                **{"flip": 0.0, "gray": 0.0, "blur": 0.0, **probabilities},
                crop_scale=(1.0, 1.0),
                crop_ratio=(1.0, 1.0),
                blur_radius=(1.0, 1.0),
            )
            asked = replace(
                feed, images=squares, transforms=transforms, batch_size=len(squares), workers=0
            )
            with closing(begin(asked)) as batches:
                fed = next(batches)
            check_form(fed, asked)
            found[name] = _difference(fed, asked)
            if found[name] > allowed:
                raise Disagreement(
                    f"{name}: expected images within {allowed} of 255 on average, got {found[name]:.2f}"
                )
    return found


def check_form(fed: Fed, feed: Feed) -> None:
    """Compare shapes, types, devices and masks of a batch with what was asked for.

    Raises:
        Disagreement: one is different.
    """
    rules, device = feed.rules, feed.device.type
    shape = (feed.batch_size, 3, *feed.transforms.size)
    got = (tuple(fed.images.shape), fed.images.dtype, fed.images.device.type)
    if got != (shape, torch.float32, device):
        raise Disagreement(f"expected images of {shape}, fp32, on {device}, got {got}")
    if (len(fed.context), len(fed.target)) != (rules.nenc, rules.npred):
        raise Disagreement(f"expected {rules.nenc} and {rules.npred} masks, got others")
    for mask in (*fed.context, *fed.target):
        if (mask.dtype, mask.device.type, len(mask)) != (torch.int64, device, feed.batch_size):
            raise Disagreement(f"expected masks as int64 on {device}, got {mask.dtype}")
        if not (mask.diff(dim=1) > 0).all() or mask.max() >= rules.height * rules.width:
            raise Disagreement("expected masks that ascend within the grid, got others")
    for context in fed.context:
        for target in fed.target:
            if (context[:, :, None] == target[:, None]).any():
                raise Disagreement("expected contexts without their targets, got one with")


def check_spread(fed: Fed, feed: Feed) -> None:
    """Check that many real images are about as bright and as varied as normalised photographs are.

    Raises:
        Disagreement: they are not.
    """
    mean, std = fed.images.mean().item(), fed.images.std().item()
    if abs(mean) > 1 or not 0.4 < std < 2:
        raise Disagreement(
            f"expected normalised photographs, got a mean of {mean:.2f} and a deviation of {std:.2f}"
        )


def _squares(images: Images, folder: Path, transforms: Transforms) -> Images:
    """Cut the largest squares out of some images and store them as JPEGs, colours halved in every other."""
    wanted = 2 * max(transforms.size)  # so that what is decoded at half its size shows
    for number, sample in enumerate(np.linspace(0, len(images) - 1, _CHECKED).astype(int)):
        image = open_stored(images.read(sample)).convert("RGB")
        side = min(image.size)
        square = image.crop((0, 0, side, side))
        if side < wanted:
            square = square.resize((wanted, wanted), Image.Resampling.LANCZOS)
        square.save(folder / f"{number}.jpg", quality=95, subsampling=2 * (number % 2))
    return open_images(folder)


def _expected(stored: bytes, transforms: Transforms) -> Tensor:
    image = Image.open(io.BytesIO(stored)).convert("RGB")
    height, width = transforms.size
    image = image.resize((width, height), Image.Resampling[transforms.interpolation.upper()])
    if transforms.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transforms.gray:
        image = image.convert("L").convert("RGB")
    if transforms.blur:
        image = image.filter(ImageFilter.GaussianBlur(transforms.blur_radius[0]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _difference(fed: Fed, feed: Feed) -> float:
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (feed.transforms.mean, feed.transforms.std)
    )
    shown = (fed.images.cpu() * std + mean) * 255
    expected = torch.stack(
        [_expected(feed.images.read(sample), feed.transforms) for sample in fed.samples.tolist()]
    )
    return (shown - expected).abs().mean((1, 2, 3)).max().item()
