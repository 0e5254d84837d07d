"""What a training loop knows of an objective."""

from typing import Protocol, TypeVar

from torch import Tensor, nn

from stopfast.config import Transforms
from stopfast.optim import OptimizerRecipe

Draws = TypeVar("Draws")


class Objective(Protocol[Draws]):
    """A pre-training task. The loop adds no knowledge of its own, and no branch on its name.

    Steps count from 1. ``Draws`` is whatever is random in one micro-batch, such as masks and noise.
    """

    transforms: Transforms
    """How photographs become the images that ``loss`` takes."""

    def modules(self) -> dict[str, nn.Module]:
        """The modules whose weights make a checkpoint, by the name they are saved under."""
        ...

    def draws(self, step: int, batch_size: int, part: slice) -> Draws:
        """Draw for images ``part`` of a step's global batch of ``batch_size``: a pure function."""
        ...

    def loss(self, images: Tensor, draws: Draws) -> Tensor:
        """The loss (a scalar) of images [B, C, H, W], B being the length of the part drawn for."""
        ...

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student, teacher) pairs to average after each update; empty where there is no teacher."""
        ...

    def optimizer_recipe(self) -> OptimizerRecipe:
        """Parameter groups and clipping."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of images, as evaluation takes them: what monitors watch."""
        ...

    def outputs(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """What ``loss`` computes on its way, by name: what a verification compares."""
        ...

    def measures(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Scalars that tell more than the loss, by name: what monitors write down. May be empty."""
        ...

    def scalars(self, step: int) -> dict[str, float]:
        """``lr``, ``weight_decay`` and, with teachers, ``momentum`` of a step."""
        ...
