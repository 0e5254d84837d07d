"""Training with its loader: what it does of itself, what the step and the loader could do alone.

The pieces are those of ``stopfast pretrain``: its loader, its step, built from settings, and its meter,
which tells how long the step's device waited for data.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.engine import runner as engine
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.refusals import NotHere
from benchmarks.engine.runner import Bench
from benchmarks.loaders.feeds import ENDLESS
from benchmarks.step.workload import MODELS
from stopfast.build import build_objective, build_step, fastest
from stopfast.config import Config
from stopfast.data.images import Images, open_images, split_folder
from stopfast.data.loader import TrainPlan, train_batches
from stopfast.env import dali_problem
from stopfast.presets import PRESETS
from stopfast.progress import Meter

ARMS: dict[str, tuple[Literal["dali", "pil"] | None, bool]] = {
    "step alone": (None, True),
    "dali alone": ("dali", False),
    "dali": ("dali", True),
    "pil alone": ("pil", False),
    "pil": ("pil", True),
}
"""Where the images come from, None for always the same ones; and whether there are steps."""
_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Training with its loader; by default ViT-B/16 at batch 64 on a GPU, a small model on a CPU."""

    data: Path | None = None
    """Folder or tar of images, or a folder with ``train/`` of that kind."""
    workers: int | None = None
    """Threads that decode; by default one for each core."""
    fast: bool = True
    """Turn on all that makes a step faster on its device; see ``stopfast.build.fastest``."""
    each: int | None = None
    """Steps of a round, after which the device is waited for; by default 25, or 5 on a CPU."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        known = {**MODELS, **PRESETS}
        if set(self.model) - set(known):
            raise ValueError(f"expected models of {list(known)}, got {list(self.model)}")
        for name in ("workers", "each"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} > 0, got {value}")


OPTIONS = TrainOptions


def plan(options: TrainOptions) -> Iterator[Cell]:
    """The step alone; then each loader, alone and with the step."""
    gpu = options.place.type == "cuda"
    workers = options.workers or len(os.sched_getaffinity(0))
    for model in options.model or (("vit-b16",) if gpu else ("small",)):
        for images in options.images or ((64,) if gpu else (16,)):
            problem: dict[str, str | int] = {"model": model, "images": images}
            problem |= {"precision": options.dtype, "workers": workers}
            yield from (Cell("train", arm, problem) for arm in ARMS)


def run(options: TrainOptions) -> int:
    """Measure.

    Raises:
        ValueError: no images are told.
    """
    if options.data is None:
        raise ValueError("expected images, got none: --data FOLDER or TAR")
    return engine.run(Path(__file__).name, options)


def test_train(cell: Cell, bench: Bench) -> None:
    """Steps on images as they come, and the share of the time in which the device waited for them."""
    options = bench.options
    assert isinstance(options, TrainOptions)
    if options.data is None:
        raise NotHere("no images: --data FOLDER or TAR")
    loader, steps = ARMS[cell.arm]
    if loader == "dali" and (problem := dali_problem()) is not None:
        raise NotHere(problem)
    gpu = bench.device.type == "cuda"
    each = options.each or (25 if gpu else 5)
    # On a GPU until the shapes of all lengths have been met, which are captured when they first are.
    warmup = options.warmup if options.warmup is not None else 12 if gpu and steps else 1
    config, images = _settings(cell, options), _images(options.data)
    samples = TrainPlan(
        len(images), config.data.batch_size, config.data.transforms, config.run.seed
    )
    step = None
    if steps:
        objective = build_objective(config, samples.steps_per_epoch)
        step = build_step(config, objective, bench.device)
    meter, before = Meter(config.data.batch_size, bench.device), dict[str, int]()
    with closing(_batches(loader, images, samples, config, bench.device)) as batches:

        def one(number: int) -> None:
            if number == warmup * each + 1:
                before.update({} if step is None else step.counts())
                meter.reset()
            with meter.waiting():
                batch = next(batches)
            if step is not None:
                step(batch, number)
            meter.count()

        bench.steps(one, first=1, rounds=_ROUNDS, each=each, warmup=warmup)
        timing = meter.report()
    bench.info["photographs"] = len(images)
    if step is not None:
        bench.info["waiting_share"] = timing.waiting
        after = step.counts()
        bench.info["counts"] = after
        bench.info["counts_while_timed"] = {name: after[name] - before[name] for name in after}


def _settings(cell: Cell, options: TrainOptions) -> Config:
    config = {**PRESETS, **MODELS}[str(cell.problem["model"])]()
    data = replace(
        config.data,
        root=options.data,
        batch_size=int(cell.problem["images"]),
        threads=int(cell.problem["workers"]),
    )
    step = replace(config.step, precision=options.dtype, accumulate=1)
    config = replace(config, data=data, step=step)
    return fastest(config, options.place) if options.fast else config


def _batches(
    loader: Literal["dali", "pil"] | None,
    images: Images,
    samples: TrainPlan,
    config: Config,
    device: torch.device,
) -> Generator[Tensor, None, None]:
    """Yield the images of step 1, 2, ..., without end."""
    if loader is None:
        same = torch.randn(samples.batch_size, 3, *config.data.transforms.size, device=device)
        while True:
            yield same
    source = train_batches(
        images,
        samples,
        first_step=1,
        last_step=ENDLESS,
        device=device,
        data=replace(config.data, loader=loader),
    )
    with closing(source):
        for batch in source:
            yield batch.images


@cache
def _images(path: Path) -> Images:
    return open_images(split_folder(path, "train"))
