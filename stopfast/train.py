"""A training run: settings to objective, data, steps, printed progress and checkpoints."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stopfast import __version__
from stopfast.build import build_objective, choose_device
from stopfast.checkpoint import (
    CheckpointError,
    flatten_state,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    unflatten_state,
)
from stopfast.config import Config, to_document
from stopfast.data.digits import digits_folder
from stopfast.data.folder import ImageFolder, scan_folder, split_folder
from stopfast.data.loader import Batch, TrainPlan, train_batches
from stopfast.objectives import Objective
from stopfast.progress import Meter, stop_request
from stopfast.step import TrainStep

_RESUMABLE = ("output", "resume", "dry_run", "device", "log_every")
"""Settings of a run that do not change what it computes, so a resume may change them."""


def pretrain(config: Config, console: Console) -> Path:
    """Train to the end, or to an interruption; return the folder of the last checkpoint.

    SIGINT (Ctrl-C) and SIGTERM end the run after the step in progress, with a checkpoint;
    ``run.resume`` goes on from it.

    Raises:
        ValueError: settings or data that cannot be trained on; nothing is written then.
        FloatingPointError: the loss is no longer finite; the last checkpoint stays.
    """
    output = config.run.output or Path("runs") / config.preset
    if not config.run.resume and output.is_dir() and any(output.glob("step-*")):
        raise ValueError(
            f"expected a new folder for the run, got {output}, which holds checkpoints; "
            "choose another --run.output, or go on with --run.resume"
        )
    device = choose_device(config.run.device)
    folder = training_folder(config)
    plan = TrainPlan(len(folder), config.data.batch_size, config.data.transforms, config.run.seed)
    objective = build_objective(config, plan.steps_per_epoch)
    step = TrainStep(
        objective,
        precision=config.step.precision,
        accumulate=config.step.accumulate,
        device=device,
    )
    last_step = config.optim.epochs * plan.steps_per_epoch
    done = _resume(newest_checkpoint(output), config, objective, step) if config.run.resume else 0
    if done >= last_step:
        raise ValueError(
            f"expected a run of fewer than {last_step} steps to go on with, got {done}"
        )
    console.print(
        f"{len(folder):,} images of {len(folder.classes)} classes, {plan.steps_per_epoch} steps an epoch, "
        f"{last_step} steps, {config.noise.variant} on {device}, {config.step.precision}, "
        f"ops {objective.ops.name}"
    )
    batches = train_batches(
        folder,
        plan,
        first_step=done + 1,
        last_step=last_step,
        device=device,
        threads=config.data.threads,
    )
    first = done
    with stop_request() as request:
        try:
            for done in _steps(config, console, step, batches, first + 1, last_step, plan):
                if request.received is not None:
                    console.print(f"{request.received.name}: stopping after step {done}")
                    break
        except FloatingPointError:
            raise  # the weights are spoilt; the last checkpoint is what there is to go on from
        except Exception:
            if done > first:
                _save(output, config, objective, step, done, console)
            raise
        return _save(output, config, objective, step, done, console)


def training_folder(config: Config) -> ImageFolder:
    """Return the images that these settings train on.

    Raises:
        ValueError: no root for a preset that has no data of its own, or nothing readable there.
    """
    root = config.data.root
    if root is None:
        if config.preset != "demo":
            raise ValueError(
                f"expected --data.root, a folder of JPEG images, for preset {config.preset!r}"
            )
        root = digits_folder(Path("runs") / "digits")
    return scan_folder(split_folder(root, "train"))


def _steps(
    config: Config,
    console: Console,
    step: TrainStep,
    batches: Iterator[Batch],
    first_step: int,
    last_step: int,
    plan: TrainPlan,
) -> Iterator[int]:
    """Take the steps, print as they go, and yield the number of each that is done."""
    meter = Meter(config.data.batch_size)
    for number in range(first_step, last_step + 1):
        with meter.waiting():
            batch = next(batches)
        result = step(batch.images, number)
        meter.count()
        if number % config.run.log_every == 0 or number == last_step:
            loss = result.loss.item()  # the one place that waits for the device
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {number}: the loss is {loss}")
            skipped = f", {step.skipped} steps skipped" if step.skipped else ""
            console.print(
                f"step {number}/{last_step}, epoch {number / plan.steps_per_epoch:.2f}: "
                f"loss {loss:.4f}, lr {result.scalars['lr']:.2e}, {meter.report(last_step - number)}"
                f"{skipped}"
            )
        yield number


def _save(
    output: Path,
    config: Config,
    objective: Objective[Any],
    step: TrainStep,
    done: int,
    console: Console,
) -> Path:
    path = output / f"step-{done:07d}"
    weights = {
        f"{name}.{key}": value
        for name, module in objective.modules().items()
        for key, value in module.state_dict().items()
    }
    tensors, rest = flatten_state(step.state_dict())
    save_checkpoint(
        path,
        {"model": weights, "optimizer": tensors},
        {
            "config": to_document(config),
            "state": {"step": done, "optimizer": rest},
            "versions": {"stopfast": __version__, "torch": torch.__version__},
        },
    )
    console.print(f"checkpoint: {path}")
    return path


def _resume(path: Path, config: Config, objective: Objective[Any], step: TrainStep) -> int:
    """Load a run's state; return the steps that are done.

    Raises:
        CheckpointError: an altered checkpoint, or one of other settings.
    """
    tensors, documents = load_checkpoint(path)
    saved, wanted = documents["config"], to_document(config)
    for name in _RESUMABLE:
        saved["run"].pop(name, None)
        wanted["run"].pop(name, None)
    different = [
        f"{section}.{name}" if isinstance(wanted[section], dict) else section
        for section in wanted
        for name in (wanted[section] if isinstance(wanted[section], dict) else [None])
        if (saved[section] != wanted[section])
        and (name is None or saved[section].get(name) != wanted[section][name])
    ]
    if different:
        raise CheckpointError(
            f"{path}: expected the settings it was made with, got other {different}"
        )
    for name, module in objective.modules().items():
        prefix = f"{name}."
        state = {
            k.removeprefix(prefix): v for k, v in tensors["model"].items() if k.startswith(prefix)
        }
        load_weights(module, state, f"{path}, {name}")
    step.load_state_dict(unflatten_state(tensors["optimizer"], documents["state"]["optimizer"]))
    return documents["state"]["step"]
