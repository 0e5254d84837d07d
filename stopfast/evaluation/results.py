"""Figures with intervals: what an evaluation returns, prints and saves."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from stopfast.trained import Which

Measure = Literal[
    "knn", "linear", "linear_last4", "logistic", "counting", "location", "propagation"
]


class _Shown(NamedTuple):
    title: str
    over: str
    """What its interval is over."""
    share: bool = True
    """Shown in percent."""


MEASURES: dict[Measure, _Shown] = {
    "knn": _Shown("kNN", "test images"),
    "linear": _Shown("linear", "test images and probe seeds"),
    "linear_last4": _Shown("linear, last 4 blocks", "test images and probe seeds"),
    "logistic": _Shown("few labels", "test images and subsets"),
    "counting": _Shown("object counting", "drawn scenes"),
    "location": _Shown("object location (r)", "drawn scenes", share=False),
    "propagation": _Shown("label propagation (J)", "drawn clips"),
}


OUTSIDE = "What pre-training again with another seed would change is in none of these intervals."
"""Belongs wherever intervals or differences are shown."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of representations: raw pixels, untrained encoders, trained encoders."""

    which: Which
    """Which encoder of the checkpoints was asked for."""
    checkpoints: dict[str, str]
    """By the name of a trained representation."""
    data: str | None
    train_images: int
    test_images: int
    """Both 0 where no probe looked at images."""
    labelled_images: int
    """Training images whose labels the probe of few labels saw; 0 without it."""
    seeds: int
    subsets: int
    figures: dict[str, dict[Measure, Figure]]
    """By representation, then by measure. All are shares in 0..1, ``location`` is a correlation."""
    differences: dict[str, dict[Measure, Figure]]
    """Paired, by "A less B": each trained encoder less its untrained beginning, and less the first one."""
    rates: dict[str, dict[Measure, list[float]]]
    """Learning rates that the linear probes of each seed chose on held-out training images."""
    references: dict[Measure, float]
    """What no features at all give."""
    over: dict[Measure, str]
    """What the interval of each measure is over."""
    untaught: list[str] = field(default_factory=list)
    """Checkpoints of objectives without a teacher, which have one encoder, whatever was asked for."""

    def encoder_of(self, name: str) -> str:
        """Return which encoder of a checkpoint was looked at, in words."""
        return "encoder" if name in self.untaught else self.which.replace("_", " ")

    @property
    def encoders(self) -> str:
        """Which encoders were looked at, in words."""
        asked, *others = dict.fromkeys(
            sorted(map(self.encoder_of, self.checkpoints), key=len, reverse=True)
        )
        return f"{asked} ({others[0]}, where there is no teacher)" if others else asked


def interval(scores: np.ndarray) -> Figure:
    """Return the mean of scores and a 95 % interval over the rows' and the columns' variation.

    The half-width is the root of the sum of two squares: 1.96 standard errors of the columns' means
    (the
    items: test images, scenes, clips) and, of more than one row, Student's quantile times the standard
    error of the rows' means (seeds). What belongs to neither alone is in both, so it errs to the wide
    side.

    Args:
        scores: [seeds, items], at least two items; differences of two such for a paired interval.

    Raises:
        ValueError: another shape.
    """
    from scipy.stats import t

    if scores.ndim != 2 or not scores.shape[0] or scores.shape[1] < 2:
        raise ValueError(
            f"expected scores [seeds, items] with two items or more, got {scores.shape}"
        )
    scores = scores.astype(np.float64)
    seeds, items = scores.shape
    half = 1.96 * scores.mean(0).std(ddof=1) / items**0.5
    if seeds > 1:
        quantile = float(t.ppf(0.975, seeds - 1))
        half = np.hypot(half, quantile * scores.mean(1).std(ddof=1) / seeds**0.5)
    mean = float(scores.mean())
    return Figure(mean, mean - float(half), mean + float(half))


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Return the mean difference of two paired results [n], and the ends of its normal 95 % interval."""
    difference = first.astype(np.float64) - second
    figure = interval(difference[None])
    return figure.value, figure.low, figure.high


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print a table of the figures, one of the paired differences, and what the intervals are over."""
    for name, path in evaluation.checkpoints.items():
        console.print(f"{name}: {evaluation.encoder_of(name)} of {path}")
    if evaluation.data is not None and evaluation.train_images:
        console.print(
            f"{evaluation.train_images:,} training images and {evaluation.test_images:,} test images "
            f"of {evaluation.data}"
        )
    console.print(_table("", evaluation.figures, evaluation, signed=False))
    if evaluation.differences:
        console.print(_table("paired differences", evaluation.differences, evaluation, signed=True))
    for measure, over in evaluation.over.items():
        told = f"{_title(measure, evaluation)}: 95 % interval over {over}"
        if measure in evaluation.references:
            told += f"; without features {_shown(measure, evaluation.references[measure])}"
        console.print(told)
    console.print(OUTSIDE)


def load_evaluation(path: Path) -> Evaluation:
    """Read what :func:`save_evaluation` wrote.

    Raises:
        ValueError: another file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for name in ("figures", "differences"):
            document[name] = {
                row: {measure: Figure(**figure) for measure, figure in by.items()}
                for row, by in document[name].items()
            }
        return Evaluation(**document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a file of evaluate --save, got {path}: {error}") from None


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")


def _table(
    title: str,
    figures: dict[str, dict[Measure, Figure]],
    evaluation: Evaluation,
    *,
    signed: bool,
) -> Table:
    """A column a representation, since there are more measures than representations."""
    table = Table(title=title or None)
    table.add_column("probe")
    for name in figures:
        table.add_column(name, justify="right")
    for measure in evaluation.over:
        cells = []
        for by in figures.values():
            figure = by.get(measure)
            if figure is None:
                cells.append("")
                continue
            half = (figure.high - figure.low) / 2
            cells.append(
                f"{_shown(measure, figure.value, signed)} ± {_shown(measure, half, unit=False)}"
            )
        table.add_row(_title(measure, evaluation), *cells)
    return table


def _title(measure: Measure, evaluation: Evaluation) -> str:
    if measure == "logistic":
        return f"{evaluation.labelled_images:,} labels in all"
    return MEASURES[measure].title


def _shown(measure: Measure, value: float, signed: bool = False, unit: bool = True) -> str:
    sign = "+" if signed else ""
    if not MEASURES[measure].share:
        return f"{value:{sign}.2f}"
    # A difference of shares is in points.
    return f"{100 * value:{sign}.1f}" + (" %" if unit and not signed else "")
