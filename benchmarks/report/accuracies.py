"""Tables of the accuracies of features: a row an arm, with intervals over seeds."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine.results import FOLDER
from benchmarks.quality.arms import (
    IJEPA,
    NO_NOISE,
    PIXELS,
    STUDIES,
    UNTRAINED,
    UNTRAINED_TOKEN,
    Study,
)
from benchmarks.quality.summary import Figure, Measure, Runs, newest_runs
from benchmarks.report.table import Table

_MEASURES: dict[Measure, str] = {"knn": "kNN", "linear": "linear"}
_STUDIES: dict[str, tuple[tuple[Study, ...], str]] = {
    "quality": (("objectives", "combinations"), IJEPA),
    "noise": (("noise", "covariance"), NO_NOISE),
    "rates": (("rates",), IJEPA),
}
"""Studies in each table, and what its arms are compared with besides their untrained beginning."""


def accuracies(table: str, folder: Path = FOLDER) -> Table:
    """Return a table of studies' arms, of each device's newest runs."""
    reference = _STUDIES[table][1]
    headings = ["device", "trained by", "seeds", *(f"{name}, %" for name in _MEASURES.values())]
    for less in ("untrained", reference):
        headings += [f"{name} less {less}" for name in _MEASURES.values()]
    rows, notes = [], list[str]()
    for runs, names in _found(table, folder):
        rows += [_row(runs, name, reference) for name in names]
        notes.append(_budget(runs))
    return Table(f"accuracies, {table}", [*headings, "s a run", "of the processor"], rows, notes)


def _found(table: str, folder: Path) -> Iterator[tuple[Runs, list[str]]]:
    """Each device's newest runs with arms of this table's own, and its arms among them, in order."""
    names = _names(table)
    own = set(names).difference(_names("noise" if table == "quality" else "quality"))
    for runs in newest_runs(folder, own):
        yield runs, [name for name in names if name in runs.rows]


def _names(table: str) -> list[str]:
    arms = (arm.name for study in _STUDIES[table][0] for arm in STUDIES[study])
    return list(dict.fromkeys(arms))


def _row(runs: Runs, arm: str, reference: str) -> list[str]:
    cells = [shown(runs.figure(arm, measure)) for measure in _MEASURES]
    for less in (runs.beginning(arm), reference):
        bare = arm == less or arm in (PIXELS, UNTRAINED, UNTRAINED_TOKEN)
        cells += [
            "" if bare else shown(runs.difference(arm, less, measure), signed=True)
            for measure in _MEASURES
        ]
    infos = list(runs.rows[arm].values())
    seconds = [info["train_s"] + info["evaluate_s"] for info in infos]
    for found in (seconds, [info["processor_s"] for info in infos]):
        cells.append(f"{sum(found) / len(found):.0f}")
    return [runs.device, arm, str(len(infos)), *cells]


def shown(figure: Figure | None, signed: bool = False) -> str:
    """Return a figure in percent or points, with its interval where it has one."""
    if figure is None:
        return ""
    value = f"{100 * figure.mean:{'+' if signed else ''}.1f}"
    return value if figure.half is None else f"{value} ± {100 * figure.half:.1f}"


def _budget(runs: Runs) -> str:
    told = runs.settings
    return (
        f"{runs.device}: {told['steps']:,} steps of {told['batch']} images out of {told['images']:,} "
        f"({told['family']}), networks of the size {told['size']!r}, {told['precision']}; classified "
        f"{told['asked']:,} test images by {told['known']:,} labelled ones. Accuracies and differences in "
        "points, the latter paired by seed, with Student's 95 % interval over seeds; one in twenty such "
        f"intervals misses. Measured at {'; '.join(runs.commits)}."
    )


ACCURACIES = {name: partial(accuracies, name) for name in _STUDIES}
"""Tables by the name that their markers have."""


def panels(folder: Path = FOLDER) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return what is plotted: low end, mean and high end by arm, by measure, by the plot's name."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for table in ("quality", "noise"):
        for runs, names in _found(table, folder):
            found[f"{runs.device}-{table}"] = {
                title: {name: _ends(runs.figure(name, measure)) for name in names}
                for measure, title in _MEASURES.items()
            }
    return found


def draw_points(axes: Any, panel: dict[str, list[float]]) -> None:  # noqa: ANN401
    """Draw means with their intervals over seeds, an arm a row."""
    for place, (low, mean, high) in enumerate(panel.values()):
        errors = [[100 * (mean - low)], [100 * (high - mean)]]
        axes.errorbar(100 * mean, place, xerr=errors, fmt="o", color="#0b6e4f", capsize=3)
    axes.set_yticks(range(len(panel)), list(panel), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %, with its 95 % interval over seeds")


def _ends(figure: Figure | None) -> list[float]:
    assert figure is not None  # of an arm that has runs
    half = figure.half or 0.0
    return [figure.mean - half, figure.mean, figure.mean + half]
