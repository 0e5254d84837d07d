"""Beyond Masking's degradations: what the encoder sees, and what its prediction is compared with."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.engine.agreement import relative_error
from stopfast.config import DegradeConfig, Transforms
from stopfast.degradations import (
    Blurred,
    Decolorized,
    Distorted,
    Undegraded,
    ZoomedIn,
    ZoomedOut,
    degradation,
)
from stopfast.kernels.ops import EAGER, FUSED, PatchTarget
from tests.golden_files import TOLERANCE

EPS = tuple(1e-6 / std for std in Transforms().std)  # 1e-6 of pixels that are not normalised
TARGET = PatchTarget(16, "channel", EPS)
SMALL = PatchTarget(4, "channel", EPS)
SIZE, SMALL_SIZE = (224, 224), (32, 48)
KINDS = {
    "none": Undegraded(SMALL_SIZE, SMALL),
    "zoomed-in": ZoomedIn(SMALL_SIZE, SMALL, margin=6),
    "zoomed-out": ZoomedOut(SMALL_SIZE, SMALL, margin=7),
    "distorted": Distorted(SMALL_SIZE, SMALL),
    "blurred": Blurred(SMALL_SIZE, SMALL),
    "decolorized": Decolorized(SMALL_SIZE, SMALL),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def seed(step: int = 1) -> Tensor:
    return torch.tensor([7, step])


def small_case(kind: str, batch: int = 2) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A small degradation, images, a prediction of what its loss takes, and the patches that count."""
    made = KINDS[kind]
    masked = torch.stack([torch.randperm(96)[:70] for _ in range(batch)])
    images = torch.randn(batch, 3, *made.source, dtype=torch.float64)
    rows = 96 if made.predicts_all else 70
    return made, images, torch.randn(batch, rows, 48, dtype=torch.float64), masked


def by_definition(kind: str, prediction: Tensor, images: Tensor, draws: Tensor, masked: Tensor):
    """The loss as the specification has it: torch's resize, numpy's padding, slices."""

    def cut(x):
        rows = [x[..., i : i + 4, j : j + 4] for i in range(0, 32, 4) for j in range(0, 48, 4)]
        return torch.stack([r.permute(0, 2, 3, 1).flatten(1) for r in rows], 1)

    def join(patches):
        image = patches.new_zeros(len(patches), 3, 32, 48)
        for n in range(96):
            i, j = 4 * (n // 12), 4 * (n % 12)
            image[..., i : i + 4, j : j + 4] = patches[:, n].view(-1, 4, 4, 3).permute(0, 3, 1, 2)
        return image

    def normal(patches):
        v = patches.unflatten(2, (16, 3))
        eps = torch.tensor(EPS, dtype=v.dtype)
        return ((v - v.mean(2, True)) / (v.std(2, keepdim=True) + eps)).flatten(2)

    def area(x, size):
        return F.interpolate(x, size=size, mode="area")

    def mean(error):
        return torch.stack([e[m].mean() for e, m in zip(error, masked, strict=True)]).mean()

    if kind == "zoomed-in":
        field = area(join(prediction), (44, 60))
        truth = area(join(normal(cut(area(images, (32, 48))))), (44, 60))
        center = (cut(field[..., 6:38, 6:54]) - normal(cut(images[..., 6:38, 6:54]))).square()
        strips = [(slice(0, 6), slice(None)), (slice(38, 44), slice(None))]
        strips += [(slice(6, 38), slice(0, 6)), (slice(6, 38), slice(54, 60))]
        edges = [F.mse_loss(field[:, :, i, j], truth[:, :, i, j]) for i, j in strips]
        return 0.8 * mean(center) + 0.2 * torch.stack(edges).sum()
    if kind == "zoomed-out":
        left, top = draws.tolist()
        places = torch.arange(18 * 34).view(18, 34)
        padded = np.pad(places.numpy(), ((top, 14 - top), (left, 14 - left)), mode="symmetric")

        def pad(x):
            return x.flatten(2)[..., torch.from_numpy(padded)]

        truth = area(join(normal(cut(area(images, (32, 48))))), (18, 34))
        return mean((cut(pad(area(join(prediction), (18, 34)))) - cut(pad(truth))).square())
    chosen = torch.stack([t[m] for t, m in zip(normal(cut(images)), masked, strict=True)])
    return F.mse_loss(prediction, chosen)


@kinds
def test_loss_and_gradient_equal_the_definition(kind):
    made, images, prediction, masked = small_case(kind)
    images.requires_grad_()
    draws = made.draws(seed(), torch.arange(2))
    everything = torch.arange(96).expand(2, -1)
    choices = [(masked, masked), (None, everything)] if made.predicts_all else [(masked, masked)]
    for given, counted in choices:
        ours, plain = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
        loss = made.loss(ours, images, draws, given, EAGER)
        expected = by_definition(kind, plain, images.detach(), draws, counted)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-11, atol=1e-15)
        assert images.grad is None  # targets carry none


