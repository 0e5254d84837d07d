"""The section of what the runs logged while they trained."""

from collections.abc import Mapping
from typing import Any

from stopfast.monitors import LEAST_STD, LEAST_VARIANCE
from stopfast.report import pictures
from stopfast.report.canvas import picture
from stopfast.report.logs import curve, thin
from stopfast.report.page import Section
from stopfast.trained import TrainedRun

_QUANTITIES = {
    "lr": "learning rate",
    "feature_std": "feature std",
    "rankme": "RankMe",
    "target_variance": "target variance",
    "knn": "kNN accuracy",
    "position_accuracy": "position accuracy",
    "position_accuracy_weighted": "weighted position accuracy",
}
_LOSSES = {
    "jepa": (
        "features",
        "the mean smooth-L1 distance to the target encoder's features, which change as it trains: a lower "
        "loss does not mean a better encoder",
    ),
    "droppos": (
        "positions",
        "the cross-entropy of the dropped positions, smoothed less and less as it trains where the "
        "settings have it so",
    ),
    "reconstruction": (
        "pixels",
        "the mean squared error of pixels, of which 1 is about what it costs to predict nothing where they "
        "are normalised",
    ),
}
"""What the loss is about, and what it is, by the objective's name."""


def curve_section(
    runs: Mapping[str, TrainedRun], logs: Mapping[str, list[dict[str, Any]]]
) -> Section:
    """Return loss, learning rate and monitors over the steps; losses that differ in kind apart."""
    kinds = {name: run.config.objective.name for name, run in runs.items()}
    losses = {kind: about for kind, about in _LOSSES.items() if kind in kinds.values()}
    several = len(losses) > 1
    wanted = [
        (f"loss: {about}" if several else "loss", "loss", kind)
        for kind, (about, _) in losses.items()
    ]
    panels, longest = {}, 1
    for name, key, kind in (*wanted, *((name, key, None) for key, name in _QUANTITIES.items())):
        curves = {
            run: thin(curve(rows, key)) for run, rows in logs.items() if kind in (None, kinds[run])
        }
        longest = max(longest, *(length for _, _, length in curves.values()))
        drawn = {run: (steps, values) for run, (steps, values, _) in curves.items() if steps}
        if drawn:
            panels[name] = drawn
    if not panels:
        return Section(title="Training", text="These runs left no log.")
    points = "" if longest == 1 else f" A point is the mean of up to {longest:,} steps."
    told = " ".join(
        f"The loss of {about} is {it}." if several else f"The loss is {it}."
        for about, it in losses.values()
    )
    caption = f"What the runs logged while they trained.{points} {told}"
    if panels.keys() & {"feature std", "RankMe", "target variance"}:
        caption += (
            " The monitors look at the target encoder, or at the encoder where there is no other. Feature "
            "std is 1 where image features point evenly in all directions, RankMe is the effective number "
            "of their dimensions, target variance the part of layer-normed patch features that differs "
            "between images and places; features that collapse bring them towards 0, 1 and 0. Step 0 is "
            "the untrained encoder: its features are mostly their mean, so feature std and RankMe begin "
            "low. They and the target variance may fall while kNN rises; a run warns where features hardly "
            f"differ any more (std below {LEAST_STD}, variance below {LEAST_VARIANCE})."
        )
    if "position accuracy" in panels:
        caption += (
            " Position accuracy is the share of the patches without a position that are put in their place;"
            " weighted, each counts by its weight in the loss."
        )
    figure = pictures.draw_curves(panels, log_scale=[name for name, *_ in wanted], runs=list(runs))
    return Section(title="Training", parts=[picture(figure, ", ".join(panels), caption, "svg")])
