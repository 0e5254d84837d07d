"""MAE and Beyond Masking: against a definition of MAE, fused against eager, every task and every way."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.block import take_rows
from stopfast.config import StepConfig
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.objectives.reconstruction import Reconstruction, ReconstructionDraws
from stopfast.step import TrainStep
from stopfast.step.graphs import StepGraphs
from tests.plain_mae import PlainMae
from tests.small_reconstruction import PATCHES, TASKS, batch_of, build, gradients, stirred
from tests.test_compute_copies import assert_equal, everything
from tests.test_step_graphs import StandIn
from tests.test_step_parts import NothingWaits, gpu_of_no_numbers

BATCH = 4
tasks = pytest.mark.parametrize("task", TASKS)


def drawn(objective: Reconstruction, step: int = 1) -> ReconstructionDraws:
    return objective.draws(step, BATCH, slice(0, BATCH))


def outcome(
    objective: Reconstruction, images: Tensor, draws: ReconstructionDraws
) -> dict[str, Tensor]:
    """The loss and every gradient."""
    loss = objective.loss(images, draws)
    loss.backward()
    named = [gradients(module).items() for module in objective.modules().values()]
    return {"loss": loss.detach(), **{name: g for items in named for name, g in items}}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    assert {n: e for n, e in errors.items() if e >= tolerance} == {}


@pytest.mark.spec(41)
@pytest.mark.parametrize(
    ("ops", "skip_unused", "tolerance"),
    [(EAGER, True, 1e-10), (EAGER, False, 1e-10), (FUSED, True, 1e-5)],
    ids=["eager", "eager-all", "fused"],
)
def test_mae_is_its_definition(ops: Ops, skip_unused: bool, tolerance: float, device: torch.device):
    objective = stirred(build(mask_ratio=0.75, ops=ops, skip_unused=skip_unused))
    images, order = batch_of(objective), drawn(objective).order
    assert order is not None
    plain = PlainMae(objective)
    expected = plain(images, order)
    expected["loss"].backward()
    for module in objective.modules().values():
        module.to(device, torch.float32 if ops is FUSED else torch.float64)
    if ops is EAGER:
        images = images.double()
    images = images.to(device)
    draws = drawn(objective)
    with watch_launches() as launches:
        got = outcome(objective, images, draws)
    assert bool(launches) == (ops is FUSED)
    assert_near(got, {"loss": expected["loss"].detach(), **plain.gradients()}, tolerance)
    with torch.no_grad():
        outputs = objective.outputs(images, draws)
        hidden = take_rows(expected["prediction"], order[:, objective.visible :])
        found = {
            "features": (outputs["encoder features"], expected["features"]),
            "masked": (outputs["predictions"], hidden),
            "all": (objective.reconstruct(images, draws), expected["prediction"]),
        }
    for name, (value, wanted) in found.items():
        assert value.shape == wanted.shape and relative_error(value, wanted) < tolerance, name


WAYS: dict[str, dict[str, Any]] = {
    "mae": {"mask_ratio": 0.75},
    "mae, stop": {"mask_ratio": 0.75, "noise": {"apply_stop": True}},
    "mae, the paper's form on both": {
        "mask_ratio": 0.75,
        "noise": {"variant": "stop_paper", "apply_to": "both"},
    },
    "mae, fixed covariance": {"mask_ratio": 0.5, "noise": {"apply_stop": True, "cov": "fixed"}},
    "mae, learned positions": {"mask_ratio": 0.5, "noise": {"learned_pos_emb": True}},
    "no bias of the projection, stop": {
        "kind": "zoomed-in",
        "mask_ratio": 0.75,
        "noise": {"apply_stop": True},
    },
    "no queries": {"kind": "distorted"},
    "no queries, noise on the context": {
        "kind": "decolorized",
        "noise": {"apply_stop": True, "apply_to": "both"},
    },
    "a decoder without blocks": {"mask_ratio": 0.75, "depths": (1, 0)},
    "a decoder of one block": {"mask_ratio": 0.5, "depths": (1, 1)},
}


@pytest.mark.parametrize("way", WAYS)
def test_fused_is_eager(way: str, device: torch.device):
    found = []
    for ops in (EAGER, FUSED):
        objective = stirred(build(**{"depths": (1, 2), **WAYS[way]}, ops=ops))
        for module in objective.modules().values():
            module.to(device)
        images = batch_of(objective, 2).to(device)
        found.append(outcome(objective, images, objective.draws(1, 2, slice(0, 2))))
    assert_near(found[1], found[0], 1e-5)


@tasks
def test_draws(task: str):
    """Those of parts are the parts of the whole, other steps have others, and shapes stay."""
    objective = build(**TASKS[task])
    whole, again, other = (drawn(objective, step) for step in (5, 5, 6))
    parts = [objective.draws(5, BATCH, slice(at, at + 2)) for at in (0, 2)]
    shared = task.startswith(("zoomed-out", "decolorized"))  # by the images of a step
    for name, value in whole._asdict().items():
        if value is None:
            assert name == "noise" or parts[0]._asdict()[name] is None
            continue
        pieces = [part._asdict()[name] for part in parts]
        same = name == "seed" or (name == "degradation" and shared)
        assert torch.equal(value, pieces[1] if same else torch.cat(pieces)), name
        assert torch.equal(value, again._asdict()[name])
        later = other._asdict()[name]
        assert later.shape == value.shape and later.dtype == value.dtype
        assert torch.equal(later, value) == (name == "sample_ids"), name
    masked = TASKS[task].get("mask_ratio", 0.0) > 0
    assert (whole.order is not None) == masked
    if whole.order is not None:
        assert torch.equal(whole.order.sort(1).values, torch.arange(PATCHES).expand(BATCH, -1))
        assert len({tuple(row) for row in whole.order.tolist()}) == BATCH


@tasks
def test_what_changes_no_number(task: str):
    """Recomputed activations, unused work, and micro-batches: loss and gradients stay."""
    images = batch_of(build(**TASKS[task]))
    found = []
    for settings in ({}, {"checkpointing": True}, {"skip_unused": False}):
        objective = stirred(build(**TASKS[task], **settings))
        found.append(outcome(objective, images, drawn(objective)))
    objective = stirred(build(**TASKS[task]))
    halves = [
        outcome(objective, images[at : at + 2], objective.draws(1, BATCH, slice(at, at + 2)))
        for at in (0, 2)
    ]
    loss = (halves[0]["loss"] + halves[1]["loss"]) / 2
    added = {name: value / 2 for name, value in halves[1].items()}  # gradients add up
    for other in (*found[1:], {**added, "loss": loss}):
        assert_near(other, found[0], 1e-5)


LEAST = {"zoomed-in": 0.281, "zoomed-in masked": 0.263}
"""The loss of the best of all predictions, where it is not 0: middle and edges disagree about the rest."""


def one_batch(task: str) -> tuple[Reconstruction, Tensor, ReconstructionDraws]:
    """Two images, drawn for once."""
    settings = {"widths": (64, 64), "update": {"lr": lambda step: 4e-3}}
    objective = build(**TASKS[task], **settings)
    images, draws = batch_of(objective, 2), objective.draws(1, 2, slice(0, 2))
    objective.draws = lambda *_: draws  # type: ignore[method-assign]
    return objective, images, draws


@tasks
def test_one_batch_is_learned(task: str):
    """Far better than by the patches' means, whose loss is about 1, or 0.5 for a smooth zoomed-out one."""
    objective, images, _ = one_batch(task)
    step = TrainStep(objective)
    for number in range(1, 121 if task in LEAST or task == "mae" else 81):
        loss = step(images, number).loss
    assert loss < LEAST.get(task, 0.0) + 0.1


