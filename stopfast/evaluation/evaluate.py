"""Evaluate checkpoints: trained encoders beside their untrained beginnings and raw pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stopfast.build import choose_device
from stopfast.config import DataConfig
from stopfast.data.scan import usable_images
from stopfast.evaluation.counting import MOST, CountingSettings, count_and_locate
from stopfast.evaluation.features import LAST_BLOCKS, Extraction, Features, extract
from stopfast.evaluation.knn import knn_predict
from stopfast.evaluation.probes import LinearSettings, fit_linear, logistic_predict
from stopfast.evaluation.propagation import PropagationSettings, propagate_labels
from stopfast.evaluation.results import (
    MEASURES,
    Evaluation,
    Measure,
    interval,
    load_evaluation,
    print_evaluation,
    save_evaluation,
)
from stopfast.evaluation.rows import build_rows, common_transforms, name_checkpoints, open_splits
from stopfast.evaluation.telling import step_line
from stopfast.trained import Which, load_trained

__all__ = [
    "DEFAULT_PROBES",
    "EvaluationSettings",
    "Probe",
    "evaluate_checkpoint",
    "evaluate_checkpoints",
    "load_evaluation",
    "print_evaluation",
    "save_evaluation",
]

Probe = Literal["knn", "linear", "logistic", "counting", "propagation"]
DEFAULT_PROBES: tuple[Probe, ...] = get_args(Probe)
_OF_IMAGES = frozenset({"knn", "linear", "logistic"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is seldom changed."""

    extraction: Extraction = field(default_factory=Extraction)
    linear: LinearSettings = field(default_factory=LinearSettings)
    seeds: int = 3
    """Linear probes that are trained, from seed 0."""
    share: float = 0.01
    """Of the training labels, for the logistic regression; at least one a class."""
    subsets: int = 5
    """Draws of that share."""
    counting: CountingSettings = field(default_factory=CountingSettings)
    propagation: PropagationSettings = field(default_factory=PropagationSettings)
    pixels: bool = True
    """Whether raw pixels are a row. Their up to 3,072 columns are the largest table of small encoders."""
    broken: Literal["refuse", "skip"] | None = None
    """Images that cannot be decoded, see ``DataConfig.broken``; default: as the first checkpoint's run."""
    max_broken: float | None = None
    """See ``DataConfig.max_broken``; default: as the first checkpoint's run."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"expected seeds >= 1, got {self.seeds}")
        if self.subsets < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"expected subsets >= 1 and share in (0, 1], got {self.subsets} and {self.share}"
            )


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path | None,
    *,
    which: Which = "target_encoder",
    probes: Sequence[Probe] = DEFAULT_PROBES,
    device: str = "auto",
    settings: EvaluationSettings | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate one checkpoint, named "trained"; see :func:`evaluate_checkpoints`."""
    return evaluate_checkpoints(
        {"trained": checkpoint},
        data,
        which=which,
        probes=probes,
        device=device,
        settings=settings,
        console=console,
    )


