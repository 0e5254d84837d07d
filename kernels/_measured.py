"""What was measured on which GPU, and so what ``ops='auto'`` is there: the reader of measured.json.

The file maps the name of a GPU, as CUDA tells it, to the operations that were timed on it::

    {"NVIDIA H100 80GB HBM3": {
        "layer_norm": true,
        "attention": {"d32": [[128, "triton"], [256, "sdpa"]], "d32 padded": [[128, "triton"]]},
        "tiles": {"layer_norm_forward": {"fp32 bf16 c512": {"ROWS": 4, "num_warps": 4}}}
    }}

An operation is true where the fused one was at least as fast as its best alternative at every shape. For
attention, by head dim, each entry names the fastest backend for that many tokens or fewer; beyond the
last, and for other head dims, it is SDPA. Rows with padding have entries of their own, ``padded``, and
without any those of the head dim. Tiles are by kernel and class of shapes, with the names that the kernel's
own heuristic gives them, which serves where there are none; ``stopfast.kernels._tiles.CHOICES`` says
what they may be. The order in which a kernel adds follows its tiles, and so do the last bits of sums.

``python -m benchmarks tune`` writes the file.
"""

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "measured.json"


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return json.loads(PATH.read_text(encoding="utf-8"))


def measured(gpu: str) -> dict[str, Any]:
    """Return what is known of a GPU: nothing, where it was not measured."""
    return _tables().get(gpu, {})


def attention_entries(
    table: dict[str, Any], head_dim: int, padded: bool = False
) -> tuple[tuple[int, str], ...]:
    """Return (most tokens, backend) of a GPU's table, ascending."""
    by_head = table.get("attention", {})
    entries = by_head.get(f"d{head_dim}", [])
    if padded:
        entries = by_head.get(f"d{head_dim} padded", entries)
    return tuple((int(most), str(backend)) for most, backend in entries)


def attention_choice(
    table: dict[str, Any], head_dim: int, tokens: int, padded: bool = False
) -> str:
    """Return the fastest backend by a GPU's table."""
    entries = attention_entries(table, head_dim, padded)
    return next((backend for most, backend in entries if tokens <= most), "sdpa")
