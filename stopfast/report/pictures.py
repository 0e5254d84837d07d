"""The pictures: each function takes plain numbers, and returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from stopfast.masking import Masks
from stopfast.pos_embed import Grid
from stopfast.report.canvas import (
    COLOURS,
    INK,
    colour_bar,
    figure,
    label,
    legend,
    legend_above,
    show,
    side_label,
    strip,
    title,
)
from stopfast.report.measures import Coverage, Retrieval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps, and the values logged at them."""
UNSEEN = 0.86
"""Gray of what an encoder does not see."""


def draw_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    log_scale: Sequence[str] = (),
    runs: Sequence[str] = (),
) -> "Figure":
    """Draw curves over steps: a panel for each quantity, in it a line for each run.

    Args:
        panels: curves by quantity, then by run; a run keeps its colour in all panels.
        log_scale: quantities whose axis is logarithmic where they span a power of ten.
        runs: all of them, in the order of their colours; default: as they come.

    Raises:
        ValueError: no panel.
    """
    if not panels:
        raise ValueError("expected at least one quantity to draw, got none")
    runs = runs or list(dict.fromkeys(run for curves in panels.values() for run in curves))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    made, axes = figure(2.7 * rows, rows, columns)
    for ax, (quantity, curves) in zip(axes.flat, panels.items(), strict=False):
        for run, (steps, values) in curves.items():
            colour = COLOURS[runs.index(run) % len(COLOURS)]
            marker = "o" if len(steps) < 12 else None
            ax.plot(steps, values, color=colour, linewidth=1.6, marker=marker, ms=4, label=run)
        label(ax, "optimiser step", quantity)
        drawn = [value for _, values in curves.values() for value in values]
        if quantity in log_scale and 0 < 10 * min(drawn) <= max(drawn):
            ax.set_yscale("log")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    legend_above(made, runs)
    return made


def draw_coverage(coverages: Mapping[str, Coverage]) -> "Figure":
    """Draw how often each patch is context and target: a pair of maps for each kind of mask, side by side.

    All maps share one scale, from 0 to the largest share.
    """
    made, axes = figure(2.45, 1, 2 * len(coverages))
    highest = max(float(share.max()) for kind in coverages.values() for share in kind)
    image = None
    for number, (kind, shares) in enumerate(coverages.items()):
        for ax, name, share in zip(axes[0, 2 * number :], Coverage._fields, shares, strict=False):
            image = show(ax, share.numpy(), low=0.0, high=highest)
            title(ax, f"{kind}: {name}")
    assert image is not None
    colour_bar(made, image, list(axes.flat), "share of images")
    return made


def draw_masks(
    images: Tensor, masks: Masks, grid: Grid, contexts: Mapping[str, Tensor]
) -> "Figure":
    """Draw example images, what of them context encoders see, and the target blocks.

    Args:
        images: [B, H, W, 3] in 0..1.
        masks: of these images; the first context and all targets are drawn.
        grid: rows and columns of patches.
        contexts: by name, what is seen of the images, before masks, [B, H, W, 3] in 0..1.
    """
    rows = len(contexts) + 2
    made, axes = figure(strip(len(images), rows), rows, len(images))
    for number, picture in enumerate(images.numpy()):
        show(axes[0, number], picture)
        kept = patch_map(masks.context[0][number], grid, picture.shape)
        for ax, seen in zip(axes[1:-1, number], contexts.values(), strict=True):
            show(ax, np.where(kept[..., None], seen[number].numpy(), UNSEEN))
        show(axes[-1, number], pale(picture))
        for target, block in enumerate(masks.target):
            _outline(axes[-1, number], block[number], grid, picture.shape, COLOURS[target % 8])
    for row, name in enumerate(("image", *contexts, "targets")):
        side_label(axes[row, 0], name)
    return made


