"""How long a device needs for a training step at least: `python -m benchmarks roofline`.

Operations and bytes (:mod:`benchmarks.roof.step_work`) over the device's two ceilings
(:mod:`benchmarks.roof.ceilings`) are a floor. Beside it stand the steps that were timed, and what the same
shares of the roof would come to on an A100: a projection, and marked as one wherever it is shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.engine import runner as engine
from benchmarks.engine.options import Options
from benchmarks.engine.provenance import device_folder
from benchmarks.engine.results import FOLDER, all_results
from benchmarks.roof.ceilings import PUBLISHED, Roof, newest_roof
from benchmarks.roof.step_work import Shape, drawn_shapes, step_bytes, step_work
from benchmarks.step.workload import MODELS
from stopfast.config import Config

A100 = Roof(bytes=1.7e12, flops=2.5e14)
"""Ceilings of an A100 of 80 GB as stated, not measured: about 85 % of what its data sheet has of memory
traffic (2.04 TB/s), and 80 % of its bf16 products (312 TFLOP/s)."""


class Part(NamedTuple):
    """What one part of a step needs, a mean over steps."""

    flops: float
    bytes: float


class Floor(NamedTuple):
    """The least milliseconds of a step under two ceilings."""

    parts: dict[str, float]
    """Of each part, the longer of its products and its traffic."""
    products: float
    """Of all products."""
    traffic: float
    """Of all bytes."""

    @property
    def summed(self) -> float:
        """Parts one after another, each at its own ceiling: what a share of the roof refers to."""
        return sum(self.parts.values())

    @property
    def overall(self) -> float:
        """Products and traffic of the whole step at the same time: less than any order of parts allows."""
        return max(self.products, self.traffic)


@dataclass(frozen=True)
class StepCost:
    """What the steps of a model and batch need."""

    images: int
    parts: dict[str, Part]

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> float:
        """Bytes of a step."""
        return sum(part.bytes for part in self.parts.values())

    def floor(self, roof: Roof) -> Floor:
        """Return the least time of a step on a device of these ceilings."""

        def needs(part: Part) -> tuple[float, float]:
            return 1e3 * part.flops / roof.flops, 1e3 * part.bytes / roof.bytes

        whole = needs(Part(self.flops, self.bytes))
        return Floor({name: max(needs(part)) for name, part in self.parts.items()}, *whole)

    def figures(self, roof: Roof, milliseconds: float) -> dict[str, float]:
        """Return what a step's measured time is beside its floor, as a row of results has it.

        ``matrix_share`` is the model-FLOP utilisation against the measured matrix rate, ``roof_share`` the
        floor of :attr:`Floor.summed` over the time.
        """
        floor = self.floor(roof)
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "floor_ms": floor.summed,
            "floor_overall_ms": floor.overall,
            "matrix_share": floor.products / milliseconds,
            "roof_share": floor.summed / milliseconds,
        }


def step_cost(config: Config, shapes: Sequence[Shape], precision: str = "bf16") -> StepCost:
    """Return the mean cost of steps of these shapes; work is not linear in lengths, so not of a mean shape.

    Raises:
        ValueError: no shape.
    """
    if not shapes:
        raise ValueError("expected shapes of at least one step, got none")
    low = 4 if precision == "fp32" else 2
    totals: dict[str, Part] = {}
    for shape in shapes:
        work, traffic = step_work(config, shape), step_bytes(config, shape, low)
        for name, moved in traffic.items():
            before = totals.get(name, Part(0, 0))
            flops = work[name].total if name in work else 0
            totals[name] = Part(before.flops + flops, before.bytes + moved)
    count = len(shapes)
    parts = {name: Part(p.flops / count, p.bytes / count) for name, p in totals.items()}
    return StepCost(shapes[0].images, parts)


def projected(cost: StepCost, measured: float, on: Roof, to: Roof) -> float:
    """Return the milliseconds that a step would take under other ceilings: a projection, no measurement.

    The rule: the other device's floor, over the share of the roof that was reached on the measured one.
    """
    return cost.floor(to).summed / (cost.floor(on).summed / measured)


@dataclass(frozen=True, kw_only=True)
class RooflineOptions(Options):
    """A step's work, traffic and floor, for each model and batch."""

    steps: int = 500
    """Steps whose masks count; the benchmarks replay 500."""
    matrix_tflops: float | None = None
    """Rate of products to reckon with, in TFLOP/s; by default the device's, from its newest results."""
    gigabytes: float | None = None
    """Memory traffic to reckon with, in GB/s; likewise."""
    measure: bool = False
    """Measure the device's ceilings first."""


