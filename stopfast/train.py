"""A training run: settings to objective, data, steps, progress, record, monitors and checkpoints."""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stopfast.build import build_objective, build_step, check_settings, choose_device
from stopfast.checkpoint import step_checkpoints
from stopfast.config import Config
from stopfast.data.digits import digits_folder
from stopfast.data.images import Images, open_images, split_folder
from stopfast.data.loader import TrainPlan, resolve_loader, train_batches
from stopfast.data.scan import usable_images
from stopfast.journal import STEPS, Journal, last_finite, open_sinks, require_sinks
from stopfast.monitors import Monitors
from stopfast.objectives import Objective
from stopfast.progress import (
    Meter,
    Stopped,
    StopRequest,
    memory_in_use,
    progress_bar,
    stop_request,
)
from stopfast.run_folder import alone
from stopfast.run_state import DataState, load_run, save_run
from stopfast.step import StepResult, TrainStep


@dataclass(kw_only=True)
class _Run:
    """The parts of a run that has begun, and how far it is."""

    config: Config
    console: Console
    output: Path
    images: Images
    plan: TrainPlan
    data: DataState
    objective: Objective[Any]
    step: TrainStep
    done: int = 0
    """Steps that the weights have taken."""
    updating: bool = False
    """In the middle of a step, of which an update may be cut in two."""

    @property
    def last_step(self) -> int:
        return self.config.optim.epochs * self.plan.steps_per_epoch

    def save(self) -> Path:
        return save_run(self.output, self.config, self.objective, self.step, self.data, self.done)

    def tell(self, text: str) -> None:
        epoch = self.done / self.plan.steps_per_epoch
        self.console.print(f"step {self.done}/{self.last_step}, epoch {epoch:.2f}: {text}")


def pretrain(config: Config, console: Console) -> Path:
    """Train to the end; return the folder of the last checkpoint.

    A run that is finished is left as it is. The record beside the checkpoints is described in
    :class:`stopfast.journal.Journal`.

    Raises:
        Stopped: SIGINT (Ctrl-C) or SIGTERM came; the step in progress was finished and saved.
        ValueError: settings or data that cannot be trained on, or a folder of another run; nothing is
            written then, but for the demo's own images.
        FloatingPointError: loss or weights are no longer finite; the last checkpoint stays.
    """
    run = _begin(config, console)
    with alone(run.output):
        if step_checkpoints(run.output):
            path, run.done = load_run(run.output, run.config, run.objective, run.step, run.data)
            if run.done >= run.last_step:
                console.print(f"finished before: {path}")
                return path
            if not config.run.resume:
                raise ValueError(
                    f"expected a new folder for the run, got {run.output}, which holds {run.done} of "
                    f"{run.last_step} steps; go on with --run.resume, or choose another --run.output"
                )
        elif config.run.resume:
            console.print(
                f"no checkpoint in {run.output} to go on from: beginning at the first step"
            )
        monitors = Monitors(run.config, run.images, console, run.step.device)
        console.print(
            f"{len(run.images):,} images of {len(run.images.classes)} classes decoded by "
            f"{run.data.loader}, {run.plan.steps_per_epoch} steps an epoch, {run.last_step} steps, "
            f"{config.preset} on {run.step.device}, {config.step.precision}, ops {config.step.ops}"
        )
        if not run.done and (run.output / STEPS).exists():
            console.print(f"no checkpoint in {run.output}: its record is begun anew")
        journal = Journal(run.output, run.done, open_sinks(run.config, run.output, run.done))
        with closing(journal), stop_request() as request:
            path = _train(run, monitors, journal, request)
    console.print(f"checkpoint: {path}")
    if request.received is not None and run.done < run.last_step:
        raise Stopped(request.received, path)
    return path


def _begin(config: Config, console: Console) -> _Run:
    """Build everything; what is wrong with the settings alone is found before the images are looked at."""
    require_sinks(config)
    device = choose_device(config.run.device)
    loader = resolve_loader(config.data.loader)
    check_settings(config, device)
    config = with_data(config)
    images = usable_images(training_images(config), config.data, console=console)
    steps_per_epoch = len(images) // config.data.batch_size
    objective = build_objective(config, max(1, steps_per_epoch))
    plan = TrainPlan(len(images), config.data.batch_size, objective.transforms, config.run.seed)
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
    if not config.data.digits:
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


