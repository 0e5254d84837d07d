"""Fused or eager is a value: a set of operations that is handed to the modules."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from stopfast.kernels import reference
from stopfast.kernels._measured import measured
from stopfast.kernels.arguments import (
    FAILURES_PER_TARGET,
    MASK_STREAM,
    AdamWBuffers,
    MaskSettings,
    Noise,
    Places,
)
from stopfast.kernels.noise import uniform

__all__ = [
    "AUTO", "EAGER", "FAILURES_PER_TARGET", "FUSED", "MASK_STREAM", "AdamWBuffers", "MaskSettings",
    "Noise", "Ops", "Places", "ops_on", "resolve_ops", "uniform",
]  # fmt: skip


class Ops(NamedTuple):
    """One implementation of each operation; :mod:`stopfast.kernels.reference` defines what it computes."""

    name: str
    predictor_tokens: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    layer_norm: Callable[..., tuple[Tensor, Tensor]]
    linear_gelu: Callable[..., Tensor]
    target_smooth_l1: Callable[..., Tensor]
    adamw_ema: Callable[..., None]
    multiblock_masks: Callable[..., tuple[Tensor, Tensor, Tensor]]


EAGER = Ops(
    name="eager",
    predictor_tokens=reference.predictor_tokens,
    attention=reference.attention,
    layer_norm=reference.layer_norm,
    linear_gelu=reference.linear_gelu,
    target_smooth_l1=reference.target_smooth_l1,
    adamw_ema=reference.adamw_ema,
    multiblock_masks=reference.multiblock_masks,
)


def _no_triton(*_: object, **__: object) -> NoReturn:
    raise ValueError(
        "expected Triton for ops=FUSED, which PyTorch's CUDA builds bring; use ops=EAGER"
    )


try:
    from stopfast.kernels.adamw_ema import adamw_ema
    from stopfast.kernels.attention_backends import attention_backend
    from stopfast.kernels.layer_norm import layer_norm
    from stopfast.kernels.linear_gelu import linear_gelu
    from stopfast.kernels.multiblock_masks import multiblock_masks
    from stopfast.kernels.predictor_tokens import predictor_tokens
    from stopfast.kernels.target_smooth_l1 import target_smooth_l1
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    attention_backend = _no_triton
    FUSED = Ops("fused", *[_no_triton] * (len(Ops._fields) - 1))
else:
    FUSED = EAGER._replace(
        name="fused",
        predictor_tokens=predictor_tokens,
        attention=attention_backend("triton"),
        layer_norm=layer_norm,
        linear_gelu=linear_gelu,
        target_smooth_l1=target_smooth_l1,
        adamw_ema=adamw_ema,
        multiblock_masks=multiblock_masks,
    )


def _automatic(name: str, first: object, *others: object, **named: object) -> Any:  # noqa: ANN401
    """Call the operation that is chosen for the device of its first argument."""
    tensor = first[0] if isinstance(first, tuple) else first
    assert isinstance(tensor, Tensor)
    return getattr(ops_on(AUTO, tensor.device), name)(first, *others, **named)


@torch.compiler.assume_constant_result
def _for_gpu(index: int | None) -> Ops:
    table = measured(torch.cuda.get_device_name(index))
    fast = {name: getattr(FUSED, name) for name in Ops._fields if table.get(name) is True}
    return EAGER._replace(
        **fast,
        name="auto",
        # The first two are on, measured or not, for their memory; nobody calls the third but by its name.
        predictor_tokens=FUSED.predictor_tokens,
        target_smooth_l1=FUSED.target_smooth_l1,
        adamw_ema=FUSED.adamw_ema,
        attention=attention_backend("auto"),
    )


AUTO = Ops("auto", *(partial(_automatic, name) for name in Ops._fields[1:]))
"""EAGER for tensors on the CPU; on a GPU, what its measured table says."""


def ops_on(ops: Ops, device: torch.device) -> Ops:
    """The operations that ``ops`` calls for tensors on a device: itself, or what AUTO chooses."""
    if ops.name != AUTO.name:
        return ops
    chosen = EAGER if device.type != "cuda" else _for_gpu(device.index)
    return chosen if ops.attention is AUTO.attention else chosen._replace(attention=ops.attention)


def resolve_ops(ops: Ops | str, attention: str = "auto") -> Ops:
    """Return the operations that ``ops`` names: ``"auto"``, ``"eager"`` or ``"fused"``.

    Args:
        ops: operations, or their name.
        attention: a backend that replaces theirs: ``"triton"``, ``"sdpa"``, ``"flex"``, ``"xformers"``;
            ``"auto"`` leaves theirs.

    Raises:
        ValueError: another name, or a backend that is not there.
    """
    named = {"auto": AUTO, "eager": EAGER, "fused": FUSED}
    if not isinstance(ops, Ops):
        if ops not in named:
            raise ValueError(f"ops: expected an Ops, 'auto', 'eager' or 'fused', got {ops!r}")
        ops = named[ops]
    return ops if attention == "auto" else ops._replace(attention=attention_backend(attention))
