"""A fine-tuning run: settings to model, data, steps, record, accuracy and the folder for timm."""

import json
import time
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rich.console import Console

from stopfast.build import choose_device
from stopfast.checkpoint import (
    newest_checkpoint,
    step_checkpoints,
)
from stopfast.config import DataConfig, to_document
from stopfast.data.loader import TrainPlan
from stopfast.data.scan import usable_images
from stopfast.evaluation.rows import open_splits
from stopfast.export.files import appearing
from stopfast.finetuning.accuracy import Accuracy, measure_accuracy
from stopfast.finetuning.chance import Stream, borrowed_generators, seed_device
from stopfast.finetuning.data import (
    LabelledImages,
    default_workers,
    eval_transform,
    in_order,
    load,
    share_of,
    train_transform,
)
from stopfast.finetuning.model import build_classifier, require_timm, write_classifier
from stopfast.finetuning.settings import FinetuneSettings
from stopfast.finetuning.state import CHECKPOINTS, MODEL, RESULT, Run
from stopfast.finetuning.step import FinetuneStep
from stopfast.journal import Journal, last_finite
from stopfast.progress import (
    Meter,
    Stopped,
    StopRequest,
    memory_in_use,
    progress_bar,
    stop_request,
)
from stopfast.run_folder import alone
from stopfast.trained import load_trained

_LOOKED_AT = ("step", "epoch", "top1", "top5", "test_loss")


def finetune(settings: FinetuneSettings, console: Console) -> Path:
    """Train a classifier from a checkpoint's encoder, and test it after every epoch.

    In the run's folder are ``log.csv`` (a row a step) and ``monitors.csv`` (a row an epoch), both also in
    ``log.jsonl``; ``checkpoints/``; and at the end ``model/``, which timm loads, and ``result.json``,
    with the accuracy after the last epoch: none is chosen by the test images. A run is a function of its
    recipe, its checkpoint and the images; on the CPU one that was stopped and resumed ends in the very
    same weights.

    Args:
        settings: what is asked for.
        console: where progress goes.

    Returns:
        The folder for timm.

    Raises:
        Stopped: SIGINT (Ctrl-C) or SIGTERM came; the step in progress was finished and saved.
        ValueError: timm is missing, settings or data that cannot be trained on, or a folder of another
            run; nothing is written then.
        FloatingPointError: loss or weights are no longer finite; the last checkpoint stays.
    """
    require_timm()
    device = choose_device(settings.device)
    with borrowed_generators(device):
        run = _begin(settings, console)
        with alone(run.output):
            finished = _go_on(run)
            if finished is not None:
                return finished
            console.print(
                f"{len(run.train.images):,} images of {len(run.classes)} classes, "
                f"{run.plan.steps_per_epoch} steps an epoch, {run.last_step} steps, tested on "
                f"{len(run.test.images):,}; {settings.name} on {device}, {run.recipe.precision}, "
                f"{run.workers} workers"
            )
            with (
                closing(Journal(run.output, run.done, looked_at=_LOOKED_AT)) as journal,
                stop_request() as request,
            ):
                accuracy = _train(run, journal, request)
            if accuracy is None:
                assert request.received is not None
                raise Stopped(request.received, newest_checkpoint(run.output / CHECKPOINTS))
            return _finish(run, accuracy)


def _begin(settings: FinetuneSettings, console: Console) -> Run:
    """Build everything; what is wrong with the checkpoint is found before the images are looked at."""
    recipe, device = settings.recipe, choose_device(settings.device)
    trained = load_trained(settings.checkpoint)
    encoder, transforms = trained.chosen(settings.which), trained.config.data.transforms
    train, test = open_splits(settings.data)
    seed_device(device, recipe.seed, Stream.WEIGHTS)
    model = build_classifier(encoder, transforms, len(train.classes), recipe)
    workers = default_workers() if settings.workers is None else settings.workers
    data = DataConfig(threads=max(1, workers), broken=settings.broken)
    train = share_of(usable_images(train, data, console=console), recipe)
    plan = TrainPlan(len(train), recipe.batch_size, transforms, recipe.seed)
    test = usable_images(test, data, console=console)
    tested = LabelledImages(test, eval_transform(transforms, recipe), recipe.seed)
    part = recipe.batch_size // recipe.accumulate
    return Run(
        settings=settings,
        console=console,
        output=settings.output or Path("runs") / f"{_name(trained.checkpoint)}-{settings.name}",
        checkpoint=trained.checkpoint,
        encoder=encoder,
        transforms=transforms,
        train=LabelledImages(train, train_transform(transforms, recipe), recipe.seed),
        test=tested,
        tested=load(tested, in_order(len(test), part), workers, device),
        plan=plan,
        step=FinetuneStep(
            model,
            recipe,
            steps_per_epoch=plan.steps_per_epoch,
            classes=len(train.classes),
            device=device,
        ),
        workers=workers,
    )


