"""Candidates for one call of an operation: each verified, then all timed against each other, and kept."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benchmarks.engine.clock import round_clock
from benchmarks.engine.refusals import NotTimed, OutOfMemory
from benchmarks.engine.results import Results
from benchmarks.tuning.race import Clock, Race, Run, race
from benchmarks.tuning.verified import Calls, Kind, Reference
from stopfast.kernels._launch import watch_compiled
from stopfast.kernels._tiles import Tiles, trying
from stopfast.kernels.cases import Arguments, Case

Phase = Literal["inference", "forward", "backward", "both"]
_REPLAY = 1e-3  # seconds that the calls of one graph take: beside it the replay's own cost is small


class TimeOver(Exception):
    """The limit came before all candidates were ready; the contest counts for nothing."""


class Spills(NotTimed):
    """A kernel of a candidate keeps registers in memory, more than the incumbent's."""

    outcome = "spills"
    passes = True


@dataclass(frozen=True)
class Candidate:
    """What may be called, and with which tiles."""

    function: Callable[..., object]
    tiles: Mapping[tuple[str, str], Tiles] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """Candidates for the same call."""

    name: str
    case: Case
    arguments: Arguments
    kind: Kind
    phase: Phase
    candidates: dict[str, Candidate]
    incumbent: str | None = None
    """Who stays unless another is clearly faster; it is the first."""
    captured: bool = True
    """Timed as a CUDA graph, without the cost of launches; not for what the host has to wait for."""
    base: Mapping[tuple[str, str], Tiles] = field(default_factory=dict)
    """Tiles of the kernels that are no candidates."""
    about: dict[str, Any] = field(default_factory=dict)
    """What its rows say besides."""


class Arena:
    """Where contests are held: a device, its clock, a limit, and the file that keeps every sample."""

    def __init__(
        self,
        device: torch.device,
        results: Results,
        seconds: float,
        *,
        since: int = 0,
        clock: Clock | None = None,
    ) -> None:
        """``since``: rows of earlier processes, by their index in the results' provenance, do not count."""
        self.device, self.results, self.since = device, results, since
        self.clock = clock or round_clock(device)
        self._end = time.monotonic() + seconds
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def known(self, contest: str) -> list[dict[str, Any]]:
        """Return what the rows of a contest say, if it was held."""
        infos = [row["extra_info"] for row in self.results.rows(kind="tune", contest=contest)]
        return [info for info in infos if info["run"] >= self.since]

    def hold(self, contest: Contest, reference: Reference) -> list[dict[str, Any]]:
        """Verify and time all candidates; return what the rows say, of earlier ones if it was held before.

        Raises:
            TimeOver: the limit came first.
        """
        if known := self.known(contest.name):
            return known
        runs: dict[str, Run] = {}
        refused: dict[str, NotTimed] = {}
        spilled, each = 0, 0
        for name, candidate in contest.candidates.items():
            if self.left < 0:
                raise TimeOver
            try:
                run, spills = self._ready(contest, candidate, reference)
                if name == contest.incumbent:
                    spilled = spills
                elif contest.incumbent and spills > spilled:
                    raise Spills(f"{spills} registers")
                each = each or self._calls(run)  # of all the same, or their times would not compare
                runs[name] = self._captured(run, contest.captured, each)
            except (
                Exception
            ) as error:  # a candidate may be another's code, or fit no GPU: the rest go on
                refused[name] = _refusal(error)
        until = self.clock() + max(self.left, 1.0)
        held = race(runs, self.clock, incumbent=contest.incumbent, until=until)
        return self._keep(contest, held, each, refused)

    def _ready(
        self, contest: Contest, candidate: Candidate, reference: Reference
    ) -> tuple[Run, int]:
        """The verified call, and how many registers its kernels spill."""
        calls = Calls(candidate.function, contest.arguments, contest.kind)
        call = getattr(calls, contest.phase)
        tiles = {**contest.base, **candidate.tiles}

        def run() -> None:
            with trying(tiles):
                call()

        with watch_compiled() as made:
            with trying(tiles):
                reference.check(candidate.function)
                if contest.phase in ("backward", "both"):
                    calls.prepare()
            run()
        return run, sum(each.n_spills or 0 for each in made)

    def _calls(self, run: Run) -> int:
        """How many calls are timed as one."""
        if self.device.type != "cuda":
            return 1
        times = []
        for _ in range(4):
            begin = self.clock()
            run()
            times.append(self.clock() - begin)
        return max(1, min(100, int(_REPLAY / max(min(times), 1e-6))))

    def _captured(self, run: Run, wanted: bool, each: int) -> Run:
        """So many calls as one, on a GPU as a graph if it is wanted."""

        def several() -> None:
            for _ in range(each):
                run()

        if self.device.type != "cuda" or not wanted:
            return several
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            several()
        return graph.replay

    def _keep(
        self, contest: Contest, held: Race, each: int, refused: dict[str, NotTimed]
    ) -> list[dict[str, Any]]:
        for name, candidate in contest.candidates.items():
            info = {
                **contest.about,
                "key": f"tune | {contest.name} | {name}",
                "kind": "tune",
                "contest": contest.name,
                "arm": name,
                "phase": contest.phase,
                "winner": name == held.winner,
                "clear": held.clear,
                "tiles": [[*key, entry] for key, entry in candidate.tiles.items()],
            }
            if name in refused:
                self.results.refuse(info, refused[name].outcome, str(refused[name]))
                continue
            row = benchmark_row(info, contest.name, [one / each for one in held.samples[name]])
            self.results.add(row)
        return self.known(contest.name)


def benchmark_row(info: dict[str, Any], group: str, seconds: list[float]) -> dict[str, Any]:
    """Return samples as a row of pytest-benchmark's format."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample in seconds:
        stats.update(sample)
    info = {**info, "ms_p50": 1e3 * statistics.median(seconds)}
    return {
        "group": group,
        "name": info["key"],
        "fullname": info["key"],
        "params": None,
        "param": None,
        "extra_info": info,
        "options": {},
        "stats": {**stats.as_dict(), "data": seconds, "iterations": 1},
    }


def about_machine(results: Results) -> dict[str, Any]:
    """Return what pytest-benchmark's files say of the machine, unless this one has it."""
    import pytest_benchmark
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

    found = results.document["machine_info"] or pytest_benchmark_generate_machine_info()
    return {"machine_info": {**found, "node": ""}, "version": pytest_benchmark.__version__}


def _refusal(error: Exception) -> NotTimed:
    if isinstance(error, NotTimed):
        return error
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return OutOfMemory(text) if isinstance(error, torch.OutOfMemoryError) else NotTimed(text)
