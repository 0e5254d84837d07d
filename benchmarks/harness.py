"""Timing of several arms against each other, and where such a timing came from.

The arms of a comparison run interleaved (A B C, A B C, ...) in one process, so that a machine that
slows down or speeds up does so for all of them.
"""

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one arm: every sample, in the order in which they were taken."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        return self._quantile(0.9)

    def _quantile(self, fraction: float) -> float:
        return torch.tensor(self.samples, dtype=torch.float64).quantile(fraction).item()

    def as_dict(self) -> dict[str, object]:
        values = {"median": self.median, "p10": self.p10, "p90": self.p90}
        return {**values, "samples": self.samples, "unit": "ms"}


def compare(
    arms: dict[str, Callable[[], object]], rounds: int, warmup: int, device: str = "cpu"
) -> dict[str, Timing]:
    """Time every arm once per round, after `warmup` rounds that are not kept.

    Host clock on the CPU. On a GPU, CUDA events around the arm and a synchronisation after it: the
    time from its first kernel's turn to its last kernel's end, so a late launch counts.
    """
    clock = _on_gpu if torch.device(device).type == "cuda" else _on_host
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warmup + rounds):
        for name, arm in arms.items():
            elapsed = clock(arm)
            if index >= warmup:
                samples[name].append(elapsed)
    return {name: Timing(taken) for name, taken in samples.items()}


def _on_host(arm: Callable[[], object]) -> float:
    start = time.perf_counter()
    arm()
    return (time.perf_counter() - start) * 1e3


def _on_gpu(arm: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    arm()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(arm: Callable[[], object], device: torch.device) -> int | None:
    """What the arm allocates at most beyond its inputs; not known on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(value: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """|value - expected| / |expected| in double precision; an absent gradient counts as zero."""
    if value is None or expected is None:
        present = value if expected is None else expected
        return 0.0 if present is None or not present.any() else float("inf")
    expected = expected.detach().double()
    difference = (value.detach().double() - expected).norm().item()
    return difference / expected.norm().item() if difference else 0.0


def provenance() -> dict[str, object]:
    """What a number depends on besides the code: versions, processor, threads, GPU."""
    return {
        "commit": _output("git", "rev-parse", "HEAD") or "unknown",
        "dirty": bool(_output("git", "status", "--porcelain")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy")},
        "cpu": _cpu_model(),
        "cpu_cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        **_gpu(),
    }


def _output(*command: str) -> str:
    """First words of a program, or nothing where it is absent or fails."""
    try:
        ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ran.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.partition("\n")[0] or None,
        "cuda": torch.version.cuda,
    }


def write_results(name: str, payload: dict[str, object], device: str = "cpu") -> Path:
    """Write `results/<device>/<date>-<commit>-<name>.json`; the payload and its provenance."""
    origin = provenance()
    kind = "cpu"
    if torch.device(device).type == "cuda":
        kind = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    commit = str(origin["commit"])[:7] + ("-dirty" if origin["dirty"] else "")
    path = HERE / "results" / kind / f"{str(origin['date'])[:10]}-{commit}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": origin, **payload}, indent=1) + "\n")
    return path


def print_table(title: str, timings: dict[str, Timing], relative_to: str | Sequence[str]) -> None:
    """Medians and spread; a ratio says how many times faster a row is than the named arm."""
    references = [relative_to] if isinstance(relative_to, str) else list(relative_to)
    table = Table(title=title)
    table.add_column("arm")
    for heading in ("median ms", "p10", "p90", *(f"x vs {name}" for name in references)):
        table.add_column(heading, justify="right")
    for name, timing in timings.items():
        ratios = (timings[reference].median / timing.median for reference in references)
        figures = (timing.median, timing.p10, timing.p90)
        table.add_row(name, *(f"{f:.3f}" for f in figures), *(f"{r:.2f}" for r in ratios))
    Console().print(table)
