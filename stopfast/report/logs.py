"""The numbers that a run wrote while it trained: ``log.jsonl``, one JSON object a line."""

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log, oldest first; none where there is no log.

    A last line that is cut off, as a killed process leaves one, is left out.

    Raises:
        ValueError: another line that is no JSON object.
    """
    path = run / LOG
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
            if number == len(lines):
                break
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object in {path}, line {number}, got {line[:60]!r}")
        rows.append(row)
    return rows


def curve(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which ``key`` was logged, ascending, and its values.

    A step that was logged twice, before an interruption and again after the resume, counts once: the
    later row is the one that the weights went through.
    """
    found = {
        int(row["step"]): float(row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float)
    }
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def thin(
    curve: tuple[list[int], list[float]], most: int = 400
) -> tuple[list[float], list[float], int]:
    """Return the means of equal stretches of a curve, at most ``most``, and the length of a stretch.

    A log has a row for every step, and a line of more points than a page has pixels shows no more.
    """
    steps, values = curve
    length = max(1, -(-len(steps) // most))

    def means(numbers: list[int] | list[float]) -> list[float]:
        parts = (numbers[i : i + length] for i in range(0, len(numbers), length))
        return [sum(part) / len(part) for part in parts]

    return means(steps), means(values), length
