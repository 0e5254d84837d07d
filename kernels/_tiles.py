"""Tiles of kernels: those of a GPU's shipped table, of a trial, or the kernel's own heuristic.

:mod:`stopfast.kernels._measured` describes the table. A kernel asks for its tiles where it is launched,
inside a registered operation: nothing of this is traced by torch.compile.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from stopfast.kernels._measured import PATH, measured

Tiles = dict[str, int]

_WARPS, _STAGES = (1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 5)
_ROWS = (16, 32, 64, 128)  # of a matrix product; the smallest is Triton's
_LINES = (1, 2, 4, 8, 16, 32)  # of a pass over rows
_TOKENS = {
    "ROWS": _ROWS,
    "DEPTH": (16, 32, 64),
    "COLUMNS": (64, 128, 256),
    "TILES": (1, 2, 3, 4),
    "num_warps": _WARPS[2:5],
    "num_stages": _STAGES[:4],
}
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "attention_forward": {"ROWS": _ROWS, "num_warps": _WARPS[:4]},
    "attention_backward": {"ROWS": _ROWS, "num_warps": _WARPS[1:5], "num_stages": _STAGES[:3]},
    "layer_norm_forward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "layer_norm_backward": {
        "ROWS": _LINES,
        "num_warps": _WARPS[1:5],
        "programs": (128, 256, 512, 1024),
    },
    "linear_gelu_forward": {
        "ROWS": (64, 128, 256),
        "COLUMNS": (64, 128, 256),
        "DEPTH": (32, 64, 128),
        "num_warps": _WARPS[2:4],
        "num_stages": _STAGES[1:],
        "GROUP": (4, 8, 16),
    },
    "linear_gelu_backward": {
        "ROWS": (*_LINES, 64, 128),
        "COLUMNS": (64, 128, 256, 512),
        "num_warps": _WARPS[1:5],
        "programs": (256, 512, 1024, 2048),
    },
    "predictor_tokens_context": _TOKENS,
    "predictor_tokens_queries": _TOKENS,
    "predictor_tokens_noise_weight": {
        "ROWS": _ROWS[:3],
        "DEPTH": (16, 32, 64),
        "COLUMNS": (64, 128, 256, 512),
        "num_warps": _WARPS[2:5],
        "num_stages": _STAGES[:3],
    },
    "target_smooth_l1_forward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "target_smooth_l1_backward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "position_cross_entropy_forward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "position_cross_entropy_backward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "patch_mse_forward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "patch_mse_backward": {"ROWS": _LINES, "num_warps": _WARPS[:5]},
    "adamw_ema": {
        "BLOCK": (512, 1024, 2048, 4096),
        "BLOCKS": (1, 2, 4, 8, 16),
        "num_warps": _WARPS[1:5],
    },
}
"""What the tiles of each kernel may be: all that a table may hold, and all that a search tries."""


class Asked(NamedTuple):
    """One question for tiles."""

    kernel: str
    shapes: str
    heuristic: Tiles


class _Trial(NamedTuple):
    entries: Mapping[tuple[str, str], Tiles]
    asked: list[Asked]


# Backward runs in a thread of its own on a GPU, so a trial cannot be local to a thread.
_trials: list[_Trial] = []


@contextmanager
def trying(entries: Mapping[tuple[str, str], Tiles]) -> Iterator[list[Asked]]:
    """Launch kernels with these tiles, by kernel and class of shapes; collect what is asked for.

    Raises:
        ValueError: tiles that a table may not hold.
    """
    for (kernel, shapes), entry in entries.items():
        _check(f"tiles of {kernel} for {shapes!r}", kernel, entry)
    trial = _Trial(entries, [])
    _trials.append(trial)
    try:
        yield trial.asked
    finally:
        _trials[:] = [each for each in _trials if each is not trial]  # two may be equal


def shape_class(*dtypes: torch.dtype, **sizes: int | str) -> str:
    """What shapes that share tiles have in common, as a table names it: ``bf16 d32 k128``."""
    return " ".join([*map(_dtype_name, dtypes), *(f"{name}{size}" for name, size in sizes.items())])


def tiles(kernel: str, shapes: str, device: torch.device, heuristic: Tiles) -> Tiles:
    """Return how a kernel is cut at this launch, in the order of the heuristic's names.

    Raises:
        ValueError: an entry of this GPU's shipped table that is none.
    """
    found = heuristic
    if device.type == "cuda":
        found = _of_device(device.index).get((kernel, shapes), heuristic)
    for trial in _trials:
        trial.asked.append(Asked(kernel, shapes, heuristic))
        found = trial.entries.get((kernel, shapes), found)
    return {name: found[name] for name in heuristic}


def table_tiles(gpu: str) -> dict[tuple[str, str], Tiles]:
    """Return all tiles of a GPU's shipped table, by kernel and class of shapes.

    Raises:
        ValueError: an entry that is none.
    """
    found: dict[tuple[str, str], Tiles] = {}
    given = measured(gpu).get("tiles", {})
    for kernel, entries in given.items():
        for shapes, entry in entries.items():
            _check(f"{PATH}: tiles of {gpu!r}, {kernel}, {shapes!r}", kernel, entry)
            found[kernel, shapes] = entry
    return found


@functools.cache
def _of_device(index: int | None) -> dict[tuple[str, str], Tiles]:
    return table_tiles(torch.cuda.get_device_name(index))


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype))


def _check(where: str, kernel: str, entry: Any) -> None:  # noqa: ANN401
    allowed = CHOICES.get(kernel)
    if allowed is None:
        raise ValueError(f"{where}: expected one of {list(CHOICES)}")
    if not isinstance(entry, dict) or entry.keys() != allowed.keys():
        raise ValueError(f"{where}: expected {list(allowed)}, got {entry}")
    for name, value in entry.items():
        if type(value) is not int or value not in allowed[name]:
            raise ValueError(f"{where}: expected {name} of {allowed[name]}, got {value!r}")
