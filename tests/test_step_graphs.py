"""Whole steps as graphs: the bookkeeping on the CPU with a stand-in for the graph, the rest on a GPU."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from stopfast.block import Block
from stopfast.config import StepConfig
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER
from stopfast.masking import Masks
from stopfast.objectives.jepa import Jepa
from stopfast.step import TrainStep
from stopfast.step import graphs as step_graphs
from stopfast.step.graphs import StepGraphs
from tests.test_compute_copies import assert_equal, everything
from tests.test_objective import assert_close, build, images, weights

SHAPES = [(9, 6), (9, 4), (12, 6), (7, 8), (10, 5)]
"""Context and target tokens."""
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda")


class StandIn:
    """Captures by running and undoing, and replays what is left of a step when its Python is left out."""

    def __init__(self, optimizer: FlatAdamW) -> None:
        self.optimizer = optimizer

    def place(self) -> nullcontext:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        segments = self.optimizer._segments
        memory = [t for s in segments for t in (*s.buffers.values(), s.steps, s.scalars)]
        before = [t.clone() for t in memory]
        work()
        for tensor, value in zip(memory, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            left_out = {"mark_updated": mock.DEFAULT, "check_memory": mock.DEFAULT}
            with mock.patch.multiple(self.optimizer, **left_out):
                work()

        return replay


def shaped_masks(batch: int, iteration: int, *, start: int, stop: int, device: Any) -> Masks:
    """Random patches, of which there are as many again every five steps."""
    kept, wanted = SHAPES[iteration % len(SHAPES)]
    generator = torch.Generator().manual_seed(iteration)
    order = torch.stack([torch.randperm(36, generator=generator) for _ in range(batch)])
    order = order[start:stop].to(device)
    return Masks([order[:, :kept]], [order[:, 20 : 20 + wanted], order[:, 28 - wanted : 28]])


def begin(graphs: bool, settings: StepConfig, **changed: Any) -> tuple[Jepa, TrainStep]:
    objective = build(**changed)
    objective.masks = shaped_masks  # type: ignore[assignment]
    step = TrainStep(objective, settings, optimizer="adamw_ema")
    if graphs:
        assert isinstance(step.optimizer, FlatAdamW)
        step._graphs = StepGraphs(step.optimizer, StandIn(step.optimizer), "cpu")
    return objective, step


WAYS: dict[str, tuple[StepConfig, dict[str, Any]]] = {
    "fp32": (StepConfig(), {}),
    "bf16 copies": (StepConfig(precision="bf16", copies=True), {}),
    "accumulated and clipped": (StepConfig(accumulate=2), {"clip": "global", "clip_norm": 0.1}),
    "all": (StepConfig(precision="bf16", copies=True, accumulate=2), {"clip": "per_tensor"}),
    "padded": (StepConfig(), {"bucket": 4}),
}


@pytest.mark.parametrize("way", WAYS)
def test_thirty_steps_over_five_shapes(way: str):
    """Each step happens once, with its own draws and schedules, whatever is looked at or loaded between."""
    settings, changed = WAYS[way]
    rate = {"lr": lambda step: 1e-3 / step, "momentum": lambda step: 1 - 0.1 / step}
    found = []
    for graphs in (False, True):
        objective, step = begin(graphs, settings, **rate, **changed)
        losses, saved = [], {}
        for number in range(1, 31):
            batch = images() * (1 + number / 30)
            losses.append(step(batch, number).loss)
            if number == 14:
                with torch.inference_mode():
                    losses.append(objective.features(batch).mean())
                saved = copy.deepcopy(step.state_dict())
            if number == 20:
                step.load_state_dict(saved)
            if number == 25:  # weights alone, as some programs load
                halved = {n: w / 2 for n, w in objective.encoder.state_dict().items()}
                objective.encoder.load_state_dict(halved)
        found.append({"losses": torch.stack(losses), **everything(objective, step)})
        shapes = 3 if way == "padded" else 5  # (9, 6), (10, 5), (12, 6) and (7, 8) round to two
        eager = 30 if not graphs else shapes
        expected = {"graphs": graphs * shapes, "replayed": 30 - eager, "eager": eager}
        assert step.counts() == expected | {"compilations": 0}
    assert_equal(*found)


def test_a_replay_marks_what_it_updated():
    """State forgotten by a load is there again, and autograd knows that weights were written."""
    objective, step = begin(True, StepConfig())
    fresh = copy.deepcopy(step.state_dict())
    for number in (1, 6, 11):
        step(images(), number)
    step.load_state_dict(fresh)
    stale = objective.encoder(images()).square().sum()
    of_teacher = objective.target_encoder(images().requires_grad_()).square().sum()
    step(images(), 16)
    assert step.counts()["replayed"] == 3
    counts = {float(s["step"]) for s in step.state_dict()["optimizer"]["state"].values()}
    trained = sum(len(group["params"]) for group in step.optimizer.param_groups)
    assert counts == {1.0} and len(step.optimizer.state) == trained
    for loss in (stale, of_teacher):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_moved_weights_are_refused():
    objective, step = begin(True, StepConfig())
    for number in (1, 6, 11):
        step(images(), number)
    objective.encoder.norm.bias.data = objective.encoder.norm.bias.data.clone()
    with pytest.raises(ValueError, match="1 elsewhere"):
        step(images(), 16)


class Toy:
    """A linear model under graphs, whose inputs a test chooses."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 1)
        self.spare = nn.Parameter(torch.ones(1))
        self.optimizer = FlatAdamW([*self.model.parameters(), self.spare], ops=EAGER)
        self.graphs = StepGraphs(self.optimizer, StandIn(self.optimizer), "cpu")

    def __call__(self, **inputs: Any) -> dict[str, int]:
        self.graphs(inputs, self.work)
        return self.graphs.counts

    def work(self, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        loss = self.model(inputs["x"].float()).sum() * inputs.get("times", 1)
        (loss + self.spare if inputs.get("spare", True) else loss).sum().backward()
        updated = self.optimizer.update()
        self.optimizer.zero_grad()
        return loss.detach(), updated


def test_what_makes_a_shape():
    """Shapes, dtypes and layouts of tensors, and the values of everything else."""
    toy, x = Toy(), torch.ones(2, 2)
    seen = [{"x": x}, {"x": x[:1]}, {"x": x.double()}, {"x": x.mT}, {"x": x, "times": 2}]
    seen += [{"x": x, "times": 3}, {"x": x, "times": None}]
    for given in seen[:-1]:
        toy(**given)
    assert toy.graphs.counts == {"graphs": 0, "replayed": 0, "eager": 6}
    for given in seen[:-1]:
        toy(**given)
    assert toy.graphs.counts == {"graphs": 6, "replayed": 6, "eager": 6}
    with pytest.raises(ValueError, match="plain values: unhashable type"):
        toy(x=x, name={1})


def test_other_launches_are_another_graph():
    """Parameters that were not all updated equally often are updated one by one from then on."""
    toy, x = Toy(), torch.ones(2, 2)
    for _ in range(3):
        toy(x=x)
    together = copy.deepcopy(toy.optimizer.state_dict())
    toy(x=x, spare=False)
    counts = dict(toy.graphs.counts)
    for _ in range(2):
        toy(x=x)
    assert toy.graphs.counts == {k: counts[k] + 1 for k in counts}
    toy.optimizer.load_state_dict(together)
    assert toy(x=x)["graphs"] == counts["graphs"] + 1  # the first graph fits again
    assert {float(s["step"]) for s in toy.optimizer.state.values()} == {4.0}


def test_shapes_beyond_the_limit_run_eagerly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_graphs, "LIMIT", 2)
    toy = Toy()
    with pytest.warns(UserWarning, match="more than 2 shapes.*--step.bucket") as warned:
        for rows in (1, 2, 3, 4) * 3:
            toy(x=torch.ones(rows, 2))
    assert len(warned) == 1
    assert toy.graphs.counts == {"graphs": 2, "replayed": 4, "eager": 8}


