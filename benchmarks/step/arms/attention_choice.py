"""Which of torch's attention kernels is fastest at a workload's shapes: an opponent gets its best."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.engine.clock import round_clock
from benchmarks.step.published_model import Attend, library_attention
from benchmarks.step.workload import Workload

_REPEATS = 20


class Choice(NamedTuple):
    """A kernel of torch's and how it is called."""

    name: str
    backend: SDPBackend
    attend: Attend


def contiguous_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention on copies of q, k and v, without which cuDNN plans anew for every length.

    It needs TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 beside them, and no bias.
    """
    q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v))
    return library_attention(q, k, v, bias)


def candidates(device: torch.device, padded: bool) -> list[Choice]:
    """Torch's kernels on a device; with padded keys they are given a bias."""
    flash = Choice("flash", SDPBackend.FLASH_ATTENTION, library_attention)
    if device.type != "cuda":
        return [flash, Choice("math", SDPBackend.MATH, library_attention)]
    cudnn = library_attention if padded else contiguous_attention
    return [
        Choice("cuDNN", SDPBackend.CUDNN_ATTENTION, cudnn),
        flash,
        Choice("memory-efficient", SDPBackend.EFFICIENT_ATTENTION, library_attention),
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
            with warnings.catch_warnings(), sdpa_kernel(choice.backend):
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
    heads, images = model.num_heads, workload.images
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
