"""The README's table of operations, from cases and results: `python -m benchmarks.kernel_table`."""

import json
from typing import Any

from benchmarks.harness import HERE
from stopfast.kernels.cases import CASES


def newest_rows() -> dict[str, list[dict[str, Any]]]:
    """By GPU, the rows of its newest `benchmarks.kernels` file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(HERE.glob("results/*/*-kernels.json")):
        if path.parent.name != "cpu":
            found[path.parent.name] = json.loads(path.read_text())["rows"]
    return found


def ratio(rows: list[dict[str, Any]], operation: str) -> str:
    """How many times as fast as its best alternative, least and most over the shapes."""
    ratios = []
    for row in rows:
        others = [arm["median"] for name, arm in row["arms"].items() if name != "fused"]
        if row["case"] == operation and "fused" in row["arms"] and others:
            ratios.append(min(others) / row["arms"]["fused"]["median"])
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured"


def table() -> str:
    """Markdown; a column for every GPU that has results."""
    measured = newest_rows()
    columns = list(measured) or ["a GPU"]
    lines = [
        "| operation | in one go | timed at | "
        + " | ".join(f"times as fast, {c}" for c in columns)
        + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for case in CASES:
        cells = [ratio(measured.get(column, []), case.name) for column in columns]
        models = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in case.timed))
        lines.append(f"| `{case.name}` | {case.fuses} | {models} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