def evaluate_checkpoints(
    checkpoints: Sequence[Path] | Mapping[str, Path],
    data: Path | None,
    *,
    which: Which = "target_encoder",
    probes: Sequence[Probe] = DEFAULT_PROBES,
    device: str = "auto",
    settings: EvaluationSettings | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Probe the frozen features of trained encoders, of their untrained beginnings, and raw pixels.

    ``knn``, ``linear`` and ``logistic`` classify ``data``'s test images from its training images, by
    the mean over patches of the encoder's normed output, ``linear`` also by the last four blocks' side
    by side. ``counting`` (which also says where objects are) and ``propagation`` look at drawn scenes
    and clips and need no data. Each figure has a 95 % interval, over what its measure says; differences
    are paired.

    Args:
        checkpoints: folders of checkpoints or of runs (then their newest), by name; without names they
            are called after the run's folder.
        data: folder with ``train`` and ``val`` or ``test``; None for the probes of drawn images
            alone.
        which: which of the two trained encoders; the published results are the target encoder's. Objectives
            without a teacher have one encoder, whichever is asked for.
        probes: which probes, each once.
        device: ``auto``, ``cpu`` or ``cuda``.
        settings: the rest; default ``EvaluationSettings()``.
        console: where it is told which images are left out and, on a terminal, how far it has come.

    Raises:
        ValueError: a checkpoint or a folder that cannot be used, checkpoints that see images in
            different ways, images that cannot be decoded (unless they are to be left out), or settings
            that make no sense; all before anything is computed.
    """
    settings = settings or EvaluationSettings()
    _require_probes(probes)
    extraction = settings.extraction
    named = name_checkpoints(checkpoints)
    where = choose_device(device)
    wanted = _OF_IMAGES & set(probes)
    if wanted and data is None:
        raise ValueError(
            "expected --data, a folder of images, for the probes knn, linear and logistic"
        )
    splits = open_splits(data) if wanted and data is not None else None
    runs = {name: load_trained(path) for name, path in named.items()}
    transforms = common_transforms(runs)
    if splits is not None:
        first = next(iter(runs.values())).config.data
        known = _broken_as_asked(replace(first, threads=extraction.threads), settings)
        splits = tuple(usable_images(split, known, console=console) for split in splits)
    rows = build_rows(
        runs,
        which,
        where,
        precision=extraction.precision,
        last_blocks=LAST_BLOCKS if "linear" in probes else 1,
        pixels=settings.pixels,
    )
    scores = _Scores()
    references: dict[Measure, float] = {}
    labelled = 0
    if splits is not None:
        features = [
            extract(rows.sources, split, transforms, where, extraction, rows.identities, console)
            for split in splits
        ]
        labels = [torch.tensor(split.labels) for split in splits]
        with step_line(console) as begin:
            labelled = _classify(scores, features, labels, wanted, where, settings, begin)
    with step_line(console) as begin:
        if "counting" in probes:
            begin("counting and locating objects")
            counted = count_and_locate(
                rows.sources, transforms, device=where, settings=settings.counting
            )
            for name, found in counted.items():
                scores.add("counting", name, found.count[None])
                scores.add("location", name, found.where[None])
            references |= {"counting": 1 / MOST, "location": 0.0}
        if "propagation" in probes:
            begin("propagating labels")
            carried = propagate_labels(
                rows.sources, transforms, device=where, settings=settings.propagation
            )
            for name, found in carried.scores.items():
                scores.add("propagation", name, found[None])
            references["propagation"] = carried.unmoved
    measures: list[Measure] = [measure for measure in MEASURES if measure in scores.found]
    return Evaluation(
        which=which,
        checkpoints={name: str(run.checkpoint) for name, run in runs.items()},
        data=None if data is None else str(data),
        train_images=len(splits[0]) if splits else 0,
        test_images=len(splits[1]) if splits else 0,
        labelled_images=labelled,
        seeds=settings.seeds,
        subsets=settings.subsets,
        figures={
            name: {m: interval(scores.found[m][name]) for m in measures if name in scores.found[m]}
            for name in rows.sources
        },
        differences={
            f"{one} less {other}": {
                m: interval(scores.found[m][one].astype(np.float64) - scores.found[m][other])
                for m in measures
                if one in scores.found[m] and other in scores.found[m]
            }
            for one, other in rows.pairs
        },
        rates=scores.rates,
        references=references,
        over={measure: MEASURES[measure].over for measure in measures},
        untaught=[name for name, run in runs.items() if run.target_encoder is run.encoder],
    )


@dataclass(frozen=True, slots=True)
class _Scores:
    found: dict[Measure, dict[str, np.ndarray]] = field(default_factory=dict)
    """[seeds, items] by measure and name."""
    rates: dict[str, dict[Measure, list[float]]] = field(default_factory=dict)

    def add(
        self, measure: Measure, name: str, scores: np.ndarray, rates: list[float] | None = None
    ) -> None:
        self.found.setdefault(measure, {})[name] = scores
        if rates is not None:
            self.rates.setdefault(name, {})[measure] = rates


def _require_probes(probes: Sequence[Probe]) -> None:
    if not probes or len(set(probes)) < len(probes) or set(probes) - set(DEFAULT_PROBES):
        raise ValueError(f"expected probes among {list(DEFAULT_PROBES)}, got {list(probes)}")


def _broken_as_asked(data: DataConfig, settings: EvaluationSettings) -> DataConfig:
    """A run's settings of its images, with what is asked for about broken ones."""
    if settings.broken is not None:
        data = replace(data, broken=settings.broken)
    if settings.max_broken is not None:
        data = replace(data, max_broken=settings.max_broken)
    return data


def _classify(
    scores: _Scores,
    features: Sequence[Mapping[str, Features]],
    labels: Sequence[Tensor],
    wanted: frozenset[str],
    device: torch.device,
    settings: EvaluationSettings,
    begin: Callable[[str], None],
) -> int:
    """Run the probes of labelled images; return how many labels the logistic regression saw."""
    labelled = 0
    known, asked = labels

    def linear(name: str, measure: Measure, train: Tensor, test: Tensor) -> None:
        probes = []
        for seed in range(settings.seeds):
            begin(f"{name}: {MEASURES[measure].title}, {seed + 1} of {settings.seeds}")
            probes.append(
                fit_linear(train, known, seed=seed, settings=settings.linear, device=device)
            )
        right = np.stack([(probe.predict(test) == asked).numpy() for probe in probes])
        scores.add(measure, name, right, [probe.rate for probe in probes])

    for name, train in features[0].items():
        test = features[1][name]
        if "knn" in wanted:
            begin(f"{name}: {MEASURES['knn'].title}")
            right = knn_predict(train.last, known, test.last, device=device) == asked
            scores.add("knn", name, right.numpy()[None])
        if "linear" in wanted:
            linear(name, "linear", train.last, test.last)
            if train.levels > 1:
                linear(name, "linear_last4", train.pooled, test.pooled)
        if "logistic" in wanted:
            tries = []
            for subset in range(settings.subsets):
                begin(f"{name}: few labels, {subset + 1} of {settings.subsets}")
                said, labelled = logistic_predict(
                    train.last, known, test.last, share=settings.share, seed=subset
                )
                tries.append((said == asked).numpy())
            scores.add("logistic", name, np.stack(tries))
    return labelled
