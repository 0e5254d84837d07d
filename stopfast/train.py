"""A training run: settings to objective, data, steps, progress, record, monitors and checkpoints."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from stopfast.build import build_objective, build_step, choose_device
from stopfast.checkpoint import step_checkpoints
from stopfast.config import Config
from stopfast.data.digits import digits_folder
from stopfast.data.images import Images, open_images, split_folder
from stopfast.data.loader import TrainPlan, resolve_loader, train_batches
from stopfast.data.scan import usable_images
from stopfast.journal import Journal, open_sinks, require_sinks
from stopfast.monitors import Monitors
from stopfast.objectives.jepa import Jepa
from stopfast.progress import Meter, StopRequest, memory_in_use, progress_bar, stop_request
from stopfast.run_state import DataState, load_run, save_run
from stopfast.step import TrainStep


@dataclass(frozen=True)
class _Run:
    """The parts of a run that has begun."""

    config: Config
    console: Console
    output: Path
    images: Images
    plan: TrainPlan
    data: DataState
    objective: Jepa
    step: TrainStep

    @property
    def last_step(self) -> int:
        return self.config.optim.epochs * self.plan.steps_per_epoch

    def save(self, done: int) -> Path:
        return save_run(self.output, self.config, self.objective, self.step, self.data, done)


def pretrain(config: Config, console: Console) -> Path:
    """Train to the end, or to an interruption; return the folder of the last checkpoint.

    SIGINT (Ctrl-C) and SIGTERM end the run after the step in progress, with a checkpoint;
    ``run.resume`` goes on from it. A run that is finished is left as it is. The record
    beside the checkpoints is described in :class:`stopfast.journal.Journal`.

    Raises:
        ValueError: settings or data that cannot be trained on; nothing is written then.
        FloatingPointError: loss or weights are no longer finite; the last checkpoint stays.
    """
    run = _begin(config, console)
    config, done = run.config, 0
    if config.run.resume or step_checkpoints(run.output):
        path, done = load_run(run.output, config, run.objective, run.step, run.data)
        if done >= run.last_step:
            console.print(f"finished before: {path}")
            return path
        if not config.run.resume:
            raise ValueError(
                f"expected a new folder for the run, got {run.output}, which holds {done} of "
                f"{run.last_step} steps; go on with --run.resume, or choose another --run.output"
            )
    monitors = Monitors(config, run.images, console, run.step.device)
    console.print(
        f"{len(run.images):,} images of {len(run.images.classes)} classes decoded by {run.data.loader}, "
        f"{run.plan.steps_per_epoch} steps an epoch, {run.last_step} steps, {config.noise.variant} on "
        f"{run.step.device}, {config.step.precision}, ops {run.objective.ops.name}"
    )
    run.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.output, done, open_sinks(config, run.output, done))
    begun = done
    try:
        with stop_request() as request:
            for number in _steps(run, monitors, journal, done + 1, request):
                done = number
                if done % config.run.checkpoint_every == 0 and done < run.last_step:
                    journal.flush()
                    run.save(done)
    except (ValueError, OSError):
        # What unreadable data raise, between two steps: the weights are those of the last one. Any
        # other failure may have come in the middle of an update, so it leaves no checkpoint.
        if done > begun:
            journal.flush()
            console.print(f"checkpoint: {run.save(done)}")
        raise
    finally:
        journal.close()
    path = run.save(done)
    console.print(f"checkpoint: {path}")
    return path


def _begin(config: Config, console: Console) -> _Run:
    """Build everything, and write nothing."""
    require_sinks(config)
    device = choose_device(config.run.device)
    loader = resolve_loader(config.data.loader)
    config = with_data(config)
    images = usable_images(training_images(config), config.data, console=console)
    plan = TrainPlan(len(images), config.data.batch_size, config.data.transforms, config.run.seed)
    objective = build_objective(config, plan.steps_per_epoch)
    return _Run(
        config=config,
        console=console,
        output=config.run.output or Path("runs") / config.preset,
        images=images,
        plan=plan,
        data=DataState(len(images), images.fingerprint(), loader),
        objective=objective,
        step=build_step(config, objective, device),
    )


def with_data(config: Config) -> Config:
    """Return settings that say where the images lie; the demo's are written out where there are none.

    Raises:
        ValueError: no root for a preset that has no data of its own.
    """
    if config.data.root is not None:
        return config
    if config.preset != "demo":
        raise ValueError(f"expected --data.root, a folder of images, for preset {config.preset!r}")
    return replace(config, data=replace(config.data, root=digits_folder(Path("runs") / "digits")))


def training_images(config: Config) -> Images:
    """Return the images that these settings train on.

    Raises:
        ValueError: no root, or no images there.
    """
    root = config.data.root
    if root is None:
        raise ValueError("expected a folder of images, got no data.root")
    return open_images(split_folder(root, "train"))


def _steps(
    run: _Run, monitors: Monitors, journal: Journal, first_step: int, request: StopRequest
) -> Iterator[int]:
    """Take the steps, tell as they go, and yield the number of each that is done."""
    step, per_epoch = run.step, run.plan.steps_per_epoch
    batches = train_batches(
        run.images,
        run.plan,
        first_step=first_step,
        last_step=run.last_step,
        device=step.device,
        data=run.config.data,
    )
    meter = Meter(run.config.data.batch_size, step.device)
    with closing(batches), progress_bar(run.console) as bar:
        task = bar.add_task("first step", total=run.last_step, completed=first_step - 1)
        for number in range(first_step, run.last_step + 1):
            begin = time.perf_counter()
            with meter.waiting():
                batch = next(batches)
            waited = time.perf_counter() - begin
            result = step(batch.images, number)
            meter.count()
            bar.update(task, completed=number)
            journal.step(
                {
                    "step": number,
                    "epoch": number / per_epoch,
                    **result.scalars,
                    "seconds": time.perf_counter() - begin,
                    "waited": waited,
                },
                result.loss,
            )
            stopping = request.received is not None
            if number % run.config.run.log_every == 0 or number == run.last_step or stopping:
                loss = _finite(journal.flush(), number)  # the one place that waits for the device
                timing = meter.report()
                told = (
                    f"loss {loss:.4f}, lr {result.scalars['lr']:.2e}, "
                    f"{timing.describe(run.last_step - number)}, {memory_in_use(step.device)}"
                )
                skipped = f", {step.skipped} steps skipped" if step.skipped else ""
                bar.update(task, description=f"loss {loss:.4f}")
                run.console.print(
                    f"step {number}/{run.last_step}, epoch {number / per_epoch:.2f}: {told}{skipped}"
                )
            if monitors.due(number, run.last_step):
                _finite(journal.flush(), number)
                seen = monitors.look(run.objective)
                journal.look({"step": number, **seen})
                told = ", ".join(f"{name} {value:.3f}" for name, value in seen.items())
                run.console.print(f"step {number}/{run.last_step}: {told}")
                meter.reset()
            yield number
            if request.received is not None and stopping:
                run.console.print(f"stopped by {request.received.name}; --run.resume goes on")
                return


def _finite(losses: list[float], last: int) -> float:
    """The last of the losses up to step ``last``.

    Raises:
        FloatingPointError: one that is not finite.
    """
    for back, loss in enumerate(reversed(losses)):
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {last - back}: the loss is {loss}")
    return losses[-1] if losses else math.nan