def draw_noise(
    spectra: Mapping[str, Tensor], ratios: Mapping[str, tuple[float, float]]
) -> "Figure":
    """Draw the eigenvalues of A A^T, and the noise's squared length over the positions'.

    Args:
        spectra: descending eigenvalues [d_p] by run; drawn on a logarithmic scale, zeros left out.
        ratios: (std^2 tr(A A^T), |psi|^2) by run, of the runs that have noise.
    """
    made, axes = figure(3.0, 1, 2 if ratios else 1)
    for number, (name, values) in enumerate(spectra.items()):
        # Float rounding of a rank that is not full would stretch the axis over twenty decades.
        kept = values[values > values[0] * 1e-9].numpy()
        axes[0, 0].plot(
            np.arange(1, len(kept) + 1),
            kept,
            color=COLOURS[number // 2 % len(COLOURS)],
            linestyle="--" if name.endswith("start") else "-",
            linewidth=1.6,
            label=name,
        )
    axes[0, 0].set_yscale("log")
    label(axes[0, 0], "number of the eigenvalue", "eigenvalue of A Aᵀ")
    legend(axes[0, 0])
    if ratios:
        ax = axes[0, 1]
        names = list(ratios)
        shares = [100 * noise / position for noise, position in ratios.values()]
        bars = ax.barh(names[::-1], shares[::-1], color=COLOURS[5], height=0.5)
        ax.bar_label(bars, [f" {share:.3g} %" for share in shares[::-1]], fontsize=9, color=INK)
        ax.set_xlim(0, 1.3 * max(shares) or 1.0)
        ax.set_ylim(-1, len(names))
        label(ax, "std² tr(A Aᵀ) over |ψ|², %", "")
    return made


def draw_cosines(
    rows: Mapping[str, Sequence[Tensor]], places: Sequence[int], grid: Grid
) -> "Figure":
    """Draw cosine maps: a row for each kind of embedding, a column for each query position.

    Args:
        rows: by name, one map [rows, columns] for each place.
        places: the query positions in raster order; each is marked.
        grid: rows and columns of patches.
    """
    made, axes = figure(1.45 * len(rows) + 0.35, len(rows), len(places))
    lowest = min(float(m.min()) for maps in rows.values() for m in maps)
    image = None
    for row, (name, maps) in enumerate(rows.items()):
        for ax, place, values in zip(axes[row], places, maps, strict=True):
            image = show(ax, values.numpy(), low=lowest, high=1.0)
            _mark(ax, place, grid)
            if not row:
                title(ax, f"row {place // grid[1]}, column {place % grid[1]}")
        side_label(axes[row, 0], name)
    assert image is not None
    colour_bar(made, image, list(axes.flat), "cosine")
    return made


def draw_images(
    rows: Mapping[str, Tensor], frames: Mapping[str, tuple[int, int, int, int]] | None = None
) -> "Figure":
    """Draw rows of images, one column for each.

    Args:
        rows: by name, fp32 [B, H, W, 3] in 0..1; rows may differ in size.
        frames: by row, a rectangle to draw on its images: left, top, width and height in pixels.
    """
    count = max(map(len, rows.values()))
    made, axes = figure(strip(count, len(rows)), len(rows), count)
    for row, (name, images) in enumerate(rows.items()):
        for ax, values in zip(axes[row], images, strict=True):
            show(ax, values.numpy())
            if frames and name in frames:
                left, top, width, height = frames[name]
                frame(ax, (left - 0.5, top - 0.5), width, height)
        side_label(axes[row, 0], name)
    return made


def draw_retrieval(
    images: Tensor, context: Tensor, grid: Grid, found: Mapping[str, Retrieval]
) -> "Figure":
    """Draw for each image the context and the query's place, and each run's heat map over the image.

    Args:
        images: [B, H, W, 3] in 0..1.
        context: int64 [B, Kx], what the encoder saw.
        grid: rows and columns of patches.
        found: by run; each heat map has a colour scale of its own, from 0 to its largest weight.
    """
    made, axes = figure(strip(len(images), len(found) + 1), len(found) + 1, len(images))
    for number, picture in enumerate(images.numpy()):
        kept = patch_map(context[number], grid, picture.shape)
        show(axes[0, number], np.where(kept[..., None], picture, pale(picture)))
        for ax, retrieval in zip(axes[1:, number], found.values(), strict=True):
            show(ax, retrieval.weights[number].numpy(), low=0.0)
        place = int(next(iter(found.values())).places[number])
        scale = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
        _mark(axes[0, number], place, grid, scale)
        for ax in axes[1:, number]:
            _mark(ax, place, grid)
    for row, name in enumerate(("context", *found)):
        side_label(axes[row, 0], name)
    return made


def patch_map(index: Tensor, grid: Grid, shape: Sequence[int]) -> np.ndarray:
    """bool [H, W]: the pixels of the patches in ``index``."""
    patches = np.zeros(grid, dtype=bool)
    patches.flat[index.numpy()] = True
    return np.kron(patches, np.ones((shape[0] // grid[0], shape[1] // grid[1]), dtype=bool))


def _outline(ax: "Axes", index: Tensor, grid: Grid, shape: Sequence[int], colour: str) -> None:
    from matplotlib.patches import Rectangle

    height, width = shape[0] / grid[0], shape[1] / grid[1]
    rows, columns = index.numpy() // grid[1], index.numpy() % grid[1]
    corner = columns.min() * width - 0.5, rows.min() * height - 0.5
    size = (np.ptp(columns) + 1) * width, (np.ptp(rows) + 1) * height
    ax.add_patch(
        Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.8, clip_on=False)
    )


def pale(picture: np.ndarray) -> np.ndarray:
    """What an image in 0..1 looks like where it is only there to show where one is."""
    return 0.35 * picture + 0.65


def _mark(ax: "Axes", place: int, grid: Grid, scale: tuple[float, float] = (1.0, 1.0)) -> None:
    """Frame one patch of a map, or of an image whose patches are ``scale`` pixels large."""
    row, column = divmod(place, grid[1])
    height, width = scale
    frame(ax, (column * width - 0.5, row * height - 0.5), width, height)


def frame(
    ax: "Axes", corner: tuple[float, float], width: float, height: float, colour: str = COLOURS[1]
) -> None:
    """Draw a rectangle that shows on light and dark."""
    from matplotlib.patches import Rectangle

    for edge, line in (("white", 2.6), (colour, 1.3)):
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=edge, linewidth=line))