@tasks
def test_least_losses(task: str):
    """The loss is a square of the prediction, whose minimum is found without a network."""
    objective, images, draws = one_batch(task)
    with torch.no_grad():
        prediction = objective.outputs(images, draws)["predictions"]
    prediction.zero_().requires_grad_()
    masked = None if draws.order is None else draws.order[:, objective.visible :]
    search = torch.optim.LBFGS([prediction], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = objective.degradation.loss(prediction, images, draws.degradation, masked, EAGER)
        found.backward()
        return found

    search.step(loss)
    assert loss().item() == pytest.approx(LEAST.get(task, 0.0), abs=1e-3)


STEPS = {name: WAYS[name] for name in ("mae", "mae, stop", "mae, the paper's form on both")} | {
    name: TASKS[name] for name in ("zoomed-in masked", "zoomed-out", "distorted", "blurred masked")
}
steps = pytest.mark.parametrize("name", STEPS)


@steps
def test_steps_in_bf16_and_with_copies(name: str):
    """Loss near that in fp32, weights in fp32; with copies the numbers of autocast, to the bit."""
    exact = TrainStep(build(**STEPS[name]))(batch_of(build(**STEPS[name])), 1).loss
    found = []
    for copies in (False, True):
        objective = build(**STEPS[name])
        settings = StepConfig(precision="bf16", copies=copies)
        step = TrainStep(objective, settings, optimizer="adamw_ema")
        losses = [step(batch_of(objective), number).loss for number in (1, 2, 3)]
        assert losses[0].dtype == torch.float32 and relative_error(losses[0], exact) < 0.02
        found.append({"losses": torch.stack(losses), **everything(objective, step)})
    assert_equal(*found)


@steps
def test_steps_as_graphs(name: str):
    """Of one shape, whatever is drawn, and each with its own draws and schedules."""
    update = {"lr": lambda step: 1e-3 / step, "clip": "global", "clip_norm": 0.1}
    found = []
    for graphs in (False, True):
        objective = build(**STEPS[name], update=update)
        settings = StepConfig(precision="bf16", copies=True, accumulate=2)
        step = TrainStep(objective, settings, optimizer="adamw_ema")
        if graphs:
            assert isinstance(step.optimizer, FlatAdamW)
            step._graphs = StepGraphs(step.optimizer, StandIn(step.optimizer), "cpu")
        images = batch_of(objective)
        losses = [step(images * (1 + n / 9), n).loss for n in range(1, 6)]
        found.append({"losses": torch.stack(losses), **everything(objective, step)})
        taken = {"graphs": 1, "replayed": 4, "eager": 1} if graphs else {"graphs": 0, "eager": 5}
        assert taken.items() <= step.counts().items()
    assert_equal(*found)


@steps
@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
def test_a_step_waits_for_nothing(name: str, ops: Ops, monkeypatch: pytest.MonkeyPatch):
    """One copy to the device, the schedules'. Draws are made there too."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # "meta" has none
    with gpu_of_no_numbers() as device:
        objective = build(**STEPS[name], ops=ops)
        step = TrainStep(objective, device=device, optimizer="adamw_ema", ops=ops)
        images = batch_of(objective).to(device)
        with NothingWaits() as mode:
            step(images, 1)
        assert mode.copies == 1


@pytest.mark.parametrize(
    ("encoder", "decoder", "degraded", "message"),
    [
        ({}, {"side": 48}, {}, "the encoder's grid"),
        ({"widths": (48, 16)}, {}, {}, "the encoder's width 48, got 32"),
        ({"patch": 4, "side": 16}, {}, {"patch": 4, "side": 16}, "3 channels 48, got 192"),
        ({}, {}, {"side": 48}, r"size \(32, 32\), got \(48, 48\)"),
        ({}, {}, {"kind": "decolorized"}, "channels 3, got 1"),
        ({}, {"kind": "distorted"}, {}, "a class token in both"),
    ],
)
def test_parts_must_fit(encoder: dict, decoder: dict, degraded: dict, message: str):
    parts = [build(**{"mask_ratio": 0.5, **of}) for of in (encoder, decoder, degraded)]
    settings = {"transforms": parts[0].transforms, "update": parts[0].update}
    Reconstruction(
        parts[0].encoder, build(**encoder).decoder, parts[0].degradation, mask_ratio=0.5, **settings
    )
    with pytest.raises(ValueError, match=message):
        Reconstruction(
            parts[0].encoder, parts[1].decoder, parts[2].degradation, mask_ratio=0.5, **settings
        )


def test_masks_must_fit():
    with pytest.raises(ValueError, match="leaves one of 16"):
        build(mask_ratio=0.95)
    with pytest.raises(ValueError, match="noise on queries, got mask_ratio 0"):
        build("distorted", noise={"apply_stop": True})
