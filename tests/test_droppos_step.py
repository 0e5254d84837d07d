"""DropPos in steps: draws, noise, measures, precision, copies, graphs, resume; nothing waits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.config import NoiseConfig, StepConfig
from stopfast.decoder import PositionDecoder
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER, FUSED, Ops, positional_noise
from stopfast.objectives.droppos import DropPos, DropPosDraws
from stopfast.step import TrainStep
from stopfast.step.graphs import StepGraphs
from tests.small_droppos import WIDTH, build, images, parameters, with_logits
from tests.test_compute_copies import assert_equal
from tests.test_step_graphs import StandIn
from tests.test_step_parts import NothingWaits, gpu_of_no_numbers

STOP = NoiseConfig(variant="stop", noise_var=0.5)
EVERYTHING: dict[str, Any] = {"multi_task": True, "shuffle": True, "noise": STOP}
KINDS: dict[str, dict[str, Any]] = {
    "published": {},
    "plain": {"attentive": False, "sigma": 0.0},
    "everything": EVERYTHING,
    "wrong positions, the confident left out": {
        "position_token": "wrong", "ignore_confident": True, "sigma": 3.0,
    },
    "recomputed": {"checkpointing": True, **EVERYTHING},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
CLIPPED = {"clip": "per_tensor", "clip_norm": 0.1}


def tensors(draws: DropPosDraws) -> dict[str, Tensor]:
    return {name: value for name, value in draws._asdict().items() if value is not None}


def taken(kind: str, settings: StepConfig, *, graphs: bool = False) -> tuple[DropPos, TrainStep]:
    objective = build(update=CLIPPED, **KINDS[kind])
    step = TrainStep(objective, settings, optimizer="adamw_ema")
    if graphs:
        assert isinstance(step.optimizer, FlatAdamW)
        step._graphs = StepGraphs(step.optimizer, StandIn(step.optimizer), "cpu")
    return objective, step


def state(objective: DropPos, step: TrainStep) -> dict[str, Tensor]:
    """Weights, moments and counts."""
    moments = step.state_dict()["optimizer"]["state"]
    found = {f"{n}.{k}": v.clone() for n, s in moments.items() for k, v in s.items()}
    return found | {name: p.detach().clone() for name, p in parameters(objective).items()}


def gradients(objective: DropPos, batch: Tensor, draws: DropPosDraws) -> dict[str, Tensor]:
    """The loss, and every gradient: what is trained has one."""
    loss = objective.loss(batch, draws)
    names = parameters(objective)
    found = torch.autograd.grad(loss, list(names.values()))
    return {"loss": loss.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recomputed"])
def test_draws_of_parts_are_those_of_the_whole(kind: str):
    objective = build(**KINDS[kind])
    whole = objective.draws(3, 8, slice(0, 8))
    parts = [objective.draws(3, 8, slice(start, start + 4)) for start in (0, 4)]
    other, seed = objective.draws(4, 8, slice(0, 8)), build(seed=1, **KINDS[kind])
    for name, value in tensors(whole).items():
        if name in ("sigma", "seed", "wrong"):
            assert all(torch.equal(getattr(part, name), value) for part in parts)
        else:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)
        assert getattr(other, name).shape == value.shape
    for name in ("order", "position_order"):
        value = getattr(whole, name)
        assert len(value.unique(dim=0)) == 8
        assert not torch.equal(value, getattr(other, name))
        assert not torch.equal(value, getattr(seed.draws(3, 8, slice(0, 8)), name))


@kinds
def test_recomputation_and_unused_work_change_nothing(kind: str):
    plain = build(**{**KINDS[kind], "checkpointing": False})
    draws = plain.draws(1, 4, slice(0, 4))
    expected = gradients(plain, images(), draws)
    for changed in ({"checkpointing": True}, {"skip_unused": False}):
        found = gradients(build(**{**KINDS[kind], **changed}), images(), draws)
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-5, name


@kinds
def test_bf16_keeps_every_gradient(kind: str):
    """None is lost to autocast's memory of the attentive pass, which has no gradients."""
    objective = build(**KINDS[kind])
    draws = objective.draws(1, 4, slice(0, 4))
    exact = gradients(objective, images(), draws)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(objective, images(), draws)
    for name, value in exact.items():
        assert relative_error(half[name], value) < 0.1, name


@pytest.mark.parametrize("kind", ["published", "everything"])
def test_copies_graphs_and_accumulation_are_plain_steps(kind: str):
    """To the bit, in bf16, over six steps of two epochs, with a resume in between."""
    found = []
    for copies, graphs in ((False, False), (True, False), (True, True)):
        settings = StepConfig(precision="bf16", accumulate=2, copies=copies)
        objective, step = taken(kind, settings, graphs=graphs)
        losses = []
        for number in range(7, 13):
            losses.append(step(images(), number).loss)
            if number == 9:
                saved = copy.deepcopy((state(objective, step), step.state_dict()))
                step(images() + 1, 99)
                with torch.no_grad():
                    for name, parameter in parameters(objective).items():
                        parameter.copy_(saved[0][name])
                step.load_state_dict(saved[1])
        assert (step.counts()["replayed"] == 6) == graphs  # the first of seven steps is not
        found.append({"losses": torch.stack(losses), **state(objective, step)})
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@pytest.mark.parametrize("kind", ["published", "everything"])
def test_resumes_to_the_bit(kind: str):
    """Six steps in a row, or three, and three of another process."""
    objective, step = taken(kind, StepConfig())
    for number in range(1, 7):
        step(images(), number)
        if number == 3:
            saved = copy.deepcopy((objective.modules(), step.state_dict()))
    again, resumed = taken(kind, StepConfig())
    for name, module in again.modules().items():
        module.load_state_dict(saved[0][name].state_dict())
    resumed.load_state_dict(saved[1])
    for number in range(4, 7):
        resumed(images(), number)
    assert_equal(state(objective, step), state(again, resumed))


