"""What a run tells while it goes, and how it is asked to stop."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Timing(NamedTuple):
    """What a stretch of steps took."""

    images_per_second: float
    waiting: float
    """Share of the time in which the device waited for data."""
    seconds_per_step: float

    def describe(self, steps_left: int) -> str:
        """Say it in words."""
        left = timedelta(seconds=round(steps_left * self.seconds_per_step))
        return (
            f"{self.images_per_second:.0f} images/s, {100 * self.waiting:.0f} % waiting for data, "
            f"{100 * (1 - self.waiting):.0f} % computing, {left} left"
        )


class Meter:
    """Images per second, and which share of the time went into waiting for data.

    The CPU waits for data while the loader is asked for them. A GPU works on while it is asked, so what
    counts there is how long its stream lies idle: from the end of a step's work to the next batch.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.on_gpu = device.type == "cuda"
        self._finished: torch.cuda.Event | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new stretch."""
        self._begin, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._elsewhere = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begin = time.perf_counter()
        yield
        if self.on_gpu:
            if self._finished is not None:
                self._idle.append((self._finished, self._event()))
        else:
            self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: neither waiting for data nor training."""
        begin = time.perf_counter()
        yield
        self._elsewhere += time.perf_counter() - begin
        self._finished = None  # the stream's idle time would have all of this in it

    def count(self) -> None:
        """Count a step as done."""
        self._steps += 1
        if self.on_gpu:
            self._finished = self._event()

    def report(self) -> Timing:
        """Return the stretch since the last report; on a GPU the caller has waited for its last step."""
        passed = time.perf_counter() - self._begin - self._elsewhere
        waited = self._waited
        waited += sum(begin.elapsed_time(end) for begin, end in self._idle) / 1000
        timing = Timing(
            self._steps * self.batch_size / passed, waited / passed, passed / self._steps
        )
        self.reset()
        return timing

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_in_use(device: torch.device) -> str:
    """Return the most memory that the process has held: of the GPU, or of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    # Linux counts in KiB.
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"


def progress_bar(console: Console) -> Progress:
    """Return a bar of the steps with loss and speed, which shows on terminals alone."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class Stopped(Exception):
    """A signal ended a run early, which saved what was done: resuming goes on."""

    def __init__(self, signal: signal.Signals, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.name}; checkpoint: {checkpoint}")
        self.signal, self.checkpoint = signal, checkpoint


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
