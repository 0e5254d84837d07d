"""What encoders see of images, and what is predicted from it, as pixels. No drawing here."""

from typing import NamedTuple

import torch
from torch import Tensor

from stopfast.config import Transforms
from stopfast.degradations import Decolorized, Degradation, ZoomedIn, ZoomedOut
from stopfast.degradations.resizing import area_resize
from stopfast.kernels.ops import PatchTarget
from stopfast.objectives.reconstruction import Reconstruction, ReconstructionDraws
from stopfast.patches import patchify, unnormalised_patches, unpatchify
from stopfast.report.samples import to_pixels

STRETCHED = "What is seen with values beyond black and white is stretched to them, image by image."
Frame = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


class Seen(NamedTuple):
    """What an encoder sees of images."""

    pixels: Tensor
    """fp32 [B, H, W, 3] in 0..1."""
    shown: Tensor
    """bool [B, H, W]: where patches are not masked."""
    inside: Frame | None
    """zoomed-out: where in it the images lie."""


class Predicted(NamedTuple):
    """What is predicted of images."""

    pixels: Tensor
    """fp32 [B, H, W, 3] in 0..1."""
    truth: Tensor
    """The same of the images themselves."""
    judged: Tensor
    """bool [B, H, W]: where the loss asks for it."""
    seen: Frame | None
    """zoomed-in: what of it the encoder sees, if not masked."""


def view_pixels(view: Tensor, degradation: Degradation | None, transforms: Transforms) -> Tensor:
    """Return what is seen of images, [B, C, H, W], as pixels [B, H, W, 3] in 0..1.

    Brightness that leaves 0..1, as a blur may make it, is stretched to it, image by image. A weighted sum
    of channels has no colour, so it gets none from what the channels were normalised with.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.mean, transforms.std))
    if isinstance(degradation, Decolorized):
        mean, std = mean.mean(), std.mean()
    pixels = (view.float() * std + mean).expand(-1, 3, -1, -1)
    low = pixels.amin((1, 2, 3), keepdim=True).clamp(max=0)
    high = pixels.amax((1, 2, 3), keepdim=True).clamp(min=1)
    return ((pixels - low) / (high - low)).permute(0, 2, 3, 1)


def seen(objective: Reconstruction, images: Tensor, draws: ReconstructionDraws) -> Seen:
    """Return what the encoder of MAE or Beyond Masking sees of images [B, 3, *source]."""
    degradation, drawn = objective.degradation, draws.degradation
    view = degradation.view(images, drawn)
    pixels = view_pixels(view, degradation, objective.transforms)
    inside = None
    if isinstance(degradation, ZoomedOut) and drawn is not None:
        left, top = drawn.tolist()
        height, width = degradation.source
        inside = (left, top, width, height)
    return Seen(pixels, ~_masked(objective, draws, len(images)), inside)


@torch.inference_mode()
def predicted(
    objective: Reconstruction, target: PatchTarget, images: Tensor, draws: ReconstructionDraws
) -> Predicted:
    """Return what MAE or Beyond Masking predicts of images [B, 3, *source].

    Normalised patches get the mean and the spread of the true ones back, which nobody predicts. Of a
    zoomed-in image, the middle is compared with the patches of the view and the margin with those of the
    whole, so each gets those of its own.
    """
    degradation, transforms = objective.degradation, objective.transforms
    patches = objective.reconstruct(images, draws).float()
    made = predicted_images(degradation, target, patches, images)
    judged, frame = _masked(objective, draws, len(images)), None
    truth = degradation.whole(images)
    if objective.visible == objective.encoder.patch_embed.num_patches:
        judged = torch.ones_like(judged)
    if isinstance(degradation, ZoomedIn):
        truth, margin = images, degradation.margin
        height, width = degradation.size
        frame = (margin, margin, width, height)
        judged = torch.nn.functional.pad(judged, (margin,) * 4, value=True)
    elif isinstance(degradation, ZoomedOut):
        # Masks are of the canvas with its mirrors; what lies under them is a matter of its place.
        judged = torch.ones_like(judged)
    return Predicted(to_pixels(made, transforms), to_pixels(truth, transforms), judged, frame)


def predicted_images(
    degradation: Degradation, target: PatchTarget, patches: Tensor, images: Tensor
) -> Tensor:
    """Return predicted patches [B, N, p * p * 3] as images, normalised by channel as the true ones are.

    Args:
        degradation: what the patches stand for.
        target: how they are normalised.
        patches: the prediction of every patch.
        images: fp32 [B, 3, *source], the true ones.

    Returns:
        fp32 [B, 3, height, width], *source for zoomed-in images and the encoder's size otherwise.
    """
    size = target.patch_size
    height, width = degradation.size
    grid = height // size, width // size

    def together(predicted: Tensor, true: Tensor) -> Tensor:
        return unpatchify(unnormalised_patches(predicted, true, target), size, grid)

    made = together(patches, degradation.whole(images))
    if not isinstance(degradation, ZoomedIn):
        return made
    made = area_resize(made, degradation.source)
    field = area_resize(unpatchify(patches, size, grid), degradation.source)
    middle = together(patchify(degradation.view(field), size), degradation.view(images))
    top = left = degradation.margin
    made[..., top : top + height, left : left + width] = middle
    return made


def _masked(objective: Reconstruction, draws: ReconstructionDraws, count: int) -> Tensor:
    """bool [count, H, W]: the pixels of the masked patches of what the encoder sees."""
    embed = objective.encoder.patch_embed
    masked = torch.zeros(count, embed.num_patches, dtype=torch.bool)
    if draws.order is not None:
        masked.scatter_(1, draws.order[:, objective.visible :], True)
    tiles = masked.unflatten(1, embed.grid)
    return tiles.repeat_interleave(embed.patch_size, 1).repeat_interleave(embed.patch_size, 2)
