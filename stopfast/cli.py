"""The command line: which command is meant, and what its end is to the shell."""

import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """usage: stopfast COMMAND ...

commands:
  demo                                          I-JEPA and StoP on handwritten digits, with a report
  pretrain PRESET [--section.field VALUE ...]   train an encoder on a folder of images
  evaluate CHECKPOINT ... --data DIR            what the features of trained encoders are worth
  finetune CHECKPOINT --data DIR --recipe NAME  a classifier from a trained encoder, end to end
  report RUN ... [--output FILE]                curves and pictures of runs, in one HTML file
  export CHECKPOINT --format F --output PATH    to timm, Hugging Face, safetensors or a published checkpoint
  verify --config PRESET|PATH                   fused operations against eager ones, on your settings
  env                                           what is installed, what is used, what fell back

`stopfast COMMAND --help` tells more.
"""

COMMANDS = ("demo", "pretrain", "evaluate", "finetune", "report", "export", "verify", "env")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the status for the shell.

    0; 1 where a verification fails; 2 after a line on what was wrong; 128 and the signal's number where
    Ctrl-C or SIGTERM stopped it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        # What the commands need takes seconds to import, so only what is needed is.
        commands = import_module("stopfast.commands")
        return getattr(commands, f"run_{arguments[0]}")(arguments[1:]) or 0
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"stopfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopfast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
