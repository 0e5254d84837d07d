"""The two ceilings of a device: the rate of its matrix products, and of its memory.

Both are measured, by loads that do nothing else: large products and those of the models' own layers, and
passes over tensors far larger than any cache. A ceiling is the best sustained rate of any load: clocks
have settled by then, which on a GPU under full load are not those of its first milliseconds.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.engine.clock import round_clock
from benchmarks.engine.results import FOLDER, all_results
from benchmarks.step.workload import MODELS
from stopfast.config import Config
from stopfast.encoder import image_grid

Run = Callable[[], object]
PUBLISHED = ("vit-b16", "vit-l16", "vit-h14")


class Roof(NamedTuple):
    """What a device reaches, per second."""

    bytes: float
    flops: float


class Load(NamedTuple):
    """Something that is as fast as one ceiling allows."""

    ceiling: Literal["matrix", "memory"]
    name: str
    work: int
    """Floating-point operations, or bytes, of one call."""
    make: Callable[[], Run]
    """Its tensors are not there before."""


def loads(
    device: torch.device, dtype: torch.dtype, models: Iterable[str] = PUBLISHED
) -> list[Load]:
    """Return the loads of a device, the best candidates first; a CPU's are small.

    Products are ``rows x inner by inner x columns`` in ``dtype``, of normal numbers: zeros take less
    power, and would be faster than anything real.
    """
    gpu = device.type == "cuda"
    sides = (
        [(8192, 8192, 8192), (16384, 8192, 8192), (4096, 4096, 4096)] if gpu else [(512, 512, 512)]
    )
    shapes = [("x".join(map(str, shape)), shape) for shape in sides]
    for model in models:
        shapes += _layers(model, MODELS[model](), 64 if gpu else 1)
    return [
        *(_product(name, shape, device, dtype) for name, shape in shapes),
        *_passes(2**28 if gpu else 2**25, device),
    ]


def _layers(model: str, config: Config, images: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The products of an encoder that sees all patches, and of a predictor whose rows are as many."""
    grid = image_grid(config.data.transforms.size, config.model.patch_size)
    rows = images * grid[0] * grid[1]
    for part, width, ratio in (
        ("encoder", config.model.embed_dim, config.model.mlp_ratio),
        ("predictor", config.model.predictor_embed_dim, config.model.predictor_mlp_ratio),
    ):
        hidden = int(width * ratio)
        yield f"{model} {part} qkv", (rows, width, 3 * width)
        yield f"{model} {part} fc1", (rows, width, hidden)
        yield f"{model} {part} fc2", (rows, hidden, width)


def _product(
    name: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Load:
    rows, inner, columns = shape

    def make() -> Run:
        left = torch.randn(rows, inner, device=device).to(dtype)
        # As a linear layer has it: rows of the weight lie along its inputs.
        weight = torch.randn(columns, inner, device=device).to(dtype)
        result = torch.empty(rows, columns, device=device, dtype=dtype)
        return lambda: torch.mm(left, weight.t(), out=result)

    return Load("matrix", name, 2 * rows * inner * columns, make)


def _passes(count: int, device: torch.device) -> Iterator[Load]:
    def copy() -> Run:
        source, target = torch.ones(count, device=device), torch.empty(count, device=device)
        return lambda: target.copy_(source)

    def add() -> Run:
        first, second = (torch.ones(count, device=device) for _ in range(2))
        target = torch.empty(count, device=device)
        return lambda: torch.add(first, second, out=target)

    def read() -> Run:
        source = torch.ones(count, device=device)
        return lambda: source.sum()

    yield Load("memory", "copy", 8 * count, copy)
    yield Load("memory", "add: two read, one written", 12 * count, add)
    yield Load("memory", "sum: read only", 4 * count, read)


def calls_for(run: Run, device: torch.device, seconds: float) -> int:
    """Return how many calls take about so long, from the second call on."""
    clock = round_clock(device)
    run()
    begin = clock()
    run()
    return max(1, round(seconds / max(clock() - begin, 1e-7)))


def sustained(run: Run, device: torch.device, seconds: float) -> float:
    """Return the seconds of one call, the median of ten rounds after as many that are not kept."""
    calls = calls_for(run, device, seconds / 20)
    clock = round_clock(device)
    times = []
    for _ in range(20):
        begin = clock()
        for _ in range(calls):
            run()
        times.append((clock() - begin) / calls)
    return torch.tensor(times[10:], dtype=torch.float64).median().item()


def measured_roof(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Roof:
    """Return both ceilings, from loads that have nothing to do with a model; ``seconds`` for each."""
    best = {"matrix": 0.0, "memory": 0.0}
    for load in loads(device, dtype, models=()):
        rate = load.work / sustained(load.make(), device, seconds)
        best[load.ceiling] = max(best[load.ceiling], rate)
    return Roof(best["memory"], best["matrix"])


def newest_roof(device: str, precision: str, folder: Path = FOLDER) -> Roof | None:
    """Return the ceilings of the newest results file of a device's folder that has both."""
    for results in reversed(all_results(folder)):
        if results.path.parent.name != device:
            continue
        rows = results.rows(kind="ceilings", precision=precision)
        rates = {ceiling: _best(rows, ceiling) for ceiling in ("memory", "matrix")}
        if all(rates.values()):
            return Roof(rates["memory"], rates["matrix"])
    return None


def _best(rows: list[dict[str, Any]], ceiling: str) -> float:
    infos = [row["extra_info"] for row in rows]
    return max((i["per_second"] for i in infos if i["ceiling"] == ceiling), default=0.0)
