"""The first steps of an arm in a process of its own: `python -m benchmarks.step.cold`, told as JSON."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
import tyro

from benchmarks.engine.clock import StepClock
from benchmarks.step.arms import ARMS
from benchmarks.step.workload import Precision, build_workload

_STALL = 5.0  # times the median


@dataclass(frozen=True, kw_only=True)
class Cold:
    """Which steps to take."""

    arm: str
    model: str
    images: int
    precision: Precision
    device: Literal["cpu", "cuda"]
    steps: int
    masks: Path | None = None
    told: Path | None = None
    """File that the story is written to."""

    def arguments(self) -> list[str]:
        """Return what the command line of this module is told to take these steps."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]


class Story(TypedDict):
    """What happened."""

    build_s: float
    """Until the arm was there."""
    step_ms: list[float]
    """Of each step, compiling and capturing included; on a GPU by marks on its stream."""
    longest_ms: float
    stalls: int
    """Steps longer than five times the median."""
    stalled_ms: float
    """What they took beyond the median."""
    counts: dict[str, dict[str, int]]
    """Compilations and captures after so many steps."""
    peak_bytes: int


def take(asked: Cold) -> Story:
    """Build the arm and take the steps, without reading anything in between."""
    device = torch.device(asked.device)
    workload = build_workload(
        asked.model, asked.images, asked.precision, device, steps=asked.steps, masks=asked.masks
    )
    clock = StepClock(device)
    clock.start()
    arm = ARMS[asked.arm](workload)
    clock.mark()
    counts = {}
    for number in range(1, asked.steps + 1):
        arm.step(number)
        clock.mark()
        if number % max(asked.steps // 5, 1) == 0:
            counts[str(number)] = arm.counts()
    built, *steps = clock.milliseconds()
    arm.close()
    median = statistics.median(steps)
    stalled = [step for step in steps if step > _STALL * median]
    return {
        "build_s": built * 1e-3,
        "step_ms": steps,
        "longest_ms": max(steps),
        "stalls": len(stalled),
        "stalled_ms": sum(stalled) - median * len(stalled),
        "counts": counts,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


def main(asked: Cold) -> None:
    """Take the steps, and tell the story."""
    text = json.dumps(take(asked))
    if asked.told is None:
        print(text)
    else:
        asked.told.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Cold))
