"""Accuracies of the objectives' features: `python -m benchmarks quality --data DIR [--study noise]`.

Every arm of a study is trained from every seed by the same recipe, that of the small presets, on the same
images for the same number of steps; its encoder's features are then classified by nearest neighbours and by
a linear probe. A run is a row of the results as soon as it is done; called again, the command goes on.
"""

import fnmatch
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from benchmarks.engine.options import Cell, Device, Precision
from benchmarks.engine.provenance import device_folder, machine_info, provenance
from benchmarks.engine.results import Results, results_path
from benchmarks.engine.runner import DEVICE_LOST, running_marker
from benchmarks.quality.arms import STUDIES, Arm, Scale, Size, Study
from benchmarks.quality.runs import Budget, Data, run_arm
from stopfast.build import choose_device
from stopfast.data.digits import digits_folder
from stopfast.data.images import Images
from stopfast.evaluation.rows import open_splits

KIND = "quality"


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """Accuracies of the objectives' features, by a budget that is the same for all."""

    data: Path | None = None
    """Folder with ``train/`` and ``test/`` of labelled photographs of one size, such as CIFAR-10; by
    default scikit-learn's handwritten digits."""
    study: Study = "objectives"
    """``objectives``; ``combinations``: those and StoP's noise in others; ``noise``: I-JEPA and levels of
    StoP's noise; ``covariance``: projected or not; ``rates``: half and twice the learning rate."""
    arm: tuple[str, ...] = ()
    """Arms of the study, by name or pattern (``beyond-*``); all when left out."""
    seeds: int | None = None
    """Runs of an arm; by default 3, and 5 of ``noise`` and ``covariance``."""
    steps: int | None = None
    """Steps of a run; by default 600 on a CPU, of which none takes 3 minutes, and 1,000 on a GPU."""
    batch: int | None = None
    """Images of a step; by default 32 on a CPU, half the presets', and 512 on a GPU."""
    size: Size | None = None
    """Networks: those of the presets (CPU), or ``small``, a ViT of 6 blocks of width 256 (GPU)."""
    images: int = 20_000
    """At most so many images to train on."""
    known: int = 5_000
    """At most so many of these, whose labels the classifiers see."""
    asked: int = 5_000
    """At most so many test images."""
    precision: Precision | None = None
    """By default bf16 on a GPU and fp32 on a CPU."""
    fast: bool = False
    """Turn on what makes a step faster, but for compilation; see ``stopfast.build.fastest``."""
    device: Device = "auto"
    threads: int | None = None
    """Threads of torch; its own default when left out."""
    seconds: float | None = None
    """Begin no run after so many seconds."""
    results: Path | None = None
    """Results file (``.json``), or the folder for one by device, date and commit; default
    ``benchmarks/results``."""
    commit: str | None = None
    """Commit of the code where there is no repository to ask."""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch", "images", "known", "asked", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} > 0, got {value}")
        if not self.arms:
            names = [arm.name for arm in STUDIES[self.study]]
            raise ValueError(f"expected arms among {names}, got {list(self.arm)}")

    @property
    def arms(self) -> list[Arm]:
        """The arms that are asked for."""
        return [
            arm
            for arm in STUDIES[self.study]
            if not self.arm or any(fnmatch.fnmatchcase(arm.name, asked) for asked in self.arm)
        ]

    @property
    def runs(self) -> Iterator[tuple[int, Arm]]:
        """Seed and arm of every run; each seed of all arms before the next."""
        seeds = self.seeds or (5 if self.study in ("noise", "covariance") else 3)
        return ((seed, arm) for seed in range(seeds) for arm in self.arms)

    def budget(self, device: torch.device) -> Budget:
        """Return what every run is given.

        Raises:
            ValueError: steps that the schedules cannot be laid over.
        """
        gpu = device.type == "cuda"
        scale = Scale(
            "demo" if self.data is None else "cifar10",
            self.size or ("small" if gpu else "preset"),
            self.batch or (512 if gpu else 32),
            self.steps or (1000 if gpu else 600),
        )
        precision = self.precision or ("bf16" if gpu else "fp32")
        return Budget(scale, precision, self.fast)


OPTIONS = QualityOptions


