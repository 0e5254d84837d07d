"""The state of a training run on disk: what a checkpoint holds, and what may differ on the way back."""

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stopfast import __version__
from stopfast.checkpoint import (
    CheckpointError,
    flatten_state,
    load_checkpoint,
    load_modules,
    newest_checkpoint,
    save_checkpoint,
    step_checkpoints,
    unflatten_state,
)
from stopfast.config import Config, to_document
from stopfast.objectives import Objective
from stopfast.step import TrainStep

Free = Mapping[str, Sequence[str]]
"""By section, the settings that may differ between a checkpoint and the run that goes on from it."""

_FREE: Free = {
    "run": (
        "output",
        "resume",
        "dry_run",
        "device",
        "log_every",
        "checkpoint_every",
        "tensorboard",
        "wandb",
    ),
    # Which images there are is told by their fingerprint, wherever they lie; what decodes, by its name.
    "data": ("root", "digits", "threads", "loader", "hardware_share", "broken", "max_broken"),
    "step": (
        "fast",
        "ops",
        "attention",
        "compile",
        "skip_unused",
        "bucket",
        "ahead",
        "copies",
        "target_stream",
        "graphs",
    ),
    "optim": ("optimizer",),
    "monitor": ("every", "images", "labelled", "labelled_images"),
}
"""Settings that do not change what a run computes but for rounding; a resume may change them."""

_KEPT = 2
"""Checkpoints of a run that stay."""


class DataState(NamedTuple):
    """What the data position, a function of the step, is true for."""

    images: int
    fingerprint: str
    """SHA-256 of the images' names, sizes and labels in their order."""
    loader: str
    """What decodes: the loaders agree closely, and not to the bit."""


def save_run(
    output: Path,
    config: Config,
    objective: Objective[Any],
    step: TrainStep,
    data: DataState,
    done: int,
) -> Path:
    """Write ``output/step-<done>``: weights, optimiser, settings, data and versions; return its path.

    Raises:
        FloatingPointError: as :func:`save_step`.
    """
    weights = {
        f"{name}.{key}": value
        for name, module in objective.modules().items()
        for key, value in module.state_dict().items()
    }
    documents = {"config": to_document(config), "data": data._asdict()}
    return save_step(output, done, weights, step.state_dict(), documents, step.device)


def save_step(
    output: Path,
    done: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    documents: Mapping[str, Any],
    device: torch.device,
) -> Path:
    """Write ``output/step-<done>`` of a run of any kind; return its path.

    The newest two checkpoints of the run are kept, the others removed. One that is there is left as it is.

    Args:
        output: the run's folder.
        done: steps that the weights have taken.
        weights: by name.
        optimizer: nested state of whatever updates the weights.
        documents: what else :func:`stopfast.checkpoint.load_checkpoint` is to return; ``state`` and
            ``versions`` are added.
        device: where the run computes.

    Raises:
        FloatingPointError: weights that are not finite, which nothing could go on from.
    """
    path = output / f"step-{done:07d}"
    if path.exists():
        return path
    spoilt = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if spoilt:
        raise FloatingPointError(
            f"step {done}: {len(spoilt)} weights are not finite, {spoilt[0]} first"
        )
    tensors, rest = flatten_state(optimizer)
    save_checkpoint(
        path,
        {"model": weights, "optimizer": tensors},
        {
            **documents,
            "state": {"step": done, "optimizer": rest},
            "versions": {
                "stopfast": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                "device": _device_name(device),
            },
        },
    )
    for older in step_checkpoints(output)[:-_KEPT]:
        shutil.rmtree(older)
    return path


def load_run(
    output: Path, config: Config, objective: Objective[Any], step: TrainStep, data: DataState
) -> tuple[Path, int]:
    """Load the newest checkpoint of a run; return its path and the steps that it has done.

    Raises:
        CheckpointError: none there, an altered one, or one of other settings or other data.
    """
    path = newest_checkpoint(output)
    tensors, documents = load_checkpoint(path)
    different = different_settings(documents["config"], to_document(config))
    if different:
        raise CheckpointError(
            f"{path}: expected the settings that it was made with, got other {', '.join(different)}"
        )
    for name, now in data._asdict().items():
        before = documents["data"][name]
        if before != now:
            raise CheckpointError(
                f"{path}: expected the data that it was made with, got another {name}: {now} instead of "
                f"{before}"
            )
    load_modules(objective.modules(), tensors["model"], str(path))
    step.load_state_dict(unflatten_state(tensors["optimizer"], documents["state"]["optimizer"]))
    return path, documents["state"]["step"]


def different_settings(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], free: Free = _FREE
) -> list[str]:
    """Return the settings that differ, with both values, but for those that may."""
    objectives = [document.get("objective", {}).get("name") for document in (saved, wanted)]
    if objectives[0] != objectives[1]:
        return [f"objective.name: {objectives[1]} instead of {objectives[0]}"]
    different = []
    for section, values in wanted.items():
        before = saved.get(section)
        if not isinstance(values, dict) or not isinstance(before, dict):
            different += [f"{section}: {values} instead of {before}"] if before != values else []
            continue
        names = sorted((values.keys() | before.keys()) - set(free.get(section, ())))
        different += [
            f"{section}.{name}: {values.get(name)} instead of {before.get(name)}"
            for name in names
            if values.get(name) != before.get(name)
        ]
    return different


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
