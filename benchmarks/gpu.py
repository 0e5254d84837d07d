"""Everything to be measured on a lent GPU, most valuable first, within a time limit.

    python -m benchmarks gpu --seconds 520 --output FOLDER [--resume EARLIER] [--commit HASH]

Each task runs in a process of its own, which leaves out what the results have and writes a row after every
arm. An arm that kills its process, loses the GPU or takes too long becomes a row that says so, and the
task goes on with the next arm. Called again with ``--resume`` it goes on where it stopped. ``--device cpu
--model toy`` rehearses it.
"""

import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks.engine.options import Options
from benchmarks.engine.provenance import HERE
from benchmarks.engine.results import Results
from benchmarks.engine.runner import running_marker
from benchmarks.report.report import printed
from benchmarks.report.tables import TABLES
from stopfast.kernels._measured import PATH

_MARGIN = 10.0  # seconds kept for the summary
_WHERE = """
import sys
from pathlib import Path
from benchmarks.engine.options import Options
from benchmarks.engine.provenance import device_folder, provenance
from benchmarks.engine.results import results_path
options = Options(device=sys.argv[1], commit=sys.argv[3] or None)
folder = device_folder(options.place)
print(results_path(Path(sys.argv[2]), folder, provenance(options.commit)))
"""
Ending = Literal["done", "done, but not every arm", "failed", "no time left"]
_ENDINGS: dict[int, Ending] = {0: "done", 1: "done, but not every arm"}


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """All that is to be measured on a GPU, most valuable first."""

    output: Path
    """Folder for the results, one for each device in it."""
    seconds: float = 520.0
    """Stop after so long."""
    resume: Path | None = None
    """Folder of an earlier call, whose results of this commit are gone on with."""
    only: tuple[str, ...] = ()
    """Tasks, by name or pattern (``step-*``); all when left out."""
    arm_seconds: float = 180.0
    """An arm that takes longer is given up."""
    device: Literal["cuda", "cpu"] = "cuda"
    model: tuple[str, ...] = ("vit-b16", "vit-l16", "vit-h14")
    commit: str | None = None
    """Commit of the code where there is no repository to ask."""
    data: Path | None = None
    """Photographs, for the loaders and the loss curves."""
    small: Path | None = None
    """Folder with ``train/`` and ``test/`` of small labelled photographs, CIFAR-10, for the accuracies."""

    def __post_init__(self) -> None:
        Options(device=self.device).place  # noqa: B018 - raises where there is no GPU
        if self.seconds <= _MARGIN or self.arm_seconds <= 0:
            raise ValueError(f"expected seconds > {_MARGIN:.0f} and arm_seconds > 0")


OPTIONS = GpuOptions


@dataclass(frozen=True)
class Task:
    """A command of ``python -m benchmarks``."""

    name: str
    command: tuple[str, ...]
    least: float
    """Seconds without which it is not begun: those of its first row, the start of a process included."""
    patience: float = 0.0
    """Seconds that an arm may take, if those are more than the options say."""


def tasks(options: GpuOptions) -> Iterator[Task]:
    """All tasks, most valuable first."""
    first, *rest = options.model
    small = options.device == "cpu"
    batches = (4,) if small else (64, 128)
    yield Task("ceilings", ("ceilings", *(("--rounds", "4") if small else ("--model", first))), 25)
    problems = [(model, images) for images in batches for model in (first, *rest)]
    for model, images in problems:
        yield _whole(model, images, small)
    problem = ("--model", first, "--images", str(batches[0]))
    cold = ("--state", "cold", "--steps", "20" if small else "500")
    cold += ("--arm", "published", "stopfast") if small else ()
    yield Task(f"cold-{first}", ("step", *problem, *cold), 60, patience=400)
    curves = ("--steps", "20" if small else "200")
    curves += ("--root", str(options.data)) if options.data else ()
    yield Task("curves", ("curves", *problem, *curves), 60)
    for model, images in problems:
        yield _parts(model, images, small)
    interpreted = ("--no-compiled", "--rounds", "1") if small else ()
    yield Task("ops", ("ops", *interpreted), 30)
    tokens = ("12", "6") if small else ("53", "33")
    shape = ("--context-tokens", tokens[0], "--target-tokens", tokens[1])
    yield Task("predictor", ("predictor", *problem, *shape), 30)
    yield Task("masks", ("masks", *(("--sweeps", "1") if small else ())), 20)
    if options.data is not None:
        yield Task("loader", ("loader", "--data", str(options.data)), 40)
        yield Task("train", ("train", "--data", str(options.data), *problem), 60)
    yield from _accuracies(options)
    if not small:
        yield Task("tune", ("tune", "--table", str(_table(options))), 60)


def _accuracies(options: GpuOptions) -> Iterator[Task]:
    """Of objectives, of StoP's noise, of combinations, ten minutes each; a rehearsal's are of digits."""
    if options.device == "cpu":
        sizes = ("--steps", "10", "--batch", "8", "--known", "100", "--asked", "50", "--seeds", "1")
        yield Task("quality", ("quality", "--arm", "untrained", "mae", *sizes), 30)
    elif options.small is not None:
        for study in ("objectives", "noise", "combinations"):
            told = ("--data", str(options.small), "--study", study)
            yield Task(f"quality-{study}", ("quality", *told), 60)