OPTIONS = RooflineOptions


class Line(NamedTuple):
    """A step that was timed."""

    arm: str
    milliseconds: float


def ceilings_for(options: RooflineOptions) -> Roof | None:
    """Return the ceilings that are told, or the device's newest measured ones.

    Raises:
        ValueError: one ceiling is told and the other is not.
    """
    told = (options.gigabytes, options.matrix_tflops)
    if None not in told:
        return Roof(float(told[0] or 0) * 1e9, float(told[1] or 0) * 1e12)
    if told != (None, None):
        raise ValueError("expected both --gigabytes and --matrix-tflops, got one of them")
    if options.measure:
        engine.run("bench_ceilings.py", options)
    return newest_roof(device_folder(options.place), options.dtype, _folder(options))


def _folder(options: RooflineOptions) -> Path:
    """Where results are, a folder for each device."""
    chosen = options.results or FOLDER
    return chosen.parent.parent if chosen.suffix == ".json" else chosen


def timed_steps(options: RooflineOptions, model: str, images: int) -> list[Line]:
    """Return the warm steps of the device's newest results that have any of this problem."""
    for results in reversed(all_results(_folder(options))):
        if results.path.parent.name != device_folder(options.place):
            continue
        rows = results.rows(kind="step", model=model, images=images, precision=options.dtype)
        if rows:
            infos: list[dict[str, Any]] = [row["extra_info"] for row in rows]
            return [Line(info["arm"], info["ms_p50"]) for info in infos]
    return []


def run(options: RooflineOptions) -> int:
    """Print a table for each model and batch; return 0."""
    console = Console(width=110)
    roof = ceilings_for(options)
    if roof is None:
        console.print("No ceilings are known here: --measure, or --matrix-tflops and --gigabytes.")
    else:
        console.print(f"ceilings: {roof.flops / 1e12:.1f} TFLOP/s, {roof.bytes / 1e9:.0f} GB/s")
    for model in options.model or PUBLISHED:
        config = MODELS[model]()
        for images in options.images or (64, 128):
            shapes = drawn_shapes(config, images, options.steps)
            cost = step_cost(config, shapes, options.dtype)
            console.print(_table(f"{model}, {images} images, {options.dtype}", cost, roof))
            if roof is not None:
                for text in _comparisons(cost, roof, timed_steps(options, model, images)):
                    console.print(text)
    return 0


def _table(title: str, cost: StepCost, roof: Roof | None) -> Table:
    table = Table(title=title)
    for heading in ("part", "TFLOP", "GB", "floor ms"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    floor = None if roof is None else cost.floor(roof)

    def row(name: str, flops: float, moved: float, least: float | None) -> None:
        known = "" if least is None else f"{least:.3f}"
        table.add_row(name, f"{flops / 1e12:.4f}", f"{moved / 1e9:.3f}", known)

    for name, part in cost.parts.items():
        row(name, part.flops, part.bytes, None if floor is None else floor.parts[name])
    row("all, one after another", cost.flops, cost.bytes, None if floor is None else floor.summed)
    row("all at once", cost.flops, cost.bytes, None if floor is None else floor.overall)
    return table


def _comparisons(cost: StepCost, roof: Roof, timed: list[Line]) -> Iterator[str]:
    floor = cost.floor(roof)
    yield f"at the floor: {1e3 * cost.images / floor.summed:.0f} images/s"
    least = cost.floor(A100).summed
    yield f"floor on an A100, stated ceilings (projected): {least:.2f} ms"
    for line in timed:
        found = cost.figures(roof, line.milliseconds)
        there = projected(cost, line.milliseconds, roof, A100)
        yield (
            f"{line.arm}: {line.milliseconds:.3f} ms, {found['matrix_share']:.1%} of the matrix rate, "
            f"{found['roof_share']:.1%} of the roof; on an A100 {there:.2f} ms (projected)"
        )
