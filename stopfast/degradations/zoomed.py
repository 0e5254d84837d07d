"""Beyond Masking's tasks (a) and (b): the encoder sees a part of the field that is predicted, or more."""

from torch import Tensor

from stopfast.block import take_rows
from stopfast.degradations.checks import check_images, check_size
from stopfast.degradations.drawing import of_step
from stopfast.degradations.resizing import area_resize, mirror_pad
from stopfast.kernels.ops import Ops, PatchTarget
from stopfast.patches import normalised_patches, patchify, unpatchify


class ZoomedIn:
    """See the middle and predict the whole: task (a), with or without masks (published behaviour).

    The patches predicted are those of the whole field at the size of the view. Resized to the field, their
    middle is compared with the view's patches, and their four edges with those of the whole.

    Args:
        size: height and width that the encoder sees.
        target: what a patch is before it is predicted.
        margin: pixels on each side that are not seen.
        edge_weight: share of the loss that is the edges'; the middle has the rest.

    Raises:
        ValueError: a size that is no multiple of the patch size, no margin, or a weight beyond 0..1.
    """

    channels = 3
    predicts_all = True

    def __init__(
        self,
        size: tuple[int, int],
        target: PatchTarget,
        margin: int = 32,
        edge_weight: float = 0.2,
    ) -> None:
        self.grid = check_size(size, target.patch_size)
        if margin < 1:
            raise ValueError(f"expected margin >= 1, got {margin}")
        if not 0 <= edge_weight <= 1:
            raise ValueError(f"expected edge_weight in 0..1, got {edge_weight}")
        self.size, self.target = size, target
        self.source = (size[0] + 2 * margin, size[1] + 2 * margin)
        self.margin, self.edge_weight = margin, edge_weight

    def draws(self, seed: Tensor, sample_ids: Tensor) -> None:
        """Nothing is random."""

    def view(self, images: Tensor, draws: None = None) -> Tensor:
        """Cut out the middle."""
        check_images(images, self.source)
        height, width = self.size
        return images[..., self.margin : self.margin + height, self.margin : self.margin + width]

    def whole(self, images: Tensor) -> Tensor:
        """Resize the whole field to the size that the encoder sees."""
        check_images(images, self.source)
        return area_resize(images, self.size)

    def loss(
        self, prediction: Tensor, images: Tensor, draws: None, masked: Tensor | None, ops: Ops
    ) -> Tensor:
        """Weigh the two :meth:`losses`."""
        center, edge = self.losses(prediction, images, masked, ops)
        return (1 - self.edge_weight) * center + self.edge_weight * edge

    def losses(
        self, prediction: Tensor, images: Tensor, masked: Tensor | None, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """Return the errors of the middle and of the edges, unweighted.

        The middle's is the mean square over the view's patches ``masked``, or all. The edges' is the sum of
        the mean squares of four strips: top, bottom, and left and right between them. Its target is
        normalised at the size of the prediction, and both are resized to the field then.
        """
        size = self.target.patch_size
        field = self._field(prediction)
        predicted = patchify(self.view(field), size)
        if masked is not None:
            predicted = take_rows(predicted, masked)
        center = ops.patch_mse(predicted, self.view(images), masked, self.target)
        truth = self._field(normalised_patches(self.whole(images), self.target))
        error = (field - truth).square()
        # A weight for each pixel: one pass over the field, where the gradients of slices would take four.
        edge = (error * self._strips(error)).sum() / max(1, error.shape[0] * error.shape[1])
        return center, edge

    def _strips(self, like: Tensor) -> Tensor:
        """Return what a pixel weighs in the sum of the four strips' means, [*source]."""
        (height, width), margin = self.source, self.margin
        weights = like.new_zeros(self.source)
        weights[:, :margin] = weights[:, -margin:] = 1 / (margin * (height - 2 * margin))
        weights[:margin] = weights[-margin:] = 1 / (margin * width)
        return weights

    def _field(self, prediction: Tensor) -> Tensor:
        """Predicted patches [B, N, p * p * 3] as an image of the whole field [B, 3, *source]."""
        return area_resize(unpatchify(prediction, self.target.patch_size, self.grid), self.source)


class ZoomedOut:
    """See a small image between mirrors and predict it large: task (b) (published behaviour).

    The mirrored canvas of prediction and target is compared patch by patch, so that a masked patch stands
    for what the encoder was not shown there.

    Args:
        size: height and width that the encoder sees.
        target: what a patch is before it is predicted.
        margin: half of what the canvas has more than the image, along each axis.

    Raises:
        ValueError: a size that is no multiple of the patch size, no margin, or one so large that a mirror
            is longer than the image.
    """

    channels = 3
    predicts_all = True

    def __init__(self, size: tuple[int, int], target: PatchTarget, margin: int = 32) -> None:
        self.grid = check_size(size, target.patch_size)
        if not 1 <= margin <= min(size) // 4:
            raise ValueError(f"expected margin in 1..{min(size) // 4}, got {margin}")
        self.size, self.target, self.margin = size, target, margin
        self.source = (size[0] - 2 * margin, size[1] - 2 * margin)

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor:
        """Draw where a step's images lie: int64 [2], left and top, each of 0 .. 2 * margin - 1."""
        return (of_step(seed, 2) * (2 * self.margin)).long()

    def view(self, images: Tensor, draws: Tensor) -> Tensor:
        """Fill the canvas with images and mirrors."""
        check_images(images, self.source)
        return mirror_pad(images, draws, self.size)

    def whole(self, images: Tensor) -> Tensor:
        """Resize the images to the canvas."""
        check_images(images, self.source)
        return area_resize(images, self.size)

    def loss(
        self, prediction: Tensor, images: Tensor, draws: Tensor, masked: Tensor | None, ops: Ops
    ) -> Tensor:
        """Return the mean squared error of the canvas's patches ``masked``, or of all."""
        size = self.target.patch_size
        patches = normalised_patches(self.whole(images), self.target)
        small, truth = (
            area_resize(unpatchify(p, size, self.grid), self.source) for p in (prediction, patches)
        )
        # The mirror of the difference is the difference of the mirrors, and one channel will do for it.
        error = mirror_pad((small - truth).square().mean(1, keepdim=True), draws, self.size)
        error = patchify(error, size)
        if masked is not None:
            error = take_rows(error, masked)
        return error.sum() / max(1, error.numel())
