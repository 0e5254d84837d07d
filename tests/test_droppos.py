"""DropPos: cases 29 to 40 of the specification, at the objective."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.build import build_objective
from stopfast.config import StepConfig
from stopfast.kernels.ops import position_map
from stopfast.objectives.droppos import DropPos, DropPosDraws
from stopfast.optim import clip_gradients
from stopfast.presets import PRESETS
from stopfast.step import TrainStep
from tests.small_droppos import build, images, parameters, with_logits

PUBLISHED: dict[str, Any] = {"mask_ratio": 0.75, "position_mask_ratio": 0.75, "side": 112}


def drawn(objective: DropPos, batch: int = 4, step: int = 1) -> DropPosDraws:
    return objective.draws(step, batch, slice(0, batch))


def told_and_asked(objective: DropPos, draws: DropPosDraws) -> tuple[Tensor, Tensor]:
    """Places [B, told] and [B, dropped] among the visible patches."""
    return draws.position_order.tensor_split([objective.told], dim=1)  # type: ignore[return-value]


@torch.no_grad()
def entering(objective: DropPos, pixels: Tensor, draws: DropPosDraws) -> Tensor:
    """What the encoder's first block gets of the visible patches and the class token, [B, 1 + V, D]."""
    seen: list[Tensor] = []
    hook = objective.encoder.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    objective.outputs(pixels, draws)
    hook.remove()
    return seen[0]


def without_content(objective: DropPos) -> None:
    """Let what enters the encoder be positions alone."""
    for parameter in objective.encoder.patch_embed.parameters():
        parameter.data.zero_()


