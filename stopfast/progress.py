"""What a run tells while it goes, and how it is asked to stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Meter:
    """Images per second, and which share of the time went into waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._begin, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def count(self) -> None:
        """Count a step as done."""
        self._steps += 1

    def report(self, steps_left: int) -> str:
        """Describe the steps since the last report."""
        passed = time.perf_counter() - self._begin
        left = steps_left * passed / self._steps
        text = (
            f"{self._steps * self.batch_size / passed:.0f} images/s, "
            f"{100 * self._waited / passed:.0f} % waiting for data, {left:.0f} s left"
        )
        self._reset()
        return text


class StopRequest:
    """Whether SIGINT or SIGTERM asked the run to stop."""

    received: signal.Signals | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn the first SIGINT (Ctrl-C) or SIGTERM into a request, so that a step is never cut in two.

    A second signal acts as it did before.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        request.received = signal.Signals(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
