"""How many images a second a training step takes, which is what a loader has to feed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.engine.provenance import device_folder
from benchmarks.engine.results import FOLDER, all_results
from benchmarks.roof.ceilings import newest_roof
from benchmarks.roof.roofline import step_cost
from benchmarks.roof.step_work import drawn_shapes
from benchmarks.step.workload import MODELS

_SHAPES = 64  # steps whose masks a floor is reckoned from


class Demand(NamedTuple):
    """What a model's step takes on a device."""

    model: str
    images_per_s: float | None
    """None where nothing is known."""
    origin: str
    """The timed step it is of, "floor" for what the device's measured ceilings allow at most, or
    "unknown"."""

    def fed_by(self, images_per_core_s: float) -> float | None:
        """Return how many cores feed it, busy all the time."""
        return None if self.images_per_s is None else self.images_per_s / images_per_core_s


def demands(
    models: Iterable[str],
    device: torch.device,
    precision: str,
    *,
    images: int = 64,
    folder: Path = FOLDER,
) -> list[Demand]:
    """Return each model's demand: of its fastest timed step, else of the roof, else none.

    Args:
        models: names of :data:`benchmarks.step.workload.MODELS`.
        device: where the step runs.
        precision: of the step.
        images: batch of a floor; timed steps count at any batch.
        folder: of the results, with a folder for each device.
    """
    return [_demand(model, device, precision, images, folder) for model in models]


def _demand(model: str, device: torch.device, precision: str, images: int, folder: Path) -> Demand:
    own = device_folder(device)
    for results in reversed(all_results(folder)):
        if results.path.parent.name != own:
            continue
        rows: list[dict[str, Any]] = [
            row["extra_info"]
            for row in results.rows(kind="step", model=model, precision=precision)
            if row["extra_info"].get("images_per_s")
        ]
        if rows:
            best = max(rows, key=lambda info: info["images_per_s"])
            return Demand(model, best["images_per_s"], f"{best['arm']}, {best['images']} images")
    roof = newest_roof(own, precision, folder)
    if roof is None:
        return Demand(model, None, "unknown")
    config = MODELS[model]()
    cost = step_cost(config, drawn_shapes(config, images, _SHAPES), precision)
    return Demand(model, 1e3 * images / cost.floor(roof).summed, "floor")