@pytest.mark.spec(29)
def test_counts():
    """49 patches are visible, 12 of them with their positions, 37 without: in every image."""
    objective = build(**PUBLISHED)
    without_content(objective)
    for step in (1, 2):
        draws = drawn(objective, 8, step)
        assert torch.equal(draws.order.sort(1).values, torch.arange(196).expand(8, -1))
        tokens = entering(objective, images(8, 112), draws)[:, 1:]
        assert tokens.shape[1] == 49
        dropped = (tokens == objective.decoder.mask_pos_token).all(-1)
        assert dropped.sum(1).tolist() == [37] * 8
    draws = drawn(objective, 400)
    seen = torch.bincount(draws.order[:, :49].flatten(), minlength=196) / 400
    assert (seen - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.spec(30)
def test_positions_go_where_they_belong():
    """Patches that are told theirs get exactly theirs, the others exactly the token, and nothing else."""
    objective = build()
    embed = objective.encoder.patch_embed
    objective.encoder.pos_embed.data[:, 1:] += torch.randn(16, 48)  # the class token's is zero
    draws, pixels = drawn(objective), images()
    got = entering(objective, pixels, draws)
    whole = F.conv2d(pixels, embed.proj.weight, embed.proj.bias, stride=8).flatten(2).mT
    told, asked = (places.tolist() for places in told_and_asked(objective, draws))
    class_token = objective.encoder.get_parameter("cls_token")
    assert torch.equal(got[:, 0], class_token[0].expand(4, -1))
    for image, order in enumerate(draws.order.tolist()):
        for place in told[image]:
            position = objective.encoder.pos_embed[0, 1 + order[place]]
            expected = whole[image, order[place]] + position
            assert torch.allclose(got[image, 1 + place], expected, atol=1e-5)
        for place in asked[image]:
            expected = whole[image, order[place]] + objective.decoder.mask_pos_token[0, 0]
            assert torch.allclose(got[image, 1 + place], expected, atol=1e-5)


@pytest.mark.spec(31)
@pytest.mark.parametrize("attentive", [False, True])
def test_only_what_is_asked_for_counts(attentive: bool):
    objective = build(attentive=attentive, **PUBLISHED)
    draws, pixels = drawn(objective), images(side=112)
    logits = torch.randn(4, 49, 196, requires_grad=True)
    with with_logits(objective, logits):
        objective.loss(pixels, draws).backward()
    told, asked = (torch.zeros(4, 49).scatter(1, x, 1) for x in told_and_asked(objective, draws))
    moved = logits.grad.abs().amax(-1)
    assert not (moved * told).any() and (moved > 0).sum() == asked.sum() == 4 * 37


@pytest.mark.spec(31)
@pytest.mark.parametrize(
    ("sigma", "norm", "chance"),
    [(0.0, "released", True), (1.0, "corrected", True), (1.0, "released", False)],
)
def test_zero_logits_are_chance(sigma: float, norm: str, chance: bool):
    """Labels that sum to 1 cost ln 196; on the released map those near the edge do not."""
    objective = build(sigma=sigma, smoothing_norm=norm, **PUBLISHED)
    with with_logits(objective, torch.zeros(4, 49, 196)):
        loss = objective.loss(images(side=112), drawn(objective)).item()
    assert (loss == pytest.approx(math.log(196), rel=1e-5)) == chance


@pytest.mark.spec(32)
def test_a_transformer_sees_no_order():
    """Visible patches in another order give the logits in that order, and so does ``shuffle``."""
    plain, shuffled = (build(shuffle=shuffle, multi_task=True) for shuffle in (False, True))
    pixels, first, second = images(), drawn(plain), drawn(shuffled)
    place = (first.order[:, None, :8] == second.order[:, :8, None]).int().argmax(-1)
    assert not torch.equal(first.order, second.order)
    assert torch.equal(first.order.gather(1, place), second.order[:, :8])
    logits = [
        made.outputs(pixels, of)["position logits"]
        for made, of in ((plain, first), (shuffled, second))
    ]
    moved = logits[0].gather(1, place[..., None].expand(-1, -1, 16))
    assert relative_error(logits[1], moved) < 1e-5
    assert relative_error(shuffled.loss(pixels, second), plain.loss(pixels, first)) < 1e-6


@pytest.mark.spec(33)
def test_maps_of_the_two_releases():
    """Released: distances on the 16 x 16 grid of 14-pixel patches, and columns that sum to 1."""
    with torch.device("meta"):
        for name, expected in (("", ((16, 16), "column")), ("-corrected", ((14, 14), "row"))):
            made = build_objective(PRESETS[f"droppos-vit-b16{name}"](), 625)
            assert isinstance(made, DropPos) and made.smoothing[:2] == expected
    assert build(side=112, smoothing_norm="released").smoothing[:2] == ((14, 14), "column")
    with pytest.raises(ValueError, match=r"at least 196 positions, got \(8, 8\)"):
        build(side=112, smoothing_grid="released")


@pytest.mark.spec(34)
def test_sigma():
    """From its first value straight down, epoch by epoch, to what is not 0 in the last."""
    objective = build(sigma=2.0, steps_per_epoch=10, epochs=800)
    epochs = [
        [float(drawn(objective, 1, 10 * e + s).sigma) for s in (1, 10)] for e in (0, 1, 400, 799)
    ]
    assert epochs == [pytest.approx([2 * (1 - e / 800)] * 2) for e in (0, 1, 400, 799)]
    assert epochs[-1][1] > 0
    assert objective.sigma(2**31 - 1) == 0  # monitors look with draws of no step of the run
    assert build(sigma=2.0, sigma_decay=False).sigma(7990) == 2.0


@pytest.mark.spec(34)
@pytest.mark.parametrize("norm", ["released", "corrected"])
def test_no_sigma_is_no_smoothing(norm: str):
    objective = build(sigma=0.0, smoothing_norm=norm, attentive=False)
    draws = drawn(objective)
    logits = torch.randn(4, 8, 16, requires_grad=True)
    with with_logits(objective, logits):
        loss = objective.loss(images(), draws)
    asked = told_and_asked(objective, draws)[1]
    wanted = logits.gather(1, asked[..., None].expand(-1, -1, 16)).flatten(0, 1)
    expected = F.cross_entropy(wanted, draws.order.gather(1, asked).flatten())
    assert relative_error(loss, expected) < 1e-6
    got, true = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    assert relative_error(got, true) < 1e-6


@pytest.mark.spec(35)
@pytest.mark.parametrize("skip_unused", [True, False])
def test_attentive_weights(skip_unused: bool):
    """Softmax over all patches of the whole image, with all positions; then 1 over the visible ones."""
    objective = build(skip_unused=skip_unused, temperature=0.3)
    pixels, draws = images(), drawn(objective)
    visible, every = draws.order[:, :8], torch.ones(4, 8, dtype=torch.bool)
    weights = objective._weights(pixels, visible, every)
    tokens = objective.encoder.tokens(pixels)
    first, patches = F.normalize(tokens[:, 0], dim=-1), F.normalize(tokens[:, 1:], dim=-1)
    attention = torch.einsum("bd,bnd->bn", first, patches).div(0.3).softmax(1).gather(1, visible)
    assert relative_error(weights, attention / attention.sum(1, keepdim=True)) < 1e-5
    assert torch.allclose(weights.sum(1), torch.ones(4)) and not weights.requires_grad
    assert weights.std() > 1e-3  # they are not all the same
    inner = objective.encoder.tokens

    def scaled(*given: Tensor, rows: Tensor) -> Tensor:
        found = inner(*given, rows=rows)
        return torch.cat([3 * found[:, :1], found[:, 1:] / 5], dim=1)

    with mock.patch.object(objective.encoder, "tokens", scaled):
        assert torch.allclose(objective._weights(pixels, visible, every), weights, rtol=1e-4)
    asked = torch.zeros(4, 8, dtype=torch.bool).scatter(
        1, told_and_asked(objective, draws)[1], True
    )
    assert torch.equal(objective._weights(pixels, visible, asked), weights * asked)


@pytest.mark.spec(36)
def test_one_normaliser_for_the_batch():
    objective = build()
    pixels, draws = images(), drawn(objective)
    loss = objective.loss(pixels, draws)
    rows = ("order", "position_order", "sample_ids")

    def of(index: list[int]) -> Tensor:
        part = draws._replace(**{name: getattr(draws, name)[index] for name in rows})
        return objective.loss(pixels[index], part)

    assert relative_error(of([0, 1, 2, 3, 0, 1, 2, 3]), loss) < 1e-6
    weights = objective._weights
    sums = []
    for image in range(4):
        asked = torch.zeros(1, 8, dtype=torch.bool)
        asked = asked.scatter(1, told_and_asked(objective, draws)[1][image : image + 1], True)
        sums.append(
            weights(pixels[image : image + 1], draws.order[image : image + 1, :8], asked).sum()
        )
    each = torch.stack([of([image]) for image in range(4)])
    share = torch.stack(sums)
    assert share.std() > 1e-3
    assert relative_error(loss, (each * share).sum() / share.sum()) < 1e-5
    with mock.patch.object(objective, "_weights", lambda *given: 7 * weights(*given)):
        assert relative_error(objective.loss(pixels, draws), loss) < 1e-6


@pytest.mark.spec(37)
def test_confident_patches_are_left_out():
    """Of the loss and of the weighted accuracy, just where the true position is as likely as its label."""
    objective = build(ignore_confident=True, sigma=1.5, attentive=False)
    draws = drawn(objective)
    visible, asked = draws.order[:, :8], told_and_asked(objective, draws)[1]
    wanted = position_map(objective.smoothing, draws.sigma).diagonal()[visible]
    likely = (wanted * torch.tensor([1.01, 0.99] * 4)).clamp(max=0.999)
    true, other = F.one_hot(visible, 16), F.one_hot((visible + 1) % 16, 16)
    rest = torch.full((4, 8, 16), 1 / 15)
    rest[:, 1::4] = 0.01 / 14 + other[:, 1::4] * (0.99 - 0.01 / 14)  # these places are told wrong
    logits = torch.where(true == 1, likely[..., None], (1 - likely[..., None]) * rest).log()
    logits.requires_grad_()
    with with_logits(objective, logits):
        objective.loss(images(), draws).backward()
        measures = objective.measures(images(), draws)
    counts = torch.zeros(4, 8).scatter(1, asked, 1) * (likely < wanted)
    assert torch.equal(logits.grad.abs().amax(-1) > 0, counts.bool())
    correct = (logits.argmax(-1) == visible).float()
    weighted = (correct * counts).sum() / counts.sum()
    assert 0 < weighted < correct.mean()
    assert measures["position_accuracy_weighted"] == pytest.approx(weighted.item())


@pytest.mark.spec(38)
def test_wrong_positions_are_the_dropped_ones():
    """In one permutation, the same in every image; those that are told are left as they are."""
    objective = build(position_token="wrong")
    without_content(objective)
    orders = set()
    for step in range(1, 7):
        draws = drawn(objective, 3, step)
        tokens = entering(objective, images(3), draws)[:, 1:]
        got = (tokens[:, :, None] == objective.encoder.patch_positions()).all(-1).int().argmax(-1)
        told, asked = told_and_asked(objective, draws)
        visible = draws.order[:, :8]
        assert torch.equal(got.gather(1, told), visible.gather(1, told))
        own = visible.gather(1, asked)
        place = (own[:, None] == got.gather(1, asked)[:, :, None]).int().argmax(-1)
        assert torch.equal(own.gather(1, place), got.gather(1, asked))
        assert len(set(map(tuple, place.tolist()))) == 1
        assert sorted(place[0].tolist()) == list(range(6))
        orders.add(tuple(place[0].tolist()))
    assert len(orders) > 4


@pytest.mark.spec(38)
@pytest.mark.parametrize("token", ["param", "zeros", "wrong"])
def test_tokens_and_gradients(token: str):
    objective = build(position_token=token)
    param = objective.decoder.mask_pos_token
    objective.loss(images(), drawn(objective)).backward()
    assert (param.grad is not None and bool(param.grad.any())) == (token == "param")
    assert param.requires_grad == (token == "param")
    if token == "zeros":
        before = objective.loss(images(), drawn(objective))
        param.data += torch.randn(48)
        assert objective.loss(images(), drawn(objective)) == before


@pytest.mark.spec(39)
@pytest.mark.parametrize("alike", [False, True])
def test_overfits_one_image(alike: bool):
    """Patches that look different are told apart; of patches that are all alike only chance is left."""
    objective = build(update={"lr": lambda step: 2e-3}, sigma_decay=False, sigma=0.0)
    step = TrainStep(objective)
    pixels = (torch.zeros(1, 3, 32, 32) if alike else images(1)).expand(16, -1, -1, -1)
    for number in range(1, 61):
        step(pixels, number)
    measured = objective.measures(pixels, drawn(objective, 16, 1000))
    accuracy = measured["position_accuracy"].item()
    assert accuracy < 0.25 if alike else accuracy > 0.95


@pytest.mark.spec(40)
def test_each_tensor_is_clipped_on_its_own():
    objective = build(update={"clip": "per_tensor", "clip_norm": 5.0})
    recipe = objective.optimizer_recipe()
    named = parameters(objective)
    assert {id(p) for p in recipe.clipped} == {id(p) for p in named.values()}
    for number, parameter in enumerate(named.values()):
        parameter.grad = torch.randn_like(parameter) * (10 if number % 2 else 1e-3)
    before = {name: p.grad.clone() for name, p in named.items()}
    clip_gradients(recipe)
    for name, parameter in named.items():
        scale = min(1.0, 5 / before[name].norm().item())
        assert relative_error(parameter.grad, scale * before[name]) < 1e-5, name
    assert {(p.grad.norm() > 4.99).item() for p in named.values()} == {True, False}


@pytest.mark.spec(40)
@pytest.mark.parametrize("attentive", [False, True])
def test_accumulated_micro_batches(attentive: bool):
    """One update by the mean gradient: the big batch's, where all images weigh the same."""
    pixels, found = images(8), []
    for accumulate in (1, 4):
        objective = build(attentive=attentive, update={"clip": "per_tensor", "clip_norm": 0.05})
        step = TrainStep(objective, StepConfig(accumulate=accumulate))
        for group in step.optimizer.param_groups:
            group["eps"] = (
                1.0  # so that an update tells of the gradient's size, not of its sign alone
            )
        parts = [
            objective.draws(1, 8, slice(i, i + 8 // accumulate))
            for i in range(0, 8, 8 // accumulate)
        ]
        with torch.no_grad():
            means = [
                objective.loss(part, draws)
                for part, draws in zip(pixels.chunk(accumulate), parts, strict=True)
            ]
        start = {name: p.detach().clone() for name, p in parameters(objective).items()}
        loss = step(pixels, 1).loss
        assert relative_error(loss, torch.stack(means).mean()) < 1e-6
        moved = torch.cat([(p - start[n]).flatten() for n, p in parameters(objective).items()])
        found.append((loss, moved))
    assert (relative_error(found[1][0], found[0][0]) < 1e-6) != attentive
    assert (relative_error(found[1][1], found[0][1]) < 1e-3) != attentive
