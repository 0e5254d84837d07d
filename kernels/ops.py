"""Fused or eager is a value: a set of operations that is handed to the modules."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from stopfast.kernels import reference, reference_losses
from stopfast.kernels._measured import measured
from stopfast.kernels.arguments import (
    FAILURES_PER_TARGET,
    MASK_STREAM,
    AdamWBuffers,
    MaskSettings,
    Noise,
    PatchTarget,
    Places,
    Smoothing,
)
from stopfast.kernels.noise import positional_noise, uniform
from stopfast.kernels.reference_losses import position_map

__all__ = [
    "AUTO", "EAGER", "FAILURES_PER_TARGET", "FUSED", "MASK_STREAM", "AdamWBuffers", "MaskSettings",
    "Noise", "Ops", "PatchTarget", "Places", "Smoothing", "ops_on", "position_map", "positional_noise",
    "resolve_ops", "uniform",
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
    position_cross_entropy: Callable[..., Tensor]
    patch_mse: Callable[..., Tensor]


EAGER = Ops(
    name="eager",
    predictor_tokens=reference.predictor_tokens,
    attention=reference.attention,
    layer_norm=reference.layer_norm,
    linear_gelu=reference.linear_gelu,
    target_smooth_l1=reference.target_smooth_l1,
    adamw_ema=reference.adamw_ema,
    multiblock_masks=reference.multiblock_masks,
    position_cross_entropy=reference_losses.position_cross_entropy,
    patch_mse=reference_losses.patch_mse,
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
    from stopfast.kernels.patch_mse import patch_mse
    from stopfast.kernels.position_cross_entropy import position_cross_entropy
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
        position_cross_entropy=position_cross_entropy,
        patch_mse=patch_mse,
    )


def _automatic(name: str, first: object, *others: object, **named: object) -> Any:  # noqa: ANN401
    """Call the operation that is chosen for the device of its first argument."""
    tensor = first[0] if isinstance(first, tuple) else first
    assert isinstance(tensor, Tensor)
    if not _is_gpu(tensor.device):
        operation = getattr(EAGER, name)
    elif name == "attention":
        operation = attention_backend("auto")
    else:
        operation = getattr(FUSED if name in _fused_on(tensor.device.index) else EAGER, name)
    return operation(first, *others, **named)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


# The first two are on, measured or not, for their memory; nobody calls the third but by its name.
_ON = ("predictor_tokens", "target_smooth_l1", "adamw_ema")


@torch.compiler.assume_constant_result
def _fused_on(index: int | None) -> tuple[str, ...]:
    """Names: functions that come out of a constant cannot be called in compiled code."""
    table = measured(torch.cuda.get_device_name(index))
    return tuple(name for name in Ops._fields if name in _ON or table.get(name) is True)


def _for_gpu(index: int | None) -> Ops:
    fused = {name: getattr(FUSED, name) for name in _fused_on(index)}
    return EAGER._replace(**fused, name="auto", attention=attention_backend("auto"))


AUTO = Ops("auto", *(partial(_automatic, name) for name in Ops._fields[1:]))
"""EAGER for tensors on the CPU; on a GPU, what its measured table says."""


def ops_on(ops: Ops, device: torch.device) -> Ops:
    """The operations that ``ops`` calls for tensors on a device: itself, or what AUTO chooses."""
    if ops.name != AUTO.name:
        return ops
    chosen = _for_gpu(device.index) if _is_gpu(device) else EAGER
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
