"""One optimiser step of any objective."""

import sys
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stopfast.config import StepConfig
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import Ops
from stopfast.objectives import Objective
from stopfast.optim import Implementation, build_optimizer, clip_gradients, set_scalars
from stopfast.step.copies import ComputeCopies
from stopfast.step.draws import StepDraws
from stopfast.step.graphs import CudaRecorder, StepGraphs

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context that computes in a precision; fp32 is none."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class StepResult(NamedTuple):
    """What a step leaves; the loss stays on the device until somebody reads it."""

    loss: Tensor
    scalars: dict[str, float]


class TrainStep:
    """Forward, backward, clipping, and the update with the teachers' average of the updated weights.

    The gradient is the mean over ``accumulate`` equal micro-batches. Weights, optimiser and average are
    fp32; bf16 and fp16 are autocast. fp16 scales the loss and leaves out a step whose gradients
    overflow, average included; ``skipped`` counts these. Nothing waits for the device, but for draws
    whose lengths it has to know, for a capture, and for fp16 by torch's or apex's optimiser.

    Args:
        objective: what is trained; its modules move to ``device``.
        settings: ``precision``, ``accumulate``, ``ahead``, ``copies`` and ``graphs`` of it; the others
            are the objective's.
        device: where.
        optimizer, ops: implementation of the update; see :func:`stopfast.optim.build_optimizer`.

    Raises:
        ValueError: an unknown precision, an optimiser that cannot be had, copies or graphs with another
            one than ``"adamw_ema"``, or graphs on the CPU.
    """

    def __init__(
        self,
        objective: Objective[Any],
        settings: StepConfig = StepConfig(),  # noqa: B008
        *,
        device: torch.device | str = "cpu",
        optimizer: Implementation = "auto",
        ops: Ops | str = "auto",
    ) -> None:
        self.device = torch.device(device)
        _check(settings, self.device, optimizer)
        self.objective, self.settings = objective, settings
        self.precision: Precision = settings.precision
        for module in objective.modules().values():
            module.to(self.device)
        self.recipe = objective.optimizer_recipe()
        copies = torch.bfloat16 if settings.copies else None
        self.optimizer = build_optimizer(
            self.recipe, objective.teacher_pairs(), optimizer, ops, copies
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # type: ignore[attr-defined]
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._one = torch.ones((), device=self.device)
        self._draws = StepDraws(objective, settings.accumulate, self.device, settings.ahead)
        self._copies = None
        if isinstance(self.optimizer, FlatAdamW) and settings.copies:
            self._copies = ComputeCopies(objective.modules().values(), self.optimizer)
        self._graphs = None
        if isinstance(self.optimizer, FlatAdamW) and settings.graphs:
            self._graphs = StepGraphs(self.optimizer, CudaRecorder(self.device), self.device)
        self._eager = 0
        self._compiled_before = _compilations()

    @property
    def skipped(self) -> int:
        """Steps that fp16 left out; reading it waits for the device."""
        return int(self._skipped)

    def counts(self) -> dict[str, int]:
        """How the steps so far were taken.

        Returns:
            ``graphs`` captured, steps ``replayed`` (the first of each graph too), ``eager`` steps, and
            ``compilations`` of torch.compile in this process since the step was built.
        """
        own = {"graphs": 0, "replayed": 0, "eager": self._eager}
        counts = own if self._graphs is None else self._graphs.counts
        return {**counts, "compilations": _compilations() - self._compiled_before}

    def __call__(self, images: Tensor, step: int) -> StepResult:
        """Take optimiser step ``step`` = 1, 2, ... on a global batch [B, C, H, W].

        Raises:
            ValueError: a batch that does not split into equal micro-batches.
            RuntimeError: a step that cannot be captured as a CUDA graph.
        """
        size, accumulate = len(images), self.settings.accumulate
        if size % accumulate:
            raise ValueError(f"expected a batch that {accumulate} divides, got {size}")
        scalars = self.objective.scalars(step)
        set_scalars(self.optimizer, scalars)
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.refresh_copies(if_written=True)  # which no replay would
        inputs = images, self._draws.take(step, size)
        if self._graphs is not None:
            loss = self._graphs(inputs, self._whole)
        else:
            loss = self._backward(*inputs)
            self._update()
            self._eager += 1
        self._draws.prepare(step + 1, size)
        return StepResult(loss, scalars)

    def _whole(self, inputs: tuple[Tensor, list[Any]]) -> tuple[Tensor, list[Tensor]]:
        """The step as a graph holds it; the optimiser's numbers are on the device already."""
        assert isinstance(self.optimizer, FlatAdamW)
        loss = self._backward(*inputs)
        if self.recipe.clip != "none":
            clip_gradients(self.recipe)
        given = None if self._copies is None else self._copies.gradients()
        updated = self.optimizer.update(given)
        self.optimizer.zero_grad()
        return loss, updated

    def _backward(self, images: Tensor, draws: list[Any]) -> Tensor:
        """Gradients and loss of all micro-batches."""
        micro = len(images) // len(draws)
        total: Tensor | None = None
        with nullcontext() if self._copies is None else self._copies.stand_in():
            for number, drawn in enumerate(draws):
                with autocast(self.device, self.precision):
                    loss = self.objective.loss(images[number * micro :][:micro], drawn)
                share = loss / len(draws)
                self.scaler.scale(share).backward()
                total = share.detach() if total is None else total + share.detach()
                if self._copies is not None and (len(draws) > 1 or self.recipe.clip != "none"):
                    self._copies.settle()  # what is added to or clipped is in fp32
        assert total is not None
        return total

    def _update(self) -> None:
        scaled = self.scaler.is_enabled()
        if self.recipe.clip != "none":
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.recipe)
        before = self.scaler.scale(self._one) if scaled else self._one
        given = {} if self._copies is None else {"gradients": self._copies.gradients()}
        self.scaler.step(self.optimizer, **given)
        self.scaler.update()
        self.optimizer.zero_grad()
        if scaled:  # a scale that was lowered is known on the device
            self._skipped += self.scaler.scale(self._one) < before

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss-scale state; the weights belong to the objective's modules."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._skipped.fill_(state["skipped"])


def _check(settings: StepConfig, device: torch.device, optimizer: str) -> None:
    if settings.precision not in ("fp32", *_AUTOCAST):
        raise ValueError(f"expected precision fp32, bf16 or fp16, got {settings.precision!r}")
    asked = [name for name in ("copies", "graphs") if getattr(settings, name)]
    if asked and optimizer != "adamw_ema":
        raise ValueError(
            f"expected the optimizer 'adamw_ema' with {' and '.join(asked)}, got {optimizer!r}"
        )
    if settings.graphs and device.type != "cuda":
        raise ValueError(f"expected a CUDA device with graphs, got {device}")


def _compilations() -> int:
    """Graphs that torch.compile has compiled in this process; its import alone takes a second."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]
