"""What is installed, what is used of it, what fell back and why: ``python -m stopfast.env``.

A library's name proves little: PyPI's ``apex`` is a web toolkit, and a wheel built for another CUDA
installs without complaint. So each one is judged by the symbol that would be called.
"""

import json
import platform
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Literal

from stopfast import __version__

_DALI_MAJOR = {"nvidia-dali-cuda130": 13, "nvidia-dali-cuda120": 12}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    version: str | None
    status: Literal["used", "available", "not used", "missing"]
    note: str


def has_symbol(module: str, symbol: str) -> bool:
    """Whether ``module`` imports and holds ``symbol``, whatever its import raises or prints."""
    loaded, _ = _load(module)
    return loaded is not None and hasattr(loaded, symbol)


def dali_problem() -> str | None:
    """None when DALI can decode images here, else the one line that says what to install."""
    finding = dali(_torch_cuda())
    return None if finding.status == "used" else f"{finding.name}: {finding.note}"


def python() -> Finding:
    """The interpreter and its platform."""
    return Finding("python", platform.python_version(), "used", platform.platform())


def stopfast() -> Finding:
    """This library."""
    return Finding("stopfast", __version__, "used", "")


def operations() -> Finding:
    """Which implementation ``ops='auto'`` is."""
    note = (
        "ops='auto' is EAGER on the CPU; on a GPU predictor_tokens and target_smooth_l1 are fused, "
        "the rest by measurement"
    )
    loaded, _ = _load("torch")
    try:
        gpu = loaded.cuda.get_device_name(0) if loaded and loaded.cuda.is_available() else None
    except Exception:  # the line on torch says what is wrong with the GPU
        gpu = None
    if gpu is not None:
        table = json.loads((Path(__file__).parent / "kernels" / "measured.json").read_text())
        note += f"; {gpu} is {'measured' if gpu in table else 'unmeasured'}"
    return Finding("operations", None, "used", note)


def torch() -> Finding:
    """PyTorch, the CUDA it was built for and the device it finds."""
    if _spec("torch") is None:
        return Finding("torch", None, "missing", "stopfast needs it: pip install 'torch>=2.10'")
    loaded, failure = _load("torch")
    if loaded is None or not hasattr(loaded, "version"):
        return Finding("torch", _version("torch"), "not used", failure or "not PyTorch")
    if loaded.version.cuda:
        build = f"built for CUDA {loaded.version.cuda}"
    elif getattr(loaded.version, "hip", None):
        build = f"built for ROCm {loaded.version.hip}"
    else:
        build = "built for the CPU only"
    return Finding("torch", str(loaded.__version__), "used", f"{build}; {_devices(loaded)}")


def triton() -> Finding:
    """Triton, by its compiler's decorator."""
    absent, use = "comes with PyTorch's CUDA builds", "compiles the fused operations"
    return _by_symbol("triton", "triton", "triton", "jit", absent, use)


def dali(torch_cuda: str | None) -> Finding:
    """NVIDIA DALI, whose CUDA must be that of PyTorch, given as ``torch.version.cuda``."""
    name = "nvidia-dali"
    installed = {dist: version for dist in _DALI_MAJOR if (version := _version(dist)) is not None}
    ours = _major(torch_cuda)
    wanted = ours if ours in _DALI_MAJOR.values() else 13
    install = f"pip install 'stopfast[dali-cuda{wanted}]'"
    if not installed:
        return Finding(name, None, "missing", f"image files are decoded with it: {install}")
    if len(installed) > 1:
        both = " ".join(installed)
        note = f"two builds overwrite each other: pip uninstall {both}, then {install}"
        return Finding(name, None, "not used", note)
    [(dist, version)] = installed.items()
    if ours is not None and ours != _DALI_MAJOR[dist]:
        built = f"{dist} is for CUDA {_DALI_MAJOR[dist]}, torch for CUDA {ours}"
        fix = (
            f"pip uninstall {dist}, then {install}"
            if ours == wanted
            else f"no DALI for CUDA {ours} is supported: install torch for CUDA {wanted}"
        )
        return Finding(name, version, "not used", f"{built}: {fix}")
    loaded, failure = _load("nvidia.dali")
    if loaded is None or not hasattr(loaded, "pipeline_def"):
        reason = failure or "nvidia.dali has no pipeline_def"
        return Finding(name, version, "not used", f"{reason}; reinstall it: {install}")
    return Finding(name, version, "used", f"decodes images (built for CUDA {_DALI_MAJOR[dist]})")


def xformers(torch_cuda: str | None) -> Finding:
    """Xformers; its record of its build is read before its binary, whose failed load is noisy."""
    name, version = "xformers", _version("xformers")
    spec = _spec("xformers")
    if spec is None:
        return Finding(name, None, "missing", "optional")
    built = _xformers_build(spec)
    if built is None:
        note = "no readable record of its build (cpp_lib.json), so no compiled attention"
        return Finding(name, version, "not used", note)
    ours, (theirs, against) = _major(torch_cuda), built
    if ours is None or theirs != ours:
        here = "torch is not built for CUDA" if ours is None else f"torch is for CUDA {ours}"
        its = "not built for CUDA" if theirs is None else f"built for CUDA {theirs}"
        return Finding(name, version, "not used", f"{its} (torch {against}), {here}")
    use = "--step.attention xformers"
    finding = _by_symbol(name, name, "xformers.ops", "memory_efficient_attention", "optional", use)
    library, _ = _load("xformers._cpp_lib")
    # Its Python half imports, attention included, even where its binary did not load.
    if finding.status == "available" and getattr(library, "_cpp_library_load_exception", None):
        return Finding(name, version, "not used", f"its binary (torch {against}) does not load")
    return finding


