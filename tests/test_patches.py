"""Images as rows of patches, and images at another size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stopfast.config import Transforms
from stopfast.degradations import ZoomedIn, ZoomedOut
from stopfast.degradations.resizing import area_resize, mirror_pad
from stopfast.kernels.ops import EAGER, PatchTarget
from stopfast.patches import normalised_patches, patchify, unpatchify

EPS = tuple(1e-6 / std for std in Transforms().std)  # 1e-6 of pixels that are not normalised
TARGET = PatchTarget(16, "channel", EPS)
SIZE, SMALL_SIZE = (224, 224), (32, 48)


@pytest.mark.spec(42)
def test_patches_are_rows_of_pixels_and_go_back():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(patches[:, 4, (1 * 4 + 2) * 3 + 1], images[:, 1, 5, 6])
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


@pytest.mark.spec(43)
def test_targets_are_normal_in_every_channel_of_a_patch():
    images = 3 + torch.randn(2, 3, *SIZE) * torch.tensor([1.0, 2.0, 0.1])[:, None, None]
    pixels = normalised_patches(images, TARGET).unflatten(2, (-1, 3))
    torch.testing.assert_close(pixels.mean(2), torch.zeros(2, 196, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(2), torch.ones(2, 196, 3), atol=1e-4, rtol=0)
    nothing, images = torch.zeros(2, 196, 768), torch.randn(2, 3, 288, 288)
    center, _ = ZoomedIn(SIZE, TARGET).losses(nothing, images, None, EAGER)
    assert center.item() == pytest.approx(255 / 256, rel=1e-5)


@pytest.mark.parametrize("norm", ["none", "patch", "channel"])
def test_targets_that_are_resized_are_those_that_are_compared(norm):
    target = PatchTarget(4, norm, {"none": (), "patch": (1e-6,), "channel": EPS}[norm])
    images = torch.randn(2, 3, *SMALL_SIZE, dtype=torch.float64)
    patches = normalised_patches(images, target)
    assert EAGER.patch_mse(patches, images, None, target).item() < 1e-24


@pytest.mark.spec(49)
@pytest.mark.parametrize(
    "sides", [(288, 224), (224, 288), (160, 224), (224, 160), (48, 36), (7, 7)]
)
def test_area_resize_is_adaptive_average_pooling(sides):
    old, new = sides
    images = torch.randn(1, 3, old, old + 32, requires_grad=True)
    size = (new, new + 64)
    got, expected = area_resize(images, size), F.adaptive_avg_pool2d(images, size)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad(x, images, weights)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-5)


@pytest.mark.spec(45)
@pytest.mark.parametrize("place", [(0, 0), (5, 9), (63, 63), (0, 31), (63, 0)])
def test_zoomed_out_is_symmetric_padding(place):
    left, top = place
    images = torch.randn(2, 3, 160, 160)
    expected = np.pad(
        images.numpy(), ((0, 0), (0, 0), (top, 64 - top), (left, 64 - left)), mode="symmetric"
    )
    got = ZoomedOut(SIZE, TARGET).view(images, torch.tensor(place))
    np.testing.assert_array_equal(got.numpy(), expected)


def test_the_largest_margin_is_mirrored_to_its_end():
    images = torch.arange(8.0).expand(1, 3, 8, 8)
    for left in range(8):
        got = mirror_pad(images, torch.tensor([left, 7 - left]), (16, 16))
        expected = np.pad(np.arange(8.0), (left, 8 - left), mode="symmetric")
        np.testing.assert_array_equal(got[0, 0, 0].numpy(), expected)
