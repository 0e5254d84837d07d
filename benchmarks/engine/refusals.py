"""Why an arm is not timed."""


class NotTimed(Exception):
    """An arm that was not timed; the message says why, and becomes a row of the results."""

    outcome = "failed"
    passes = False
    """Whether the benchmark's exit status stays 0."""


class NotHere(NotTimed):
    """An arm cannot run on this machine: a library or a device is missing."""

    outcome = "not here"
    passes = True


class OutOfMemory(NotTimed):
    """An arm needs more memory than the device has."""

    outcome = "out of memory"
    passes = True


class Disagreement(NotTimed):
    """An arm computes other numbers than the reference."""

    outcome = "disagrees"