def apex() -> Finding:
    """NVIDIA's apex, by its fused optimizer or normalization; PyPI's has neither."""
    name, version = "apex", _version("apex")
    source = "NVIDIA's has no PyPI package: build it from its repository"
    spec = _spec("apex")
    if spec is None:
        return Finding(name, None, "missing", f"optional; {source}")
    for module, symbol in (("optimizers", "FusedAdam"), ("normalization", "FusedLayerNorm")):
        if has_symbol(f"apex.{module}", symbol):
            if _spec("amp_C") is None:
                note = "NVIDIA's, built without its CUDA extensions (no amp_C)"
                return Finding(name, version, "not used", note)
            used = "--optim.optimizer apex" if symbol == "FusedAdam" else "nothing uses it"
            return Finding(name, version, "available", f"apex.{module}.{symbol}; {used}")
    # The unrelated one may raise too, where its own requirements are missing: look at the files.
    if any(
        (folder / part).exists()
        for folder in _folders(spec)
        for part in ("optimizers", "normalization")
    ):
        _, failure = _load("apex.optimizers")
        return Finding(name, version, "not used", failure or "no apex.optimizers.FusedAdam")
    note = (
        f"the installed 'apex' is not NVIDIA's (no apex.optimizers.FusedAdam); not used. {source}"
    )
    return Finding(name, version, "not used", note)


def flash_attn() -> Finding:
    """The flash-attention package, apart from the copy inside PyTorch."""
    return _by_symbol("flash-attn", "flash_attn", "flash_attn", "flash_attn_func", "optional")


def timm() -> Finding:
    """The timm model library."""
    if _spec("timm") is None:
        return Finding("timm", None, "missing", "optional: pip install 'stopfast[timm]'")
    return Finding("timm", _version("timm"), "available", "optional")


def report() -> list[Finding]:
    """Every finding; an examination that fails becomes a line of its own."""
    cuda = _torch_cuda()
    examinations: dict[str, Callable[[], Finding]] = {
        "python": python,
        "stopfast": stopfast,
        "operations": operations,
        "torch": torch,
        "triton": triton,
        "nvidia-dali": lambda: dali(cuda),
        "xformers": lambda: xformers(cuda),
        "apex": apex,
        "flash-attn": flash_attn,
        "timm": timm,
    }
    return [_guarded(name, examine) for name, examine in examinations.items()]


def main() -> None:
    """Print the report, one line for each item."""
    rows = [(f.name, f.version or "-", f.status, f.note) for f in report()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, note in rows:
        aligned = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{aligned}  {note}".rstrip())


def _guarded(name: str, examine: Callable[[], Finding]) -> Finding:
    try:
        return examine()
    except Exception as error:
        return Finding(name, None, "not used", f"could not be examined: {_one_line(error)}")


def _by_symbol(
    name: str, package: str, module: str, symbol: str, absent: str, use: str = "nothing uses it"
) -> Finding:
    if _spec(package) is None:
        return Finding(name, None, "missing", absent)
    loaded, failure = _load(module)
    if loaded is None or not hasattr(loaded, symbol):
        note = failure or f"the installed {package!r} has no {module}.{symbol}"
        return Finding(name, _version(name), "not used", note)
    return Finding(name, _version(name), "available", f"{module}.{symbol}; {use}")


def _load(module: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why: optional binaries raise anything at import, and print."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            return import_module(module), ""
    except (Exception, SystemExit) as error:
        return None, f"importing {module} raised {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _spec(package: str) -> ModuleSpec | None:
    """Where a top-level package lies, without importing it."""
    try:
        return find_spec(package)
    except (ImportError, ValueError):
        return None


def _folders(spec: ModuleSpec) -> list[Path]:
    return [Path(folder) for folder in spec.submodule_search_locations or ()]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _major(cuda: str | None) -> int | None:
    return int(cuda.split(".")[0]) if cuda else None


def _torch_cuda() -> str | None:
    loaded, _ = _load("torch")
    return getattr(getattr(loaded, "version", None), "cuda", None)


def _devices(loaded: ModuleType) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not loaded.cuda.is_available():
                return "no GPU found, so everything runs on the CPU"
            count = loaded.cuda.device_count()
            return f"{count} x {loaded.cuda.get_device_name(0)}"
        except Exception as error:
            return f"the GPU cannot be used: {_one_line(error)}"


def _xformers_build(spec: ModuleSpec) -> tuple[int | None, str] | None:
    """The CUDA major and the PyTorch that an installed xformers was built for."""
    for folder in _folders(spec):
        try:
            version = json.loads((folder / "cpp_lib.json").read_text(encoding="utf-8"))["version"]
            cuda = version["cuda"]
            return (None if cuda is None else int(cuda) // 100), str(version["torch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


if __name__ == "__main__":
    main()
