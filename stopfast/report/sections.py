"""The sections of a report: what is computed of the runs, drawn, and said about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stopfast.build import build_jepa, build_masks
from stopfast.config import Config
from stopfast.masking import Masks
from stopfast.monitors import LEAST_STD, LEAST_VARIANCE
from stopfast.predictor import Predictor
from stopfast.report import measures, pictures
from stopfast.report.canvas import data_uri
from stopfast.report.logs import curve, thin
from stopfast.report.page import Picture, Section
from stopfast.report.samples import to_pixels
from stopfast.report.settings import mask_kind
from stopfast.trained import TrainedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTITIES = {
    "loss": "loss",
    "lr": "learning rate",
    "feature_std": "feature std",
    "rankme": "RankMe",
    "target_variance": "target variance",
    "knn": "kNN accuracy",
}
_COVERAGE_BATCHES = 64
_DRAWS = 256
_TEMPERATURE = 0.1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one image size and patch size, which share pictures."""

    runs: Mapping[str, TrainedRun]
    pool: Tensor | None
    """fp32 [P, 3, H, W], normalised, over which features are averaged; None where there are no images."""
    shown: Sequence[int] = ()
    """Which of the pool the pictures show."""

    @property
    def first(self) -> TrainedRun:
        """The run whose settings decide what the others share."""
        return next(iter(self.runs.values()))

    @property
    def images(self) -> Tensor | None:
        """The images that the pictures show, fp32 [B, 3, H, W]."""
        return None if self.pool is None else self.pool[list(self.shown)]


def curve_section(logs: Mapping[str, list[dict[str, Any]]]) -> Section:
    """Return loss, learning rate and monitors over the steps."""
    panels, longest = {}, 1
    for key, name in _QUANTITIES.items():
        curves = {run: thin(curve(rows, key)) for run, rows in logs.items()}
        longest = max(longest, *(length for _, _, length in curves.values()))
        drawn = {run: (steps, values) for run, (steps, values, _) in curves.items() if steps}
        if drawn:
            panels[name] = drawn
    if not panels:
        return Section(title="Training", text="These runs left no log.")
    points = "" if longest == 1 else f" A point is the mean of up to {longest:,} steps."
    caption = (
        f"What the runs logged while they trained.{points} The loss is the mean smooth-L1 distance to the "
        "target encoder's features, which change as it trains: a lower loss does not mean a better encoder."
    )
    if panels.keys() & {"feature std", "RankMe", "target variance"}:
        caption += (
            " The monitors look at the target encoder. Feature std is 1 where image features point evenly "
            "in all directions, RankMe is the effective number of their dimensions, target variance the "
            "part of the targets that differs between images and places; features that collapse bring them "
            "towards 0, 1 and 0. Step 0 is the untrained encoder: its features are mostly their mean, so "
            "feature std and RankMe begin low. They and the target variance may fall while kNN rises; a "
            f"run warns where features hardly differ any more (std below {LEAST_STD}, variance below "
            f"{LEAST_VARIANCE})."
        )
    figure = pictures.draw_curves(panels, log_scale=("loss",))
    return Section(title="Training", parts=[_picture(figure, ", ".join(panels), caption, "svg")])


def mask_section(group: Group) -> Section:
    """Return example masks, and how often each patch is context and target."""
    config = group.first.config
    parts = []
    masks = build_masks(config)
    if group.images is not None:
        drawn, batch = _first_masks(config, len(group.images))
        pixels = to_pixels(group.images, config.data.transforms)
        caption = (
            f"Masks of the first step{_whose(group)} ({mask_kind(config)}), laid over example images. "
            f"Context: what the encoder is given, cut to the shortest of the {batch} contexts of its "
            f"batch. Targets: the {len(drawn.target)} blocks whose features are predicted; they may "
            "overlap one another."
        )
        figure = pictures.draw_masks(pixels, drawn, masks.grid)
        parts.append(_picture(figure, "example masks", caption))
    kinds = {
        name: replace(config, objective=replace(config.jepa, mask=mask))
        for name, mask in _mask_kinds(config).items()
    }
    coverages = {
        name: measures.coverage(build_masks(kind), _cut_over(kind), _COVERAGE_BATCHES)
        for name, kind in kinds.items()
    }
    empty = [
        name for name, c in coverages.items() if not (c.target[-1].any() or c.context[-1].any())
    ]
    caption = (
        f"Share of the images of {_COVERAGE_BATCHES} batches in which a patch is context, and in which it "
        "is target. Faithful masks are those of the published programs; corrected ones may reach the last "
        "row and column, and cut contexts by chance instead of from the bottom."
    )
    if empty:
        caption += f" The last row and column are never seen with {' and '.join(empty)} masks."
    parts.append(_picture(pictures.draw_coverage(coverages), "coverage of the patches", caption))
    return Section(title="Masks", parts=parts)


