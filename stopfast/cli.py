"""The command line: ``stopfast pretrain``, ``stopfast evaluate``, ``stopfast env``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from stopfast import env
from stopfast.config import PRESETS, Config, to_document
from stopfast.evaluate import Which, evaluate_checkpoint, print_evaluation, save_evaluation
from stopfast.train import pretrain

USAGE = """usage: stopfast COMMAND ...

commands:
  pretrain PRESET [--section.field VALUE ...]   train an encoder on a folder of images
  evaluate CHECKPOINT --data DIR                kNN and linear accuracy of a trained encoder
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after one line that says what was wrong with the request."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"pretrain": _pretrain, "evaluate": _evaluate, "env": _env}
    if not arguments or arguments[0] not in commands:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        commands[arguments[0]](arguments[1:])
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"stopfast: {error}", file=sys.stderr)
        return 2
    return 0


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


def _env(arguments: Sequence[str]) -> None:
    if arguments:
        raise ValueError(f"expected no arguments for env, got {list(arguments)}")
    env.main()


if __name__ == "__main__":
    sys.exit(main())
