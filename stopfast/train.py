"""A training run: settings to objective, data, steps, printed progress and checkpoints."""

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from stopfast.build import build_objective, build_step, choose_device
from stopfast.checkpoint import step_checkpoints
from stopfast.config import Config
from stopfast.data.digits import digits_folder
from stopfast.data.folder import ImageFolder, scan_folder, split_folder
from stopfast.data.loader import TrainPlan, train_batches
from stopfast.progress import Meter, StopRequest, stop_request
from stopfast.run_state import load_run, save_run
from stopfast.step import TrainStep


def pretrain(config: Config, console: Console) -> Path:
    """Train to the end, or to an interruption; return the folder of the last checkpoint.

    SIGINT (Ctrl-C) and SIGTERM end the run after the step in progress, with a checkpoint;
    ``run.resume`` goes on from it. A run that is finished is left as it is.

    Raises:
        ValueError: settings or data that cannot be trained on; nothing is written then.
        FloatingPointError: loss or weights are no longer finite; the last checkpoint stays.
    """
    output = config.run.output or Path("runs") / config.preset
    device = choose_device(config.run.device)
    folder = training_folder(config)
    plan = TrainPlan(len(folder), config.data.batch_size, config.data.transforms, config.run.seed)
    objective = build_objective(config, plan.steps_per_epoch)
    step = build_step(config, objective, device)
    last_step = config.optim.epochs * plan.steps_per_epoch
    done = 0
    if config.run.resume or step_checkpoints(output):
        path, done = load_run(output, config, objective, step)
        if done >= last_step:
            console.print(f"finished before: {path}")
            return path
        if not config.run.resume:
            raise ValueError(
                f"expected a new folder for the run, got {output}, which holds {done} of {last_step} "
                "steps; go on with --run.resume, or choose another --run.output"
            )
    console.print(
        f"{len(folder):,} images of {len(folder.classes)} classes, {plan.steps_per_epoch} steps an epoch, "
        f"{last_step} steps, {config.noise.variant} on {device}, {config.step.precision}, "
        f"ops {objective.ops.name}"
    )
    with stop_request() as request:
        begun = done
        try:
            for number in _steps(config, console, step, folder, plan, done + 1, request):
                done = number
                if done % config.run.checkpoint_every == 0 and done < last_step:
                    save_run(output, config, objective, step, done)
        except (ValueError, OSError):
            # What unreadable data raise, between two steps: the weights are those of the last one. Any
            # other failure may have come in the middle of an update, so it leaves no checkpoint.
            if done > begun:
                console.print(f"checkpoint: {save_run(output, config, objective, step, done)}")
            raise
        path = save_run(output, config, objective, step, done)
    console.print(f"checkpoint: {path}")
    return path


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
    folder: ImageFolder,
    plan: TrainPlan,
    first_step: int,
    request: StopRequest,
) -> Iterator[int]:
    """Take the steps, print as they go, and yield the number of each that is done."""
    last_step = config.optim.epochs * plan.steps_per_epoch
    batches = train_batches(
        folder,
        plan,
        first_step=first_step,
        last_step=last_step,
        device=step.device,
        threads=config.data.threads,
    )
    meter = Meter(config.data.batch_size)
    for number in range(first_step, last_step + 1):
        with meter.waiting():
            batch = next(batches)
        result = step(batch.images, number)
        meter.count()
        stopping = request.received is not None
        if number % config.run.log_every == 0 or number == last_step or stopping:
            loss = result.loss.item()  # the one place that waits for the device
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {number}: the loss is {loss}")
            skipped = f", {step.skipped} steps skipped" if step.skipped else ""
            console.print(
                f"step {number}/{last_step}, epoch {number / plan.steps_per_epoch:.2f}: "
                f"loss {loss:.4f}, lr {result.scalars['lr']:.2e}, "
                f"{meter.report(last_step - number)}{skipped}"
            )
        yield number
        if request.received is not None and stopping:
            console.print(f"stopped by {request.received.name}; --run.resume goes on")
            return
