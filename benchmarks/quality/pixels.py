"""Small photographs, decoded once and kept; their crops are computed where the training runs.

Decoding 32-pixel files anew for every run would take as long as the steps of a small network, on a GPU
many times as long. The crops are those of the library's loader: same boxes, same resampling.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Transforms
from stopfast.data.draws import Draws, center_draws
from stopfast.data.images import Images
from stopfast.data.loader import TrainPlan
from stopfast.data.pixels import open_stored, to_rgb

_ONE = 2.0**22
Scale = tuple[Tensor, Tensor]
"""Mean and deviation of 0..255, fp32 [3, 1, 1] each, on the images' device: no step waits for them."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Photographs of one size."""

    stored: Tensor
    """uint8 [N, 3, H, W]."""
    labels: Tensor
    """int64 [N], on the CPU."""

    @classmethod
    def load(cls, images: Images, device: torch.device, threads: int = 1) -> "Pixels":
        """Decode images onto a device.

        Raises:
            ValueError: one that cannot be decoded, or photographs of several sizes.
        """

        def decode(number: int) -> np.ndarray:
            return np.asarray(to_rgb(open_stored(images.read(number))))

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(decode, range(len(images))))
        sizes = {image.shape[:2] for image in found}
        if len(sizes) > 1:
            some = sorted(sizes)[:3]
            raise ValueError(f"expected photographs of one size, got (height, width) of {some} ...")
        stored = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
        return cls(stored.to(device), torch.tensor(images.labels))

    def __len__(self) -> int:
        return len(self.stored)

    def training(self, plan: TrainPlan, steps: int) -> Iterator[Tensor]:
        """Yield the images fp32 [B, 3, h, w] of steps 1, 2, ..., ``steps`` of a plan, on their device.

        Raises:
            ValueError: a plan with grayscale or blurred images, which need PIL.
        """
        if plan.transforms.gray or plan.transforms.blur:
            raise ValueError("expected transforms without gray and blur, got some with")
        size, scale = plan.transforms.size, self._scale(plan.transforms)
        for first in range(1, steps + 1, plan.steps_per_epoch):
            last = min(first + plan.steps_per_epoch - 1, steps)
            order = np.stack(list(plan.batches(first, last)))
            draws = plan.draws(first, order.reshape(-1), self._sizes(order.size))
            boxes = self._boxes(draws).unflatten(0, order.shape)
            samples = torch.from_numpy(order).to(self.stored.device)
            for some, box in zip(samples, boxes, strict=True):
                yield cut(self.stored[some], box, size, scale)

    def whole(self, transforms: Transforms, batch_size: int = 512) -> Iterator[Tensor]:
        """Yield all images in order, cut to the centre as for evaluation."""
        scale = self._scale(transforms)
        for some in self.stored.split(batch_size):
            draws = center_draws(self._sizes(len(some)), transforms)
            yield cut(some, self._boxes(draws), transforms.size, scale)

    def _sizes(self, count: int) -> np.ndarray:
        return np.tile(np.array(self.stored.shape[2:]), (count, 1))

    def _scale(self, transforms: Transforms) -> Scale:
        mean, std = torch.tensor([transforms.mean, transforms.std])[..., None, None] * 255
        return mean.to(self.stored.device), std.to(self.stored.device)

    def _boxes(self, draws: Draws) -> Tensor:
        boxes = np.concatenate([draws.top_left, draws.size, draws.flip[:, None]], axis=1)
        return torch.from_numpy(boxes).to(self.stored.device)


def cut(stored: Tensor, boxes: Tensor, size: tuple[int, int], scale: Scale) -> Tensor:
    """Crop, resize as PIL's antialiased bilinear filter does, mirror and normalise.

    Args:
        stored: uint8 [B, 3, H, W].
        boxes: int32 [B, 5]: top, left, height and width of the crop, and 1 for a mirrored image.
        size: height and width of the result, h and w.
        scale: mean and deviation that images are normalised by.

    Returns:
        fp32 [B, 3, h, w].
    """
    height, width = size
    top, left, rows, columns, mirrored = boxes.T
    down = _weights(top, rows, stored.shape[2], height)
    right = _weights(left, columns, stored.shape[3], width)
    right = torch.where(mirrored[:, None, None].bool(), right.flip(1), right)
    # PIL resamples rows first, and rounds to bytes after each of the two.
    images = (stored.double() @ right[:, None].mT).add_(0.5).floor_()
    images = (down[:, None] @ images).add_(0.5).floor_().float()
    return (images - scale[0]) / scale[1]


def _weights(first: Tensor, length: Tensor, side: int, count: int) -> Tensor:
    """How much of each of ``side`` pixels is in each of ``count``, of crops [B]: fp64 [B, count, side].

    In PIL's 22 bits, so that what lies half-way between two bytes is rounded as it does.
    """
    scale = (length.double() / count)[:, None, None]
    places = torch.arange(side, device=first.device)[None, None]
    begin, end = first[:, None, None], (first + length)[:, None, None]
    centre = begin + (torch.arange(count, device=first.device)[None, :, None] + 0.5) * scale
    distance = (places + 0.5 - centre).abs() / scale.clamp_min(1)
    weights = (1 - distance).clamp_min(0) * ((places >= begin) & (places < end))
    return (weights / weights.sum(2, keepdim=True) * _ONE).round() / _ONE
