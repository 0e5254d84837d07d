"""The benchmarks' engine: rows after each arm, resuming, refusals; the kinds that a CPU has."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import bench_masks
from benchmarks.__main__ import main
from benchmarks.bench_ops import largest_error
from benchmarks.bench_predictor import worst_error
from benchmarks.engine import clock
from benchmarks.engine.options import Cell, Options, chosen
from benchmarks.engine.refusals import Disagreement
from benchmarks.engine.results import Results
from benchmarks.engine.runner import run, running_marker

FAKE = """
import time, weakref
from pathlib import Path
import torch
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.refusals import Disagreement, NotHere

OPTIONS = Options
HELD = []
CALLS = Path(__file__).with_suffix(".calls")

def plan(options):
    for arm in ("quick", "slow", "absent", "big", "broken", "wrong", "late"):
        yield Cell("fake", arm, {"model": "toy", "images": 4})

def note(text):
    CALLS.write_text((CALLS.read_text() if CALLS.exists() else "") + text + " ")

def test_fake(cell, bench):
    bench.shared(lambda: note("made"))
    note(cell.arm)
    if cell.arm == "absent":
        raise NotHere("no such library")
    held = torch.nn.Linear(2, 2)
    if cell.arm in ("big", "wrong", "broken"):
        HELD.append(weakref.ref(held))
    if cell.arm == "big":
        raise torch.OutOfMemoryError("1 TB")
    if cell.arm == "wrong":
        raise Disagreement("error 3")
    if cell.arm == "broken":
        {}["key"]
    if cell.arm == "late":
        bench.info["still_held"] = any(ref() is not None for ref in HELD)
    seconds = 0.004 if cell.arm == "slow" else 0.001
    numbers = []
    bench.steps(lambda n: (numbers.append(n), time.sleep(seconds)), first=1, rounds=2, each=3, warmup=1)
    bench.info["numbers"] = numbers
"""


@pytest.fixture
def fake(tmp_path):
    """A file of benchmarks beside a conftest that is the engine's; its results go to tmp_path."""
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (tmp_path / "bench_fake.py").write_text(FAKE)
    path = tmp_path / "results" / "cpu" / "2026-01-01-abcdef0.json"

    def measure(**options):
        status = run(
            str(tmp_path / "bench_fake.py"), Options(results=path, device="cpu", **options)
        )
        return status, Results.open(path)

    measure.calls = lambda: (tmp_path / "bench_fake.calls").read_text().split()
    measure.path = path
    return measure


def test_every_arm_is_a_row(fake, monkeypatch):
    """Timed or not; a refusal or an error fails the command, a missing library does not."""
    starts = []
    begin = clock.StepClock.start
    monkeypatch.setattr(clock.StepClock, "start", lambda self: (starts.append(1), begin(self)))
    status, results = fake()
    infos = {r["extra_info"]["arm"]: r["extra_info"] for r in results.rows(kind="fake")}
    assert status == 1 and list(infos) == ["quick", "slow", "late"]
    outcomes = {r["extra_info"]["arm"]: r["extra_info"] for r in results.not_timed(model="toy")}
    told = {arm: (info["outcome"], info["reason"]) for arm, info in outcomes.items()}
    assert told == {
        "absent": ("not here", "no such library"),
        "big": ("out of memory", "OutOfMemoryError: 1 TB"),
        "wrong": ("disagrees", "error 3"),
        "broken": ("failed", "KeyError: 'key'"),
    }
    assert not infos["late"]["still_held"], "an arm that was not timed leaves what it held"
    assert len(starts) == 3 * (1 + 2 + 1)  # warm-up, rounds, and pytest-benchmark's last call
    assert (
        infos["slow"]["ms_p50"] > 3.9 and 0.9 < infos["quick"]["ms_p10"] < infos["slow"]["ms_p10"]
    )
    assert len(infos["quick"]["step_ms"]) == 6
    assert infos["quick"]["numbers"][:9] == list(range(1, 10))  # three of warm-up
    assert infos["quick"]["images_per_s"] == pytest.approx(
        4 * 6 / sum(infos["quick"]["step_ms"]) * 1e3
    )
    assert fake.calls().count("made") == 1
    assert not running_marker(fake.path).exists()
    origin = results.document["provenance"][0]
    assert {"commit", "dirty", "torch", "seed", "threads", "cpu", "load"} <= set(origin)
    assert results.document["machine_info"]["cpu"]["count"] == origin["cpu_cores"]


