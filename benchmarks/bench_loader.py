"""Data loaders on photographs: images a second, images a second of a busy core, and what feeds which model.

What asks for the batches does nothing else, so a loader goes as fast as it can. All of its threads and
processes are counted: a core is busy for as long as this process and its children ran. Batches lie on the
step's device when they are counted, masks too.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import runner as engine
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.provenance import device_folder, provenance
from benchmarks.engine.refusals import NotHere
from benchmarks.engine.results import Results, Row, results_path
from benchmarks.engine.runner import Bench
from benchmarks.loaders.arms import LOADERS
from benchmarks.loaders.demand import demands
from benchmarks.loaders.feeds import Batches, Feed
from benchmarks.loaders.gate import check_form, check_loader, check_spread
from benchmarks.roof.ceilings import PUBLISHED
from stopfast.config import Transforms
from stopfast.data.images import Images, open_images

Augmentation = Literal["crop-flip", "all"]
TRANSFORMS: dict[Augmentation, Transforms] = {
    "crop-flip": Transforms(flip=0.5),
    "all": Transforms(flip=0.5, gray=0.2, blur=0.5),
}
"""At 224 pixels; "all" are those of StoP."""
_SECONDS = 6.0  # that an arm is measured for, at least
_LEAST = 20  # batches, likewise
_QUEUED = 8  # batches that lie in a loader's queues, beside two for each worker
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Loaders on full-size photographs."""

    data: Path | None = None
    """Folder of photographs, or a tar of them."""
    images: tuple[int, ...] = (64,)
    workers: tuple[int, ...] = ()
    """Threads, or processes, that decode; by default as many as there are cores, then 2 and 1."""
    augment: tuple[Augmentation, ...] = ("crop-flip", "all")
    threads: int | None = 1
    """Threads of torch in the process that asks; decoding has those of ``workers``."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if any(workers < 1 for workers in self.workers):
            raise ValueError(f"expected workers > 0, got {self.workers}")


OPTIONS = LoaderOptions


def plan(options: LoaderOptions) -> Iterator[Cell]:
    """Every arm with each number of workers; the augmentations apart."""
    counts = options.workers or tuple(sorted({1, min(2, CORES), CORES}, reverse=True))
    for augment in options.augment:
        for images in options.images:
            for workers in counts:
                problem = {"transforms": augment, "images": images, "workers": workers}
                yield from (Cell("loader", arm, problem) for arm in LOADERS)


def run(options: LoaderOptions) -> int:
    """Measure, and print what feeds which model.

    Raises:
        ValueError: no photographs are told.
    """
    if options.data is None:
        raise ValueError("expected photographs, got none: --data FOLDER or TAR")
    status = engine.run(Path(__file__).name, options)
    path = results_path(options.results, device_folder(options.place), provenance(options.commit))
    if path.exists():
        Console(width=140).print(feeding_table(Results.open(path).rows(kind="loader")))
    return status


@pytest.mark.benchmark(timer=time.perf_counter)  # that of CUDA events would keep a core busy
def test_loader(cell: Cell, bench: Bench) -> None:
    """Batches one after another."""
    options = bench.options
    assert isinstance(options, LoaderOptions)
    if options.data is None:
        raise NotHere("no photographs: --data FOLDER or TAR")
    augment: Augmentation = cell.problem["transforms"]  # type: ignore[assignment]
    feed = Feed(
        images=_opened(options.data),
        transforms=TRANSFORMS[augment],
        batch_size=int(cell.problem["images"]),
        workers=int(cell.problem["workers"]),
        device=bench.device,
    )
    begin = LOADERS[cell.arm]
    bench.info |= {
        "photographs": len(feed.images),
        "kilobytes": round(float(feed.images.sizes.mean()) / 1e3, 1),
        "agreement": check_loader(begin, feed),
        "cores": CORES,
        "load_before": round(os.getloadavg()[0], 2),
    }
    started = time.perf_counter()
    with closing(begin(feed)) as batches:
        first = next(batches)
        bench.info["first_batch_s"] = time.perf_counter() - started
        check_form(first, feed)
        check_spread(first, feed)
        del first
        rate = _measure(bench, batches, feed)
    bench.info["demand"] = {
        demand.model: {**demand._asdict(), "cores": demand.fed_by(rate)}
        for demand in demands(options.model or PUBLISHED, bench.device, options.dtype)
    }


@cache
def _opened(path: Path) -> Images:
    return open_images(path)


def _measure(bench: Bench, batches: Batches, feed: Feed) -> float:
    """Take batches until the queues are as full as they stay, then time some; images per busy second."""
    told = bench.options
    warmup = _QUEUED + 2 * feed.workers if told.warmup is None else told.warmup
    begin = time.perf_counter()
    for _ in range(warmup):
        next(batches)
    enough = math.ceil(_SECONDS * warmup / (time.perf_counter() - begin))
    rounds = told.rounds or max(_LEAST, 4 * feed.workers, enough)
    if feed.device.type == "cuda":
        torch.cuda.synchronize(feed.device)
    begin, busy = time.perf_counter(), cpu_seconds()
    bench.benchmark.pedantic(next, args=(batches,), rounds=rounds, warmup_rounds=0, iterations=1)
    if feed.device.type == "cuda":
        torch.cuda.synchronize(feed.device)
    seconds, busy = time.perf_counter() - begin, cpu_seconds() - busy
    images = rounds * feed.batch_size
    bench.info |= {
        "images_per_s": images / seconds,
        "images_per_core_s": images / busy,
        "busy_cores": busy / seconds,
    }
    return images / busy


def cpu_seconds() -> float:
    """Return how long this process and those that it began, and which still run, have been on a core."""
    own = os.times()
    return own.user + own.system + sum(_of(child.pid) for child in active_children())


def _of(process: int | None) -> float:
    # getrusage knows only children that have ended. After the name in parentheses, which may hold spaces,
    # the fields 14 and 15 are the ticks of user and system.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def feeding_table(rows: list[Row]) -> Table:
    """Return the loaders' rates, and how many busy cores feed each model's step."""
    infos = [row["extra_info"] for row in rows]
    models = sorted({model for info in infos for model in info["demand"]})
    table = Table(title="loaders: images/s; cores that feed a step, and images/s that it takes")
    for heading in ("transforms", "images", "workers", "arm", "images/s", "a busy core", "busy"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for model in models:
        table.add_column(model, justify="right")
    for info in infos:
        table.add_row(
            *(str(info[name]) for name in ("transforms", "images", "workers", "arm")),
            *(f"{info[name]:.0f}" for name in ("images_per_s", "images_per_core_s")),
            f"{info['busy_cores']:.2f}",
            *(_fed(info["demand"].get(model)) for model in models),
        )
    return table


def _fed(demand: dict[str, Any] | None) -> str:
    if demand is None or demand["images_per_s"] is None:
        return "unknown"
    return f"{demand['cores']:.1f} for {demand['images_per_s']:.0f} ({demand['origin']})"