def _table(options: GpuOptions) -> Path:
    """The kernels' table that is tuned: the shipped one, or an earlier call's, copied to the output."""
    table = options.output.resolve() / PATH.name
    if not table.exists():
        earlier = sorted(options.resume.glob(f"**/{PATH.name}")) if options.resume else []
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy([PATH, *earlier][-1], table)
    return table


def _whole(model: str, images: int, small: bool) -> Task:
    """What the claim rests on; a rehearsal compiles nothing."""
    arms = ("published*", "stopfast", *(() if small else ("compile*", "apex*")))
    return _step("step", model, images, arms)


def _parts(model: str, images: int, small: bool) -> Task:
    """What each part is worth."""
    arms = ("stopfast without *skip*",) if small else ("stopfast with*",)
    return _step("parts", model, images, arms)


def _step(name: str, model: str, images: int, arms: tuple[str, ...]) -> Task:
    problem = ("step", "--model", model, "--images", str(images))
    least = 45 if model == "vit-b16" else 20 if model == "toy" else 60
    # The first arm also pays for the reference, some for minutes of compilation.
    return Task(f"{name}-{model}-{images}", (*problem, "--arm", *arms), least, patience=400)


def run(options: GpuOptions) -> int:
    """Run what fits; print what came of it. 1 if a task failed."""
    begin, console = time.monotonic(), Console(width=150)
    path = where(options)
    if options.resume is not None:
        taken_over(options.resume, path)
    endings: dict[str, Ending] = {}
    for task in tasks(options):
        if options.only and not any(fnmatch.fnmatchcase(task.name, one) for one in options.only):
            continue
        left = options.seconds - _MARGIN - (time.monotonic() - begin)
        console.rule(f"{task.name}: {left:.0f} s left")
        endings[task.name] = "no time left"
        if left >= task.least:
            endings[task.name] = attempt(task, options, path, time.monotonic() + left)
    for name in TABLES:
        table = TABLES[name](options.output)
        if table.rows and name != "ops":
            console.print(printed(table))
    for name, ending in endings.items():
        console.print(f"{name}: {ending}")
    console.print(
        f"{path}: {len(Results.open(path).rows())} rows in {time.monotonic() - begin:.0f} s"
    )
    return int("failed" in endings.values())


def where(options: GpuOptions) -> Path:
    """Return the results file, as a process that may use the GPU names it: this one leaves it alone.

    Raises:
        ValueError: that process failed.
    """
    told = (options.device, str(options.output.resolve()), options.commit or "")
    ran = subprocess.run(
        [sys.executable, "-c", _WHERE, *told],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise ValueError(f"the device is of no use: {ran.stderr.strip()}")
    return Path(ran.stdout.strip().splitlines()[-1])


def taken_over(earlier: Path, path: Path) -> None:
    """Copy an earlier call's results of the same device and commit, if there are any."""
    commit = path.stem.partition("-")[2].partition("-")[2].partition("-")[2]
    found = sorted(earlier.glob(f"**/{path.parent.name}/????-??-??-{commit}.json"))
    if found and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found[-1], path)


def attempt(task: Task, options: GpuOptions, path: Path, deadline: float) -> Ending:
    """Run a task until it is done or the time is over; what an arm breaks is begun anew without it.

    A process that ended otherwise than pytest does, after it had written rows, lost the GPU or fell on its
    way out: the next one goes on behind them.
    """
    marker = running_marker(path)
    while True:
        marker.unlink(missing_ok=True)
        left = deadline - time.monotonic()
        if left < task.least:
            return "no time left"
        before = _rows(path)
        patience = max(options.arm_seconds, task.patience)
        status, reason = _watched(_command(task, options, path, left), marker, patience, deadline)
        if reason == "no time left":
            marker.unlink(missing_ok=True)
            return reason
        if marker.exists():
            results = Results.open(path)
            results.refuse(json.loads(marker.read_text()), "gave no result", reason)
        elif status in _ENDINGS:
            return _ENDINGS[status]
        elif _rows(path) == before:
            return "failed"


def _rows(path: Path) -> int:
    results = Results.open(path)
    return len(results.rows()) + len(results.not_timed())


def _command(task: Task, options: GpuOptions, path: Path, left: float) -> list[str]:
    kind, *rest = task.command
    common = ["--device", options.device, "--results", str(path), "--seconds", f"{left:.0f}"]
    common += ["--commit", options.commit] if options.commit else []
    return [sys.executable, "-m", "benchmarks", kind, *rest, *common]


def _watched(command: list[str], marker: Path, patience: float, deadline: float) -> tuple[int, str]:
    """Run a command; its exit status, and why it ended if it did not end by itself."""
    interpreted = {"TRITON_INTERPRET": "1"} if "ops" in command and "cpu" in command else {}
    child = subprocess.Popen(
        command, cwd=HERE.parent, env={**os.environ, **interpreted}, start_new_session=True
    )
    while True:
        try:
            status = child.wait(0.5)
        except subprocess.TimeoutExpired:
            reason = _overdue(marker, patience, deadline)
            if reason is None:
                continue
            os.killpg(child.pid, signal.SIGKILL)
            return child.wait(), reason
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return status, f"its process ended with {name}"


def _overdue(marker: Path, patience: float, deadline: float) -> str | None:
    if time.monotonic() > deadline:
        return "no time left"
    try:
        since = time.time() - marker.stat().st_mtime
    except FileNotFoundError:
        return None
    return f"took over {patience:.0f} s" if since > patience else None