def noise_section(group: Group) -> Section:
    """Return the covariance of the queries' noise, and what it does to positions."""
    predictors = {name: run.predictor for name, run in group.runs.items()}
    starts = {name: _start(run.config) for name, run in group.runs.items()}
    spectra, ratios = {}, {}
    for name, predictor in predictors.items():
        for label, one in ((f"{name}, start", starts[name]), (name, predictor)):
            spectra[label] = measures.projection_spectrum(one)
            if measures.noise_projection(one) is not None:
                ratios[label] = measures.noise_to_position(one)
    caption = (
        "Left: eigenvalues of A Aᵀ, A being the predictor's projection of the encoder's features "
        "(predictor_embed), before training (dashed) and after."
    )
    if ratios:
        caption += (
            " StoP projects its noise by the same A, so the covariance of a query's noise is std² A Aᵀ. "
            "Right: its trace, the mean squared length of the noise, over that of the positions, |ψ|² ("
            + "; ".join(f"{name}: {n:.3g} over {p:.3g}" for name, (n, p) in ratios.items())
            + ")."
        )
    parts = [_picture(pictures.draw_noise(spectra, ratios), "spectrum of A Aᵀ", caption, "svg")]
    parts.append(_cosines(group, {n: p for n, p in predictors.items() if n in ratios}))
    return Section(title="Position and noise", parts=parts)


def feature_section(group: Group) -> Section | None:
    """Return the principal components of patch features, with and without position; None without images."""
    if group.pool is None or group.images is None:
        return None
    encoders = {"untrained": group.first.untrained()}
    encoders |= {name: run.target_encoder for name, run in group.runs.items()}
    features = {n: measures.patch_features(e, group.pool) for n, e in encoders.items()}
    pixels = to_pixels(group.images, group.first.config.data.transforms)
    shares = {n: measures.position_share(values) for n, values in features.items()}
    captions = (
        "The first three principal components of the patch features, as red, green and blue: of the "
        "untrained encoder, and of each run's target encoder. Each row has components of its own, so "
        "colours compare within a row. They hold {held} of the variance. A pattern that is the same in "
        "every image is position: the mean feature of each position alone makes up "
        f"{_percent(shares)} of the variance.",
        "The same with position taken out: from each feature the mean at its position over "
        f"{len(group.pool)} images is subtracted first, so that what is left tells the images apart. The "
        "components hold {held} of the variance.",
    )
    parts = []
    for caption, centred in zip(captions, (False, True), strict=True):
        colours, held = {}, {}
        for name, values in features.items():
            rows = values - values.mean(0) if centred else values
            made, held[name] = measures.pca_colours(rows)
            colours[name] = made[list(group.shown)].unflatten(1, group.first.predictor.grid_size)
        figure = pictures.draw_components(pixels, colours)
        parts.append(_picture(figure, "PCA of patch features", caption.format(held=_percent(held))))
    return Section(title="Patch features", parts=parts)


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{100 * share:.0f}\u00a0% ({name})" for name, share in shares.items())


