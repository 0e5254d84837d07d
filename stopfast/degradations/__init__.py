"""What the encoder sees of an image, and what a prediction is compared with: MAE's and Beyond Masking's."""

from typing import Any, Protocol

from torch import Tensor

from stopfast.config import DegradeConfig
from stopfast.degradations.spoilt import Blurred, Decolorized, Distorted, Undegraded
from stopfast.degradations.zoomed import ZoomedIn, ZoomedOut
from stopfast.kernels.ops import Ops, PatchTarget

__all__ = [
    "Blurred", "Decolorized", "Degradation", "Distorted", "Undegraded", "ZoomedIn", "ZoomedOut",
    "degradation",
]  # fmt: skip


class Degradation(Protocol):
    """What the encoder sees of an image, and what its prediction is compared with.

    All of it is batched, runs where the images are, and draws nothing that it is not given.
    """

    size: tuple[int, int]
    """Height and width that the encoder sees."""
    source: tuple[int, int]
    """Height and width of the images that ``view``, ``whole`` and ``loss`` take."""

    @property
    def channels(self) -> int:
        """Channels of the encoder's input."""
        ...

    @property
    def predicts_all(self) -> bool:
        """Whether ``loss`` takes the prediction of every patch, or of the wanted ones only."""
        ...

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor | None:
        """Draw what is random in one micro-batch, a pure function of what it belongs to.

        Args:
            seed: int64 [2], the run's seed and the step, on the device of the result.
            sample_ids: int64 [B], places in the step's global batch. What a whole step shares does not
                depend on them.

        Returns:
            fp32 or int64, or None where nothing is random.
        """
        ...

    def view(self, images: Tensor, draws: Any) -> Tensor:  # noqa: ANN401 (Tensor or None, by the class)
        """Return what the encoder sees of images [B, 3, *source]: [B, channels, *size].

        Raises:
            ValueError: images of another shape.
        """
        ...

    def whole(self, images: Tensor) -> Tensor:
        """Return what the patches of a prediction stand for, undegraded: [B, 3, *size].

        Raises:
            ValueError: images of another shape.
        """
        ...

    def loss(
        self,
        prediction: Tensor,
        images: Tensor,
        draws: Any,  # noqa: ANN401 (Tensor or None, by the class)
        masked: Tensor | None,
        ops: Ops,
    ) -> Tensor:
        """Compare a prediction with the images; a scalar in at least fp32, under autocast too.

        Args:
            prediction: [B, N, p * p * 3] if ``predicts_all``; otherwise [B, K, p * p * 3].
            images: [B, 3, *source]; no gradient goes through them.
            draws: what ``view`` was given.
            masked: int64 [B, K], the patches whose errors count; None for all N, in order.
            ops: implementation of ``patch_mse``.
        """
        ...


def degradation(
    settings: DegradeConfig, size: tuple[int, int], target: PatchTarget, seed: int = 0
) -> Degradation:
    """Build what the settings name.

    Args:
        settings: kind and numbers of the degradation.
        size: height and width that the encoder sees.
        target: what a patch is before it is predicted.
        seed: the run's.

    Raises:
        ValueError: settings that do not fit the size.
    """
    match settings.kind:
        case "none":
            return Undegraded(size, target)
        case "zoomed-in":
            return ZoomedIn(size, target, settings.margin, settings.edge_weight)
        case "zoomed-out":
            return ZoomedOut(size, target, settings.margin)
        case "distorted":
            return Distorted(size, target, settings.strength)
        case "blurred":
            return Blurred(size, target, settings.blur_std, settings.mix_channels, seed)
        case "decolorized":
            return Decolorized(size, target, settings.gray_channels)
