"""What the ahead-of-time gate allows: its rules, the committed budgets, and figures held to both."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import triton

from stopfast.kernels.cases import Case

BUDGETS = Path(__file__).with_name("aot_budgets.json")
ARCHITECTURES = (80, 90, 100)
OPTIONAL = {100}
"""Where Triton may refuse to compile, unless a budget says that it can.

Under another Triton than the budgets', what is wrong there is reported and breaches nothing: Triton 3.6
turns IEEE fp32 products into TF32 on sm_100, whatever a kernel asks for.
"""
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
REGISTER_LIMIT = 255
REGISTER_UNIT = 8
"""Registers are handed to threads in units of eight: a figure within its unit costs nothing."""
EXCUSED: dict[tuple[str, str], str] = {
    (
        "attention",
        "fp32",
    ): "IEEE products take their operands from registers, and backward has five of "
    "them over all keys of a head; no tile of Triton's smallest, 16 rows, fits on every architecture",
}
"""Why kernels of an operation that multiply fp32 matrices, in a precision, may have a stack and spills.

The budgets hold them all the same.
"""

_REWRITE = "python -m tests.aot --write"


class Measured(NamedTuple):
    """What one configuration came to on one architecture."""

    name: str
    architecture: int
    figures: dict[str, int]
    multiplied: list[str]
    """Element types of the matrices it multiplies."""
    breaches: list[str]
    """What no budget can allow, besides limits to the figures."""
    error: str | None = None
    """Why it could not be compiled."""


class Breach(NamedTuple):
    """What is wrong, and in which configuration."""

    where: str
    text: str


def case_and_kind(name: str) -> tuple[str, str]:
    """The operation, and the precision it runs in."""
    head = name.split(": ")[0].split(", ")
    return head[0], head[-1]


def idle_tensor_cores(measured: list[Measured], cases: tuple[Case, ...]) -> list[Breach]:
    """Operations that multiply matrices, in the precisions where no kernel of theirs uses tensor cores.

    A product written without ``tl.dot`` would show nothing that asks for tensor cores.
    """
    used: dict[tuple[str, str], int] = {}
    multiplies = {c.name for c in cases if any(c.flops(shape) for shape in c.timed.values())}
    for each in measured:
        case, kind = case_and_kind(each.name)
        if case in multiplies and kind != "fp32" and each.error is None:
            key = (f"sm_{each.architecture}", f"{case}, {kind}")
            used[key] = used.get(key, 0) + each.figures["tensor_core"]
    return [
        Breach(f"{a} {b}", "no tensor cores in any kernel") for (a, b), n in used.items() if not n
    ]


def compare(
    measured: list[Measured], committed: dict[str, Any], whole: bool
) -> tuple[list[Breach], list[str]]:
    """What breaks a rule or a budget, and what moved without breaking any.

    Args:
        measured: all figures.
        committed: what the file of budgets holds.
        whole: whether ``measured`` is of all operations, so that a budget without figures is stale.
    """
    same = committed.get("triton") == triton.__version__
    budgets: dict[str, dict[str, dict[str, int]]] = committed.get("budgets", {})
    breaches, moved = [], []
    for each in measured:
        where = f"sm_{each.architecture} {each.name}"
        budget = budgets.get(each.name, {}).get(f"sm_{each.architecture}")
        if each.error is not None:
            faults = [f"not compiled: {each.error}"]
            lenient = each.architecture in OPTIONAL and not (same and budget)
        else:
            faults = each.breaches + _limits(each)
            lenient = each.architecture in OPTIONAL and not same
            over, changed = _changes(each.figures, budget, same)
            faults += over
            moved += [f"{where}: {', '.join(changed)}"] if changed else []
        if lenient:
            moved += [f"{where}: {fault}" for fault in faults]
        else:
            breaches += [Breach(where, fault) for fault in faults]
    if whole and same:
        stale = sorted(set(budgets) - {each.name for each in measured})
        breaches += [Breach(name, f"a budget of no configuration; {_REWRITE}") for name in stale]
    return breaches, moved


def _limits(each: Measured) -> list[str]:
    """Where the figures pass what holds for all configurations."""
    figures, faults = each.figures, []
    excused = case_and_kind(each.name) in EXCUSED and set(each.multiplied) == {"f32"}
    if (figures["stack"] or figures["spills"]) and not excused:
        faults.append(f"stack {figures['stack']}, spills {figures['spills']}; none allowed")
    if {"bf16", "f16"} & set(each.multiplied) and not figures["tensor_core"]:
        faults.append("a product of half-precision matrices without tensor cores")
    for figure, limit in (
        ("registers", REGISTER_LIMIT),
        ("shared", SHARED_LIMIT[each.architecture]),
    ):
        if figures[figure] > limit:
            faults.append(f"{figure} {figures[figure]}, of {limit} allowed")
    return faults


def _changes(
    figures: dict[str, int], budget: dict[str, int] | None, same: bool
) -> tuple[list[str], list[str]]:
    """Where the figures pass their budget, and where they differ from it."""
    if budget is None:
        return [f"no budget; {_REWRITE}"] * same, []
    over, changed = [], []
    for figure, value in figures.items():
        if value == budget[figure]:
            continue
        change = f"{figure} {budget[figure]} -> {value}"
        changed.append(change)
        unit = REGISTER_UNIT if figure == "registers" else 1
        worse = -(-value // unit) > -(-budget[figure] // unit) and figure != "tensor_core"
        if same and (worse or (figure == "tensor_core" and not value)):
            over.append(f"over its budget: {change}")
    return over, changed


def committed_budgets() -> dict[str, Any]:
    """What the file of budgets holds."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def commit(measured: list[Measured], cases: tuple[Case, ...]) -> None:
    """Write the figures of these operations into the file; those of the others stay.

    Raises:
        ValueError: the others' are of another Triton.
    """
    before = committed_budgets()
    names = {case.name for case in cases}
    budgets = before.get("budgets", {}).items()
    kept = {name: budget for name, budget in budgets if case_and_kind(name)[0] not in names}
    if kept and before["triton"] != triton.__version__:
        raise ValueError(
            f"expected triton {before['triton']}, which the other budgets are of, got "
            f"{triton.__version__}; write those of all operations"
        )
    for each in measured:
        if each.error is None:
            kept.setdefault(each.name, {})[f"sm_{each.architecture}"] = each.figures
    entries = []
    for name, budget in sorted(kept.items()):
        rows = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in budget.items()]
        entries.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n    }")
    body = ",\n".join(entries)
    BUDGETS.write_text(
        f'{{\n  "triton": "{triton.__version__}",\n  "budgets": {{\n{body}\n  }}\n}}\n'
    )


def report(breaches: list[Breach], moved: list[str]) -> str:
    """The same breach of many configurations once."""
    grouped: dict[str, list[str]] = {}
    for where, text in breaches:
        grouped.setdefault(text, []).append(where)
    lines = [
        f"moved: {len(moved)}",
        *(f"  {entry}" for entry in moved),
        f"breaches: {len(breaches)}",
    ]
    for text, places in grouped.items():
        lines += [f"  {text}", *(f"    {where}" for where in places[:4])]
        if len(places) > 4:
            lines.append(f"    and {len(places) - 4} more")
    return "\n".join(lines)
