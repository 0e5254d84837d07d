"""The whole training step: the published program, what can be assembled, stopfast and its ablations.

No arm is timed before it has taken the published program's steps (`benchmarks.step.gate`). Warm: after
every shape that is timed has been met often enough for nothing to be compiled or captured any more, 40
steps in rounds of ten, in which the host waits for nothing but what the arm itself waits for. Cold: the
first 500 steps of a process of its own with empty caches, compiling included.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.engine.options import Cell, Options
from benchmarks.engine.provenance import HERE, device_folder
from benchmarks.engine.refusals import Disagreement, NotTimed, OutOfMemory
from benchmarks.engine.runner import Bench
from benchmarks.roof.ceilings import newest_roof
from benchmarks.roof.roofline import step_cost
from benchmarks.roof.step_work import shape_of
from benchmarks.step.arms import ARMS, OURS, StepArm
from benchmarks.step.cold import Cold, Story
from benchmarks.step.gate import STEPS, Errors, Reference, check, reference
from benchmarks.step.workload import MODELS, Precision, build_workload

_EACH = 10  # steps of a round
_ROUNDS = 4
_PASSES = 5  # over the timed masks at most, until nothing new is compiled or captured
_COLD_SECONDS = 540


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """The whole training step; by default ViT-B/16 at batch 64 on a GPU, a small model on a CPU."""

    state: tuple[Literal["warm", "cold"], ...] = ("warm",)
    """Steps when all is compiled and captured, or the first ones of a process."""
    masks: Path | None = None
    """File of masks to replay, written where it is not there; by default one for each problem in the
    user's cache."""
    steps: int = 500
    """Cold steps, and masks before they repeat."""
    gate_steps: int = STEPS
    """Steps that every arm takes beside the published program before it is timed."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if set(self.model) - set(MODELS):
            raise ValueError(f"expected models of {list(MODELS)}, got {list(self.model)}")
        if self.precision == "fp16":
            raise ValueError("expected precision fp32 or bf16, got fp16")
        if min(self.steps, self.gate_steps) < 1:
            raise ValueError("expected steps and gate_steps > 0")


OPTIONS = StepOptions


def plan(options: StepOptions) -> Iterator[Cell]:
    """Every arm of every problem; the ablations are not taken cold."""
    gpu = options.place.type == "cuda"
    for model in options.model or (("vit-b16",) if gpu else ("small",)):
        for images in options.images or ((64,) if gpu else (8,)):
            problem = {"model": model, "images": images, "precision": options.dtype}
            if "warm" in options.state:
                yield from (Cell("step", arm, problem) for arm in ARMS)
            if "cold" in options.state:
                whole = (arm for arm in ARMS if not arm.startswith(f"{OURS} "))
                yield from (Cell("cold", arm, {**problem, "steps": options.steps}) for arm in whole)


def _reference(cell: Cell, options: StepOptions) -> Reference:
    precision: Precision = "bf16" if options.dtype == "bf16" else "fp32"
    workload = build_workload(
        str(cell.problem["model"]),
        int(cell.problem["images"]),
        precision,
        options.place,
        steps=options.steps,
        masks=options.masks,
    )
    return reference(workload, options.gate_steps)


def _checked(arm: StepArm, expected: Reference, bench: Bench) -> Errors:
    options = bench.options
    assert isinstance(options, StepOptions)
    found = check(arm, expected, options.gate_steps)
    bench.info["errors"] = {
        "loss": found.loss,
        "moments": max(found.moments.values()),
        **{f"travel of {part}": value for part, value in found.travel.items()},
    }
    bench.info["gate_steps"] = options.gate_steps
    bench.info["choices"] = arm.choices()
    return found


def settle(arm: StepArm, first: int, steps: int) -> int:
    """Take the steps that will be timed until nothing is compiled or captured; how many were taken."""
    before = None
    for taken in range(_PASSES):
        if before is not None and _made(arm) == before:
            return taken * steps
        before = _made(arm)
        for number in range(first, first + steps):
            arm.step(number)
    return _PASSES * steps


def _sane(loss: float, expected: Reference) -> float:
    """The loss after all that was timed; shapes that the gate did not meet are in it.

    Raises:
        Disagreement: it is not finite, or twice what training began with.
    """
    first = expected.exact.losses[0].item()
    if not loss <= 2.0 * first:
        raise Disagreement(f"a loss of {loss} after the timed steps, {first} at the first")
    return loss


def _made(arm: StepArm) -> tuple[int, int]:
    counts = arm.counts()
    return counts["compilations"], counts["graphs"]


def test_step(cell: Cell, bench: Bench) -> None:
    """Milliseconds of a warm step, images a second, peak memory, share of the roof."""
    options = bench.options
    assert isinstance(options, StepOptions)
    expected = bench.shared(lambda: _reference(cell, options))
    workload = expected.workload
    arm = ARMS[cell.arm](workload)
    try:
        _checked(arm, expected, bench)
        first, rounds = options.gate_steps + 1, options.rounds or _ROUNDS
        warmup = 1 if options.warmup is None else options.warmup
        timed = range(first, first + (rounds + warmup) * _EACH)
        bench.info["settled_after"] = settle(arm, first, len(timed))
        before = _made(arm)
        times = bench.steps(arm.step, first=first, rounds=_ROUNDS, each=_EACH, warmup=1)
        bench.info["counts"] = arm.counts()
        bench.info["settled"] = _made(arm) == before
        bench.info["loss"] = _sane(arm.step(timed.stop).item(), expected)
    finally:
        arm.close()
    kept = [workload.masks_of(number) for number in timed[warmup * _EACH :]]
    shapes = [shape_of(workload.config, masks, workload.images) for masks in kept]
    cost = step_cost(workload.config, shapes, workload.precision)
    bench.info |= {"flops": cost.flops, "bytes": cost.bytes}
    folder = bench.recorder.results.path.parent
    roof = newest_roof(device_folder(bench.device), workload.precision, folder.parent)
    if roof is not None and times:
        bench.info |= cost.figures(roof, sum(times) / len(times))


def test_cold(cell: Cell, bench: Bench) -> None:
    """The first steps of a process with empty caches: its stalls, and what it compiled and captured."""
    options = bench.options
    assert isinstance(options, StepOptions)
    expected = bench.shared(lambda: _reference(cell, options))
    arm = ARMS[cell.arm](expected.workload)
    try:
        _checked(arm, expected, bench)
    finally:
        arm.close()
    del arm
    bench.recorder.clean()  # the process to come needs the memory
    workload = expected.workload
    asked = Cold(
        arm=cell.arm,
        model=workload.model,
        images=workload.images,
        precision=workload.precision,
        device=bench.device.type,  # type: ignore[arg-type]
        steps=options.steps,
        masks=options.masks,
    )
    stories: list[Story] = []
    bench.benchmark.pedantic(lambda: stories.append(_in_its_own_process(asked)), rounds=1)
    bench.info |= stories[0]
    bench.info["images_per_s"] = 1e3 * workload.images * options.steps / sum(stories[0]["step_ms"])


def _in_its_own_process(asked: Cold) -> Story:
    """Run :mod:`benchmarks.step.cold` with caches of its own.

    Raises:
        OutOfMemory, NotTimed: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        told = Path(folder, "story.json")
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.step.cold", *asked.arguments(), "--told", str(told)],
            cwd=HERE.parent,
            env={**os.environ, **caches},
            capture_output=True,
            text=True,
            timeout=_COLD_SECONDS,
            check=False,
        )
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["nothing said"])[-1]
            kind = OutOfMemory if "OutOfMemoryError" in last else NotTimed
            raise kind(f"exit status {ran.returncode}: {last}")
        return json.loads(told.read_text())
