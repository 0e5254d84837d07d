"""Takes measurements through pytest-benchmark and keeps each in the results file as soon as it is there.

A file ``benchmarks/bench_<name>.py`` has ``OPTIONS``, a dataclass of options; ``plan(options)``, which
yields measurements (:class:`~benchmarks.engine.options.Cell`); and for every kind of them a function
``test_<kind>(cell, bench)`` that compares the arm with its reference, raises a
:class:`~benchmarks.engine.refusals.NotTimed` or measures it by ``bench.time`` or ``bench.steps``.
``benchmarks/conftest.py`` calls them.
"""

import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from benchmarks.engine.clock import StepClock
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.provenance import HERE, clocks, device_folder, machine_info, provenance
from benchmarks.engine.refusals import NotTimed, OutOfMemory
from benchmarks.engine.results import FOLDER, Results, results_path

T = TypeVar("T")
HANDED_OVER = pytest.StashKey[Options]()
"""Where the command line's options lie for ``conftest.py``."""
_NO_MEMORY = "out of memory|ALLOC_FAILED|can't allocate memory"  # of Triton, cuBLAS, a CPU
DEVICE_LOST = 70
"""Exit status after an arm left the GPU in a state that no later arm can use."""


class _HandOver:
    def __init__(self, options: Options) -> None:
        self.options = options

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[HANDED_OVER] = self.options


def run(file: str, options: Options) -> int:
    """Take the measurements of ``benchmarks/<file>``; the exit status, 0 where no arm failed.

    Raises:
        ValueError: no arm is as asked for.
    """
    chosen = options.results or FOLDER
    storage = chosen.parent if chosen.suffix == ".json" else chosen
    arguments = [
        *("-q", "-c", str(HERE.parent / "pyproject.toml"), "--rootdir", str(HERE.parent)),
        *("-p", "no:cacheprovider", "-W", "ignore:Benchmark fixture was not used"),
        *("-W", "ignore:Module already imported"),
        *("--benchmark-only", "--benchmark-columns", "min,median,max,rounds"),
        # pytest-benchmark makes this folder, by default where one stands.
        *("--benchmark-storage", f"file://{storage}"),
    ]
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    try:
        status = pytest.main([str(HERE / file), *arguments], plugins=[_HandOver(options)])
    finally:  # what a measurement is taken under is nobody else's
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        told = {name: getattr(options, name) for name in ("model", "images", "arm")}
        raise ValueError(f"expected something to time in {file}, got nothing for {told}")
    return int(status)