@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        ("everything", EAGER),
        ("everything", FUSED),
        ("wrong positions, the confident left out", FUSED),
    ],
)
def test_a_step_waits_for_nothing(kind: str, ops: Ops):
    """Draws included; one copy to the device a step, the schedules', which does not wait for it."""
    with gpu_of_no_numbers() as device:
        objective = build(ops=ops, update=CLIPPED, **KINDS[kind])
        step = TrainStep(
            objective, StepConfig(accumulate=2), device=device, optimizer="adamw_ema", ops=ops
        )
        batch = images().to(device)
        with NothingWaits() as mode:
            for number in (1, 2):
                step(batch, number)
        assert mode.copies == 2


@pytest.mark.parametrize("variant", ["stop", "stop_paper"])
@pytest.mark.parametrize("apply_to", ["masked", "context", "both"])
def test_noise(variant: Any, apply_to: Any):
    """It is added to the features of the right patches, before the projection; the class token has none."""
    noise = NoiseConfig(variant=variant, noise_var=0.25, apply_to=apply_to)
    objective = build(noise=noise)
    given: list[Tensor] = []
    objective.decoder.decoder_embed.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    draws = objective.draws(2, 8, slice(4, 8))
    features = objective.outputs(images(), draws)["encoder features"]
    told = torch.zeros(4, 8).scatter(1, draws.position_order[:, :2], 1)[..., None]
    noisy = {"masked": 1 - told, "context": told, "both": torch.ones_like(told)}[apply_to]
    std = {"stop": 0.25, "stop_paper": 0.5}[variant]
    pixels_own, normals = positional_noise(
        torch.tensor([0, 2]), torch.arange(4, 8), 1, 2, 8, WIDTH, context=True
    )[0].split(4)
    # The pixel decoder's context draws the first copy: the two losses' noise is not the same.
    assert not torch.equal(pixels_own, normals)
    expected = features.clone()
    expected[:, 1:] += std * normals * noisy
    assert relative_error(given[0], expected) < 1e-6
    added = (given[0] - features)[:, 1:][noisy[..., 0].bool()]
    assert added.std().item() == pytest.approx(std, rel=0.1)


def test_noise_changes_what_is_predicted_from_step_to_step():
    plain, noisy = build(), build(noise=STOP)
    draws = noisy.draws(1, 4, slice(0, 4))
    losses = [noisy.loss(images(), draws._replace(seed=torch.tensor([0, n]))) for n in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2] and losses[0] != plain.loss(images(), draws)
    none = build(noise=NoiseConfig(variant="stop", noise_var=0.0))
    for quiet in (none, build(noise=NoiseConfig(variant="stop_off"))):
        assert relative_error(quiet.loss(images(), draws), plain.loss(images(), draws)) < 1e-7


@pytest.mark.parametrize(
    "changed", [{"cov": "fixed"}, {"tie": False}, {"noise_dim": "predictor"}, {"noise_var": -1.0}]
)
def test_noise_of_another_kind_is_refused(changed: dict[str, Any]):
    with pytest.raises(ValueError, match="expected noise"):
        build(noise=NoiseConfig(**{"variant": "stop", **changed}))


def test_measures():
    """Plain and weighted accuracy of logits by hand."""
    objective = build()
    pixels, draws = images(2), objective.draws(1, 2, slice(0, 2))
    visible, asked = draws.order[:, :8], draws.position_order[:, 2:].tolist()
    every = torch.ones(2, 8, dtype=torch.bool)
    weights = objective._weights(pixels, visible, every)
    right = {(0, asked[0][0]), (0, asked[0][3]), (1, asked[1][5])}
    told = {(0, place) for place in draws.position_order[0, :2].tolist()}
    logits = torch.zeros(2, 8, 16)
    for image in range(2):
        for place in range(8):
            hit = (image, place) in right | told
            logits[image, place, (visible[image, place] + (not hit)) % 16] = 1
    with with_logits(objective, logits):
        got = objective.measures(pixels, draws)
    assert got["position_accuracy"] == pytest.approx(3 / 12)
    total = sum(weights[i, p] for i in range(2) for p in asked[i])
    expected = sum(weights[key] for key in right) / total
    assert got["position_accuracy_weighted"] == pytest.approx(expected.item())


def test_parts_that_do_not_fit():
    good = build()
    given: dict[str, Any] = dict(
        settings=good.settings, noise=NoiseConfig(),
        transforms=good.transforms, update=good.update, epochs=1, steps_per_epoch=1,
    )  # fmt: skip
    for decoder, message in (
        (PositionDecoder(16, 48, 32, 1, 4, class_token=False), "class token"),
        (PositionDecoder(16, 32, 32, 1, 4), r"width 48 to 16 positions, got \(32, 16\)"),
        (PositionDecoder(9, 48, 32, 1, 4), r"width 48 to 16 positions, got \(48, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DropPos(good.encoder, decoder, **given)
    with pytest.raises(ValueError, match="this decoder has no positions"):
        build(noise=NoiseConfig(learned_pos_emb=True))
    with pytest.raises(ValueError, match="position_mask_ratio > 0"):
        build(position_mask_ratio=0.0)
