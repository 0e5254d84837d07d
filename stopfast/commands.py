"""The commands of the command line, each with its arguments; ``stopfast.cli`` calls them."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from stopfast import env
from stopfast.build import choose_device, fastest
from stopfast.config import Config, to_document
from stopfast.demo import demo
from stopfast.evaluation.evaluate import (
    DEFAULT_PROBES,
    EvaluationSettings,
    Probe,
    evaluate_checkpoints,
    load_evaluation,
    print_evaluation,
    save_evaluation,
)
from stopfast.export import Format, export_run
from stopfast.finetuning import finetune, finetune_settings
from stopfast.presets import PRESETS
from stopfast.published_yaml import from_yaml
from stopfast.report import report
from stopfast.report.results import evaluation_section
from stopfast.step import Precision
from stopfast.train import Stopped, pretrain
from stopfast.trained import Which
from stopfast.verify import print_rows, read_config, verify

PRETRAIN_USAGE = """usage: stopfast pretrain PRESET [--section.field VALUE ...]
       stopfast pretrain --from-yaml FILE [--section.field VALUE ...]

FILE is a configuration of the published I-JEPA or StoP program, unchanged.
`stopfast pretrain PRESET --help` lists every setting, `--dry-run` prints them resolved.

presets; NAME-corrected mends the quirks of a published one, where it has any, and NAME-demo is NAME-cifar10
on handwritten digits, without data of your own:
"""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Train I-JEPA and StoP for some minutes on scikit-learn's handwritten digits, evaluate, report."""

    output: Path = Path("runs") / "demo"
    """Folder for the two runs and the report; a run that is finished there is not trained again."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Probe trained encoders, each one's untrained beginning, and raw pixels.

    With ``--extraction.cache`` an evaluation that was interrupted goes on.
    """

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Checkpoint folders, or runs' folders: then their newest checkpoints."""
    data: Path | None = None
    """Folder with train/ and val/ or test/, each of class folders of images; counting and propagation need
    none."""
    which: Which = "target_encoder"
    """Which of the two trained encoders; the published results are the target encoder's."""
    probes: tuple[Probe, ...] = DEFAULT_PROBES
    device: str = "auto"
    save: Path | None = None
    """JSON file to write the result to."""
    settings: Annotated[EvaluationSettings, tyro.conf.arg(name="")] = field(
        default_factory=EvaluationSettings
    )


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one HTML file about runs of any objectives: curves, what is seen and predicted, features."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    data: Path | None = None
    """Images for the pictures; default: those of the first run."""
    evaluation: Path | None = None
    """What `stopfast evaluate --save` wrote, to show as well."""
    output: Path = Path("report.html")
    """One that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a trained encoder for another library."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder, or a run's folder: then its newest checkpoint."""
    format: Format
    """``pth`` is the file of the published program of the run's objective, with all its networks."""
    output: Path
    """New file (safetensors, pth) or folder (timm, hf)."""
    which: Which = "target_encoder"
    """Which of the two encoders; the published results are the target encoder's. Objectives without a
    teacher have one encoder."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Compare the fused operations with the eager ones: forward, every gradient, updates, losses."""

    config: str
    """A preset, a JSON file of settings, a published YAML file, or the folder of a run or checkpoint."""
    checkpoint: Path | None = None
    """Folder of a run or checkpoint whose weights to begin with."""
    steps: int = 10
    """Length of the stretch of training whose losses are laid over each other."""
    images: int | None = None
    """Random images of a step; default: the settings' batch."""
    precision: Precision | None = None
    """Precision of the steps; default: the settings'."""
    device: str = "auto"


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def run_demo(arguments: Sequence[str]) -> int:
    """Train, evaluate and report on the digits."""
    asked = tyro.cli(DemoArguments, prog="stopfast demo", args=arguments)
    return _or_stopped(lambda: demo(asked.output, _console(), device=asked.device))


