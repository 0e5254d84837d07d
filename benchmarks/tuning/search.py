"""Search of what is fastest on the GPU at hand: `python -m benchmarks tune --seconds 300`.

In this order, as what comes first is worth most: attention's backend by head dim and length; which
operations are faster fused; tiles of each kernel, climbing from its heuristic; and the first two again
where tiles have changed. A candidate's results and gradients are held to the eager definition before its
time counts. Each contest's samples are kept, and what is decided goes into the table that ``ops='auto'``
reads. A later call goes on where the last one stopped.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.engine.options import Options
from benchmarks.engine.provenance import device_folder, provenance
from benchmarks.engine.results import Results, results_path
from benchmarks.tuning.contest import Arena, Candidate, Contest, TimeOver, about_machine
from benchmarks.tuning.jobs import (
    BY_NAME,
    CHOSEN,
    TILED,
    Problem,
    alternatives,
    attention_problems,
    backends,
    neighbours,
    phase_of,
    problems,
)
from benchmarks.tuning.table import (
    attention_table,
    fused_table,
    nested_tiles,
    read_table,
    write_table,
)
from benchmarks.tuning.verified import DTYPES, Calls, Reference, copied
from stopfast.kernels._launch import interpreted
from stopfast.kernels._measured import PATH
from stopfast.kernels._tiles import Asked, Tiles, trying
from stopfast.kernels.attention import forward_kernel
from stopfast.kernels.cases import Arguments
from stopfast.kernels.ops import FUSED

_CLIMBS = 8  # rounds of neighbours for one kernel at most


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """Search the fastest backends, operations and tiles; ``--model`` names operations."""

    seconds: float | None = 300.0
    """Time limit; what was decided until then stands."""
    table: Path | None = None
    """Where it is written; by default the shipped table, which a rehearsal without a GPU may not touch."""
    cudnn: bool = False
    """Let cuDNN's attention into the table. It plans anew for each new shape: for runs of few shapes."""
    compiled: bool = True
    """Count `torch.compile` of an operation's definition as an alternative to the fused one."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if set(self.model) - set(BY_NAME):
            raise ValueError(f"expected operations of {list(BY_NAME)}, got {self.model}")


OPTIONS = TuneOptions


class Tuner:
    """One search: its arena, what was decided so far, and the table that it goes into."""

    def __init__(
        self, options: TuneOptions, device: torch.device, results: Results, since: int = 0
    ) -> None:
        on_gpu = device.type == "cuda"
        if not on_gpu and (options.table is None or options.table.resolve() == PATH.resolve()):
            raise ValueError("expected --table of its own for a rehearsal without a GPU")
        if not on_gpu and not interpreted(forward_kernel):
            raise ValueError("expected a GPU, or TRITON_INTERPRET=1 for a rehearsal")
        self.options, self.device = options, device
        self.path = options.table or PATH
        self.gpu = torch.cuda.get_device_name(device) if on_gpu else "rehearsal"
        self.arena = Arena(device, results, options.seconds or float("inf"), since=since)
        self.console = Console(width=110)
        self.round = 0
        given = read_table(self.path).get(self.gpu, {}).get("tiles", {})
        self.tiles = {
            (kernel, s): entry for kernel, each in given.items() for s, entry in each.items()
        }

    def search(self) -> bool:
        """Decide as much as there is time for; whether that is all."""
        try:
            self._backends()
            self._fused()
            before = dict(self.tiles)
            self._all_tiles()
            changed = {key[0] for key in self.tiles if self.tiles[key] != before.get(key)}
            self.round = 1
            if any(kernel.startswith("attention") for kernel in changed):
                self._backends()
            self._fused({op for op in CHOSEN if any(kernel.startswith(op) for kernel in changed)})
        except TimeOver:
            return False
        finally:
            self.write()
        return True

    def write(self) -> None:
        """Put everything that has been decided into the table."""
        infos = [row["extra_info"] for row in self.arena.results.rows(kind="tune")]
        labels = {op: [p.label for p in problems(op, self.device)] for op in CHOSEN}
        decided = {
            **fused_table(infos, labels),
            "attention": attention_table(infos, self.options.cudnn),
            "tiles": nested_tiles(self.tiles),
        }
        write_table(self.path, self.gpu, decided)

    def _wanted(self, operation: str) -> bool:
        return not self.options.model or operation in self.options.model

    def _hold(
        self,
        name: str,
        operation: str,
        problem: Problem,
        candidates: dict[str, Candidate],
        given: "_Given",
        **about: object,
    ) -> list[dict[str, Any]]:
        contest = Contest(
            f"{name}, round {self.round}",
            BY_NAME[operation],
            given.arguments,
            problem.kind,
            problem.phase,
            candidates,
            incumbent=next(iter(candidates)) if about["job"] == "tiles" else None,
            captured=operation != "multiblock_masks",  # its definition asks the device how it went
            base=dict(self.tiles),
            about={"op": operation, "label": problem.label, "round": self.round, **about},
        )
        infos = self.arena.known(contest.name) or self.arena.hold(contest, given.reference)
        times = {info["arm"]: info["ms_p50"] for info in infos}
        best = next((info["arm"] for info in infos if info["winner"]), "nobody")
        first = next(iter(candidates))
        compared = f", {first} {times[first]:.4f}" if first in times and best != first else ""
        self.console.print(f"{contest.name}: {best} {times.get(best, 0):.4f} ms{compared}")
        return infos

    def _backends(self) -> None:
        for problem in attention_problems(self.device) if self._wanted("attention") else ():
            shape = problem.shape
            self._hold(
                f"attention {problem.label}",
                "attention",
                problem,
                backends(),
                _Given("attention", problem, self.device),
                job="attention",
                head_dim=shape["d"],
                padded="lengths" in shape,
                tokens=shape["N"],
                weight=problem.weight,
            )

    def _fused(self, operations: Iterable[str] = CHOSEN) -> None:
        for operation in operations:
            for problem in problems(operation, self.device) if self._wanted(operation) else ():
                if operation == "multiblock_masks":
                    problem = problem._replace(phase="inference")
                candidates = alternatives(BY_NAME[operation], self.options.compiled)
                given = _Given(operation, problem, self.device)
                self._hold(
                    f"{operation} {problem.label}",
                    operation,
                    problem,
                    candidates,
                    given,
                    job="fused",
                )
                if "torch.compile" in candidates:
                    torch.compiler.reset()

    def _all_tiles(self) -> None:
        """Those of the first shape of every operation first, then those of the second, and so on."""
        listed = [
            [(operation, problem) for problem in problems(operation, self.device)]
            for operation in TILED
            if self._wanted(operation)
        ]
        climbed: set[tuple[str, str]] = set()
        for operation, problem in (each for row in zip_longest(*listed) for each in row if each):
            given = _Given(operation, problem, self.device)
            for asked in given.asked():
                if (asked.kernel, asked.shapes) not in climbed:
                    climbed.add((asked.kernel, asked.shapes))
                    self._climb(
                        operation, problem._replace(phase=phase_of(asked.kernel)), given, asked
                    )

    def _climb(self, operation: str, problem: Problem, given: "_Given", asked: Asked) -> None:
        key = (asked.kernel, asked.shapes)
        function = getattr(FUSED, operation)
        tried: list[Tiles] = [self.tiles.get(key, asked.heuristic)]
        for number in range(_CLIMBS):
            now = self.tiles.get(key, asked.heuristic)
            fresh = [each for each in neighbours(asked.kernel, now) if each not in tried]
            if not fresh:
                return
            tried += fresh
            candidates = {_text(now): Candidate(function)}
            candidates |= {_text(each): Candidate(function, {key: each}) for each in fresh}
            name = f"tiles of {asked.kernel} {asked.shapes}, climb {number}"
            infos = self._hold(name, operation, problem, candidates, given, job="tiles")
            won = [info for info in infos if info["winner"] and info["tiles"]]
            if not won:
                return
            ((*_, entry),) = won[0]["tiles"]
            self.tiles[key] = entry
            self.write()


class _Given:
    """An operation's arguments, the same every time, and its definition's results; made when needed."""

    def __init__(self, operation: str, problem: Problem, device: torch.device) -> None:
        self.operation, self.problem, self.device = operation, problem, device

    @cached_property
    def arguments(self) -> Arguments:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dtype = DTYPES[self.problem.kind]
            return BY_NAME[self.operation].make(self.problem.shape, dtype, self.device)

    @cached_property
    def reference(self) -> Reference:
        return Reference(BY_NAME[self.operation], self.arguments, self.problem.kind)

    def asked(self) -> list[Asked]:
        """Every question for tiles of the fused operation, forwards and backwards, once each."""
        case = BY_NAME[self.operation]
        given = copied(self.arguments) if case.in_place else self.arguments
        calls = Calls(getattr(FUSED, self.operation), given, self.problem.kind)
        with trying({}) as asked:
            if case.in_place:
                calls.forward()
            elif calls.prepare():
                calls.backward()
        return list({(one.kernel, one.shapes): one for one in asked}.values())


def _text(entry: Tiles) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.items())


def run(options: TuneOptions) -> int:
    """Search, and write the table and every sample; 0 also where the time was over first."""
    device = options.place
    origin = provenance(options.commit)
    results = Results.open(results_path(options.results, device_folder(device), origin))
    since = len(results.document["provenance"]) if options.again else 0
    tuner = Tuner(options, device, results, since)
    results.begin(origin, **about_machine(results))
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    with (
        nullcontext() if side is None else torch.cuda.stream(side)
    ):  # graphs take no default stream
        whole = tuner.search()
    tuner.console.print(f"{'all' if whole else 'not all'} decided: {tuner.path}, {results.path}")
    return 0
