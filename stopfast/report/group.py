"""The runs that share pictures, and the images of these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stopfast.build import build_objective
from stopfast.config import Config, ObjectiveConfig
from stopfast.objectives import Objective
from stopfast.trained import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs whose encoders see images of one size in patches of one size."""

    runs: Mapping[str, TrainedRun]
    pool: Tensor | None
    """fp32 [P, 3, H, W], normalised, over which features are averaged; None where there are no images."""
    shown: Sequence[int] = ()
    """Which of the pool the pictures show."""
    fields: Mapping[str, Tensor]
    """The pool as each run's objective takes it, fp32 [P, 3, height, width]; empty where there are no
    images. An encoder may see a part of it, or it amid something else."""

    @property
    def first(self) -> TrainedRun:
        """The run whose settings decide what the others share."""
        return next(iter(self.runs.values()))

    @property
    def images(self) -> Tensor | None:
        """The images that the pictures show, fp32 [B, 3, H, W]."""
        return None if self.pool is None else self.pool[list(self.shown)]

    def field(self, name: str) -> Tensor:
        """These images as a run's objective takes them, fp32 [B, 3, height, width]."""
        return self.fields[name][list(self.shown)]

    def of(self, kind: type[ObjectiveConfig]) -> "Group | None":
        """The runs of one kind of objective; None where there is none."""
        runs = {n: run for n, run in self.runs.items() if isinstance(run.config.objective, kind)}
        return replace(self, runs=runs) if runs else None

    @property
    def whose(self) -> str:
        """Name the first run where there are several."""
        return f" of {next(iter(self.runs))}" if len(self.runs) > 1 else ""


def at_start(config: Config) -> Objective[Any]:
    """Return the objective that a run began with; the length of its epochs plays no part."""
    objective = build_objective(config, steps_per_epoch=1)
    for module in objective.modules().values():
        module.eval()
    return objective
