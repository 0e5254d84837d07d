"""The sections of runs of I-JEPA and StoP: masks, noise, what a prediction finds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stopfast.build import build_jepa, build_masks
from stopfast.config import Config, JepaConfig
from stopfast.degradations import Degradation
from stopfast.masking import Masks
from stopfast.objectives.jepa import Jepa
from stopfast.predictor import Predictor
from stopfast.report import measures, pictures
from stopfast.report.canvas import picture
from stopfast.report.group import Group
from stopfast.report.page import Picture, Section
from stopfast.report.samples import to_pixels
from stopfast.report.settings import mask_kind
from stopfast.report.views import STRETCHED, view_pixels
from stopfast.report.wording import percent
from stopfast.trained import TrainedRun

_COVERAGE_BATCHES = 64
_DRAWS = 256
_TEMPERATURE = 0.1


def jepa_sections(group: Group) -> list[Section]:
    """Return what there is to show of the runs of I-JEPA and StoP; nothing where there are none."""
    own = group.of(JepaConfig)
    if own is None:
        return []
    made = (mask_section(own), retrieval_section(own), noise_section(own))
    return [section for section in made if section is not None]


def mask_section(group: Group) -> Section:
    """Return example masks, and how often each patch is context and target."""
    config = group.first.config
    parts = []
    masks = build_masks(config)
    if group.images is not None:
        drawn, batch = _first_masks(config, len(group.images))
        pixels = to_pixels(group.images, config.data.transforms)
        contexts = _contexts(group)
        caption = (
            f"Masks of the first step{group.whose} ({mask_kind(config)}), laid over example images. "
            f"Context: what the encoder is given, cut to the shortest of the {batch} contexts of its "
            f"batch. Targets: the {len(drawn.target)} blocks whose features are predicted; they may "
            "overlap one another."
        )
        if any(_degradation(run) for run in group.runs.values()):
            caption += (
                " A degraded context is what that encoder sees, while the target encoder sees the image "
                "as it is."
            )
        if any(run.config.jepa.degrade.kind == "blurred" for run in group.runs.values()):
            caption += f" {STRETCHED}"
        figure = pictures.draw_masks(pixels, drawn, masks.grid, contexts)
        parts.append(picture(figure, "example masks", caption))
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
    parts.append(picture(pictures.draw_coverage(coverages), "coverage of the patches", caption))
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
    parts = [picture(pictures.draw_noise(spectra, ratios), "spectrum of A Aᵀ", caption, "svg")]
    parts.append(_cosines(group, {n: p for n, p in predictors.items() if n in ratios}))
    return Section(title="Position and noise", parts=parts)


def retrieval_section(group: Group) -> Section | None:
    """Return what a predicted token is like in the image; None without images."""
    if group.images is None:
        return None
    config = group.first.config
    masks, _ = _first_masks(config, len(group.images))
    found = {
        name: measures.retrieve(run, *_seen(group, name), masks, temperature=_TEMPERATURE)
        for name, run in group.runs.items()
    }
    right = {
        name: (r.weights.flatten(1).argmax(1) == r.places).float().mean().item()
        for name, r in found.items()
    }
    caption = (
        f"From the context{group.whose} (top), the predictor predicts the feature at the framed "
        "patch, the middle of a target block. Below: cosine of this prediction with the target encoder's "
        f"feature at every patch of the image, as a softmax with temperature {_TEMPERATURE:g}; brighter is "
        "more alike. Noise is drawn once, as in training. The most alike patch is the framed one in "
        f"{percent(right)} of these {len(group.images)} images."
    )
    pixels = to_pixels(group.images, config.data.transforms)
    grid = group.first.predictor.grid_size
    figure = pictures.draw_retrieval(pixels, masks.context[0], grid, found)
    return Section(title="What a prediction finds", parts=[picture(figure, "retrieval", caption)])


def _degradation(run: TrainedRun) -> Degradation | None:
    assert isinstance(run.objective, Jepa)
    return run.objective.degradation


def _seen(group: Group, name: str) -> tuple[Tensor, Tensor]:
    """What a run's context encoder sees of the shown images in its first step, and its target encoder."""
    run, images = group.runs[name], group.field(name)
    degradation = _degradation(run)
    if degradation is None:
        return images, images
    first = torch.tensor([run.config.run.seed, 1])
    drawn = degradation.draws(first, torch.arange(len(images)))
    return degradation.view(images, drawn), degradation.whole(images)


def _contexts(group: Group) -> dict[str, Tensor]:
    """What context encoders see, before masks, as pixels [B, H, W, 3]; once for all that see the image."""
    contexts = {}
    for name, run in group.runs.items():
        kind = run.config.jepa.degrade.kind
        row = "context" if kind == "none" else f"{kind}\ncontext"
        if row not in contexts:
            seen, _ = _seen(group, name)
            contexts[row] = view_pixels(seen, _degradation(run), run.config.data.transforms)
    return contexts


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
    return picture(pictures.draw_cosines(maps, places, grid), "cosine maps of positions", caption)


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
