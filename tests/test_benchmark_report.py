"""The benchmarks' results: files, tables, plots, and the script for a GPU that goes on with them."""

import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.engine.options import Cell
from benchmarks.engine.results import Results, all_results, results_path
from benchmarks.engine.runner import running_marker
from benchmarks.report import plots, report
from benchmarks.report.measured import newest
from benchmarks.report.tables import listed, projection


def write(path, rows, commit="abcdef0", **more):
    """A results file with rows of (cell, milliseconds or outcome); entries of all rows by name."""
    results = Results.open(path)
    results.begin({"commit": commit, "dirty": False})
    for cell, found in rows:
        info = {**cell.problem, "kind": cell.kind, "arm": cell.arm, "key": cell.key, **more}
        if isinstance(found, str):
            results.refuse(info, found, "because")
        else:
            results.add({"extra_info": info, "stats": {"data": [ms / 1e3 for ms in found]}})
    return results


STEP = {"model": "toy", "images": 4, "precision": "bf16"}


def step(arm, sweep=0, kind="step", **problem):
    return Cell(kind, arm, {**STEP, **problem}, sweep)


def test_newest_rows_win_and_sweeps_are_one(tmp_path):
    """By the time at which they were taken; a sweep without memory does not hide one that ran."""
    old, new = (
        tmp_path / "gpu" / "2026-02-02-aaaaaaa.json",
        tmp_path / "gpu" / "2026-01-01-bbb.json",
    )
    write(old, [(step("a"), [1.0]), (step("b"), [2.0, 4.0])], "aaaaaaaa")
    again = [(step("a", 0), [5.0]), (step("a", 1), [7.0]), (step("a", 2), "out of memory")]
    newer = write(new, again, "bbbbbbb1")
    for found in newer.document["benchmarks"]:
        found["extra_info"]["taken"] = "2999-01-01T00:00:00"
    newer.write()
    (tmp_path / "gpu" / "evaluation.json").write_text('{"figures": {}}')
    first, second = newest("step", tmp_path)
    assert (first.arm, first.samples, first.ms, first.commit) == ("a", (5.0, 7.0), 6.0, "bbbbbbb")
    assert first.outcome is None
    assert (second.arm, second.ms, second.outcome) == ("b", 3.0, None)


def test_file_names(tmp_path):
    """One file for each device and clean commit, whatever the day; broken ones are refused."""
    origin = {"commit": "0123456789", "dirty": False, "date": "2026-03-03T00:00:00"}
    path = results_path(tmp_path, "cpu", origin)
    assert path == tmp_path / "cpu" / "2026-03-03-0123456.json"
    path.parent.mkdir()
    (path.parent / "2026-03-01-0123456.json").write_text("{}")
    assert results_path(tmp_path, "cpu", origin).name == "2026-03-01-0123456.json"
    altered = results_path(tmp_path, "cpu", {**origin, "dirty": True})
    assert altered.name == "2026-03-03-0123456-dirty.json"
    with pytest.raises(ValueError, match="expected results"):
        Results.open(path.parent / "2026-03-01-0123456.json")


def test_table_of_steps(tmp_path):
    """Losing arms and those without memory are rows; ratios are to the published and the strongest."""
    found = [("published", [30.0]), ("compile", [10.0]), ("stopfast", [5.0]), ("lean", [15.0])]
    rows = [(step(arm), ms) for arm, ms in [*found, ("apex", "out of memory"), ("x", "not here")]]
    write(tmp_path / "gpu" / "2026-01-01-abcdef0.json", rows, peak_reserved_bytes=2**30)
    made = listed("step", tmp_path)
    cells = [dict(zip(made.headings, line, strict=True)) for line in made.rows]
    assert [c["arm"] for c in cells] == ["published", "compile", "stopfast", "lean", "apex"]
    assert [c["x published"] for c in cells] == ["1.00", "3.00", "6.00", "2.00", ""]
    assert [c["x strongest other"] for c in cells] == ["0.33", "1.00", "2.00", "0.67", ""]
    assert cells[3]["ms (10th to 90th percentile)"] == "15.0 (15.0 to 15.0)"
    assert cells[4]["ms (10th to 90th percentile)"] == "out of memory"
    assert (cells[0]["peak GiB"], cells[0]["of roof"]) == ("1.00", "")
    assert made.notes[1:] == ["apex, step toy 4 bf16: because.", "Not there: x (because)."]


def test_beside_the_roof(tmp_path):
    """With measured ceilings: shares of them, and an A100's time, which is marked as projected."""
    path = tmp_path / "nvidia-h100" / "2026-01-01-abcdef0.json"
    write(path, [(step("stopfast"), [1.0])])
    assert listed("step", tmp_path).rows[0][-5:-2] == ["", "", ""]
    assert projection(tmp_path).rows == []
    for ceiling, rate in (("matrix", 5e11), ("memory", 3.4e9)):
        load = Cell("ceilings", ceiling, {"ceiling": ceiling, "precision": "bf16"})
        write(path, [(load, [1.0])], per_second=rate)
    table = listed("step", tmp_path)
    floor = float(table.rows[0][table.headings.index("floor ms")])
    assert floor > 0 and table.rows[0][table.headings.index("of roof")].endswith("%")
    op = Cell("ops", "fused", {"op": "attention", "shape": "x", "precision": "bf16"})
    write(path, [(op, [1.0])], bytes=17e5, flops=1e8)
    assert listed("op-arms", tmp_path).rows[0][-2] == "50%"
    made = projection(tmp_path)
    assert float(made.rows[0][-1]) == pytest.approx(0.002)  # both ceilings are 500 times as high
    assert "projected" in made.headings[-1] and "not measured" in made.notes[0]


