"""What was measured on which GPU, and so what ``ops='auto'`` is there: the reader of measured.json.

The file maps the name of a GPU, as CUDA tells it, to the operations that were timed on it::

    {"NVIDIA H100 80GB HBM3": {
        "layer_norm": true,
        "attention": {"d32": [[128, "triton"], [256, "sdpa"]]}
    }}

An operation is true where the fused one was at least as fast as its best alternative at every shape. For
attention, by head dim, each entry names the fastest backend for that many tokens or fewer; beyond the
last, and for other head dims, it is SDPA.
"""

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


def measured(gpu: str) -> dict[str, Any]:
    """Return what is known of a GPU: nothing, where it was not measured."""
    return _tables().get(gpu, {})


def attention_entries(table: dict[str, Any], head_dim: int) -> tuple[tuple[int, str], ...]:
    """Return (most tokens, backend) of a GPU's table, ascending."""
    entries = table.get("attention", {}).get(f"d{head_dim}", [])
    return tuple((int(most), str(backend)) for most, backend in entries)


def attention_choice(table: dict[str, Any], head_dim: int, tokens: int) -> str:
    """Return the fastest backend by a GPU's table."""
    entries = attention_entries(table, head_dim)
    return next((backend for most, backend in entries if tokens <= most), "sdpa")
