"""Degradations that leave all in its place, or nearly: none, and (c), (d) and (e) of Beyond Masking."""

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from stopfast.degradations.checks import check_images, check_size
from stopfast.degradations.drawing import of_images, of_run, of_step
from stopfast.kernels.ops import Ops, PatchTarget

Range = tuple[float, float]


class Undegraded:
    """See the image as it is, as MAE does: what there is to predict is masked.

    Args:
        size: height and width of the images.
        target: what a patch is before it is predicted.

    Raises:
        ValueError: a size that is no multiple of the patch size.
    """

    channels = 3
    predicts_all = False

    def __init__(self, size: tuple[int, int], target: PatchTarget) -> None:
        check_size(size, target.patch_size)
        self.size = self.source = size
        self.target = target

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor | None:
        """Nothing is random."""
        return None

    def view(self, images: Tensor, draws: Tensor | None) -> Tensor:
        """Return the images."""
        check_images(images, self.source)
        return images

    def whole(self, images: Tensor) -> Tensor:
        """Return the images."""
        check_images(images, self.source)
        return images

    def loss(
        self,
        prediction: Tensor,
        images: Tensor,
        draws: Tensor | None,
        masked: Tensor | None,
        ops: Ops,
    ) -> Tensor:
        """Return the mean squared error of the patches ``masked``, or of all."""
        return ops.patch_mse(prediction, images, masked, self.target)


class Distorted(Undegraded):
    """See every point drawn towards a centre by the square of its distance: task (c) (published behaviour).

    A pixel at g of [-1, 1]^2 shows what lay at ``g + m |c - g| (c - g)``, with a centre c and a magnitude m
    of each image.

    Args:
        size: height and width of the images.
        target: what a patch is before it is predicted.
        strength: least and greatest m; at most 1 / sqrt(8), with which everything shown lies inside.

    Raises:
        ValueError: a size or a strength that cannot be.
    """

    def __init__(
        self, size: tuple[int, int], target: PatchTarget, strength: Range = (0.15, 0.25)
    ) -> None:
        super().__init__(size, target)
        if not 0 <= strength[0] <= strength[1] <= 1 / math.sqrt(8):
            raise ValueError(
                f"expected strength 0 <= low <= high <= {1 / math.sqrt(8):.3f}, got {strength}"
            )
        self.strength = strength

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor:
        """Draw x and y of the centre, in [-1, 1), and m, of each image: fp32 [B, 3]."""
        drawn = of_images(seed, sample_ids, 3)
        low, high = self.strength
        return torch.cat([2 * drawn[:, :2] - 1, low + (high - low) * drawn[:, 2:]], 1).float()

    def grid(self, draws: Tensor) -> Tensor:
        """Return the places (x, y) in [-1, 1]^2 that the pixels show, [B, H, W, 2]."""
        y, x = (torch.linspace(-1, 1, n, device=draws.device, dtype=draws.dtype) for n in self.size)
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
        towards = draws[:, None, None, :2] - place
        distance = torch.linalg.vector_norm(towards, dim=3, keepdim=True)
        return place + draws[:, None, None, 2:] * distance * towards

    def view(self, images: Tensor, draws: Tensor) -> Tensor:
        """Interpolate between the pixels at :meth:`grid`."""
        check_images(images, self.source)
        with torch.autocast(images.device.type, enabled=False):
            return F.grid_sample(images, self.grid(draws.to(images.dtype)), align_corners=True)


class Blurred(Undegraded):
    """See the image through a random 7 x 7 convolution of its own: task (d), **reconstructed**.

    The operator that was released makes seven channels of one pixel each, which no encoder takes. Its
    constants (1/49, padding 3, seven) stand for 7 x 7 kernels with weights N(1/49, std^2), drawn anew for
    every image, and the bias that a convolution begins with, applied to normalised images.

    Args:
        size: height and width of the images.
        target: what a patch is before it is predicted.
        std: standard deviation of the weights.
        mixed: sum over all three channels, which makes an image nearly gray and three times as bright;
            otherwise each channel has a kernel of its own, no bias, and on average its brightness.
        seed: the run's, which decides the bias: uniform within 1 / sqrt(147).

    Raises:
        ValueError: a size or a std that cannot be.
    """

    _KERNEL = 7

    def __init__(
        self,
        size: tuple[int, int],
        target: PatchTarget,
        std: float = 0.02,
        mixed: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(size, target)
        if std < 0:
            raise ValueError(f"expected std >= 0, got {std}")
        self.std, self.mixed = std, mixed
        bound = 1 / math.sqrt(3 * self._KERNEL**2)
        self.bias = [bound * (2 * u - 1) for u in of_run(seed, 3)] if mixed else None

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor:
        """Draw the weights of each image: fp32 [B, 3, 3, 7, 7], or [B, 3, 1, 7, 7] if nothing is mixed."""
        shape = 3, 3 if self.mixed else 1, self._KERNEL, self._KERNEL
        # Half a step up from multiples of 2**-32, so that none is 0, whose normal is infinite.
        drawn = torch.special.ndtri(of_images(seed, sample_ids, math.prod(shape)) + 2.0**-33)
        return (self._KERNEL**-2 + self.std * drawn).float().unflatten(1, shape)

    def view(self, images: Tensor, draws: Tensor) -> Tensor:
        """Convolve, with zeros beyond the image."""
        check_images(images, self.source)
        batch = images.shape[0]
        groups = batch if self.mixed else 3 * batch
        with torch.autocast(images.device.type, enabled=False), _exact_convolutions():
            stacked = images.reshape(1, 3 * batch, *self.size)
            weights = draws.flatten(0, 1).to(images.dtype)
            blurred = F.conv2d(stacked, weights, padding=self._KERNEL // 2, groups=groups)
            blurred = blurred.view_as(images)
        if self.bias is None:
            return blurred
        # Filled and not copied from the host, which a captured graph could not replay.
        bias = torch.cat([blurred.new_full((1,), each) for each in self.bias])
        return blurred + bias[:, None, None]


def _exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN as it is set, but for TF32, which it takes for fp32 by default: images would be off by 1e-3."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


class Decolorized(Undegraded):
    """See a random weighting of the three channels: task (e) (published behaviour).

    Args:
        size: height and width of the images.
        target: what a patch is before it is predicted.
        channels: 1 for one gray channel, as published, whose encoder fits no image of three; 3 for the
            same gray in each.

    Raises:
        ValueError: a size or a number of channels that cannot be.
    """

    _MOST = 0.667  # the weights sum to 1 on average

    def __init__(self, size: tuple[int, int], target: PatchTarget, channels: int = 1) -> None:
        super().__init__(size, target)
        if channels not in (1, 3):
            raise ValueError(f"expected 1 or 3 channels, got {channels}")
        self.channels = channels

    def draws(self, seed: Tensor, sample_ids: Tensor) -> Tensor:
        """Draw the channels' weights, which all images of a step share: fp32 [3], in [0, 0.667)."""
        return (self._MOST * of_step(seed, 3)).float()

    def view(self, images: Tensor, draws: Tensor) -> Tensor:
        """Weigh the channels."""
        check_images(images, self.source)
        gray = (images * draws[:, None, None]).sum(1, keepdim=True)
        return gray.expand(-1, self.channels, -1, -1)
