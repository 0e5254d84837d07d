"""The arms of the step benchmarks, by name."""

from collections.abc import Callable

from benchmarks.arms.program import Program
from benchmarks.arms.protocol import StepArm
from benchmarks.arms.published import Published
from benchmarks.refusals import NotHere
from benchmarks.workload import Workload

__all__ = ["ARMS", "NotHere", "StepArm"]

ARMS: dict[str, Callable[[Workload], StepArm]] = {
    "published": Published,
    "published without needless costs": Program,
}
"""What builds each arm; it raises :class:`NotHere` where the arm cannot run."""
