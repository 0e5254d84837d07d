"""Evaluate checkpoints: trained encoders beside their untrained beginnings and raw pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stopfast.build import choose_device
from stopfast.evaluation.counting import MOST, CountingSettings, count_and_locate
from stopfast.evaluation.features import Extraction, Features, extract
from stopfast.evaluation.knn import knn_predict
from stopfast.evaluation.probes import LinearSettings, fit_linear, logistic_predict
from stopfast.evaluation.propagation import PropagationSettings, propagate_labels
from stopfast.evaluation.results import (
    MEASURES,
    Evaluation,
    Measure,
    interval,
    print_evaluation,
    save_evaluation,
)
from stopfast.evaluation.rows import build_rows, common_transforms, name_checkpoints, open_splits
from stopfast.trained import Which, load_trained

__all__ = [
    "DEFAULT_PROBES",
    "EvaluationSettings",
    "Probe",
    "evaluate_checkpoint",
    "evaluate_checkpoints",
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
    share: float = 0.01
    """Of the training labels, for the logistic regression; at least one a class."""
    subsets: int = 5
    """Draws of that share."""
    counting: CountingSettings = field(default_factory=CountingSettings)
    propagation: PropagationSettings = field(default_factory=PropagationSettings)

    def __post_init__(self) -> None:
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
    seeds: int = 3,
    device: str = "auto",
    threads: int = 2,
    settings: EvaluationSettings | None = None,
) -> Evaluation:
    """Evaluate one checkpoint, named "trained"; see :func:`evaluate_checkpoints`."""
    return evaluate_checkpoints(
        {"trained": checkpoint},
        data,
        which=which,
        probes=probes,
        seeds=seeds,
        device=device,
        threads=threads,
        settings=settings,
    )


def evaluate_checkpoints(
    checkpoints: Sequence[Path] | Mapping[str, Path],
    data: Path | None,
    *,
    which: Which = "target_encoder",
    probes: Sequence[Probe] = DEFAULT_PROBES,
    seeds: int = 3,
    device: str = "auto",
    threads: int = 2,
    settings: EvaluationSettings | None = None,
) -> Evaluation:
    """Probe the frozen features of trained encoders, of their untrained beginnings, and raw pixels.

    ``knn``, ``linear`` and ``logistic`` classify ``data``'s test images from its training images, by
    the mean over patches of the encoder's normed output, ``linear`` also by the last four blocks' side
    by side. ``counting`` (which also says where objects are) and ``propagation`` look at drawn scenes
    and clips and need no data. Each figure has a 95 % interval, over what its measure says; differences
    are paired.

    Args:
        checkpoints: folders of checkpoints or of runs (then their newest), by name; without names they
        are
            called after the run's folder.
        data: folder with ``train`` and ``val`` or ``test``; None for the probes of drawn images
            alone.
        which: which of the two trained encoders; the published results are the target encoder's.
        probes: which probes, each once.
        seeds: linear probes that are trained, from seed 0.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: that decode.
        settings: the rest; default ``EvaluationSettings()``.

    Raises:
        ValueError: a checkpoint or a folder that cannot be used, checkpoints that see images in
        different ways,
            or settings that make no sense; all before anything is computed.
    """
    settings = settings or EvaluationSettings()
    extraction = replace(settings.extraction, threads=threads)
    _require_probes(probes, seeds)
    named = name_checkpoints(checkpoints)
    where = choose_device(device)
    wanted = _OF_IMAGES & set(probes)
    if wanted and data is None:
        raise ValueError("expected a folder of images for kNN, linear and logistic, got none")
    splits = open_splits(data) if wanted and data is not None else None
    runs = {name: load_trained(path) for name, path in named.items()}
    transforms = common_transforms(runs)
    rows = build_rows(runs, which, where, extraction.precision)
    scores = _Scores()
    references: dict[Measure, float] = {}
    labelled = 0
    if splits is not None:
        features = [
            extract(rows.sources, split, transforms, where, extraction, rows.identities)
            for split in splits
        ]
        labels = [torch.tensor(split.labels) for split in splits]
        labelled = _classify(scores, features, labels, wanted, seeds, where, settings)
    if "counting" in probes:
        counted = count_and_locate(
            rows.sources, transforms, device=where, settings=settings.counting
        )
        for name, found in counted.items():
            scores.add("counting", name, found.count[None])
            scores.add("location", name, found.where[None])
        references |= {"counting": 1 / MOST, "location": 0.0}
    if "propagation" in probes:
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
        seeds=seeds,
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


def _require_probes(probes: Sequence[Probe], seeds: int) -> None:
    if not probes or len(set(probes)) < len(probes) or set(probes) - set(DEFAULT_PROBES):
        raise ValueError(f"expected probes among {list(DEFAULT_PROBES)}, got {list(probes)}")
    if seeds < 1:
        raise ValueError(f"expected seeds >= 1, got {seeds}")


def _classify(
    scores: _Scores,
    features: Sequence[Mapping[str, Features]],
    labels: Sequence[Tensor],
    wanted: frozenset[str],
    seeds: int,
    device: torch.device,
    settings: EvaluationSettings,
) -> int:
    """Run the probes of labelled images; return how many labels the logistic regression saw."""
    labelled = 0
    known, asked = labels

    def linear(name: str, measure: Measure, train: Tensor, test: Tensor) -> None:
        probes = [
            fit_linear(train, known, seed=seed, settings=settings.linear, device=device)
            for seed in range(seeds)
        ]
        right = np.stack([(probe.predict(test) == asked).numpy() for probe in probes])
        scores.add(measure, name, right, [probe.rate for probe in probes])

    for name, train in features[0].items():
        test = features[1][name]
        if "knn" in wanted:
            right = knn_predict(train.last, known, test.last, device=device) == asked
            scores.add("knn", name, right.numpy()[None])
        if "linear" in wanted:
            linear(name, "linear", train.last, test.last)
            if train.levels > 1:
                linear(name, "linear_last4", train.pooled, test.pooled)
        if "logistic" in wanted:
            tries = []
            for subset in range(settings.subsets):
                said, labelled = logistic_predict(
                    train.last, known, test.last, share=settings.share, seed=subset
                )
                tries.append((said == asked).numpy())
            scores.add("logistic", name, np.stack(tries))
    return labelled