def test_refusals(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="a CUDA device with graphs, got cpu"):
        TrainStep(build(), StepConfig(graphs=True), optimizer="adamw_ema")
    with pytest.raises(ValueError, match="'adamw_ema' with graphs, got 'torch'"):
        TrainStep(build(), StepConfig(graphs=True), optimizer="torch", device="cuda")
    toy = Toy()
    toy(x=torch.ones(1, 2))
    monkeypatch.setattr(StandIn, "capture", lambda *_: torch.ones(2).item())
    with pytest.raises(RuntimeError, match=r"could not be captured.*--step\.no-graphs"):
        toy(x=torch.ones(1, 2))


HARDEST: dict[str, Any] = {"bucket": 4, "target_stream": True, "clip": "global", "clip_norm": 0.1}
GPU_WAYS: dict[str, tuple[StepConfig, dict[str, Any]]] = {
    **WAYS,
    "target stream": (StepConfig(), {"target_stream": True}),
    "everything": (StepConfig(precision="bf16", copies=True, accumulate=2), HARDEST),
}


def on_gpu(graphs: bool, settings: StepConfig, **changed: Any) -> tuple[Jepa, TrainStep]:
    objective = build(**changed)
    objective.masks = shaped_masks  # type: ignore[assignment]
    settings = replace(settings, graphs=graphs)
    return objective, TrainStep(objective, settings, device=CUDA, optimizer="adamw_ema")


