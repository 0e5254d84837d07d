"""Plots of the newest results, as SVG files that carry a hash of the numbers they show."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine.results import FOLDER
from benchmarks.report.accuracies import draw_points, panels
from benchmarks.report.measured import Measured, groups, is_ours, newest

Numbers = dict[str, Any]
_OURS, _OTHERS, _NOT_TIMED = "#0b6e4f", "#8d99ae", "#d90429"


def numbers(folder: Path = FOLDER) -> dict[str, Numbers]:
    """Return what is plotted, by the plot's name."""
    found: dict[str, Numbers] = {}
    for kind, collect in (("step", _bars), ("cold", _lines), ("curves", _losses)):
        for group in groups(newest(kind, folder)):
            panel = collect(group)
            if panel:
                found.setdefault(f"{group[0].device}-{kind}", {})[group[0].group] = panel
    return {**found, **panels(folder)}


def digest(shown: Numbers) -> str:
    """Return the hash of a plot's numbers, rounded to six digits."""
    text = json.dumps(_rounded(shown), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stale(folder: Path = FOLDER) -> list[Path]:
    """Return the plots that are missing, show other numbers than the results, or have no results."""
    expected = {_path(name, folder): digest(shown) for name, shown in numbers(folder).items()}
    present = {path: _noted(path) for path in (folder / "plots").glob("*.svg")}
    names = sorted({*expected, *present})
    return [path for path in names if expected.get(path) != present.get(path)]


def write_plots(folder: Path = FOLDER) -> list[Path]:
    """Draw the stale plots anew and remove those without results; needs matplotlib."""
    shown = {_path(name, folder): found for name, found in numbers(folder).items()}
    changed = stale(folder)
    for path in changed:
        if path in shown:
            _draw(shown[path], path)
        else:
            path.unlink()
    return changed


def _path(name: str, folder: Path) -> Path:
    return folder / "plots" / f"{name}.svg"


def _noted(path: Path) -> str | None:
    found = re.search(r"numbers sha256:([0-9a-f]{64})", path.read_text())
    return found[1] if found else None


def _rounded(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def _bars(group: list[Measured]) -> Numbers:
    return {
        one.arm: [one.spread(f) for f in (0.1, 0.5, 0.9)] if one.samples else one.outcome
        for one in group
    }


def _lines(group: list[Measured]) -> Numbers:
    return {one.arm: list(one.samples) for one in group if one.samples}


def _losses(group: list[Measured]) -> Numbers:
    return {one.arm: one.info["losses"] for one in group if one.info.get("losses")}


def _draw(shown: Numbers, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind = path.stem.rpartition("-")[2]
    draw: Callable[[Any, Numbers], None] = _DRAWN.get(kind, _draw_lines)
    rows = max(len(panel) for panel in shown.values()) if kind in _DRAWN else 8
    # Ids are by default drawn at random, and a date would change with every drawing.
    with rc_context({"svg.hashsalt": "stopfast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, (0.6 + 0.28 * rows) * len(shown)), layout="constrained")
        for axes, (title, panel) in zip(
            figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True
        ):
            axes.set_title(title, fontsize=10)
            draw(axes, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        described = f"numbers sha256:{digest(shown)}"
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": described})


def _draw_bars(axes: Any, panel: Numbers) -> None:  # noqa: ANN401
    for place, (arm, spread) in enumerate(panel.items()):
        if isinstance(spread, list):
            low, middle, high = spread
            errors = [[middle - low], [high - middle]]
            colour = _OURS if is_ours(arm) else _OTHERS
            axes.barh(place, middle, xerr=errors, color=colour, height=0.7)
        else:
            axes.text(0, place, f" {spread}", va="center", color=_NOT_TIMED)
    axes.set_yticks(range(len(panel)), panel, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step: median, 10th to 90th percentile")


def _draw_lines(axes: Any, panel: Numbers) -> None:  # noqa: ANN401
    """Losses; or times of steps, which span orders of magnitude."""
    for arm, values in panel.items():
        axes.plot(range(1, len(values) + 1), values, linewidth=1, label=arm)
    spans = max(max(v) for v in panel.values()) / max(min(min(v) for v in panel.values()), 1e-12)
    axes.set_yscale("log" if spans > 20 else "linear")
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


_DRAWN: dict[str, Callable[[Any, Numbers], None]] = {
    "step": _draw_bars,
    "quality": draw_points,
    "noise": draw_points,
}
"""What draws a row for each arm, by kind; all else is drawn as lines."""
