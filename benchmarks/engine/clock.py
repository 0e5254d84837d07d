"""Clocks: CUDA events on a GPU, the host's clock elsewhere."""

import time
from collections.abc import Callable

import torch


def round_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds for pytest-benchmark: it waits for the device before it is read."""
    return EventClock(device).seconds if device.type == "cuda" else time.perf_counter


class EventClock:
    """Seconds between CUDA events on the current stream; a reading waits for its event.

    Events tell single-precision milliseconds, which after minutes no longer tell a microsecond. So each
    reading is a distance from the last one, and the sum is a double.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Event | None = None
        self._passed = 0.0

    def seconds(self) -> float:
        """Wait for the device; the time since the first reading."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()
        if self._last is not None:
            self._passed += self._last.elapsed_time(event) * 1e-3
        self._last = event
        return self._passed


class StepClock:
    """Times of single steps, from marks between them that do not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[torch.cuda.Event | float] = []
        self._starts: list[int] = []

    def start(self) -> None:
        """Mark the start of some steps in a row; what lies before it is nobody's time."""
        self._starts.append(len(self._marks))
        self.mark()

    def mark(self) -> None:
        """Mark the end of a step."""
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._marks.append(event)

    def milliseconds(self) -> list[float]:
        """Wait for the device and return each step's time, in the order in which they were taken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        starts = set(self._starts)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [
            _between(first, second)
            for index, (first, second) in enumerate(pairs, start=1)
            if index not in starts
        ]


def _between(first: "torch.cuda.Event | float", second: "torch.cuda.Event | float") -> float:
    if isinstance(first, float) and isinstance(second, float):
        return (second - first) * 1e3
    assert isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event)
    return first.elapsed_time(second)
