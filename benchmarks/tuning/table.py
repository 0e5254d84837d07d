"""From contests to the table that ``ops='auto'`` reads; its format is in ``kernels/_measured.py``."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stopfast.kernels._tiles import Tiles

Info = dict[str, Any]
_BOUNDS = (128, 256)
"""Most tokens of an entry: a predictor's and a context's rows have fewer, a whole grid's more."""


def attention_table(infos: Iterable[Info], cudnn: bool) -> dict[str, list[list[int | str]]]:
    """Return attention's entries from the rows of its contests.

    The backend of an entry has the least time over all its shapes, each as often as a model has it, among
    those that can compute every one. Where a contest was held again, the later one counts.
    """
    problems: dict[str, dict[str, Info]] = {}
    for info in infos:
        if info["job"] == "attention" and (cudnn or info["arm"] != "cudnn"):
            arms = problems.setdefault(info["label"], {})
            if arms and next(iter(arms.values()))["round"] < info["round"]:
                arms.clear()
            arms[info["arm"]] = info
    entries: dict[tuple[int, bool, int], list[dict[str, Info]]] = {}
    for arms in problems.values():
        first = next(iter(arms.values()))
        bound = next(bound for bound in _BOUNDS if first["tokens"] <= bound)
        entries.setdefault((first["head_dim"], first["padded"], bound), []).append(arms)
    table: dict[str, list[list[int | str]]] = {}
    for (head_dim, padded, bound), found in sorted(entries.items()):
        common = set.intersection(*(set(arms) for arms in found))
        if not common:
            continue

        def total(name: str, found: list[dict[str, Info]] = found) -> float:
            return sum(arms[name]["weight"] * arms[name]["ms_p50"] for arms in found)

        name = f"d{head_dim}" + " padded" * padded
        table.setdefault(name, []).append([bound, min(sorted(common), key=total)])
    return table


def fused_table(infos: Iterable[Info], labels: Mapping[str, Iterable[str]]) -> dict[str, bool]:
    """Return, for each operation with contests at all its shapes, whether fused is nowhere slower.

    ``labels`` are the shapes of each operation. Where a contest was held again, the later one counts.
    """
    rounds: dict[tuple[str, str], tuple[int, dict[str, float]]] = {}
    for info in infos:
        if info["job"] != "fused":
            continue
        key = (info["op"], info["label"])
        number, arms = rounds.get(key, (-1, {}))
        if info["round"] > number:
            number, arms = info["round"], {}
        if info["round"] == number:
            arms[info["arm"]] = info["ms_p50"]
        rounds[key] = (number, arms)
    table = {}
    for op, wanted in labels.items():
        found = [rounds[op, label][1] for label in wanted if (op, label) in rounds]
        if len(found) == len(list(wanted)):
            table[op] = all(
                "fused" in arms and arms["fused"] <= min(arms.values()) for arms in found
            )
    return table


def nested_tiles(tiles: Mapping[tuple[str, str], Tiles]) -> dict[str, dict[str, Tiles]]:
    """Return tiles as the table has them, by kernel and class of shapes."""
    found: dict[str, dict[str, Tiles]] = {}
    for (kernel, shapes), entry in sorted(tiles.items()):
        found.setdefault(kernel, {})[shapes] = entry
    return found


def read_table(path: Path) -> dict[str, Any]:
    """Return the whole table, of all GPUs; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(path: Path, gpu: str, decided: Mapping[str, Any]) -> None:
    """Put what was decided for a GPU into the table; what is not in ``decided`` stays."""
    table = read_table(path)
    table[gpu] = {
        **table.get(gpu, {}),
        **{name: value for name, value in decided.items() if value != {}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
