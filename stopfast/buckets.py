"""Masks of few lengths: padded to multiples, with the real lengths on the device.

The lengths of context and targets change from step to step; rounded up, they have few values, so that a
graph can be captured and a shape compiled for each pair of them. The real lengths are numbers on the
device, which kernels read: one graph serves all lengths of its bucket, and the numbers are those of
the masks without padding.
"""

import torch
from torch import Tensor

from stopfast.masking import Masks
from stopfast.transfers import filled_pair


def bucket_of(length: int, multiple: int, most: int | None = None) -> int:
    """Return ``length`` rounded up to a multiple, but not beyond ``most``."""
    rounded = -(-length // multiple) * multiple
    return rounded if most is None else max(length, min(rounded, most))


def pad_slots(tensor: Tensor, slots: int) -> Tensor:
    """Pad the tokens [..., K, C] of explicit noise with zeros to ``slots``."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, slots - tensor.shape[-2]))


def pad_to_bucket(masks: Masks, multiple: int, most: int | None = None) -> Masks:
    """Pad masks with index 0, contexts and targets each to a multiple, and say how many are real.

    Nothing waits for the device: the lengths are known from the shapes, and are filled in there.

    Args:
        masks: without padding.
        multiple: what lengths are rounded up to.
        most: no mask is padded beyond this, such as the number of patches.

    Returns:
        Masks with int32 ``lengths`` on the indices' device, also where there was nothing to pad.

    Raises:
        ValueError: a multiple less than 1, or masks with padding.
    """
    if multiple < 1:
        raise ValueError(f"expected a multiple >= 1, got {multiple}")
    if masks.lengths is not None:
        raise ValueError("expected masks without padding, got some with lengths")
    kept, wanted = masks.context[0].shape[1], masks.target[0].shape[1]

    def padded(group: list[Tensor], length: int) -> list[Tensor]:
        slots = bucket_of(length, multiple, most)
        return list(torch.nn.functional.pad(torch.stack(group), (0, slots - length)).unbind(0))

    device = masks.context[0].device
    return Masks(
        padded(masks.context, kept),
        padded(masks.target, wanted),
        filled_pair(kept, wanted, device, torch.int32),
    )
