"""A run's folder, which one process at a time writes to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the run's folder; one that was made for nothing is taken away again.

    Raises:
        ValueError: another process trains there.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / ".lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"expected a folder of this run's own, got {output}, where another process trains"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        if not any(output.iterdir()):
            output.rmdir()
