"""What goes into a decoder, what comes out, and what it says when it cannot."""

from typing import NamedTuple

import numpy as np
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


def unreadable(images: Images, reasons: dict[str, str]) -> ValueError:
    """Return the error that says which images cannot be decoded, and why."""
    listed = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return ValueError(
        f"{images.root}: expected images that can be decoded, got {listed}; repair or remove them, "
        "or leave such images out with --data.broken skip (evaluate: --broken skip)"
    )
