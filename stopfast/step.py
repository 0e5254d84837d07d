"""One optimiser step of any objective."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stopfast.kernels.ops import Ops
from stopfast.objectives import Objective
from stopfast.optim import Implementation, build_optimizer, clip_gradients, set_scalars

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
    overflow, average included; ``skipped`` counts these.

    Args:
        objective: what is trained; its modules move to ``device``.
        precision: of the computation.
        accumulate: micro-batches of one step.
        device: where.
        optimizer, ops: implementation of the update; see :func:`stopfast.optim.build_optimizer`.

    Raises:
        ValueError: an unknown precision, or an optimiser that cannot be had.
    """

    def __init__(
        self,
        objective: Objective[Any],
        *,
        precision: Precision = "fp32",
        accumulate: int = 1,
        device: torch.device | str = "cpu",
        optimizer: Implementation = "auto",
        ops: Ops | str = "auto",
    ) -> None:
        if precision not in ("fp32", *_AUTOCAST):
            raise ValueError(f"expected precision fp32, bf16 or fp16, got {precision!r}")
        self.objective = objective
        self.device = torch.device(device)
        for module in objective.modules().values():
            module.to(self.device)
        self.recipe = objective.optimizer_recipe()
        self.optimizer = build_optimizer(self.recipe, objective.teacher_pairs(), optimizer, ops)
        self.accumulate = accumulate
        self.precision: Precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        self.skipped = 0

    def __call__(self, images: Tensor, step: int) -> StepResult:
        """Take optimiser step ``step`` = 1, 2, ... on a global batch [B, C, H, W].

        Raises:
            ValueError: a batch that does not split into equal micro-batches.
        """
        size = len(images)
        if size % self.accumulate:
            raise ValueError(f"expected a batch that {self.accumulate} divides, got {size}")
        scalars = self.objective.scalars(step)
        set_scalars(self.optimizer, scalars)
        micro = size // self.accumulate
        total: Tensor | None = None
        for start in range(0, size, micro):
            part = slice(start, start + micro)
            draws = self.objective.draws(step, size, part)
            with autocast(self.device, self.precision):
                loss = self.objective.loss(images[part], draws)
            share = loss / self.accumulate
            self.scaler.scale(share).backward()
            total = share.detach() if total is None else total + share.detach()
        assert total is not None
        self._update()
        return StepResult(total, scalars)

    def _update(self) -> None:
        if self.recipe.clip != "none":
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.recipe)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler.get_scale() < scale:
            self.skipped += 1

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
        self.skipped = state["skipped"]
