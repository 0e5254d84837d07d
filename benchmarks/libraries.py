"""Libraries that compute what an operation computes, as opponents: apex, Liger, torch's own optimiser."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stopfast.kernels.ops import AdamWBuffers


def library_arms(operation: str) -> Iterator[tuple[str, Callable[..., object]]]:
    """The arms of an operation by name; one whose library is absent says so when it is called."""
    yield from {
        "layer_norm": [
            ("apex FusedLayerNorm", apex_layer_norm),
            ("Liger LayerNorm", liger_layer_norm),
        ],
        "adamw_ema": [
            ("torch fused AdamW, foreach EMA, copies", TorchUpdate()),
            ("apex FusedAdam, foreach EMA, copies", ApexUpdate()),
        ],
    }.get(operation, [])


def apex_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    norm = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return total, norm(total, weight, bias, weight.shape, eps)


def liger_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    function = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return total, function.apply(total, weight, bias, eps)


class TorchUpdate:
    """AdamW(fused=True), then the average and the copies by foreach, over the same flat buffers."""

    def __init__(self) -> None:
        self.optimizer: Any = None

    def build(self, parameter: torch.nn.Parameter, scalars: Tensor) -> Any:  # noqa: ANN401
        lr, decay, _, _, beta1, beta2, eps = scalars.tolist()
        return torch.optim.AdamW(
            [parameter], lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=True
        )

    def __call__(
        self,
        buffers: AdamWBuffers,
        scalars: Tensor,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        if self.optimizer is None:
            parameter = torch.nn.Parameter(buffers.param)
            parameter.grad = buffers.grad.to(buffers.param.dtype)
            self.optimizer = self.build(parameter, scalars)
            self.rest = 1 - float(scalars[2])
        self.optimizer.step()
        copies = [(buffers.param, buffers.param_copy)]
        if buffers.average is not None:
            torch._foreach_lerp_([buffers.average], [buffers.param], self.rest)  # type: ignore[attr-defined]
            copies.append((buffers.average, buffers.average_copy))
        for source, target in copies:
            if target is not None:
                torch._foreach_copy_([target], [source])  # type: ignore[attr-defined]


class ApexUpdate(TorchUpdate):
    """The same with NVIDIA apex's FusedAdam."""

    def build(self, parameter: torch.nn.Parameter, scalars: Tensor) -> Any:  # noqa: ANN401
        lr, decay, _, _, beta1, beta2, eps = scalars.tolist()
        fused_adam = import_module("apex.optimizers").FusedAdam
        return fused_adam(
            [parameter], lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, adam_w_mode=True
        )