@kinds
def test_on_the_device_with_fused_operations(kind, device):
    pytest.importorskip("triton")
    made, images, prediction, masked = small_case(kind)
    draws = made.draws(seed(), torch.arange(2))
    there = None if draws is None else made.draws(seed().to(device), torch.arange(2, device=device))
    plain = prediction.requires_grad_()
    expected = by_definition(kind, plain, images, draws, masked)
    expected.backward()
    ours = prediction.detach().float().to(device).requires_grad_()
    pixels = images.float().to(device)
    loss = made.loss(ours, pixels, there, masked.to(device), FUSED)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert relative_error(ours.grad.cpu(), plain.grad) < TOLERANCE
    if draws is not None:
        torch.testing.assert_close(there.cpu(), draws)
    seen = made.view(pixels, there).cpu()
    torch.testing.assert_close(seen, made.view(images.float(), draws), rtol=1e-5, atol=1e-4)


@pytest.mark.spec(41)
def test_published_values():
    masked = torch.arange(196)[torch.arange(196) % 4 != 0][None]

    def case(made):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, 3, *made.source, generator=generator)
        return 0.1 * torch.randn(1, 196, 768, generator=generator), images

    made = ZoomedIn(SIZE, TARGET)
    prediction, images = case(made)
    center, edge = made.losses(prediction, images, masked, EAGER)
    total = made.loss(prediction, images, None, masked, EAGER)
    got = [x.item() for x in (center, edge, total)]
    assert got == pytest.approx([1.0002724, 2.5248351, 1.3051850], rel=1e-6)

    made = ZoomedOut(SIZE, TARGET)
    prediction, images = case(made)
    places = torch.tensor([20, 37])
    got = [made.loss(prediction, images, places, m, EAGER).item() for m in (masked, None)]
    assert got == pytest.approx([0.4792811, 0.4830857], rel=1e-6)

    grid = Distorted(SIZE, TARGET).grid(torch.tensor([[0.5, -0.5, 0.2]]))[0]
    got = torch.stack([grid[0, 0], grid[0, 223], grid[223, 0]])
    expected = [[-0.525658, -0.841886], [0.929289, -0.929289], [-0.363604, 0.363604]]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.spec(44)
def test_zoomed_in_sees_the_middle_and_its_strips_and_middle_tile_the_field():
    made = ZoomedIn(SIZE, TARGET)
    images = torch.randn(1, 3, 288, 288)
    assert torch.equal(made.view(images), images[:, :, 32:256, 32:256])
    weights = made._strips(images.double())
    assert not made.view(weights.expand(1, 3, -1, -1)).any()
    assert (weights > 0).sum() == 288 * 288 - 224 * 224
    for strip in (weights[:32], weights[256:], weights[32:256, :32], weights[32:256, 256:]):
        assert len(strip.unique()) == 1 and strip.sum().item() == pytest.approx(1)


