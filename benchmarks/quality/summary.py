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
    """All runs of one file, which have one budget."""

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
    """Return each device's file with the newest run of these arms, with all other arms that it has.

    Files are never mixed: their budgets may differ.

    Raises:
        ValueError: such a file with runs of several budgets.
    """
    found: dict[str, tuple[str, Runs]] = {}
    for results in all_results(folder):
        rows = results.rows(kind="quality")
        times = [r["extra_info"]["taken"] for r in rows if r["extra_info"]["arm"] in arms]
        if not times:
            continue
        device, taken = results.path.parent.name, max(times)
        if device not in found or found[device][0] <= taken:
            found[device] = (taken, _runs(results, rows))
    return [runs for _, runs in found.values()]


def _runs(results: Results, rows: list[Row]) -> Runs:
    infos = [row["extra_info"] for row in rows]
    if any(info["settings"] != infos[0]["settings"] for info in infos):
        raise ValueError(f"expected runs of one budget in {results.path}, got several")
    by_arm: dict[str, dict[int, Row]] = {}
    for name in sorted({info["arm"] for info in infos}, key=list(ARMS).index):
        of_arm = [info for info in infos if info["arm"] == name]
        by_arm[name] = {info["seed"]: info for info in sorted(of_arm, key=lambda i: i["seed"])}
    origins = [results.document["provenance"][info["run"]] for info in infos]
    commits = [str(o["commit"])[:7] + (", altered" if o["dirty"] else "") for o in origins]
    return Runs(
        results.path.parent.name, infos[0]["settings"], tuple(dict.fromkeys(commits)), by_arm
    )