def run_pretrain(arguments: Sequence[str]) -> int:
    """Train by a preset or a published YAML file."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = [n for n in PRESETS if not n.endswith(("-corrected", "-demo"))]
        width = max(map(len, names))
        lines = [f"  {n:<{width}}  {_summary(PRESETS[n])}" for n in names]
        text = PRETRAIN_USAGE + "\n".join(lines)
        print(text, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    console = _console()
    first, *rest = arguments
    if first.partition("=")[0] == "--from-yaml":
        file = first.partition("=")[2] or (rest.pop(0) if rest else "")
        if not Path(file).is_file():
            raise ValueError(f"expected a file after --from-yaml, got {file!r}, which is none")
        begin = from_yaml(Path(file))
        print(
            f"{file}: batch_size {begin.data.batch_size} is of one process, and the file does not say "
            "how many there were; for 2,048 images a step, --data.batch-size 2048 --step.accumulate "
            f"{2048 // begin.data.batch_size}. Its folder is --run.output {begin.run.output}, its "
            f"precision --step.precision {begin.step.precision}",
            file=sys.stderr,
        )
    elif first in PRESETS:
        begin = PRESETS[first]()
    else:
        near = get_close_matches(first, PRESETS, n=1)
        meant = f"; is it {near[0]!r}?" if near else ""
        raise ValueError(
            "expected --from-yaml FILE or a preset first, which `stopfast pretrain --help` lists, "
            f"got {first!r}{meant}"
        )
    config = tyro.cli(Config, default=begin, prog=f"stopfast pretrain {first}", args=rest)
    if config.step.fast:
        # It changes what the flags begin from, so that each switch can still be set on its own.
        step = replace(begin.step, precision=config.step.precision)
        begin = fastest(replace(begin, step=step), choose_device(config.run.device))
        config = tyro.cli(Config, default=begin, prog=f"stopfast pretrain {first}", args=rest)
    if config.run.dry_run:
        console.print_json(json.dumps(to_document(config)))
        return 0
    return _or_stopped(lambda: pretrain(config, console))


def _or_stopped(work: Callable[[], object]) -> int:
    """Return 0, or the shell's status of the signal that stopped the work."""
    try:
        work()
    except Stopped as stop:
        return 128 + stop.signal
    return 0


def _summary(build: object) -> str:
    lines = (build.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def run_finetune(arguments: Sequence[str]) -> int:
    """Train a classifier from a checkpoint's encoder, end to end."""
    settings = finetune_settings(arguments)
    return _or_stopped(lambda: finetune(settings, _console()))


def run_evaluate(arguments: Sequence[str]) -> None:
    """Print, and save, what features are worth."""
    asked = tyro.cli(EvaluateArguments, prog="stopfast evaluate", args=arguments)
    evaluation = evaluate_checkpoints(
        asked.checkpoints,
        asked.data,
        which=asked.which,
        probes=asked.probes,
        device=asked.device,
        settings=asked.settings,
        console=_console(),
    )
    print_evaluation(evaluation, _console())
    if asked.save is not None:
        save_evaluation(evaluation, asked.save)


def run_report(arguments: Sequence[str]) -> None:
    """Write the page about runs."""
    asked = tyro.cli(ReportArguments, prog="stopfast report", args=arguments)
    sections = []
    if asked.evaluation is not None:
        sections = [evaluation_section(load_evaluation(asked.evaluation))]
    page = report(asked.runs, asked.data, asked.output, sections=sections)
    _console().print(f"report: {page}")


def run_export(arguments: Sequence[str]) -> None:
    """Write an encoder for another library."""
    asked = tyro.cli(ExportArguments, prog="stopfast export", args=arguments)
    path = export_run(asked.checkpoint, asked.output, format=asked.format, which=asked.which)
    _console().print(f"exported: {path}")


def run_verify(arguments: Sequence[str]) -> int:
    """Compare fused with eager; return 1 where they disagree."""
    asked = tyro.cli(VerifyArguments, prog="stopfast verify", args=arguments)
    config = read_config(asked.config)
    if asked.precision is not None:
        config = replace(config, step=replace(config.step, precision=asked.precision))
    rows = verify(
        config,
        checkpoint=asked.checkpoint,
        steps=asked.steps,
        images=asked.images,
        device=choose_device(asked.device),
    )
    print_rows(rows, _console())
    return int(not all(row.passed for row in rows))


def run_env(arguments: Sequence[str]) -> None:
    """Print what is installed and used."""
    if arguments:
        raise ValueError(f"expected no arguments for env, got {list(arguments)}")
    env.main()
