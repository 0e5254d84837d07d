"""What goes into a decoder, what comes out, and what it says when it cannot."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stopfast.data.draws import Draws
from stopfast.data.images import Images


class Encoded(NamedTuple):
    """Images as stored, and what is to be done to them."""

    samples: np.ndarray
    """int64 [B], the images' numbers."""
    data: list[bytes]
    """The files' bytes."""
    draws: Draws


class Batch(NamedTuple):
    """Images and what they are."""

    images: Tensor
    """fp32 [B, 3, H, W] on the loader's device, normalised."""
    samples: Tensor
    """int64 [B] on the CPU, the images' numbers."""


def host_batch(*shape: int) -> Tensor:
    """Return uninitialised fp32 memory of the host that the kernel may give in huge pages.

    numpy asks for these where much is allocated, torch does not: to touch 38 MB in pages of 4 KiB costs a
    tenth of what decoding as many pixels does.
    """
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def unreadable(images: Images, reasons: dict[str, str]) -> ValueError:
    """Return the error that says which images cannot be decoded, and why."""
    listed = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return ValueError(
        f"{images.root}: expected images that can be decoded, got {listed}; repair or remove them, "
        "or leave such images out with --data.broken skip (evaluate: --broken skip)"
    )