@pytest.mark.spec(44)
def test_zoomed_in_edges_reach_border_patches_and_the_middle_what_is_masked():
    made, images = ZoomedIn(SIZE, TARGET), torch.randn(2, 3, 288, 288)
    prediction = torch.randn(2, 196, 768, requires_grad=True)
    masked = torch.tensor(
        [[0, 15], [195, 90]]
    )  # of the view: rows 32 to 47 of the field, and so on
    center, edge = made.losses(prediction, images, masked, EAGER)

    def touched(loss):
        (gradient,) = torch.autograd.grad(loss, prediction, retain_graph=True)
        return gradient.abs().sum(2).view(2, 14, 14) > 0

    border = torch.ones(14, 14, dtype=torch.bool)
    border[2:12, 2:12] = False  # 32 of 288 pixels are 24.9 of 224
    assert torch.equal(touched(edge), border.expand(2, -1, -1))
    expected = torch.zeros(2, 14, 14, dtype=torch.bool)
    for image, numbers in enumerate(masked.tolist()):
        for number in numbers:
            first = [32 + 16 * n for n in divmod(number, 14)]
            # Pixel i of the field covers floor(7i/9) to ceil(7(i+1)/9) - 1 of the prediction.
            rows, columns = (
                slice(7 * i // 9 // 16, (-(-7 * (i + 16) // 9) - 1) // 16 + 1) for i in first
            )
            expected[image, rows, columns] = True
    assert torch.equal(touched(center), expected)
    total = made.loss(prediction, images, None, masked, EAGER)
    torch.testing.assert_close(total, 0.8 * center + 0.2 * edge)
    assert made.loss(prediction, images, None, None, EAGER).isfinite()  # nothing is masked


@pytest.mark.spec(45)
def test_zoomed_out_of_one_colour_has_nothing_to_predict_and_one_place_serves_a_step():
    made = ZoomedOut(SIZE, TARGET)
    images = torch.full((2, 3, 160, 160), 0.7)
    # Rounding, which the floor of 1e-6 makes larger.
    assert made.loss(torch.zeros(2, 196, 768), images, torch.tensor([5, 9]), None, EAGER) < 0.1
    places = torch.stack([made.draws(seed(step), torch.arange(4)) for step in range(1, 3000)])
    assert places.shape == (2999, 2)
    for side in places.T:
        assert set(side.tolist()) == set(range(64))
        assert abs(side.double().mean() - 31.5) < 4 * 18.5 / math.sqrt(2999)


@pytest.mark.spec(46)
def test_distorted_is_drawn_towards_its_centre():
    made = Distorted(SIZE, TARGET)
    images = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    still = torch.tensor([[0.3, -0.7, 0.0], [1.0, 0.2, 0.0]])
    torch.testing.assert_close(made.view(images, still), images, atol=1e-10, rtol=0)
    draws = made.draws(seed(), torch.arange(500))
    low, high = torch.tensor([-1, -1, 0.15]), torch.tensor([1, 1, 0.25])
    spread = (draws - low) / (high - low)
    assert (spread >= 0).all() and (spread < 1).all()
    deviation = 4 * math.sqrt(1 / 12 / 500)
    assert (spread.mean(0) - 0.5).abs().max() < deviation and (spread.std(0) > 0.25).all()
    small = Distorted(SMALL_SIZE, SMALL)
    assert small.grid(draws).abs().max() <= 1
    # The centre of this one is the pixel in row 8, column 12, and stays; x is first.
    center = torch.tensor([[2 * 12 / 47 - 1, 2 * 8 / 31 - 1, 0.25]])
    torch.testing.assert_close(small.grid(center)[0, 8, 12], center[0, :2])


@pytest.mark.spec(46)
@pytest.mark.parametrize("strength", [0.15, 0.2, 0.25, 0.35])
def test_distorted_folds_beyond_half_the_inverse_of_its_strength(strength):
    grid = Distorted((201, 201), PatchTarget(1, "none", ())).grid(
        torch.tensor([[-1.0, -1.0, strength]])
    )[0]
    along = grid.diagonal()[0] + 1  # x on the ray from the centre to the far corner
    pixel = torch.linspace(0, math.sqrt(8), 201)
    outward = along.diff() > 0
    middle = (pixel[1:] + pixel[:-1]) / 2
    near_the_fold = (middle - 1 / (2 * strength)).abs() < 0.02
    assert torch.equal(outward | near_the_fold, (middle < 1 / (2 * strength)) | near_the_fold)


@pytest.mark.spec(47)
@pytest.mark.parametrize("channels", [1, 3])
def test_decolorized_is_one_weighting_for_a_step(channels):
    made = Decolorized(SIZE, TARGET, channels)
    images = torch.randn(3, 3, *SIZE)
    weights = made.draws(seed(), torch.arange(3))
    r, g, b = weights.tolist()
    gray = r * images[:, 0] + g * images[:, 1] + b * images[:, 2]
    assert made.channels == channels
    torch.testing.assert_close(
        made.view(images, weights), torch.stack(channels * [gray], 1), atol=1e-6, rtol=1e-6
    )
    many = torch.stack([made.draws(seed(step), torch.arange(3)) for step in range(1, 2001)])
    assert 0 <= many.min() < 0.01 and 0.66 < many.max() <= 0.667
    assert (many.mean(0) - 0.3335).abs().max() < 4 * 0.667 / math.sqrt(12 * 2000)
    assert torch.corrcoef(many.T).sub(torch.eye(3)).abs().max() < 0.1  # three weights, not one


@pytest.mark.spec(48)
@pytest.mark.parametrize("mixed", [True, False])
def test_blurred_is_a_convolution_of_each_image_with_weights_of_its_own(mixed):
    made = Blurred(SIZE, TARGET, mixed=mixed, seed=3)
    images = torch.randn(4, 3, *SIZE)
    weights = made.draws(seed(), torch.arange(4))
    got = made.view(images, weights)
    bias = torch.tensor(made.bias) if mixed else None
    for image, weight, seen in zip(images, weights, got, strict=True):
        groups = 1 if mixed else 3
        one = F.conv2d(image[None], weight, bias, padding=3, groups=groups)[0]
        torch.testing.assert_close(seen, one, atol=1e-5, rtol=1e-5)
    assert got.shape == images.shape
    assert weights.shape == (4, 3, 3 if mixed else 1, 7, 7)
    many = made.draws(seed(), torch.arange(200)).flatten(1)
    assert torch.unique(many).numel() > 0.99 * many.numel()  # anew for each image
    standard = ((many - 1 / 49) / 0.02).double().flatten()
    count = math.sqrt(standard.numel())
    assert abs(standard.mean()) < 4 / count
    assert abs(standard.std() - 1) < 4 / math.sqrt(2) / count
    assert abs(standard.pow(4).mean() - 3) < 4 * math.sqrt(96) / count  # normal, not uniform
    gain = many.unflatten(1, (3, -1)).sum(2).mean()
    assert gain.item() == pytest.approx(3 if mixed else 1, abs=0.05)


@pytest.mark.spec(48)
def test_blurred_has_the_bias_of_its_run():
    biases = torch.tensor([Blurred(SIZE, TARGET, seed=run).bias for run in range(300)]).double()
    assert biases.abs().max() <= 1 / math.sqrt(147)
    assert biases.std() == pytest.approx(1 / math.sqrt(3 * 147), rel=0.1)
    assert Blurred(SIZE, TARGET, seed=5).bias == pytest.approx(biases[5].tolist())


@kinds
def test_parts_of_a_step_are_drawn_as_the_whole_and_steps_differ(kind):
    made = KINDS[kind]
    whole = made.draws(seed(), torch.arange(8))
    if kind in ("none", "zoomed-in"):
        assert whole is None
        return
    parts = [made.draws(seed(), torch.arange(i, i + 4)) for i in (0, 4)]
    if kind in ("zoomed-out", "decolorized"):
        assert all(torch.equal(part, whole) for part in parts)
    else:
        assert torch.equal(torch.cat(parts), whole)
        assert len(whole.flatten(1).unique(dim=0)) == 8
    assert len({str(made.draws(seed(step), torch.arange(8)).tolist()) for step in (1, 2, 3)}) == 3
    other = made.draws(torch.tensor([8, 1]), torch.arange(8))
    assert not torch.equal(other, whole)


@kinds
def test_half_precision_around_changes_nothing_but_the_prediction(kind):
    made, images, prediction, masked = small_case(kind)
    images, prediction = images.float(), prediction.bfloat16()
    draws = made.draws(seed(), torch.arange(2))
    expected = (
        made.view(images, draws),
        made.whole(images),
        made.loss(prediction.float(), images, draws, masked, EAGER),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = (
            made.view(images, draws),
            made.whole(images),
            made.loss(prediction, images, draws, masked, EAGER),
        )
    for seen, wanted in zip(got, expected, strict=True):
        assert seen.dtype == torch.float32
        torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=1e-6)


@kinds
def test_nothing_reads_the_values_of_a_tensor(kind):
    """A captured graph could not."""
    made = KINDS[kind]
    with FakeTensorMode():
        images = torch.randn(2, 3, *made.source)
        draws = made.draws(torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int64))
        masked = torch.empty(2, 70, dtype=torch.int64)
        prediction = torch.randn(2, 96 if made.predicts_all else 70, 48)
        assert made.view(images, draws).shape == (2, made.channels, *SMALL_SIZE)
        assert made.whole(images).shape == (2, 3, *SMALL_SIZE)
        assert made.loss(prediction, images, draws, masked, EAGER).shape == ()


