"""Images as rows of patches, in the order (row, column, channel) of MAE and Beyond Masking, and back."""

import torch
from torch import Tensor

from stopfast.kernels.ops import PatchTarget


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        images: [B, C, H, W]; H and W are multiples of ``patch_size``.
        patch_size: side of a patch, in pixels.

    Returns:
        [B, N, patch_size ** 2 * C], patches counted by rows.
    """
    tiles = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches together again: the inverse of :func:`patchify`.

    Args:
        patches: [B, N, patch_size ** 2 * C].
        patch_size: side of a patch, in pixels.
        grid: rows and columns, N in all.

    Returns:
        [B, C, H, W].
    """
    tiles = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalised_patches(images: Tensor, target: PatchTarget) -> Tensor:
    """Return the pixels of every patch as ``target`` has them, for those that are resized afterwards.

    Where they are only compared with a prediction, ``Ops.patch_mse`` does both at once and makes no copy.

    Args:
        images: [B, C, H, W], normalised by channel as the loader makes them.
        target: patch size and norm; see ``patch_mse`` in ``kernels/reference_losses.py``.

    Returns:
        [B, N, p * p * C] in the images' dtype, without a gradient.
    """
    patches = patchify(images.detach(), target.patch_size)
    if target.norm == "none":
        return patches
    pixels = patches.unflatten(2, (-1, images.shape[1]))
    mean, scale = _statistics(pixels, target)
    return ((pixels - mean) / scale).flatten(2)


def unnormalised_patches(patches: Tensor, images: Tensor, target: PatchTarget) -> Tensor:
    """Give patches the mean and the spread of those of the images: undo :func:`normalised_patches`.

    Args:
        patches: [B, N, p * p * C], such as predictions of normalised patches.
        images: [B, C, H, W], of which they are predictions.
        target: how the patches of the images were normalised.

    Returns:
        As ``patches``.
    """
    if target.norm == "none":
        return patches
    pixels = patchify(images, target.patch_size).unflatten(2, (-1, images.shape[1]))
    mean, scale = _statistics(pixels, target)
    return (patches.unflatten(2, (-1, images.shape[1])) * scale + mean).flatten(2)


def _statistics(pixels: Tensor, target: PatchTarget) -> tuple[Tensor, Tensor]:
    """What is subtracted from the pixels of patches [B, N, p * p, C], and what they are divided by."""
    axes = (2, 3) if target.norm == "patch" else 2
    variance, mean = torch.var_mean(pixels, axes, keepdim=True)
    # Filled and not copied from the host, which a captured graph could not replay.
    eps = torch.cat([mean.new_full((1,), each) for each in target.eps])
    return mean, (variance + eps).sqrt() if target.norm == "patch" else variance.sqrt() + eps
