"""The figures of an evaluation as a section of the page."""

from stopfast.evaluation.results import MEASURES, OUTSIDE, Evaluation, Figure, Measure
from stopfast.report.page import Section, Table


def evaluation_section(evaluation: Evaluation) -> Section:
    """Return what features are worth under each probe, with intervals, and the paired differences."""
    images = ""
    if evaluation.train_images:
        images = (
            f" The probes learn from {evaluation.train_images:,} labelled training images and are asked "
            f"about {evaluation.test_images:,} test images."
        )
    over = "; ".join(f"{_title(m, evaluation)}: {text}" for m, text in evaluation.over.items())
    text = (
        f"What frozen features of the {evaluation.encoders} are worth, beside those of the encoder that "
        f"training began with and the pixels themselves.{images}"
    )
    tables = [
        _table("features", evaluation.figures, evaluation, f"With 95 % intervals, over: {over}."),
        _table(
            "difference",
            evaluation.differences,
            evaluation,
            "Paired differences, shares in percentage points. Where an interval holds 0, these data do not "
            f"tell the two apart. {OUTSIDE}",
        ),
    ]
    return Section(title="Evaluation", text=text, parts=[table for table in tables if table.rows])


def _table(
    what: str,
    figures: dict[str, dict[Measure, Figure]],
    evaluation: Evaluation,
    caption: str,
) -> Table:
    """A row for each representation or pair, a column for each measure."""
    return Table(
        header=(what, *(_title(measure, evaluation) for measure in evaluation.over)),
        rows=[
            (name, *(_cell(m, by.get(m), signed=what == "difference") for m in evaluation.over))
            for name, by in figures.items()
        ],
        caption=caption,
    )


def _title(measure: Measure, evaluation: Evaluation) -> str:
    if measure == "logistic":
        return f"{evaluation.labelled_images:,} labels"
    return MEASURES[measure].title


def _cell(measure: Measure, figure: Figure | None, *, signed: bool) -> str:
    if figure is None:
        return ""
    scale, digits = (100.0, 1) if MEASURES[measure].share else (1.0, 2)
    sign = "+" if signed else ""
    value, low, high = (
        f"{scale * end:{sign}.{digits}f}" for end in (figure.value, figure.low, figure.high)
    )
    unit = "\u00a0%" if MEASURES[measure].share and not signed else ""
    # A narrow page breaks the line before the interval, not inside.
    return f"{value}{unit} ({low}\u00a0to\u00a0{high})"
