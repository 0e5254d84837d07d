"""Images at another size: by areas, and on a larger canvas between mirrors."""

import math

import torch
from torch import Tensor


def area_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by adaptive average pooling, up or down: ``F.interpolate(mode="area")`` to rounding.

    Pixel i of b covers the pixels floor(i a / b) to ceil((i + 1) a / b) - 1 of a. The pattern repeats
    gcd(a, b) times, so each axis is one product with a small table. Torch's own gradient on a GPU is a sum
    in no fixed order, and on a CPU it takes several times as long.

    Args:
        images: [B, C, H, W], floating; computed in at least fp32, under autocast too.
        size: height and width to return.

    Returns:
        [B, C, *size].
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images.to(torch.promote_types(torch.float32, images.dtype))
        table = _areas(images.shape[3], size[1], images)
        images = (images.unflatten(3, (-1, table.shape[1])) @ table.mT).flatten(3)
        table = _areas(images.shape[2], size[0], images)
        return (table @ images.unflatten(2, (-1, table.shape[1]))).flatten(2, 3)


def _areas(old: int, new: int, like: Tensor) -> Tensor:
    """The share of each old pixel in each new one, [new / gcd, old / gcd], made on the device."""
    common = math.gcd(old, new)
    old, new = old // common, new // common
    i = torch.arange(new, device=like.device)[:, None]
    place = torch.arange(old, device=like.device)
    # The last comparison is place < ceil((i + 1) * old / new) without a division.
    covered = (place >= i * old // new) & (place * new < (i + 1) * old)
    covered = covered.to(like.dtype)
    return covered / covered.sum(1, keepdim=True)


def mirror_pad(images: Tensor, left_top: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay images on a larger canvas, with mirrors along their sides: pixels at a side come twice.

    Args:
        images: [B, C, h, w].
        left_top: int64 [2], the column and row of the canvas where all images begin; it is not read by
            the host. No more pixels lie before or behind an image than it has.
        size: height and width of the canvas.

    Returns:
        [B, C, *size].
    """
    for dim, offset in ((2, left_top[1]), (3, left_top[0])):
        length = images.shape[dim]
        place = torch.arange(size[dim - 2], device=images.device) - offset
        place = torch.where(place < 0, -1 - place, place)
        place = torch.where(place >= length, 2 * length - 1 - place, place)
        images = images.index_select(dim, place)
    return images
