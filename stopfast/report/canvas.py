"""Figures in one style, through matplotlib's objects: no window, no global state, imported when used."""

import base64
import io
from collections.abc import Sequence
from importlib.util import find_spec
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

import numpy as np

from stopfast.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's palette: told apart by people with any kind of colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#000000")
WIDTH = 8.0
"""Inches of a figure: at the page's width its text has the size of the page's."""
INK, FAINT = "#222222", "#8a8a8a"
_DPI = 150
_TEXT = 9.0
_LABEL = 14
"""Letters of a line beside a row of images, which have the rest of the width."""


def require_matplotlib() -> None:
    """Refuse to begin without matplotlib.

    Raises:
        RuntimeError: it is not installed; says how to get it.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "expected matplotlib for pictures, which is not installed: pip install 'stopfast[viz]'"
        )


def figure(height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, np.ndarray]":
    """Return a new figure, ``WIDTH`` by ``height`` inches, and its axes, an object array [rows, columns].

    Raises:
        RuntimeError: matplotlib is not installed; says how to get it.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_facecolor("white")
        ax.tick_params(labelsize=_TEXT, colors=INK, color=FAINT)
        for edge in ax.spines.values():
            edge.set_color(FAINT)
    return made, axes


def strip(columns: int, rows: int) -> float:
    """Inches of height of rows of square images, given the label's place at the left."""
    return (WIDTH - 0.9) / max(columns, 3) * rows + 0.1


def title(ax: "Axes", text: str) -> None:
    """Write what an axes shows above it."""
    ax.set_title(text, fontsize=_TEXT, color=INK)


def side_label(ax: "Axes", text: str) -> None:
    """Write what a row of images shows at the left of its first axes; a long name takes several lines."""
    text = "\n".join(part for line in text.split("\n") for part in wrap(line, _LABEL))
    ax.set_ylabel(text, fontsize=_TEXT, color=INK, rotation=0, ha="right", va="center", labelpad=6)


def label(ax: "Axes", x: str, y: str) -> None:
    """Name both axes of a diagram, and give it a light grid."""
    ax.set_xlabel(x, fontsize=_TEXT, color=INK)
    ax.set_ylabel(y, fontsize=_TEXT, color=INK)
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def legend(ax: "Axes") -> None:
    """Name the lines that have a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=_TEXT - 0.5, frameon=False, labelcolor=INK)


def legend_above(figure: "Figure", names: Sequence[str]) -> None:
    """Name the lines of all diagrams of a figure above them, each name once and in this order."""
    named = {}
    for ax in figure.axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    shown = [name for name in names if name in named]
    columns = max(1, min(len(shown), 100 // max(map(len, shown), default=100)))
    figure.legend(
        [named[name] for name in shown],
        shown,
        loc="outside upper center",
        ncols=columns,
        fontsize=_TEXT - 0.5,
        frameon=False,
        labelcolor=INK,
    )


def show(
    ax: "Axes",
    values: np.ndarray,
    *,
    low: float | None = None,
    high: float | None = None,
    colours: str = "viridis",
) -> "AxesImage":
    """Draw an image [H, W, 3] of values in 0..1, or a map [H, W] in colours, without ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    return ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")


def colour_bar(figure: "Figure", image: "AxesImage", axes: "Sequence[Axes]", text: str) -> None:
    """Put the scale of an image beside the axes that share it."""
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.015, aspect=25)
    bar.set_label(text, fontsize=_TEXT, color=INK)
    bar.ax.tick_params(labelsize=_TEXT - 0.5, colors=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def data_uri(figure: "Figure", kind: Literal["svg", "png"]) -> str:
    """Return a figure as the ``data:`` address of an image: SVG for lines, PNG for pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else {})
    media = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(
    figure: "Figure", alternative: str, caption: str, kind: Literal["svg", "png"] = "png"
) -> Picture:
    """Return a figure as a part of the page."""
    return Picture(source=data_uri(figure, kind), alternative=alternative, caption=caption)
