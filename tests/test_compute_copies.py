"""Computing with the optimiser's bf16 copies: the numbers of autocast's own casts, to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stopfast.config import StepConfig
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER, FUSED
from stopfast.objectives.jepa import Jepa
from stopfast.step import TrainStep
from stopfast.step.copies import ComputeCopies
from tests.test_objective import build, images, weights

KINDS: dict[str, dict[str, Any]] = {
    "stop": {},
    "ijepa": {"noise": {}},
    "the projection read for context, queries and noise": {
        "noise": {"apply_stop": True, "apply_to": "both"}
    },
    "a projection of the noise's own": {"noise": {"apply_stop": True, "tie": False}},
    "no bias": {"noise": {"variant": "stop_paper"}},
    "recomputed": {"checkpointing": True},
    "clipped": {"clip": "global", "clip_norm": 0.1},
    "accumulated": {"accumulate": 4},
    "padded": {"bucket": 4},
    "whole": {"skip_unused": False},
}


def step_of(objective: Jepa, copies: bool, accumulate: int = 1) -> TrainStep:
    settings = StepConfig(precision="bf16", copies=copies, accumulate=accumulate)
    return TrainStep(objective, settings, optimizer="adamw_ema")


def everything(objective: Jepa, step: TrainStep) -> dict[str, Tensor]:
    """Weights, average, moments and counts."""
    state = step.state_dict()["optimizer"]["state"]
    moments = {f"{n}.{k}": v.clone() for n, s in state.items() for k, v in s.items()}
    return weights(objective) | moments


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_are_autocasts(kind: str):
    found = []
    for copies in (False, True):
        settings = dict(KINDS[kind])
        accumulate = settings.pop("accumulate", 1)
        objective = build(**settings)
        step = step_of(objective, copies, accumulate)
        losses = [step(images(), number).loss for number in range(1, 6)]
        found.append({"losses": torch.stack(losses), **everything(objective, step)})
    assert_equal(*found)


def test_a_fused_step_is_autocasts():
    found = []
    for copies in (False, True):
        objective = build(ops=FUSED)
        for part in (m for root in objective.modules().values() for m in root.modules()):
            if hasattr(part, "ops"):
                part.ops = FUSED  # type: ignore
        step = step_of(objective, copies)
        found.append({"loss": step(images(2), 1).loss, **everything(objective, step)})
    assert_equal(*found)


def test_layers_compute_with_copies_and_are_left_as_they_were():
    """Linear layers and the patch embedding read bf16, norms and positions fp32; and only inside."""
    objective = build()
    step = step_of(objective, copies=True)
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, module: nn.Module) -> None:
        seen.setdefault(name, set()).update(
            p.dtype for p in module._parameters.values() if p is not None
        )

    named = [(n, m) for root in objective.modules().values() for n, m in root.named_modules()]
    own = {name: dict(module.named_parameters()) for name, module in objective.modules().items()}
    inner = objective.loss
    objective.loss = lambda *given: [note(n, m) for n, m in named] and inner(*given)  # type: ignore
    step(images(), 1)
    half, wide = {torch.bfloat16}, {torch.float32}
    assert seen["blocks.0.attn.qkv"] == seen["predictor_blocks.1.mlp.fc1"] == half
    assert seen["patch_embed.proj"] == half and seen["predictor_embed"] == half | wide
    assert seen["norm"] == seen["blocks.0.norm1"] == wide
    for name, module in objective.modules().items():
        after = dict(module.named_parameters())
        assert all(after[n] is p and p.grad is None for n, p in own[name].items())
        assert {t.dtype for t in copy.deepcopy(module).state_dict().values()} == wide


def test_an_error_leaves_the_modules_as_they_were():
    objective = build()
    step = step_of(objective, copies=True)
    own = list(objective.encoder.parameters())
    with pytest.raises(ValueError, match="expected images"):
        step(images()[:, :2], 1)
    assert all(a is b for a, b in zip(own, objective.encoder.parameters(), strict=True))


@pytest.mark.parametrize("moved", [False, True])
def test_looks_loads_and_resumes_in_between(moved: bool):
    """What reads or writes the weights between two steps is as without copies."""
    found = []
    for copies in (False, True):
        objective = build()
        step = step_of(objective, copies)
        step(images(), 1)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            features = objective.features(images()).float()
        saved = copy.deepcopy((weights(objective), step.state_dict()))
        step(images(), 2)
        for name, module in objective.modules().items():  # weights alone, as some programs load
            module.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in saved[0].items() if k.startswith(name)}
            )
        if moved:
            step.load_state_dict(saved[1])
        step(images(), 2)
        found.append({"features": features, **everything(objective, step)})
    assert_equal(*found)


class Tied(nn.Module):
    """A weight of two layers, of which one is also read as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.raw = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.frozen(self.first(x))) + self.raw.sum()


def test_tied_weights_get_every_gradient():
    torch.manual_seed(1)
    model = Tied()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatAdamW(trained, ops=EAGER, copies=torch.bfloat16)
    copies = ComputeCopies([model], optimizer)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    expected = [p.grad for p in trained]
    optimizer.zero_grad()
    for settle in (False, True):
        with copies.stand_in(), torch.autocast("cpu", torch.bfloat16):
            assert model.first.weight is model.second.weight is not model.raw
            assert model.frozen.weight.dtype == torch.float32  # no copy is kept of it
            model(x).sum().backward()
        given = {} if settle else copies.gradients()
        if settle:
            copies.settle()
        got = [given.get(p, p.grad) for p in trained]
        assert all(torch.equal(a.float(), b) for a, b in zip(got, expected, strict=True))  # type: ignore
        assert copies.gradients() == {}
        optimizer.zero_grad()


def test_refusals():
    kept = FlatAdamW(nn.Linear(2, 2).parameters(), ops=EAGER)
    with pytest.raises(ValueError, match="keeps copies"):
        ComputeCopies([nn.Linear(2, 2)], kept)
    for optimizer in ("auto", "torch", "apex"):
        objective = build()
        memory = objective.encoder.norm.weight.data_ptr()
        with pytest.raises(ValueError, match=f"'adamw_ema' with copies, got '{optimizer}'"):
            TrainStep(objective, StepConfig(precision="bf16", copies=True), optimizer=optimizer)  # type: ignore
        assert objective.encoder.norm.weight.data_ptr() == memory
    with pytest.raises(ValueError, match="bf16 with copies"):
        StepConfig(precision="fp16", copies=True)
