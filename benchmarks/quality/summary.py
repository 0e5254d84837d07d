"""Runs of many seeds as figures: means, intervals over seeds, differences paired by seed."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.engine.results import Results, Row, all_results
from benchmarks.quality.arms import ARMS, UNTRAINED, UNTRAINED_TOKEN, Scale, settings

Measure = Literal["knn", "linear"]


class Figure(NamedTuple):
    """A mean, and half of its 95 % interval over seeds; None of one seed."""

    mean: float
    half: float | None


@dataclass(frozen=True)
class Runs:
    """Runs of one budget, by one code."""

    device: str
    """Folder of the results."""
    settings: Mapping[str, Any]
    commits: tuple[str, ...]
    rows: Mapping[str, Mapping[int, Row]]
    """``extra_info`` by arm and seed, in the order of :data:`benchmarks.quality.arms.ARMS`."""

    def scores(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return an arm's accuracies by seed."""
        return {seed: float(info[measure]) for seed, info in self.rows.get(arm, {}).items()}

    def figure(self, arm: str, measure: Measure) -> Figure | None:
        """Return an arm's accuracy."""
        return interval(self.scores(arm, measure).values())

    def difference(self, arm: str, reference: str, measure: Measure) -> Figure | None:
        """Return an arm's accuracy less another's, over the seeds that both have."""
        first, second = self.scores(arm, measure), self.scores(reference, measure)
        return interval(first[seed] - second[seed] for seed in first if seed in second)

    def beginning(self, arm: str) -> str:
        """Return the untrained arm that an arm began as."""
        scale = Scale(**{name: self.settings[name] for name in Scale._fields})
        return UNTRAINED_TOKEN if settings(ARMS[arm], scale, 0).model.class_token else UNTRAINED


def interval(scores: Iterable[float]) -> Figure | None:
    """Return mean and half-width of Student's 95 % interval of scores; None of none."""
    from scipy.stats import sem, t

    found = np.array(list(scores), dtype=np.float64)
    if not len(found):
        return None
    half = float(t.ppf(0.975, len(found) - 1) * sem(found)) if len(found) > 1 else None
    return Figure(float(found.mean()), half)


def newest_runs(folder: Path, arms: Collection[str]) -> list[Runs]:
    """Return each device's newest runs of these arms, with all others of their budget and code.

    Those are the runs of the same settings in the same file, or of the same commit in another one: arms
    can be shared out between processes, each with a file of its own. A run that was taken twice counts
    once, the later one.
    """
    found: dict[str, list[_Run]] = {}
    for results in all_results(folder):
        for row in results.rows(kind="quality"):
            one = _Run(row["extra_info"], _commit(results, row), results.path)
            found.setdefault(results.path.parent.name, []).append(one)
    return [
        _together(device, max(own, key=_taken), runs)
        for device, runs in found.items()
        if (own := [one for one in runs if one.info["arm"] in arms])
    ]


class _Run(NamedTuple):
    info: Row
    commit: str
    path: Path


def _taken(one: _Run) -> str:
    return one.info["taken"]


def _commit(results: Results, row: Row) -> str:
    origin = results.document["provenance"][row["extra_info"]["run"]]
    return str(origin["commit"])[:7] + (", altered" if origin["dirty"] else "")


def _together(device: str, newest: _Run, runs: list[_Run]) -> Runs:
    """The newest run and those that can be compared with it; altered code is another in every file."""
    altered, told = newest.commit.endswith("altered"), newest.info["settings"]
    same = [
        one
        for one in sorted(runs, key=_taken)
        if one.info["settings"] == told
        and (one.path == newest.path or (one.commit == newest.commit and not altered))
    ]
    by_arm: dict[str, dict[int, Row]] = {
        name: {} for name in ARMS if name in {one.info["arm"] for one in same}
    }
    for one in same:
        by_arm[one.info["arm"]][one.info["seed"]] = one.info
    return Runs(device, told, tuple(dict.fromkeys(one.commit for one in same)), by_arm)