def _train(run: _Run, monitors: Monitors, journal: Journal, request: StopRequest) -> Path:
    """Take the steps that are left and save; where something ends them early, save what is whole."""
    begun = run.done
    try:
        _steps(run, monitors, journal, request)
        return run.save()
    except FloatingPointError:
        raise
    except Exception:
        # Between two steps the weights are whole, whatever went wrong; inside one they may not be.
        if run.done > begun and not run.updating:
            try:
                journal.flush()
                run.console.print(f"checkpoint: {run.save()}")
            except Exception as second:
                run.console.print(f"no checkpoint could be written: {second}")
        raise


def _steps(run: _Run, monitors: Monitors, journal: Journal, request: StopRequest) -> None:
    """Take steps, tell, write, look and save, until the last one or a request to stop."""
    settings = run.config.run
    batches = train_batches(
        run.images,
        run.plan,
        first_step=run.done + 1,
        last_step=run.last_step,
        device=run.step.device,
        data=run.config.data,
    )
    meter, first = Meter(run.config.data.batch_size, run.step.device), run.done + 1
    if monitors.due(run.done, run.last_step) and not journal.looked(run.done):
        _look(run, monitors, journal)  # what it begins with, or what a request to stop left out
    if run.config.step.compile:
        run.console.print("compiling: the first step takes a minute or more")
    with closing(batches), progress_bar(run.console) as bar:
        task = bar.add_task("first step", total=run.last_step, completed=run.done)
        while run.done < run.last_step:
            begin = time.perf_counter()
            with meter.waiting():
                batch = next(batches)
            waited = time.perf_counter() - begin
            run.updating = True
            result = run.step(batch.images, run.done + 1)
            run.done, run.updating = run.done + 1, False
            meter.count()
            bar.update(task, completed=run.done)
            _record(run, journal, result, time.perf_counter() - begin, waited)
            stop, last = request.received, run.done == run.last_step
            if run.done % settings.log_every == 0 or last or stop:
                loss = last_finite(journal.flush(), run.done)
                timing = meter.report()
                bar.update(task, description=f"loss {loss:.4f}")
                run.tell(
                    f"loss {loss:.4f}, lr {result.scalars['lr']:.2e}, "
                    f"{timing.describe(run.last_step - run.done)}, "
                    f"{memory_in_use(run.step.device)}{_counted(run.step)}"
                )
            elif run.done == first:
                meter.reset()  # it had all that happens once in it
            look = monitors.due(run.done, run.last_step) and not stop
            save = run.done % settings.checkpoint_every == 0 and not last
            if look or save:
                with meter.paused():
                    last_finite(journal.flush(), run.done)
                    if look:
                        _look(run, monitors, journal)
                    if save:
                        run.save()
            if stop:
                run.console.print(f"stopped by {stop.name}")
                return


def _counted(step: TrainStep) -> str:
    """What was left out, captured and compiled so far; the latter two end within some hundred steps."""
    counts = {"skipped": step.skipped, **step.counts()}
    names = {"skipped": "steps skipped", "graphs": "CUDA graphs", "compilations": "compilations"}
    return "".join(f", {counts[key]} {name}" for key, name in names.items() if counts[key])


def _look(run: _Run, monitors: Monitors, journal: Journal) -> None:
    seen = monitors.look(run.objective, warn=run.done > 0)
    journal.look({"step": run.done, **seen})
    run.tell(", ".join(f"{name} {value:.3f}" for name, value in seen.items()))


def _record(run: _Run, journal: Journal, result: StepResult, seconds: float, waited: float) -> None:
    epoch = run.done / run.plan.steps_per_epoch
    row = {"step": run.done, "epoch": epoch, **result.scalars, "seconds": seconds, "waited": waited}
    journal.step(row, result.loss)
