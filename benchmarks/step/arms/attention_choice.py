"""Which of torch's attention kernels is fastest at a workload's shapes: an opponent gets its best."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.engine.clock import round_clock
from benchmarks.step.published_model import Attend, library_attention
from benchmarks.step.workload import Workload

_REPEATS = 20
_BATCHES = 8
"""A step's batch is repeated so often on a GPU: the kernels are to take longer than their launches."""


class Choice(NamedTuple):
    """A kernel of torch's and how it is called."""

    name: str
    backends: tuple[SDPBackend, ...]
    """By priority: what takes no bias gives way to the next."""
    attend: Attend

    def allowed(self) -> AbstractContextManager[object]:
        """Where torch uses these kernels alone."""
        return sdpa_kernel(list(self.backends), set_priority=True)


def contiguous_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention on copies of q, k and v, without which cuDNN plans anew for every length.

    It needs TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 beside them, and no bias.
    """
    q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v))
    return library_attention(q, k, v, bias)


def candidates(device: torch.device, padded: bool) -> list[Choice]:
    """Torch's kernels on a device; with padded keys they are given a bias."""
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    if device.type != "cuda":
        chosen = {"flash": (flash,), "math": (SDPBackend.MATH,)}
        return [Choice(name, backends, library_attention) for name, backends in chosen.items()]
    cudnn = SDPBackend.CUDNN_ATTENTION
    found = [
        Choice("cuDNN", (cudnn,), library_attention if padded else contiguous_attention),
        Choice("memory-efficient", (efficient,), library_attention),
    ]
    if not padded:
        return [*found, Choice("flash", (flash,), library_attention)]
    # Flash takes no bias, but the target encoder, the largest part, has none.
    return [
        *found,
        Choice("flash and cuDNN", (flash, cudnn), library_attention),
        Choice("flash and memory-efficient", (flash, efficient), library_attention),
    ]


def fastest_attention(workload: Workload, padded: tuple[int, int] | None = None) -> Choice:
    """Time forward and backward of a step's attention by each kernel and return the fastest.

    Args:
        workload: whose shapes; those of its first step.
        padded: lengths of context and target that keys are padded to, and kept out by a bias.

    Raises:
        RuntimeError: no kernel takes these shapes in this precision.
    """
    # Read by torch when it first calls cuDNN's attention, so before any of them is timed.
    os.environ.setdefault("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    timed: dict[Choice, float] = {}
    refused: list[str] = []
    for choice in candidates(workload.device, padded is not None):
        try:
            with warnings.catch_warnings(), choice.allowed():
                warnings.simplefilter("ignore")  # torch says at length why a kernel does not apply
                timed[choice] = _seconds(workload, choice.attend, padded)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            refused.append(f"{choice.name}: {error}")
    if not timed:
        raise RuntimeError(f"expected a kernel for attention, got none: {refused}")
    return min(timed, key=lambda choice: timed[choice])


def _seconds(workload: Workload, attend: Attend, padded: tuple[int, int] | None) -> float:
    clock, total = round_clock(workload.device), 0.0
    for depth, call in _calls(workload, attend, padded):
        for _ in range(5):
            call()
        begin = clock()
        for _ in range(_REPEATS):
            call()
        total += depth * (clock() - begin) / _REPEATS
    return total


def _calls(
    workload: Workload, attend: Attend, padded: tuple[int, int] | None
) -> Iterator[tuple[int, Callable[[], object]]]:
    """(number of blocks, one block's attention) of the three networks."""
    model, masks = workload.config.model, workload.masks_of(1)
    context, target = padded or (masks.context[0].shape[1], masks.target[0].shape[1])
    patches = workload.weights["encoder"]["pos_embed"].shape[1]
    heads = model.num_heads
    images = workload.images * (_BATCHES if workload.device.type == "cuda" else 1)
    wide, narrow = model.embed_dim // heads, model.predictor_embed_dim // heads
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32

    def call(sequences: int, tokens: int, head: int, trained: bool) -> Callable[[], object]:
        # Laid out as the packed projection leaves them.
        packed = torch.randn(
            sequences, tokens, 3, heads, head, dtype=dtype, device=workload.device
        ).requires_grad_(trained)
        bias = None
        if padded is not None and trained:
            bias = torch.zeros(1, 1, 1, tokens, dtype=dtype, device=workload.device)

        def run() -> object:
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = attend(q, k, v, bias)
            if not trained:
                return mixed
            return torch.autograd.grad(mixed, packed, torch.ones_like(mixed))

        return run

    yield model.depth, call(images, patches, wide, False)
    yield model.depth, call(images * len(masks.context), context, wide, True)
    sequences = images * len(masks.context) * len(masks.target)
    yield model.predictor_depth, call(sequences, context + target, narrow, True)
