"""A copy of the source with a mistake in it, and tests run on that copy."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("stopfast", "kernels", "tests", "benchmarks", "pyproject.toml")

Mistake = tuple[str, str, str]
"""A file, a text that is in it once, and what that becomes."""


class Mutant(NamedTuple):
    """A mistake: text of a file, and what it becomes."""

    case: int
    mistake: str
    file: str
    right: str
    wrong: str


def run_on_copy(mistake: Mistake | None, test: Callable[[Path], int]) -> int:
    """Run ``test`` in a fork, inside a copy of the source; return what it returns.

    Raises:
        ValueError: the mistake's text is not in its file exactly once.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for entry in COPIED:
            source = ROOT / entry
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / entry, symlinks=True, ignore=ignored)
            else:
                shutil.copy(source, copy / entry)
        if mistake is not None:
            file, right, wrong = mistake
            text = (copy / file).read_text()
            if text.count(right) != 1:
                raise ValueError(f"{right!r} is not once in {file}")
            (copy / file).write_text(text.replace(right, wrong))
        child = os.fork()
        if child == 0:
            os._exit(_inside(copy, test))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _inside(copy: Path, test: Callable[[Path], int]) -> int:
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    for name in [n for n in sys.modules if n.split(".")[0] in ("stopfast", "tests", "benchmarks")]:
        del sys.modules[name]
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    return test(copy)