def retrieval_section(group: Group) -> Section | None:
    """Return what a predicted token is like in the image; None without images."""
    if group.images is None:
        return None
    config = group.first.config
    masks, _ = _first_masks(config, len(group.images))
    found = {
        name: measures.retrieve(run, group.images, masks, temperature=_TEMPERATURE)
        for name, run in group.runs.items()
    }
    right = {
        name: (r.weights.flatten(1).argmax(1) == r.places).float().mean().item()
        for name, r in found.items()
    }
    caption = (
        f"From the context{_whose(group)} (top), the predictor predicts the feature at the framed "
        "patch, the middle of a target block. Below: cosine of this prediction with the target encoder's "
        f"feature at every patch of the image, as a softmax with temperature {_TEMPERATURE:g}; brighter is "
        "more alike. Noise is drawn once, as in training. The most alike patch is the framed one in "
        f"{_percent(right)} of these {len(group.images)} images."
    )
    pixels = to_pixels(group.images, config.data.transforms)
    grid = group.first.predictor.grid_size
    figure = pictures.draw_retrieval(pixels, masks.context[0], grid, found)
    return Section(title="What a prediction finds", parts=[_picture(figure, "retrieval", caption)])


def _whose(group: Group) -> str:
    """Name the run that the masks are of, where there are several."""
    return f" of {next(iter(group.runs))}" if len(group.runs) > 1 else ""


def _cosines(group: Group, noisy: Mapping[str, Predictor]) -> Picture:
    predictor = group.first.predictor
    rows, columns = grid = predictor.grid_size
    places = [
        row * columns + column
        for row, column in (
            (rows // 4, columns // 4),
            (rows // 4, 3 * columns // 4),
            (rows // 2, columns // 2),
            (3 * rows // 4, columns // 4),
        )
    ]
    maps = {"position": [measures.position_cosines(predictor, place) for place in places]}
    generator = torch.Generator().manual_seed(group.first.config.run.seed)
    for name, one in noisy.items():
        shape = (len(places), _DRAWS, one.noise_channels)
        noise = torch.randn(shape, generator=generator)
        drawn = [measures.position_cosines(one, p, n) for p, n in zip(places, noise, strict=True)]
        maps[f"{name}:\none draw"] = [values[0] for values in drawn]
        maps[f"{name}:\nmean of {_DRAWS}"] = [values.mean(0) for values in drawn]
    caption = (
        "Cosine of one position's embedding ψ (framed) with the embedding of every position. Top: ψ "
        "itself."
    )
    if noisy:
        caption += (
            " Below: ψ with noise, ψ + std A n, for one draw of n and for the mean over "
            f"{_DRAWS} draws; the stronger the noise, the less a query tells of its place."
        )
    return _picture(pictures.draw_cosines(maps, places, grid), "cosine maps of positions", caption)


def _mask_kinds(config: Config) -> dict[str, Any]:
    """The masks as published, mended, and, where they are neither, those of the settings."""
    mask = config.jepa.mask
    kinds = {
        "faithful": replace(mask, edge_inclusive=False, truncate="first", truncate_over="local"),
        "corrected": replace(mask, edge_inclusive=True, truncate="random", truncate_over="global"),
    }
    return kinds if mask in kinds.values() else {**kinds, "this run's": mask}


def _cut_over(config: Config) -> int:
    """How many images' contexts are cut to one length: a step's, or a micro-batch's."""
    part = 1 if config.jepa.mask.truncate_over == "global" else config.step.accumulate
    return config.data.batch_size // part


def _first_masks(config: Config, count: int) -> tuple[Masks, int]:
    """Return the first step's masks of its first images, and how many contexts are cut to one length."""
    batch = max(_cut_over(config), count)
    context, target, _ = build_masks(config)(batch, 0)
    return Masks([index[:count] for index in context], [index[:count] for index in target]), batch


def _start(config: Config) -> Predictor:
    """Return the predictor that a run began with; the length of its epochs plays no part."""
    return build_jepa(config, steps_per_epoch=1).predictor


def _picture(
    figure: "Figure", alternative: str, caption: str, kind: Literal["svg", "png"] = "png"
) -> Picture:
    return Picture(source=data_uri(figure, kind), alternative=alternative, caption=caption)
