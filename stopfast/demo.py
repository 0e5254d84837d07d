"""``stopfast demo``: I-JEPA and StoP under equal conditions in a few minutes, with a table and a report."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from stopfast.checkpoint import CheckpointError, step_checkpoints
from stopfast.config import Config
from stopfast.data.digits import digits_folder
from stopfast.data.images import open_images, split_folder
from stopfast.evaluation.evaluate import (
    Probe,
    evaluate_checkpoints,
    print_evaluation,
    save_evaluation,
)
from stopfast.presets import PRESETS
from stopfast.report.canvas import require_matplotlib
from stopfast.report.compose import report
from stopfast.report.results import evaluation_section
from stopfast.train import Stopped, pretrain

_LOOKS = 4
"""Times that the monitors look at a run."""
_PROBES: tuple[Probe, ...] = ("knn", "linear", "logistic")
_LEAD = (
    "Two small vision transformers were trained without labels on the handwritten digits that come with "
    "scikit-learn, with the same images, crops, masks and schedules; only the predictor's queries differ. "
    "Minutes on a CPU show that everything works, and what the pictures of a real run will look like. They "
    "say nothing about which method is better on photographs."
)


def demo(
    output: Path, console: Console, *, device: str = "auto", epochs: int | None = None
) -> Path:
    """Train I-JEPA and StoP on scikit-learn's handwritten digits, evaluate both, and write a report.

    The two runs have the settings of the preset ``demo`` but for what their queries are made of, and take
    the way that any run takes: JPEG files, the loader, :func:`stopfast.train.pretrain`. ``output`` gets
    ``digits/``, ``ijepa/``, ``stop/``, ``evaluation.json`` and ``report.html``. A run that is
    finished there is not trained again, and one that was interrupted goes on.

    Args:
        output: a folder.
        console: where the progress goes.
        device: ``auto``, ``cpu`` or ``cuda``.
        epochs: of each run; default the preset's, of 266 steps.

    Returns:
        The report.

    Raises:
        Stopped: Ctrl-C or SIGTERM; the same call goes on.
        RuntimeError: matplotlib is not installed; nothing is trained then.
        CheckpointError: ``output`` holds a run of other settings, or an altered one.
    """
    require_matplotlib()
    digits = digits_folder(output / "digits")
    configs = demo_configs(output, digits, device=device, epochs=epochs)
    for number, (name, config) in enumerate(configs.items(), start=1):
        console.rule(f"{name}: training {number} of {len(configs)}")
        _train(config, console)
    console.rule("evaluation")
    runs = {name: output / name for name in configs}
    evaluation = evaluate_checkpoints(runs, digits, probes=_PROBES, device=device)
    save_evaluation(evaluation, output / "evaluation.json")
    print_evaluation(evaluation, console)
    console.rule("report")
    page = report(
        list(runs.values()),
        digits,
        output / "report.html",
        title="I-JEPA and StoP on handwritten digits",
        lead=_LEAD,
        sections=[evaluation_section(evaluation)],
    )
    console.print(
        "Curves, tables and pictures of both runs are in one file; open it in a browser:\n"
        f"  {page.resolve().as_uri()}"
    )
    return page


def demo_configs(
    output: Path, digits: Path, *, device: str = "auto", epochs: int | None = None
) -> dict[str, Config]:
    """Return the settings of the two runs by name: only their queries and their folders differ."""
    base = PRESETS["demo"]()
    epochs = base.optim.epochs if epochs is None else epochs
    steps = epochs * (len(open_images(split_folder(digits, "train"))) // base.data.batch_size)
    looks = -(-steps // _LOOKS)
    return {
        variant: replace(
            base,
            data=replace(base.data, root=digits),
            noise=replace(base.noise, variant=variant),
            optim=replace(base.optim, epochs=epochs, warmup=min(1.0, epochs / 2)),
            monitor=replace(base.monitor, every=looks),
            run=replace(base.run, output=output / variant, device=device),
        )
        for variant in ("ijepa", "stop")
    }


def _train(config: Config, console: Console) -> None:
    """Train, or go on."""
    folder = config.run.output
    assert folder is not None
    resume = bool(step_checkpoints(folder))
    try:
        pretrain(replace(config, run=replace(config.run, resume=resume)), console)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {folder}, or choose another --output") from None
    except Stopped:
        console.print("Interrupted. The same command goes on from here.")
        raise
