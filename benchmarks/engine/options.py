"""What every kind of benchmark can be told, and the measurements that follow from it."""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from stopfast.build import choose_device

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every kind of benchmark can be told; a kind adds its own."""

    device: Device = "auto"
    model: tuple[str, ...] = ()
    """Models or operations; a kind has its own default."""
    images: tuple[int, ...] = ()
    """Images of a batch; a kind has its own default."""
    arm: tuple[str, ...] = ()
    """Arms to time, by name or pattern (``stopfast*``); all when left out."""
    precision: Precision | None = None
    """By default bf16 on a GPU and fp32 on a CPU."""
    rounds: int | None = None
    """Measured rounds of an arm; a kind has its own default."""
    warmup: int | None = None
    """Rounds before those that are kept."""
    sweeps: int = 1
    """Go so many times through the arms of a group: a slow minute of the machine meets all of them."""
    threads: int | None = None
    """Threads of torch; its own default when left out."""
    seconds: float | None = None
    """Begin no arm after so many seconds."""
    results: Path | None = None
    """Results file (``.json``), or the folder for one by device, date and commit; default
    ``benchmarks/results``."""
    commit: str | None = None
    """Commit of the code where there is no repository to ask."""
    again: bool = False
    """Time again what the results file has."""

    def __post_init__(self) -> None:
        for name in ("rounds", "sweeps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} > 0, got {value}")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"expected warmup >= 0, got {self.warmup}")

    @property
    def place(self) -> torch.device:
        """Where arms run.

        Raises:
            ValueError: CUDA is asked for and not there.
        """
        return choose_device(self.device)

    @property
    def dtype(self) -> Precision:
        """Precision asked for, or the device's."""
        return self.precision or ("bf16" if self.place.type == "cuda" else "fp32")


@dataclass(frozen=True)
class Cell:
    """One measurement: an arm on a problem."""

    kind: str
    """It is measured by the function ``test_<kind>``."""
    arm: str
    problem: dict[str, str | int]
    """What the arms that are compared have in common, e.g. model, images, precision."""
    sweep: int = 0

    @property
    def group(self) -> str:
        """Name of the comparison."""
        return " ".join([self.kind, *(str(value) for value in self.problem.values())])

    @property
    def key(self) -> str:
        """Name of the measurement."""
        return " | ".join([self.group, self.arm, str(self.sweep)])


def chosen(cells: Iterable[Cell], options: Options) -> Iterator[Cell]:
    """The arms that are asked for, in groups; each group's arms once per sweep."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if not options.arm or any(fnmatch.fnmatchcase(cell.arm, asked) for asked in options.arm):
            groups.setdefault(cell.group, []).append(cell)
    for members in groups.values():
        for sweep in range(options.sweeps):
            yield from (replace(cell, sweep=sweep) for cell in members)
