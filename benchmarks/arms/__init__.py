"""The arms of the step benchmarks, by name."""

from collections.abc import Callable

from benchmarks.arms.protocol import NotHere, StepArm
from benchmarks.workload import Workload

__all__ = ["ARMS", "NotHere", "StepArm"]

ARMS: dict[str, Callable[[Workload], StepArm]] = {}
"""What builds each arm; it raises :class:`NotHere` where the arm cannot run."""
