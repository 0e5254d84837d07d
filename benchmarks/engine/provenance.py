"""Where a measurement came from: code, versions, processor, GPU and its clocks, seeds."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest-benchmark",
    "nvidia-dali-cuda130",
    "xformers",
    "apex",
)
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
_COMMIT = r"[0-9a-f]{7,40}"


def provenance(commit: str | None = None, seed: int = 0) -> dict[str, object]:
    """Return what a number depends on besides the arm, as JSON.

    ``commit`` is told where there is no repository to ask; whether files differ from it is then unknown
    (None). Results are no change of the code.

    Raises:
        ValueError: something that is no commit.
    """
    if commit is not None and not re.fullmatch(_COMMIT, commit):
        raise ValueError(f"expected commit as 7 to 40 hexadecimal digits, got {commit!r}")
    found = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--", "..", ":!results")
    return {
        "commit": found or commit or "unknown",
        "dirty": bool(changed) if found else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        **_gpu(),
    }


def machine_info() -> dict[str, object]:
    """Return the machine as pytest-benchmark's files have it.

    Its own description has the node's name, and takes a process and a second.
    """
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "release": platform.release(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": _cpu_model(), "count": os.cpu_count()},
    }


def device_folder(device: torch.device) -> str:
    """Return the name of a device's folder of results: ``cpu``, or the GPU's name in small letters."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def clocks() -> dict[str, float]:
    """Return the GPU's clocks in MHz, power in W and temperature in degrees, as found now."""
    if not torch.cuda.is_available():
        return {}
    index = str(torch.cuda.current_device())
    line = output(
        "nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader,nounits", "-i", index
    )
    pairs = zip(_CLOCKS.split(","), line.split(","), strict=False)
    return {name: float(text) for name, text in pairs if re.fullmatch(r"\s*[\d.]+\s*", text)}


def output(*command: str) -> str:
    """Return what a program prints, or nothing where it is absent or fails."""
    try:
        ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ran.stdout.strip()


def version(package: str) -> str | None:
    """Return an installed package's version, or None."""
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
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.partition("\n")[0] or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "clocks": clocks(),
    }