class Recorder:
    """The results file of a session, and what it keeps from one arm to the next."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.options, self.device = options, options.place
        self.lost = False
        self._began = time.monotonic()
        self._shared: tuple[str, Any] | None = None
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        origin = provenance(options.commit)
        path = results_path(options.results, device_folder(self.device), origin)
        self.results = Results.open(path)
        fresh = origin["dirty"] and options.results != path
        self.resumes = not (options.again or fresh)
        self.results.begin(origin, **_about(config))
        self.marker = running_marker(path)

    def unwanted(self, cell: Cell) -> str | None:
        """Why a measurement is not taken now, without a row: there is one, or no time is left."""
        if self.resumes and self.results.has(cell.key):
            return f"in {self.results.path.name} already"
        seconds = self.options.seconds
        if seconds is not None and time.monotonic() - self._began > seconds:
            return f"the {seconds:.0f} s are over"
        return None

    def about(self, cell: Cell) -> dict[str, Any]:
        """Return what the results say of a measurement, whatever comes of it."""
        names = {"key": cell.key, "kind": cell.kind, "arm": cell.arm, "sweep": cell.sweep}
        return {**cell.problem, **names, "device": self.device.type}

    def begin(self, cell: Cell) -> None:
        """Leave a mark of what is being measured, for whoever finds this process dead."""
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(json.dumps(self.about(cell)))

    def end(self) -> None:
        """Remove the mark."""
        self.marker.unlink(missing_ok=True)

    def keep(self, cell: Cell, stats: Any) -> dict[str, Any]:  # noqa: ANN401
        """Write the row of a measurement from pytest-benchmark's figures; return its ``extra_info``."""
        row = stats.as_dict(include_data=True)
        info = {**self.about(cell), **row["extra_info"]}
        milliseconds = info.get("step_ms") or [1e3 * second for second in row["stats"]["data"]]
        for name, fraction in (("ms_p10", 0.1), ("ms_p50", 0.5), ("ms_p90", 0.9)):
            info.setdefault(name, quantile(milliseconds, fraction))
        if self.device.type == "cuda":
            info.setdefault("peak_bytes", torch.cuda.max_memory_allocated(self.device))
            info.setdefault("peak_reserved_bytes", torch.cuda.max_memory_reserved(self.device))
            info["clocks"] = clocks()
        # pytest-benchmark has the parameters too, as objects that JSON does not know.
        self.results.add({**row, "params": None, "extra_info": info})
        return info

    def refuse(self, cell: Cell, error: Exception, info: dict[str, Any]) -> NotTimed:
        """Write the row of what was not timed; say it in our words."""
        refusal = _as_refusal(error)
        self.lost = self.lost or self._device_is_lost()
        self.results.refuse({**self.about(cell), **info}, refusal.outcome, str(refusal))
        return refusal

    def shared(self, group: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return what all arms of a group use, made once; the last group's is given up first."""
        if self._shared is None or self._shared[0] != group:
            self._shared = None
            self.clean()
            self._shared = (group, make())
            self.clean()
        return self._shared[1]

    def clean(self) -> None:
        """Give back what an arm left: memory, compiled code, peaks."""
        gc.collect()
        if self.lost:
            return
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _device_is_lost(self) -> bool:
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False


class Bench:
    """What a benchmark's function measures with."""

    def __init__(self, cell: Cell, recorder: Recorder, benchmark: Any) -> None:  # noqa: ANN401
        self.cell, self.recorder, self.benchmark = cell, recorder, benchmark
        self.options, self.device = recorder.options, recorder.device
        self.info: dict[str, Any] = benchmark.extra_info
        """What the row says besides; may be added to before and after measuring."""

    def shared(self, make: Callable[[], T]) -> T:
        """Return ``make()``, made once for all arms of the problem."""
        return self.recorder.shared(self.cell.group, make)

    def time(
        self,
        run: Callable[[], object],
        *,
        rounds: int,
        warmup: int = 1,
        iterations: int = 1,
        setup: Callable[[], None] | None = None,
    ) -> None:
        """Time ``run()`` in rounds of so many calls; the options' rounds and warm-up come first.

        ``setup()`` is called before every round, untimed, and allows one call a round.
        """
        options = self.options
        self.benchmark.pedantic(
            run,
            rounds=options.rounds or rounds,
            warmup_rounds=warmup if options.warmup is None else options.warmup,
            iterations=iterations,
            setup=setup,
        )

    def steps(
        self, step: Callable[[int], object], *, first: int, rounds: int, each: int, warmup: int
    ) -> list[float]:
        """Time training steps ``first``, ``first + 1``, ...; the milliseconds of each measured one.

        A round is ``each`` steps in a row, and the host waits for the device only at its end.
        """
        options = self.options
        rounds = options.rounds or rounds
        warmup = warmup if options.warmup is None else options.warmup
        clock, taken = StepClock(self.device), 0

        def one() -> None:
            nonlocal taken
            if taken % each == 0:
                clock.start()
            step(first + taken)
            clock.mark()
            taken += 1

        # pytest-benchmark does not divide the time of a single call.
        self.benchmark.pedantic(one, rounds=rounds, warmup_rounds=warmup, iterations=each)
        times = clock.milliseconds()[warmup * each : (warmup + rounds) * each]
        self.info["step_ms"] = times
        images = self.cell.problem.get("images")
        if isinstance(images, int) and times:
            self.info["images_per_s"] = 1e3 * images * len(times) / sum(times)
        return times


def running_marker(path: Path) -> Path:
    """Return the file beside a results file that names the measurement being taken."""
    return path.with_suffix(".running")


def quantile(values: list[float], fraction: float) -> float:
    """Return a quantile by linear interpolation."""
    return torch.tensor(values, dtype=torch.float64).quantile(fraction).item()


def _about(config: pytest.Config) -> dict[str, Any]:
    """The part of the document that is pytest-benchmark's own."""
    import pytest_benchmark

    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    version = pytest_benchmark.__version__
    return {"machine_info": machine_info(), "commit_info": commit, "version": version}


def _as_refusal(error: Exception) -> NotTimed:
    """An arm is another's code: whatever it raises is told in a row, and the others go on."""
    if isinstance(error, NotTimed):
        return error
    first = str(error).strip().partition("\n")[0]
    text = f"{type(error).__name__}: {first}"
    short = isinstance(error, torch.OutOfMemoryError) or re.search(_NO_MEMORY, str(error))
    return OutOfMemory(text) if short else NotTimed(text)