def run(options: QualityOptions) -> int:
    """Take the runs that the results file lacks; the exit status, 1 if one of them failed, 70 if the GPU is
    lost.

    Raises:
        ValueError: data or settings that cannot be used, or a file of runs by other settings.
    """
    begin, device = time.monotonic(), choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    budget = options.budget(device)
    splits = open_splits(options.data or digits_folder(user_cache_path("stopfast") / "digits"))
    told = _told(options, budget, splits)
    origin = provenance(options.commit)
    path = results_path(options.results, device_folder(device), origin, f"-{KIND}")
    results = Results.open(path)
    require_same(results, told)
    # What an altered checkout's file has may be of other code.
    resumes = not origin["dirty"] or options.results == path
    wanted = [
        (seed, arm)
        for seed, arm in options.runs
        if not (resumes and results.has(_cell(arm, seed).key))
    ]
    print(f"{path}: {len(wanted)} runs to take", flush=True)
    if not wanted:
        return 0
    results.begin(origin, machine_info=machine_info())
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = (options.images, options.known, options.asked)
    data = Data.load(splits, counts, device, len(os.sched_getaffinity(0)))
    failed = 0
    for number, (seed, arm) in enumerate(wanted, 1):
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            print(f"the {options.seconds:.0f} s are over: {len(wanted) - number + 1} runs are left")
            break
        cell = _cell(arm, seed)
        info = {"key": cell.key, "kind": KIND, "arm": arm.name, "seed": seed, "settings": told}
        running_marker(path).write_text(json.dumps(info))
        try:
            found = run_arm(arm, seed, budget, data, device)
        except Exception as error:  # the other arms go on
            failed += 1
            results.refuse(info, "failed", f"{type(error).__name__}: {error}".partition("\n")[0])
            print(f"{cell.key}: {error!r}", file=sys.stderr)
            if _lost(device):
                return DEVICE_LOST
        else:
            results.add(_row(cell, {**info, **found}))
            print(f"{number}/{len(wanted)} {arm.name}, seed {seed}: {_shown(found)}", flush=True)
        running_marker(path).unlink()
        gc.collect()  # before the next arm's networks
    return int(failed > 0)


def require_same(results: Results, told: dict[str, object]) -> None:
    """Refuse to add runs to those of another budget: they could not be compared.

    Raises:
        ValueError: the file has such runs.
    """
    for row in (*results.rows(kind=KIND), *results.not_timed(kind=KIND)):
        before = row["extra_info"]["settings"]
        other = {name for name in {*before, *told} if before.get(name) != told.get(name)}
        if other:
            there = {name: before.get(name) for name in sorted(other)}
            raise ValueError(
                f"expected the settings of the runs in {results.path}, {there}, got "
                f"{ {name: told.get(name) for name in sorted(other)} }; choose another --results"
            )


def _lost(device: torch.device) -> bool:
    """Whether an arm left the GPU in a state that no later one can use."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _shown(found: dict[str, Any]) -> str:
    return (
        f"kNN {found['knn']:.1%}, linear {found['linear']:.1%}, {found['train_s']:.0f} s and "
        f"{found['evaluate_s']:.0f} s"
    )


def _told(
    options: QualityOptions, budget: Budget, splits: tuple[Images, Images]
) -> dict[str, object]:
    """What all runs of a file must have in common."""
    train, test = splits
    return {
        **budget.scale._asdict(),
        "precision": budget.precision,
        "fast": budget.fast,
        "images": min(options.images, len(train)),
        "known": min(options.known, options.images, len(train)),
        "asked": min(options.asked, len(test)),
        "data": [split.fingerprint()[:16] for split in splits],
    }


def _cell(arm: Arm, seed: int) -> Cell:
    return Cell(KIND, arm.name, {}, seed)


def _row(cell: Cell, info: dict[str, Any]) -> dict[str, object]:
    """A row as pytest-benchmark has it, of one round: the training."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    stats.update(info["train_s"])
    about = {"group": KIND, "name": cell.key, "fullname": cell.key, "params": None, "param": None}
    data = {**stats.as_dict(), "data": stats.data, "iterations": 1}
    return {**about, "extra_info": info, "options": {}, "stats": data}