def test_markdown_and_plots_follow_the_results(tmp_path, capsys):
    """--check is 1 until --write has renewed tables and plots, and again after new results."""
    pytest.importorskip("matplotlib")
    folder, text = tmp_path / "results", tmp_path / "README.md"
    path = folder / "gpu" / "2026-01-01-abcdef0.json"
    text.write_text("before\n<!-- table: step -->\nold\n<!-- end -->\nafter\n")

    def called(*flags):
        return main(["report", *flags, "--results", str(folder), "--file", str(text)])

    assert called("--check") == 1
    called("--write")
    assert called("--check") == 0 and "step: not measured." in text.read_text()
    write(path, [(step("stopfast"), [1.0, 2.0]), (step("apex"), "out of memory")])
    assert called("--check") == 1
    called("--write")
    assert called("--check") == 0
    assert "| stopfast | 1.500 (1.100 to 1.900) |" in text.read_text()
    assert text.read_text().startswith("before\n") and text.read_text().endswith("after\n")
    (drawn,) = (folder / "plots").glob("*.svg")
    first = drawn.read_bytes()
    assert b"stopfast" in first and b"out of memory" in first and b"<dc:date>" not in first
    drawn.unlink()
    assert called("--check") == 1 and plots.write_plots(folder) == [drawn]
    assert drawn.read_bytes() == first
    write(path, [(step("stopfast"), [3.0])])
    capsys.readouterr()
    assert called("--check") == 1
    assert capsys.readouterr().out.count("not up to date") == 2
    path.unlink()
    called("--write")
    assert not drawn.exists()


@pytest.mark.parametrize(
    "text", ["<!-- table: step -->\nno end", "<!-- table: nothing -->\n<!-- end -->"]
)
def test_markers_are_checked(text, tmp_path):
    """A marker without an end, or of no table, is refused."""
    with pytest.raises(ValueError, match="expected"):
        report.renewed(text, tmp_path)


CHILD = """
import json, os, sys, time
from pathlib import Path
results, kill = Path(sys.argv[1]), sys.argv[2:]
marker = results.with_suffix(".running")
have = results.read_text() if results.exists() else ""
for arm in ("dies", "hangs", "fine"):
    if f"| {arm} |" in have:
        continue
    marker.write_text(json.dumps({"key": f"k | {arm} | 0", "kind": "k", "arm": arm}))
    if arm == "dies":
        os.kill(os.getpid(), 11)
    if arm == "hangs":
        time.sleep(60)
    marker.unlink()
sys.exit(1)
"""


def test_script_survives_its_arms(tmp_path, monkeypatch):
    """One that kills its process and one that hangs are rows; the rest goes on, in time."""
    path = tmp_path / "results.json"
    command = [sys.executable, "-c", CHILD, str(path)]
    monkeypatch.setattr(gpu, "_command", lambda *_: command)
    options = gpu.GpuOptions(output=tmp_path, device="cpu", arm_seconds=1.0)
    task = gpu.Task("k", (), least=0.0)
    Results.open(path).begin({"commit": "unknown", "dirty": None})
    ending = gpu.attempt(task, options, path, time.monotonic() + 30)
    told = {
        r["extra_info"]["arm"]: r["extra_info"]["reason"] for r in Results.open(path).not_timed()
    }
    assert told == {"dies": "its process ended with SIGSEGV", "hangs": "took over 1 s"}
    assert ending == "done, but not every arm"
    path.unlink()
    began = time.monotonic()
    slow = replace(options, arm_seconds=100.0)
    assert gpu.attempt(task, slow, path, began + 2) == "no time left"
    assert time.monotonic() - began < 10 and not running_marker(path).exists()
    assert not [r for r in Results.open(path).not_timed() if r["extra_info"]["arm"] == "hangs"]


def test_script_goes_on_behind_rows(tmp_path, monkeypatch):
    """A process that fell after it had written a row is begun again; one that wrote none is not."""
    path, statuses = tmp_path / "results.json", iter([70, -6, 0, 2])

    def watched(*_):
        status = next(statuses)
        if status not in (0, 2):
            write(path, [(step(str(status)), "failed")])
        return status, ""

    monkeypatch.setattr(gpu, "_watched", watched)
    options, task = gpu.GpuOptions(output=tmp_path, device="cpu"), gpu.Task("k", ("k",), least=0.0)
    ending = gpu.attempt(task, options, path, time.monotonic() + 30)
    assert ending == "done" and len(Results.open(path).not_timed()) == 2
    assert gpu.attempt(task, options, path, time.monotonic() + 30) == "failed"


def test_script_orders_and_resumes(tmp_path):
    """Ceilings, then ViT-B/16 at 64; results of the same commit are taken over, others not."""
    names = [task.name for task in gpu.tasks(gpu.GpuOptions(output=tmp_path, device="cpu"))]
    assert names[:3] == ["ceilings", "step-vit-b16-4", "step-vit-l16-4"]
    assert names.index("parts-vit-b16-4") > names.index("step-vit-h14-4")
    wanted = tmp_path / "new" / "gpu" / "2026-05-05-abcdef0.json"
    for commit in ("abcdef0", "1234567"):
        write(tmp_path / "old" / "gpu" / f"2026-05-04-{commit}.json", [(step(commit), [1.0])])
    gpu.taken_over(tmp_path / "old", wanted)
    (only,) = all_results(tmp_path / "new")
    assert [r["extra_info"]["arm"] for r in only.rows()] == ["abcdef0"]
    with pytest.raises(ValueError, match="expected seconds"):
        gpu.GpuOptions(output=tmp_path, device="cpu", seconds=1)
