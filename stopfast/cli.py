"""The command line: ``stopfast pretrain`` and what comes before and after it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from stopfast import env
from stopfast.build import choose_device
from stopfast.config import Config, to_document
from stopfast.demo import demo
from stopfast.evaluation.evaluate import (
    DEFAULT_PROBES,
    Probe,
    evaluate_checkpoints,
    print_evaluation,
    save_evaluation,
)
from stopfast.export import Format, export_run
from stopfast.presets import PRESETS
from stopfast.published_yaml import from_yaml
from stopfast.report import report
from stopfast.step import Precision
from stopfast.train import pretrain
from stopfast.trained import Which
from stopfast.verify import print_rows, read_config, verify

USAGE = """usage: stopfast COMMAND ...

commands:
  demo                                          I-JEPA and StoP on handwritten digits, with a report
  pretrain PRESET [--section.field VALUE ...]   train an encoder on a folder of images
  evaluate CHECKPOINT ... --data DIR            what the features of trained encoders are worth
  report RUN ... [--output FILE]                curves and pictures of runs, in one HTML file
  export CHECKPOINT --format F --output PATH    to timm, Hugging Face, safetensors or a published checkpoint
  verify --config PRESET|PATH                   fused operations against eager ones, on your settings
  env                                           what is installed, what is used, what fell back

`stopfast COMMAND --help` tells more.
"""

PRETRAIN_USAGE = """usage: stopfast pretrain PRESET [--section.field VALUE ...]
       stopfast pretrain --from-yaml FILE [--section.field VALUE ...]

FILE is a configuration of the published I-JEPA or StoP program, unchanged.
`stopfast pretrain PRESET --help` lists every setting, `--dry-run` prints them resolved.

presets:
"""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Train I-JEPA and StoP for some minutes on scikit-learn's handwritten digits, evaluate, report."""

    output: Path = Path("runs") / "demo"
    """Folder for the two runs and the report; what is there already is not made again."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Probe trained encoders, each one's untrained beginning, and raw pixels."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Checkpoint folders, or runs' folders: then their newest checkpoints."""
    data: Path | None = None
    """Folder with train/ and test/ (or val/), each of class folders of images; counting and propagation
    need none."""
    which: Which = "target_encoder"
    """Which of the two trained encoders; the published results are the target encoder's."""
    probes: tuple[Probe, ...] = DEFAULT_PROBES
    device: str = "auto"
    threads: int = 2
    """Threads that decode."""
    save: Path | None = None
    """JSON file to write the result to."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one HTML file about runs: settings, curves, masks, noise, features, retrieval."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    data: Path | None = None
    """Images for the pictures; default: those of the first run."""
    output: Path = Path("report.html")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a trained encoder for another library."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder, or a run's folder: then its newest checkpoint."""
    format: Format
    """``pth`` is the published programs' ``.pth.tar``, with both encoders and the predictor."""
    output: Path
    """New file (safetensors, pth) or folder (timm, hf)."""
    which: Which = "target_encoder"
    """Which of the two encoders; the published results are the target encoder's."""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if a verification fails, 2 after a line on what was wrong, 130 if cut."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {
        "demo": _demo,
        "pretrain": _pretrain,
        "evaluate": _evaluate,
        "report": _report,
        "export": _export,
        "verify": _verify,
        "env": _env,
    }
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        return commands[arguments[0]](arguments[1:]) or 0
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"stopfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopfast: interrupted", file=sys.stderr)
        return 130


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def _demo(arguments: Sequence[str]) -> None:
    asked = tyro.cli(DemoArguments, prog="stopfast demo", args=arguments)
    demo(asked.output, _console(), device=asked.device)


def _pretrain(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PRESETS))
        lines = [f"  {n:<{width}}  {_summary(build)}" for n, build in PRESETS.items()]
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
            f"{2048 // begin.data.batch_size}",
            file=sys.stderr,
        )
    elif first in PRESETS:
        begin = PRESETS[first]()
    else:
        raise ValueError(
            f"expected --from-yaml FILE or one of the presets {', '.join(PRESETS)} first, got {first!r}"
        )
    config = tyro.cli(Config, default=begin, prog=f"stopfast pretrain {first}", args=rest)
    if config.run.dry_run:
        console.print_json(json.dumps(to_document(config)))
        return 0
    pretrain(config, console)
    return 0


def _summary(build: object) -> str:
    lines = (build.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def _evaluate(arguments: Sequence[str]) -> None:
    asked = tyro.cli(EvaluateArguments, prog="stopfast evaluate", args=arguments)
    evaluation = evaluate_checkpoints(
        asked.checkpoints,
        asked.data,
        which=asked.which,
        probes=asked.probes,
        device=asked.device,
        threads=asked.threads,
    )
    print_evaluation(evaluation, _console())
    if asked.save is not None:
        save_evaluation(evaluation, asked.save)


def _report(arguments: Sequence[str]) -> None:
    asked = tyro.cli(ReportArguments, prog="stopfast report", args=arguments)
    _console().print(f"report: {report(asked.runs, asked.data, asked.output)}")


def _export(arguments: Sequence[str]) -> None:
    asked = tyro.cli(ExportArguments, prog="stopfast export", args=arguments)
    path = export_run(asked.checkpoint, asked.output, format=asked.format, which=asked.which)
    _console().print(f"exported: {path}")


def _verify(arguments: Sequence[str]) -> int:
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


def _env(arguments: Sequence[str]) -> None:
    if arguments:
        raise ValueError(f"expected no arguments for env, got {list(arguments)}")
    env.main()


if __name__ == "__main__":
    sys.exit(main())