@ON_GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", GPU_WAYS)
def test_graphs_are_the_eager_step(way: str, compiled: bool):
    """Twenty steps over changing shapes: the losses, and the weights but for a bias without gradient."""
    if compiled and way != "everything":
        pytest.skip("compiled once is enough")
    settings, changed = GPU_WAYS[way]
    found = []
    for graphs in (False, True):
        objective, step = on_gpu(graphs, settings, **changed)
        if compiled:
            for part in (m for root in objective.modules().values() for m in root.modules()):
                if isinstance(part, Block):
                    part.compile_parts()
        losses = [step(images().to(CUDA), number).loss for number in range(1, 21)]
        after = {n: w for n, w in weights(objective).items() if not n.endswith("qkv.bias")}
        found.append({"losses": torch.stack(losses), **after})
        assert not graphs or step.counts()["graphs"] == step.counts()["eager"] > 1
    assert found[0]["losses"].std() > 1e-3 * found[0]["losses"].mean()  # so that stale inputs show
    assert_close(*found, tolerance=2e-4 if settings.precision == "fp32" else 2e-2)


@ON_GPU
def test_every_replay_draws_its_own_noise():
    """Nothing but the noise changes, and it is the noise of each step's number."""
    found = []
    for graphs in (False, True):
        objective, step = on_gpu(graphs, StepConfig(), lr=lambda _: 0.0)
        first = shaped_masks(8, 0, start=0, stop=8, device=CUDA)
        objective.masks = lambda *_, first=first, **__: first  # type: ignore[assignment]
        found.append([step(images().to(CUDA), n).loss.item() for n in range(1, 9)])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(set(found[1])) == 8


@ON_GPU
def test_graphs_share_their_memory():
    """Five graphs hold hardly more than the first of them, which reads the most tokens."""
    objective, step = on_gpu(True, StepConfig())
    objective.masks = lambda batch, i, **given: shaped_masks(batch, i + 2, **given)  # type: ignore
    batch, held = images(1024).to(CUDA), []
    for number in range(1, 11):
        for _ in range(2):
            step(batch, number)
        if number <= 5:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert step.counts()["graphs"] == 5
    assert held[4] < 1.5 * held[0]
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= 1.05 * held[4]


@ON_GPU
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_no_step_waits_for_the_gpu(graphs: bool, ahead: bool):
    settings = StepConfig(precision="bf16", copies=True, ahead=ahead)
    objective, step = on_gpu(graphs, settings, **HARDEST)
    drawn = [shaped_masks(8, i, start=0, stop=8, device=CUDA) for i in range(5)]
    objective.masks = lambda _, i, **__: drawn[i % 5]  # type: ignore[assignment]
    batch = images().to(CUDA)
    for number in range(1, 16):
        step(batch, number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(batch, number).loss for number in range(16, 26)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