@kinds
def test_settings_name_it_and_copies_are_alike(kind):
    made = degradation(DegradeConfig(kind=kind, margin=6, gray_channels=3), SMALL_SIZE, SMALL, 4)
    assert type(made) is type(KINDS[kind])
    images = torch.randn(2, 3, *made.source)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        draws = other.draws(seed(), torch.arange(2))
        assert torch.equal(other.view(images, draws), made.view(images, draws))
    with pytest.raises(ValueError, match="expected images"):
        made.view(images[..., 1:], made.draws(seed(), torch.arange(2)))
    with pytest.raises(ValueError, match="expected images"):
        made.whole(images[:, :2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Undegraded((224, 220), TARGET), "multiples of 16"),
        (lambda: ZoomedIn(SIZE, TARGET, margin=0), "margin"),
        (lambda: ZoomedIn(SIZE, TARGET, edge_weight=1.1), "edge_weight"),
        (lambda: ZoomedOut(SIZE, TARGET, margin=57), r"margin in 1\.\.56"),
        (lambda: Distorted(SIZE, TARGET, strength=(0.2, 0.1)), "strength"),
        (lambda: Distorted(SIZE, TARGET, strength=(0.2, 0.36)), "strength"),
        (lambda: Blurred(SIZE, TARGET, std=-1), "std"),
        (lambda: Decolorized(SIZE, TARGET, channels=2), "channels"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
