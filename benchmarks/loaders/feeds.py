"""What a loader of the benchmarks is asked for, and what it hands over."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.mask_loops import PUBLISHED, Rules
from stopfast.config import Transforms
from stopfast.data.images import Images
from stopfast.data.loader import TrainPlan

ENDLESS = 10**9
"""The last step of a loader: one that no benchmark comes to."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What every loader is asked for."""

    images: Images
    transforms: Transforms
    batch_size: int
    workers: int
    """Threads that decode, or processes."""
    device: torch.device
    """Where batches are wanted."""
    rules: Rules = PUBLISHED
    seed: int = 0

    def plan(self) -> TrainPlan:
        """Return which samples each step reads, the same for every loader."""
        return TrainPlan(len(self.images), self.batch_size, self.transforms, self.seed)


class Fed(NamedTuple):
    """The batch of one step."""

    images: Tensor
    """fp32 [B, 3, H, W] on the device, normalised."""
    samples: Tensor
    """int64 [B] on the host, the images' numbers."""
    context: list[Tensor]
    """E tensors [B, Kx] of int64 on the device."""
    target: list[Tensor]
    """M tensors [B, Ky] of int64 on the device."""


Batches = Generator[Fed, None, None]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device; to a GPU from pinned memory, without a wait."""
    if tensor.device.type == device.type:
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
