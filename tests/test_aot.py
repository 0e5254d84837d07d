"""Every kernel compiled ahead of time: within its budget, and without the known traps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stopfast.kernels.cases import CASES
from tests import aot, budgets
from tests.budgets import Measured, compare, idle_tensor_cores
from tests.row_offsets import row_offset_faults

ROOT = Path(__file__).parents[1]


def command(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a module where kernels are compiled instead of interpreted."""
    try:
        aot.tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the gate says of all operations."""
    file = tmp_path_factory.mktemp("aot") / "outcome.json"
    done = command("tests.aot", "--json", str(file))
    assert file.exists(), done.stderr
    print(done.stdout)
    return json.loads(file.read_text())


def test_every_configuration_is_within_its_budget(outcome: dict[str, Any]):
    assert outcome["breaches"] == []


def test_every_operation_is_compiled_for_every_architecture(outcome: dict[str, Any]):
    measured = [Measured(*each) for each in outcome["measured"]]
    compiled = {(m.name.split(",")[0], m.architecture) for m in measured if m.error is None}
    fused = [case.name for case in CASES if case.name not in outcome["plain"]]
    assert compiled >= {(name, architecture) for name in fused for architecture in (80, 90)}


def test_every_operation_is_fused(outcome: dict[str, Any]):
    assert outcome["plain"] == []


@pytest.fixture(scope="module")
def planted() -> dict[str, list[Measured]]:
    """What the gate says of the planted kernels, by name."""
    done = command("tests.planted_kernels")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Measured]] = {}
    for each in json.loads(done.stdout):
        found.setdefault(each["name"], []).append(Measured(**each))
    return found


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("tf32", "TF32 in the machine code"),
        ("narrow_offset", "row offset: a 32-bit product with an argument"),
        ("widened_too_late", "row offset: a 32-bit product with an argument"),
        ("narrow_constant_width", "row offset: a 32-bit product of a product"),
        ("narrow_range", "row offset: a 32-bit product of unbounded numbers"),
        ("narrow_in_a_loop", "row offset: a 32-bit sum of unbounded steps"),
        ("narrow_in_a_loop_sometimes", "row offset: a 32-bit sum of unbounded steps"),
        ("narrow_under_a_condition", "row offset: a 32-bit product with an argument"),
        ("narrow_in_a_while", "row offset: a 32-bit product with an argument"),
        ("narrow_before_a_loop", "row offset: a 32-bit product with an argument"),
        ("narrow_steps", "row offset: a 32-bit product of a product"),
        ("narrow_after_steps", "row offset: a 32-bit product of a product"),
        ("narrowed_again", "row offset: a product narrowed to 32 bits"),
    ],
)
def test_a_planted_fault_is_named(planted: dict[str, list[Measured]], name: str, fault: str):
    assert [m.architecture for m in planted[name]] == [80, 90]
    assert all(any(breach.startswith(fault) for breach in m.breaches) for m in planted[name])


def test_spills_are_named(planted: dict[str, list[Measured]]):
    breaches, _ = compare(planted["spills"], {}, False)
    assert [breach.text.split()[0] for breach in breaches] == ["stack", "stack"]


def test_faultless_kernels_pass(planted: dict[str, list[Measured]]):
    for name in ("wide_offset", "dot"):
        assert compare(planted[name], {}, False) == ([], [])
    assert not any("TF32" in breach for m in planted["ieee"] for breach in m.breaches)


def test_the_place_of_a_row_offset_is_named(planted: dict[str, list[Measured]]):
    source = Path(__file__).with_name("planted_kernels.py").read_text().splitlines()
    line = 1 + source.index("    at = row[:, None] * width + tl.arange(0, WIDTH)[None, :]")
    assert all(f"planted_kernels.py:{line} " in m.breaches[0] for m in planted["narrow_offset"])


def test_tensor_cores_are_demanded_where_matrices_are_multiplied(
    planted: dict[str, list[Measured]],
):
    """By the operation's count of work, because a product by hand has no ``tl.dot`` to go by."""
    assert all(m.figures["tensor_core"] > 0 for m in planted["dot"])
    idle = [m._replace(name="linear_gelu, ViT, bf16: kernel") for m in planted["by hand"]]
    assert [breach.where for breach in idle_tensor_cores(idle, CASES)] == [
        "sm_80 linear_gelu, bf16",
        "sm_90 linear_gelu, bf16",
    ]
    assert not idle_tensor_cores([m._replace(name="layer_norm, ViT, bf16: k") for m in idle], CASES)
    assert not idle_tensor_cores(
        [m._replace(name="linear_gelu, ViT, fp32: k") for m in idle], CASES
    )


FIGURES = {"registers": 40, "stack": 0, "spills": 0, "shared": 1024, "tensor_core": 8}
NAME = "attention, ViT-B/16, bf16: kernel(BLOCK=64) 4 warps, 2 stages"
VERSION = budgets.triton.__version__


def measured(
    architecture: int = 90, name: str = NAME, error: str | None = None, **changes: int
) -> Measured:
    return Measured(name, architecture, {**FIGURES, **changes}, ["bf16"], [], error)


