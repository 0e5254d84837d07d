"""The ceilings of the device, a row for each load: what `python -m benchmarks roofline --measure` takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.engine.options import Cell, Options
from benchmarks.engine.provenance import clocks
from benchmarks.engine.runner import Bench
from benchmarks.roof.ceilings import PUBLISHED, Load, calls_for, loads

_ROUND = 0.05  # seconds; ten rounds that are not kept are enough for clocks to settle
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class CeilingOptions(Options):
    """The device's matrix rate and memory bandwidth."""


OPTIONS = CeilingOptions


def _loads(options: Options) -> dict[str, Load]:
    models = options.model or (PUBLISHED if options.place.type == "cuda" else PUBLISHED[:1])
    return {load.name: load for load in loads(options.place, _DTYPES[options.dtype], models)}


def plan(options: Options) -> Iterator[Cell]:
    """One measurement a load."""
    for name, load in _loads(options).items():
        yield Cell("ceilings", name, {"ceiling": load.ceiling, "precision": options.dtype})


def test_ceilings(cell: Cell, bench: Bench) -> None:
    """The sustained rate of a load, and the clocks under it."""
    load = _loads(bench.options)[cell.arm]
    run = load.make()
    calls = calls_for(run, bench.device, _ROUND)
    bench.time(run, rounds=20, warmup=10, iterations=calls)
    stats = bench.benchmark.stats.stats
    bench.info |= {
        "work": load.work,
        "per_second": load.work / stats.median,
        "best_per_second": load.work / stats.min,
    }
    if bench.device.type == "cuda":
        for _ in range(20 * calls):  # a second of work: longer than asking takes
            run()
        bench.info["clocks_under_load"] = clocks()
        torch.cuda.synchronize(bench.device)
