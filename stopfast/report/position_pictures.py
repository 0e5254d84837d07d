"""The pictures of DropPos: each function takes plain numbers, and returns a matplotlib figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from stopfast.pos_embed import Grid
from stopfast.report.canvas import COLOURS, colour_bar, figure, show, side_label, strip, title
from stopfast.report.pictures import UNSEEN, patch_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOLD, _ASKED, _RIGHT, _WRONG = COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[1]


class Maps(Protocol):
    """How well the patches of each place are put back; NaN if never asked."""

    @property
    def accuracy(self) -> Tensor:
        """[rows, columns]."""
        ...

    @property
    def distance(self) -> Tensor:
        """[rows, columns], in patches."""
        ...


def draw_placed(
    images: Tensor, visible: Tensor, asked: Tensor, said: Tensor, sure: Tensor, grid: Grid
) -> "Figure":
    """Draw images, their visible patches, and these where they are said to belong.

    Args:
        images: [B, H, W, 3] in 0..1.
        visible: int64 [B, V], places of the visible patches.
        asked: bool [B, V], of which the place is asked for.
        said: int64 [B, V], the answers.
        sure: [B, V], their probabilities: where two answers are one, the surer patch is drawn.
        grid: rows and columns of patches.
    """
    made, axes = figure(strip(len(images), 3), 3, len(images))
    for number, pixels in enumerate(images.numpy()):
        show(axes[0, number], pixels)
        seen = patch_map(visible[number], grid, pixels.shape)
        show(axes[1, number], np.where(seen[..., None], pixels, UNSEEN))
        for place, unknown in zip(visible[number].tolist(), asked[number].tolist(), strict=True):
            _frame(axes[1, number], place, grid, pixels.shape, _ASKED if unknown else _TOLD)
        order = sure[number].argsort()
        _place(axes[2, number], pixels, visible[number][order], asked[number][order],
               said[number][order], grid)  # fmt: skip
    for row, name in enumerate(("image", "seen", "placed")):
        side_label(axes[row, 0], name)
    return made


def draw_placing(maps: Mapping[str, Maps]) -> "Figure":
    """Draw for each run how often, and how far from its place, a patch is put; runs share the scales."""
    made, axes = figure(2.5 * len(maps), len(maps), 2)
    for column, (name, text) in enumerate(
        (("accuracy", "share of right answers"), ("distance", "distance in patches"))
    ):
        highest = max(np.nanmax(getattr(each, name).numpy()) for each in maps.values())
        image = None
        for row, (run, each) in enumerate(maps.items()):
            image = show(axes[row, column], getattr(each, name).numpy(), low=0.0, high=highest)
            title(axes[row, column], f"{run}: {name}" if len(maps) > 1 else name)
        assert image is not None
        colour_bar(made, image, list(axes[:, column]), text)
    return made


def _place(
    ax: "Axes", pixels: np.ndarray, visible: Tensor, asked: Tensor, said: Tensor, grid: Grid
) -> None:
    """Put the patches that are told their places there, and over them the others where they are said."""
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    canvas = np.full_like(pixels, UNSEEN)

    def put(to: int, place: int) -> None:
        (y, x), (i, j) = divmod(to, grid[1]), divmod(place, grid[1])
        patch = pixels[i * height :, j * width :][:height, :width]
        canvas[y * height :, x * width :][:height, :width] = patch

    moved = []
    for place, unknown, to in sorted(
        zip(visible.tolist(), asked.tolist(), said.tolist(), strict=True), key=lambda each: each[1]
    ):
        put(to if unknown else place, place)
        if unknown:
            moved.append((place, to))
        else:
            _frame(ax, place, grid, pixels.shape, _TOLD)
    for place, to in moved:
        _frame(ax, to, grid, pixels.shape, _RIGHT if place == to else _WRONG)
        if place != to:
            ends = [
                (np.array(divmod(p, grid[1])) + 0.5) * (height, width) - 0.5 for p in (place, to)
            ]
            (y, x), (to_y, to_x) = ends
            ax.plot([x, to_x], [y, to_y], color=_WRONG, linewidth=0.7, alpha=0.7)
            ax.plot([x], [y], "o", color=_WRONG, markersize=1.5)
    show(ax, canvas)


def _frame(ax: "Axes", place: int, grid: Grid, shape: tuple[int, ...], colour: str) -> None:
    """Frame one patch from inside, so that neighbours' frames do not cover one another."""
    from matplotlib.patches import Rectangle

    height, width = shape[0] / grid[0], shape[1] / grid[1]
    row, column = divmod(place, grid[1])
    inset = 0.06 * min(height, width)
    corner = column * width - 0.5 + inset, row * height - 0.5 + inset
    size = width - 2 * inset, height - 2 * inset
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.0))
