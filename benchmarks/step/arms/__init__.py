"""The arms of the step benchmarks, by name."""

from collections.abc import Callable
from functools import partial

from benchmarks.engine.refusals import NotHere
from benchmarks.step.arms.assembled import Bucketed, Compiled
from benchmarks.step.arms.captured import captured_arm
from benchmarks.step.arms.libraries import Apex, xformers_arm
from benchmarks.step.arms.ours import WITH, WITHOUT, stopfast
from benchmarks.step.arms.program import Program
from benchmarks.step.arms.protocol import StepArm
from benchmarks.step.arms.published import Published
from benchmarks.step.workload import Workload

__all__ = ["ARMS", "OURS", "PUBLISHED", "NotHere", "StepArm"]

PUBLISHED, OURS = "published", "stopfast"
ARMS: dict[str, Callable[[Workload], StepArm]] = {
    PUBLISHED: Published,
    OURS: stopfast,
    "compile + SDPA, whole step captured": captured_arm,
    "compile + SDPA, buckets, reduce-overhead": Bucketed,
    "compile + SDPA": Compiled,
    "published without needless costs": Program,
    "compile + xformers": xformers_arm,
    "apex": Apex,
    **{f"{OURS} without {name}": partial(stopfast, change=c) for name, c in WITHOUT.items()},
    **{f"{OURS} with {name}": partial(stopfast, change=c) for name, c in WITH.items()},
}
"""What builds each arm, the most telling first; it raises :class:`NotHere` where the arm cannot run."""