def _name(checkpoint: Path) -> str:
    """What the run of a checkpoint is called."""
    return checkpoint.resolve().parent.name


def _go_on(run: Run) -> Path | None:
    """Take over what the folder holds; return the model's folder if the run is finished.

    Raises:
        ValueError: steps in a folder that nobody asked to resume.
    """
    resume = run.settings.resume
    if step_checkpoints(run.output / CHECKPOINTS):
        run.load()
        if (run.output / RESULT).exists():
            run.console.print(f"finished before: {run.output / MODEL}")
            return run.output / MODEL
        if not resume:
            raise ValueError(
                f"expected a new folder for the run, got {run.output}, which holds {run.done} of "
                f"{run.last_step} steps; go on with --resume, or choose another --output"
            )
    elif resume:
        run.console.print(
            f"no checkpoint in {run.output} to go on from: beginning at the first step"
        )
    return None


def _train(run: Run, journal: Journal, request: StopRequest) -> Accuracy | None:
    """Take the steps that are left; return the accuracy after the last, or None if stopped before.

    Where something ends them early, what is whole is saved.
    """
    begun = run.done
    try:
        return _steps(run, journal, request)
    except FloatingPointError:
        raise
    except Exception:
        # Between two updates the weights are whole, whatever went wrong; inside one they may not be.
        if run.done > begun and not run.updating:
            journal.flush()
            run.console.print(f"checkpoint: {run.save()}")
        raise


def _steps(run: Run, journal: Journal, request: StopRequest) -> Accuracy | None:
    """Take steps, tell, write, test and save, until the last one or a request to stop."""
    settings, spe = run.settings, run.plan.steps_per_epoch
    meter, first = Meter(run.recipe.batch_size, run.step.device), run.done + 1
    accuracy = None
    if run.done and run.done % spe == 0 and not journal.looked(run.done):
        accuracy = _look(run, journal)  # what a request to stop left out
    elif run.done == run.last_step:
        accuracy = _measured(run)  # the row is there, but the run ended before the result was
    with closing(run.batches()) as parts, progress_bar(run.console) as bar:
        task = bar.add_task("first step", total=run.last_step, completed=run.done)
        while run.done < run.last_step:
            begin = time.perf_counter()
            with meter.waiting():
                batch = list(islice(parts, run.recipe.accumulate))
            waited = time.perf_counter() - begin
            run.updating = True
            loss, rate = run.step(batch, run.done + 1)
            run.done, run.updating = run.done + 1, False
            meter.count()
            seconds = time.perf_counter() - begin
            row = {"step": run.done, "epoch": run.epoch, "lr": rate}
            journal.step({**row, "seconds": seconds, "waited": waited}, loss)
            bar.update(task, completed=run.done)
            stop, whole = request.received, run.done % spe == 0
            if run.done % settings.log_every == 0 or whole or stop:
                shown = last_finite(journal.flush(), run.done)
                timing = meter.report()
                bar.update(task, description=f"loss {shown:.4f}")
                run.tell(
                    f"loss {shown:.4f}, lr {rate:.2e}, "
                    f"{timing.describe(run.last_step - run.done)}, {memory_in_use(run.step.device)}"
                )
            elif run.done == first:
                meter.reset()  # it had all that happens once in it
            if stop:
                run.save()
                run.console.print(f"stopped by {stop.name}")
                return None
            if whole:
                with meter.paused():
                    run.save()
                    accuracy = _look(run, journal)
    return accuracy


def _measured(run: Run) -> Accuracy:
    return measure_accuracy(run.step.model, run.tested, run.recipe.precision, run.step.device)


def _look(run: Run, journal: Journal) -> Accuracy:
    accuracy = _measured(run)
    row = {"step": run.done, "epoch": run.epoch, "top1": accuracy.top1.value}
    if accuracy.top5 is not None:
        row["top5"] = accuracy.top5.value
    journal.look({**row, "test_loss": accuracy.loss})
    run.tell(accuracy.describe())
    return accuracy


def _finish(run: Run, accuracy: Accuracy) -> Path:
    """Write the model's folder, and then the result, which says that the run is finished."""
    folder = run.output / MODEL
    if not folder.exists():
        with appearing(folder) as path:
            write_classifier(
                run.step.model, run.encoder, run.transforms, run.classes, run.recipe, path
            )
    result = {
        **asdict(accuracy),
        "train_images": len(run.train.images),
        "test_images": len(run.test.images),
        "classes": len(run.classes),
        "checkpoint": str(run.checkpoint),
        "which": run.settings.which,
        "name": run.settings.name,
        "recipe": to_document(run.recipe),
    }
    with appearing(run.output / RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    run.console.print(f"{accuracy.describe()}\nmodel: {folder}")
    return folder
