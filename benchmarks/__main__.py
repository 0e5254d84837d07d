"""Measurements, their tables and plots: `python -m benchmarks KIND [--option VALUE ...]`."""

import sys
from collections.abc import Sequence
from importlib import import_module

import tyro

KINDS = {
    "ops": ("bench_ops", "each operation against eager, torch.compile and libraries"),
    "masks": ("bench_masks", "drawing the masks of a batch"),
    "predictor": ("bench_predictor", "the predictor, forward and backward"),
    "step": ("bench_step", "the whole training step, against the published and assembled programs"),
    "curves": ("curves", "losses of the published program and of stopfast, step by step"),
    "loader": ("bench_loader", "images a second of data loaders"),
    "train": ("bench_train", "training with the loader: waiting and computing"),
    "quality": ("quality.command", "accuracies of the objectives' features, over seeds"),
    "ceilings": ("bench_ceilings", "the device's matrix rate and memory bandwidth"),
    "roofline": ("roof.roofline", "what a step has to compute and to move, and its floor"),
    "tune": ("tuning.search", "search of the kernels' configurations on the device at hand"),
    "report": ("report.report", "tables and plots from the results; --write, --check"),
    "gpu": ("gpu", "all of it, most valuable first, within a time limit; goes on where it stopped"),
}
"""Kinds of measurement: module with ``OPTIONS``, a dataclass, and perhaps ``run(options)``; what it is."""


def usage() -> str:
    """Return what can be measured."""
    lines = (f"  {kind:10} {text}" for kind, (_, text) in KINDS.items())
    return "\n".join(
        [str(__doc__), *lines, "\n`python -m benchmarks KIND --help` lists its options."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one kind; the exit status. Only that kind's code is imported."""
    kind, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if kind in ("-h", "--help"):
        print(usage())
        return 0
    if kind not in KINDS:
        print(f"expected one of {list(KINDS)}, got {kind!r}", file=sys.stderr)
        return 2
    name, about = KINDS[kind]
    module = import_module(f"benchmarks.{name}")
    try:
        options = tyro.cli(
            module.OPTIONS, args=rest, prog=f"python -m benchmarks {kind}", description=about
        )
        if hasattr(module, "run"):
            return module.run(options)
        from benchmarks.engine.runner import run

        return run(f"{name}.py", options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
