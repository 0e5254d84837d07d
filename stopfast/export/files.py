"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_new(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ValueError: ``output`` exists.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"expected a new path to export to, got {output}, which exists")


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """Give a path beside ``output`` to write a file or folder at, which then becomes ``output`` whole.

    Whatever goes wrong inside leaves no ``output``.

    Raises:
        ValueError: ``output`` exists.
    """
    require_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    _remove(unfinished)  # what an earlier, killed export left
    try:
        yield unfinished
        require_new(output)
        os.replace(unfinished, output)
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
