"""Which of several calls is fastest: timed in turn, until the difference is clear or the time is over."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Run = Callable[[], object]
Clock = Callable[[], float]

_FIRST = 7  # rounds before anybody may be out
_LOSSES = 0.9  # share of rounds that who is out must have lost against the leader


@dataclass(frozen=True)
class Race:
    """Seconds of each call, in the order in which they were taken; of who was out, fewer."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    winner: str | None = None
    """The fastest; None where nobody ran."""
    clear: bool = False
    """Whether all others are slower beyond doubt."""

    def median(self, name: str) -> float:
        """Median seconds of a call."""
        return statistics.median(self.samples[name])


def race(
    runs: Mapping[str, Run],
    clock: Clock,
    *,
    incumbent: str | None = None,
    rounds: int = 40,
    until: float = float("inf"),
    gain: float = 0.01,
) -> Race:
    """Time calls in turn, a round after another, and leave out who has clearly lost.

    Who is out lost at least 90 % of its rounds, no fewer than seven, against the one with the lowest
    median, and its own median is higher by ``gain``. What is left at the end differs by less than that, or
    was not told apart in time: the incumbent stays if it is among them.

    Args:
        runs: what is timed, by name; each has been called before.
        clock: seconds; reading it waits for the device.
        incumbent: who wins unless another is clearly faster.
        rounds: at most.
        until: reading of the clock after which no round begins.
        gain: difference that is worth a change, as a share of the time.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    left = list(runs)
    for number in range(rounds):
        if not left or (number and clock() > until):
            break
        for name in left:
            begin = clock()
            runs[name]()
            samples[name].append(clock() - begin)
        if number + 1 >= _FIRST:
            left = _still_in(samples, left, gain)
        if len(left) == 1 and number + 1 >= _FIRST:
            break
    if not left or not samples[left[0]]:
        return Race(samples)
    fastest = min(left, key=lambda name: statistics.median(samples[name]))
    return Race(samples, incumbent if incumbent in left else fastest, len(left) == 1)


def _still_in(samples: Mapping[str, list[float]], left: list[str], gain: float) -> list[str]:
    medians = {name: statistics.median(samples[name]) for name in left}
    leader = min(left, key=lambda name: medians[name])

    def lost(name: str) -> bool:
        pairs = zip(samples[name], samples[leader], strict=True)
        slower = sum(mine > its for mine, its in pairs)
        far = medians[name] > (1 + gain) * medians[leader]
        return far and slower >= _LOSSES * len(samples[leader])

    return [name for name in left if name == leader or not lost(name)]
