"""Per-step schedules as closed forms: a value is a function of the step, so a resume replays nothing."""

import math
from dataclasses import dataclass
from typing import Literal

FixStrategy = Literal["const", "linear"]


def _cosine(start: float, final: float, progress: float) -> float:
    return final + (start - final) / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """Optional linear warm-up, then half a cosine from ``reference`` to ``final``.

    Steps count from 1, as the published schedulers do: they advance before the first update. From step
    ``fix_step`` on (StoP's threshold) the value is constant, or goes straight to ``final`` over the
    steps that remain.
    """

    reference: float
    """Value at the top of the cosine."""
    final: float
    """Value at ``total_steps`` and after."""
    total_steps: int
    """Length T of the schedule, warm-up included."""
    start: float | None = None
    """Value that the warm-up starts from; None without a warm-up."""
    warmup_steps: int = 0
    """Length W of the warm-up."""
    fix_step: int | None = None
    """Step from which the cosine no longer counts; None for never."""
    fix_strategy: FixStrategy = "const"
    """What happens from ``fix_step`` on."""
    counted_before: int = 0
    """Subtracted from the step first: 1 for programs whose first update has passed no step."""
    warmup_arrives: bool = False
    """Whether the warm-up's last step has the full value, one step before the cosine begins."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"expected 0 <= warmup_steps < total_steps, got {self.warmup_steps} and {self.total_steps}"
            )
        if self.warmup_steps and self.start is None:
            raise ValueError("expected start with warmup_steps > 0, got None")
        if self.fix_step is not None and not self.warmup_steps <= self.fix_step < self.total_steps:
            raise ValueError(
                f"expected fix_step in {self.warmup_steps}..{self.total_steps - 1}, got {self.fix_step}"
            )

    def __call__(self, step: int) -> float:
        """Return the value of optimiser step ``step`` = 1, 2, ..."""
        step -= self.counted_before
        if step < self.warmup_steps:
            assert self.start is not None
            length = max(1, self.warmup_steps - self.warmup_arrives)
            return self.start + step / length * (self.reference - self.start)
        if self.fix_step is not None and step >= self.fix_step:
            fixed = self._curve(self.fix_step)
            if self.fix_strategy == "const":
                return fixed
            passed = (step - self.fix_step) / (self.total_steps - self.fix_step)
            return self._clamp(fixed + passed * (self.final - fixed))
        return self._curve(step)

    def _curve(self, step: int) -> float:
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self._clamp(_cosine(self.reference, self.final, min(1.0, progress)))

    def _clamp(self, value: float) -> float:
        falling = self.final <= self.reference
        return max(self.final, value) if falling else min(self.final, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMomentum:
    """EMA momentum from ``start`` to ``end`` in a straight line; step 1 uses exactly ``start``."""

    start: float
    end: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the momentum of optimiser step ``step`` = 1, 2, ..."""
        return self.start + (step - 1) * (self.end - self.start) / self.total_steps
