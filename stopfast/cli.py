"""The command line: ``stopfast pretrain``, ``evaluate``, ``verify``, ``env``."""

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
from stopfast.evaluate import Which, evaluate_checkpoint, print_evaluation, save_evaluation
from stopfast.presets import PRESETS
from stopfast.step import Precision
from stopfast.train import pretrain
from stopfast.verify import print_rows, read_config, verify

USAGE = """usage: stopfast COMMAND ...

commands:
  pretrain PRESET [--section.field VALUE ...]   train an encoder on a folder of images
  evaluate CHECKPOINT --data DIR                kNN and linear accuracy of a trained encoder
  verify --config PRESET|PATH                   fused operations against eager ones, on your settings
  env                                           what is installed, what is used, what fell back

`stopfast COMMAND --help` tells more.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Classify images from the features of a trained encoder, an untrained one, and raw pixels."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder, or a run's folder: then its newest checkpoint."""
    data: Path
    """Folder with train/ and test/ (or val/), each of class folders of JPEG files."""
    which: Which = "target_encoder"
    """Which of the two trained encoders; the published results are the target encoder's."""
    device: str = "auto"
    threads: int = 2
    """Threads that decode."""
    save: Path | None = None
    """JSON file to write the result to."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Compare the fused operations with the eager ones: forward, every gradient, updates, losses."""

    config: str
    """A preset, a JSON file of settings, or the folder of a run or checkpoint."""
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
    """Run a command; return 0, 1 where a verification fails, 2 after a line on what was wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"pretrain": _pretrain, "evaluate": _evaluate, "verify": _verify, "env": _env}
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        return commands[arguments[0]](arguments[1:]) or 0
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"stopfast: {error}", file=sys.stderr)
        return 2


def _pretrain(arguments: Sequence[str]) -> None:
    presets = {name: ((build.__doc__ or "").strip(), build()) for name, build in PRESETS.items()}
    config: Config = tyro.extras.overridable_config_cli(
        presets, prog="stopfast pretrain", args=arguments
    )
    console = Console(soft_wrap=True, highlight=False)
    if config.run.dry_run:
        console.print_json(json.dumps(to_document(config)))
        return
    pretrain(config, console)


def _evaluate(arguments: Sequence[str]) -> None:
    asked = tyro.cli(EvaluateArguments, prog="stopfast evaluate", args=arguments)
    evaluation = evaluate_checkpoint(
        asked.checkpoint,
        asked.data,
        which=asked.which,
        device=asked.device,
        threads=asked.threads,
    )
    print_evaluation(evaluation, Console(soft_wrap=True, highlight=False))
    if asked.save is not None:
        save_evaluation(evaluation, asked.save)


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
    print_rows(rows, Console(soft_wrap=True, highlight=False))
    return int(not all(row.passed for row in rows))


def _env(arguments: Sequence[str]) -> None:
    if arguments:
        raise ValueError(f"expected no arguments for env, got {list(arguments)}")
    env.main()


if __name__ == "__main__":
    sys.exit(main())