def judged(version: str = VERSION, **changes: int) -> tuple[list[str], list[str]]:
    committed = {"triton": version, "budgets": {NAME: {"sm_90": FIGURES}}}
    breaches, moved = compare([measured(**changes)], committed, True)
    return [breach.text for breach in breaches], moved


def test_figures_that_move():
    """More than the budget is a breach under the Triton that it was written with; less is reported."""
    assert judged() == ([], [])
    for changes in ({"registers": 41}, {"shared": 1025}):
        breaches, moved = judged(**changes)
        assert len(breaches) == len(moved) == 1 and breaches[0].startswith("over its budget")
        breaches, moved = judged("0.0", **changes)
        assert breaches == [] and len(moved) == 1
    for changes in ({"registers": 33}, {"shared": 1000}, {"tensor_core": 7}):
        breaches, moved = judged(**changes)
        assert breaches == [] and len(moved) == 1


@pytest.mark.parametrize(
    "changes",
    [{"registers": 256}, {"shared": 232449}, {"stack": 8}, {"spills": 1}, {"tensor_core": 0}],
    ids=str,
)
def test_limits_hold_without_a_budget(changes: dict[str, int]):
    assert len(compare([measured(**changes)], {}, True)[0]) == 1


def test_only_fp32_products_can_be_excused(monkeypatch: pytest.MonkeyPatch):
    name = NAME.replace("bf16", "fp32")
    monkeypatch.setitem(budgets.EXCUSED, ("attention", "fp32"), "for this test")
    spilling = measured(name=name, stack=8, spills=2)._replace(multiplied=["f32"])
    assert compare([spilling], {}, True) == ([], [])
    assert compare([spilling._replace(multiplied=[])], {}, True)[0]
    assert compare([spilling._replace(name=NAME)], {}, True)[0]
    committed = {"triton": VERSION, "budgets": {name: {"sm_90": {**spilling.figures, "stack": 4}}}}
    assert [b.text for b in compare([spilling], committed, True)[0]] == [
        "over its budget: stack 4 -> 8"
    ]


def test_budgets_that_are_missing_or_stale():
    committed = {"triton": VERSION, "budgets": {NAME: {"sm_90": FIGURES}}}
    other = measured(name=NAME.replace("64", "32"))
    breaches, _ = compare([other], committed, True)
    texts = ["no budget", "a budget of no configuration"]
    assert [breach.text.split(";")[0] for breach in breaches] == texts
    assert len(compare([other], committed, False)[0]) == 1
    assert compare([other], {**committed, "triton": "0.0"}, True)[0] == []


def test_committed_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written is within itself, and the budgets of other operations stay, of the same Triton."""
    monkeypatch.setattr(budgets, "BUDGETS", tmp_path / "budgets.json")
    cases = {case.name: case for case in CASES}
    both = [measured(), measured(name="layer_norm, ViT-B/16, bf16: kernel() 4 warps, 2 stages")]
    budgets.commit(both, tuple(cases.values()))
    assert compare(both, budgets.committed_budgets(), True) == ([], [])
    both[0] = measured(registers=48)
    budgets.commit(both[:1], (cases["attention"],))
    assert compare(both, budgets.committed_budgets(), True) == ([], [])
    monkeypatch.setattr(budgets.triton, "__version__", "0.0")
    with pytest.raises(ValueError, match="other budgets"):
        budgets.commit(both[:1], (cases["attention"],))
    budgets.commit(both, tuple(cases.values()))
    assert budgets.committed_budgets()["triton"] == "0.0"


def test_what_triton_does_badly_on_the_newest_architecture():
    """Refused or wrong code is a breach there under the budgets' Triton, and reported under others."""
    refused = [measured(architecture, error="refused") for architecture in (90, 100)]
    breaches, moved = compare(refused, {}, True)
    assert [breach.where.split()[0] for breach in breaches] == ["sm_90"]
    assert len(moved) == 1 and moved[0].startswith("sm_100")
    wrong = [measured(architecture, stack=8) for architecture in (90, 100)]
    for version, expected in ((VERSION, 2), ("0.0", 1)):
        figures = {"sm_90": {**FIGURES, "stack": 8}, "sm_100": {**FIGURES, "stack": 8}}
        committed = {"triton": version, "budgets": {NAME: figures}}
        assert len(compare(refused, committed, True)[0]) == expected
        assert len(compare(wrong, committed, True)[0]) == expected


def test_pointer_arithmetic_is_read_or_refused():
    function = "tt.func public @f(%x: !tt.ptr<i32>, %n: i32) {\n"
    results = "%a, %b = tt.split %n : i32\n%c:2 = tt.split %b : i32\n"
    used = "%d = arith.muli %c#1, %n : i32\n%e = tt.addptr %x, %d : !tt.ptr<i32>, i32\n"
    assert row_offset_faults(function + results + "}") == []
    assert len(row_offset_faults(function + results + used + "}")) == 1
    for line in ("^bb1(%a: i32):", "%0 = arith.addi %1, %2 : i32", "a line of another language"):
        assert row_offset_faults(function + line + "\n}")
