"""The specification, continued: the losses of DropPos, MAE and Beyond Masking.

Shape legend: B images, V visible patches, L positions that a patch may be given, K predicted patches, N
patches of an image, C channels, p pixels along a patch.
"""

import torch
from torch import Tensor

from stopfast.kernels.arguments import (
    SMALLEST_SPREAD,
    PatchTarget,
    Smoothing,
    check_patches,
    check_positions,
)


def position_map(smoothing: Smoothing, sigma: Tensor) -> Tensor:
    """How much of a position's label lies on each position (DropPos, Wang et al., NeurIPS 2023).

    ``w[i, j] = exp(-d2(i, j) / sigma**2)``, d2 being the squared distance on the grid, over ``S[j]``
    ("column", the published behaviour) or ``S[i]`` ("row", the paper's), ``S = w.sum(1)``. A sigma of 0
    gives the identity.

    Args:
        smoothing: the grid, of N positions, and the norm.
        sigma: floating scalar, in patches.

    Returns:
        [N, N] in sigma's dtype, row i for label i.
    """
    rows, columns = smoothing.grid
    place = torch.arange(rows * columns, device=sigma.device)
    down, right = (x[:, None] - x for x in (place // columns, place % columns))
    squared = down.square() + right.square()
    weight = torch.exp(-squared / sigma.square().clamp_min(SMALLEST_SPREAD))
    total = weight.sum(1)
    return weight / (total if smoothing.norm == "column" else total[:, None])


def position_cross_entropy(
    logits: Tensor, index: Tensor, weight: Tensor, sigma: Tensor, smoothing: Smoothing
) -> Tensor:
    """Weighted mean cross-entropy between predicted positions and smoothed labels (DropPos).

    ``-sum_j map[i, j] log_softmax(logits)[j]`` over the L positions there are logits for, i being the
    true one. The part of a label that lies beyond them, on a larger grid, is dropped and not made up for.
    With ``ignore_confident`` a patch counts for nothing once its probability of the true position is at
    least ``map[i, i]``.

    Args:
        logits: [B, V, L].
        index: int64 [B, V], the true positions.
        weight: fp32 [B, V]; no gradient goes through it.
        sigma: fp32 scalar on the same device.
        smoothing: see :func:`position_map`; its grid has at least L positions.

    Returns:
        The sum of the weighted entropies over the sum of the weights that counted, 0 where that sum is
        0: a scalar in the wider of fp32 and the logits' dtype.

    Raises:
        ValueError: arguments whose shapes do not fit each other, or an unknown norm.
    """
    check_positions(logits, index, weight, sigma, smoothing)
    dtype = torch.promote_types(torch.float32, logits.dtype)
    likely = logits.to(dtype).log_softmax(-1)
    smoothed = position_map(smoothing, sigma.detach().to(dtype))[:, : logits.shape[-1]]
    entropy = -(smoothed[index] * likely).sum(-1)
    weight = weight.detach().to(dtype)
    if smoothing.ignore_confident:
        true = likely.detach().gather(-1, index[..., None])[..., 0].exp()
        weight = torch.where(true >= smoothed.diagonal()[index], 0.0, weight)
    total = weight.sum()
    return (weight * entropy).sum() / torch.where(total == 0, 1.0, total)


def patch_mse(
    prediction: Tensor, images: Tensor, index: Tensor | None, target: PatchTarget
) -> Tensor:
    """Mean squared error between predicted patches and the images' own, normalised.

    "patch": ``(v - mean) / sqrt(var + eps)`` over all values of a patch (MAE, He et al., CVPR 2022).
    "channel": ``(v - mean) / (sqrt(var) + eps)`` over each channel of a patch, with an eps of its own
    (Beyond Masking, Tian et al., 2022, published behaviour). Variances are unbiased.

    Args:
        prediction: [B, K, p * p * C], the values of a patch in the order (row, column, channel).
        images: [B, C, H, W]; no gradient goes through them.
        index: int64 [B, K], which of the N patches, counted by rows, is predicted; None: all, in order.
        target: patch size and norm.

    Returns:
        The mean over images, patches and values, 0 where there are none: a scalar in the wider of fp32
        and the prediction's dtype.

    Raises:
        ValueError: arguments whose shapes do not fit each other, or a norm without its eps.
    """
    check_patches(prediction, images, index, target)
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    if not prediction.numel():
        return prediction.to(dtype).sum()
    size = target.patch_size
    patches = images.detach().to(dtype).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # [B, N, p * p, C]
    if index is not None:
        chosen = index[:, :, None, None].expand(-1, -1, *patches.shape[2:])
        patches = patches.gather(1, chosen)
    if target.norm != "none":
        axes = (2, 3) if target.norm == "patch" else 2
        variance, mean = torch.var_mean(patches, axes, keepdim=True)
        # Filled and not copied from the host, which a captured graph could not replay.
        eps = torch.cat([mean.new_full((1,), each) for each in target.eps])
        scale = (variance + eps).sqrt() if target.norm == "patch" else variance.sqrt() + eps
        patches = (patches - mean) / scale
    error = prediction.to(dtype) - patches.flatten(2)
    return error.square().mean()