def test_sweeps_and_resuming(fake):
    """Arms take turns; a second call takes what is missing only, unless told to take all again."""
    assert fake(arm=("quick",), sweeps=2)[0] == 0
    fake(arm=("quick", "sl*"), sweeps=2)
    assert fake.calls() == ["made", "quick", "quick", "made", "slow", "slow"]
    status, results = fake(arm=("quick", "absent"), sweeps=2, again=True)
    assert status == 0 and fake.calls()[6:] == ["made", "quick", "absent", "quick", "absent"]
    assert len(results.rows()) == 4 and len(results.not_timed()) == 2
    assert {r["extra_info"]["run"] for r in results.rows(arm="quick")} == {2}
    assert fake(arm=("quick", "late"), seconds=-1.0)[0] == 0
    assert "late" not in fake.calls()
    with pytest.raises(ValueError, match="nothing for"):
        fake(arm=("none",))
    cells = [Cell("k", arm, {"m": m}) for m in "xy" for arm in "ab"]
    order = [c.key for c in chosen(cells, Options(sweeps=2))]
    assert order[:4] == ["k x | a | 0", "k x | b | 0", "k x | a | 1", "k x | b | 1"]


def test_pytest_benchmark_reads_the_file(fake):
    """Its own command compares the rows of a results file."""
    fake(arm=("quick", "slow"))
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", str(fake.path.parents[1])]
    ran = subprocess.run(
        [*command, "compare", str(fake.path), "--columns=median"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "fake toy 4 | quick | 0" in ran.stdout and "slow" in ran.stdout


def test_clocks(monkeypatch):
    """Marks between steps; sums of events are doubles, though each distance is a float."""
    times = iter([10.0, 11.0, 13.0, 20.0, 21.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    marks = clock.StepClock(torch.device("cpu"))
    for step_count in (2, 1):
        marks.start()
        for _ in range(step_count):
            marks.mark()
    assert marks.milliseconds() == [1e3, 2e3, 1.5e3]

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            self.at = None

        def record(self, stream):
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return torch.tensor(1e3 * (other.at - self.at), dtype=torch.float32).item()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    read = clock.round_clock(torch.device("cuda"))
    read()
    Event.now = 100_000.0
    before = read()
    Event.now += 1e-5
    assert read() - before == pytest.approx(1e-5, rel=1e-3)


def test_wrong_arms_are_refused():
    """Each kind's comparison sees a wrong result, and NaN."""
    contexts, targets = bench_masks.sampler("numpy loop", 4, torch.device("cpu"))(0)
    bench_masks.check((contexts, targets), 4, 0)
    for wrong in (
        (contexts, targets[:3]),
        ([contexts[0].flip(1)], targets),
        ([targets[0]], targets),
        ([contexts[0][:, :8]], targets),
        (contexts, [targets[0] + 1, *targets[1:]]),
        ([contexts[0].int()], targets),
    ):
        with pytest.raises(Disagreement):
            bench_masks.check(wrong, 4, 0)
    one, nan = torch.ones(3), torch.full((3,), torch.nan)
    assert largest_error([one], [one]) == 0 and largest_error([nan], [one]) == float("inf")
    assert largest_error([1.1 * one], [one]) == pytest.approx(0.1, rel=1e-5)
    assert worst_error({"y": one}, {"y": one}, 1e-4) == 0
    for got in (1.1 * one, nan, None):
        with pytest.raises(Disagreement, match="'y'"):
            worst_error({"y": got}, {"y": one}, 1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["predictor", "--model", "toy", "--images", "2", "--context-tokens", "12", "--rounds", "1"],
        ["masks", "--images", "4", "--sweeps", "1", "--rounds", "1", "--warmup", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_kinds_run(arguments, tmp_path):
    """Every arm that a CPU has agrees and is timed; the rest say why not."""
    options = ["--device", "cpu", "--results", str(tmp_path / "r.json"), "--threads", "1"]
    if arguments[0] == "predictor":
        options += ["--target-tokens", "6"]
    assert main([*arguments, *options]) == 0
    results = Results.open(tmp_path / "r.json")
    assert {r["extra_info"]["outcome"] for r in results.not_timed()} == {"not here"}
    assert len(results.rows()) == {"predictor": 10, "masks": 6}[arguments[0]]


def test_command_line(capsys):
    """Unknown kinds and values are refused with status 2; without a kind there is help."""
    assert main([]) == 0 and "predictor" in capsys.readouterr().out
    assert main(["nonsense"]) == 2 and "expected one of" in capsys.readouterr().err
    for wrong in (
        "predictor --model none",
        "ops --model none",
        "masks --rounds 0",
        "report --table x",
    ):
        with pytest.raises(SystemExit, match="2"):
            main(wrong.split())
        assert "expected" in capsys.readouterr().err
