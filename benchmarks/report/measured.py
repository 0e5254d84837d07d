"""The newest measurement of every arm, from all files of results."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.results import FOLDER, Results, Row, all_results
from benchmarks.engine.runner import quantile

PUBLISHED = "published"


def is_ours(arm: str) -> bool:
    """Whether an arm is the library's, in whole or in part."""
    return arm == "fused" or arm.startswith("stopfast")


@dataclass(frozen=True)
class Measured:
    """One arm of one comparison on one device; all sweeps of its newest file together."""

    device: str
    """Folder of the results."""
    group: str
    arm: str
    info: dict[str, Any]
    """``extra_info`` of the last sweep."""
    samples: tuple[float, ...]
    """Milliseconds of steps or rounds; none of what was not timed."""
    commit: str

    @property
    def ms(self) -> float | None:
        """Median milliseconds."""
        return quantile(list(self.samples), 0.5) if self.samples else None

    def spread(self, fraction: float) -> float:
        """Return a quantile of the milliseconds."""
        return quantile(list(self.samples), fraction)

    @property
    def outcome(self) -> str | None:
        """Why it was not timed, in two words."""
        return self.info.get("outcome")


def newest(kind: str, folder: Path = FOLDER) -> list[Measured]:
    """Return what was measured of a kind: groups and arms in the order in which they were first taken."""
    rows: dict[tuple[str, str], tuple[str, list[tuple[Results, Row]]]] = {}
    for results in all_results(folder):
        for key, found in _by_arm(results, kind).items():
            place = (results.path.parent.name, key)
            taken = max(row["extra_info"]["taken"] for row in found)
            if place not in rows or rows[place][0] <= taken:
                rows[place] = (taken, [(results, row) for row in found])
    return [_merged(device, key, found) for (device, key), (_, found) in rows.items()]


def groups(measured: Iterable[Measured]) -> Iterator[list[Measured]]:
    """Yield the arms of each comparison on each device."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        found.setdefault((one.device, one.group), []).append(one)
    yield from found.values()


def fastest(arms: Iterable[Measured]) -> Measured | None:
    """Return the arm of the least median, if any was timed."""
    timed = [arm for arm in arms if arm.samples]
    return min(timed, key=lambda arm: arm.ms or 0.0) if timed else None


def published(arms: Iterable[Measured]) -> Measured | None:
    """Return the published way of a comparison, if it was timed."""
    return next((arm for arm in arms if arm.arm == PUBLISHED and arm.samples), None)


def strongest(arms: Iterable[Measured]) -> Measured | None:
    """Return the fastest arm that is neither the library's nor the published program itself."""
    return fastest(one for one in arms if not is_ours(one.arm) and one.arm != PUBLISHED)


def commits(measured: Iterable[Measured]) -> list[str]:
    """Return the commits that rows come from, in order."""
    return list(dict.fromkeys(one.commit for one in measured))


def _by_arm(results: Results, kind: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in (*results.rows(kind=kind), *results.not_timed(kind=kind)):
        key = row["extra_info"]["key"].rpartition(" | ")[0]
        found.setdefault(key, []).append(row)
    # A sweep that was timed says more than one for which, say, there was no memory.
    return {key: [r for r in rows if "stats" in r] or rows for key, rows in found.items()}


def _merged(device: str, key: str, found: list[tuple[Results, Row]]) -> Measured:
    results, last = found[-1]
    group, _, arm = key.partition(" | ")
    samples = [value for _, row in found for value in _samples(row)]
    return Measured(device, group, arm, last["extra_info"], tuple(samples), _commit(results, last))


def _samples(row: Row) -> list[float]:
    if "stats" not in row:
        return []
    return row["extra_info"].get("step_ms") or [1e3 * second for second in row["stats"]["data"]]


def _commit(results: Results, row: Row) -> str:
    origin = results.document["provenance"][row["extra_info"]["run"]]
    name = str(origin["commit"])
    short = name[:7] if re.fullmatch("[0-9a-f]+", name) else name
    return short + (", altered" if origin["dirty"] else "")
