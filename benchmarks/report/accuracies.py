"""Tables of the accuracies of features: a row an arm, with intervals over seeds."""

from functools import partial
from pathlib import Path

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
    studies, reference = _STUDIES[table]
    names = {arm.name for study in studies for arm in STUDIES[study]}
    headings = ["device", "trained by", "seeds", *(f"{name}, %" for name in _MEASURES.values())]
    for less in ("untrained", reference):
        headings += [f"{name} less {less}" for name in _MEASURES.values()]
    rows, notes = [], list[str]()
    for runs in newest_runs(folder):
        here = [name for name in runs.rows if name in names]
        rows += [_row(runs, name, reference) for name in here]
        notes += [_budget(runs)] if here else []
    return Table(f"accuracies, {table}", [*headings, "s a run"], rows, notes)


def _row(runs: Runs, arm: str, reference: str) -> list[str]:
    cells = [shown(runs.figure(arm, measure)) for measure in _MEASURES]
    for less in (runs.beginning(arm), reference):
        bare = arm == less or arm in (PIXELS, UNTRAINED, UNTRAINED_TOKEN)
        cells += [
            "" if bare else shown(runs.difference(arm, less, measure), signed=True)
            for measure in _MEASURES
        ]
    seconds = [info["train_s"] + info["evaluate_s"] for info in runs.rows[arm].values()]
    return [runs.device, arm, str(len(seconds)), *cells, f"{sum(seconds) / len(seconds):.0f}"]


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
